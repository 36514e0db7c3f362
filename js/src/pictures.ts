/** Decodes pictures where there is a browser. */

import type { Picture } from "./bundle.js";

/** A picture of a file or a canvas, upright as its EXIF orientation says; what is transparent becomes black. */
export async function decodePicture(file: ImageBitmapSource): Promise<Picture> {
  const bitmap = await createImageBitmap(file, { imageOrientation: "from-image", colorSpaceConversion: "none" });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true })!;
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return { data: context.getImageData(0, 0, width, height).data, width, height };
}
