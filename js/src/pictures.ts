/** Decodes pictures where there is a browser. */

import type { Picture } from "./bundle.js";
import { orientationOf } from "./orientation.js";

/**
 * A picture of a file or a canvas; what is transparent becomes black.
 *
 * A JPEG, PNG or WebP comes as it is stored, with its orientation: which adapters see it upright, they say themselves.
 * Any other file is turned as the browser turns it.
 */
export async function decodePicture(file: ImageBitmapSource): Promise<Picture> {
  const { orientation, parts } =
    file instanceof Blob ? await orientationOf(new Uint8Array(await file.arrayBuffer())) : { orientation: 1, parts: [] };
  const stored = file instanceof Blob ? new Blob(parts as BlobPart[], { type: file.type }) : file;
  const bitmap = await createImageBitmap(stored, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true })!;
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: context.getImageData(0, 0, width, height).data, width, height, orientation };
}
