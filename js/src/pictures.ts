/** Decodes pictures where there is a browser. */

import type { Picture } from "./bundle.js";
import { HhdeployError } from "./errors.js";
import { orientationOf, stored } from "./orientation.js";

/**
 * A picture of a file or a canvas; what is transparent becomes black, but for a PNG's or a GIF's colours.
 *
 * A JPEG, PNG, WebP or AVIF comes as it is stored, with its orientation: which adapters see it upright, they say
 * themselves. Any other file is turned as the browser turns it.
 *
 * Throws `HhdeployError` for what the browser can not read, and for a picture that it would show otherwise than Python
 * reads it: an animated AVIF, one that is too large for the browser's canvas.
 */
export async function decodePicture(file: ImageBitmapSource): Promise<Picture> {
  const bytes = file instanceof Blob ? new Uint8Array(await file.arrayBuffer()) : undefined;
  const found = bytes && (await orientationOf(bytes));
  const source = found ? new Blob(found.parts as BlobPart[], { type: (file as Blob).type }) : file;
  const bitmap = await createImageBitmap(source, { imageOrientation: "from-image", colorSpaceConversion: "none" }).catch(unread);
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true })!;
  checkCanvas(context);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const picture = { data: context.getImageData(0, 0, width, height).data, width, height, orientation: found?.orientation ?? 1 };
  return found?.turned ? stored(picture) : picture;
}

function unread(): never {
  throw new HhdeployError(
    "expected a picture that this browser can read, found none: JPEG, PNG and WebP are read everywhere.",
  );
}

/** A canvas that is too large stays empty, and says nothing. */
function checkCanvas(context: OffscreenCanvasRenderingContext2D): void {
  const { width, height } = context.canvas;
  const last = [width - 1, height - 1, 1, 1] as const;
  context.fillRect(...last);
  if (context.getImageData(...last).data[3] !== 255) {
    throw new HhdeployError(
      `expected a picture that this browser's canvas holds, found ${width} x ${height} pixels. Save it smaller.`,
    );
  }
  context.clearRect(...last);
}
