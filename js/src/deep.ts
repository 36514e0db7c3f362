/** A PNG's pixels: those of 16 bits of grey, of which browsers drop the lower eight where Python rounds, and damaged ones. */

import { HhdeployError } from "./errors.js";
import { ascii, pngChunk, viewOf } from "./blocks.js";

const GREY = 0; // a PNG's colour type
// Where the pixels of each pass of an interlaced picture begin, and how far they are apart.
const PASSES = [
  [0, 0, 8, 8],
  [4, 0, 8, 8],
  [0, 4, 4, 8],
  [2, 0, 4, 4],
  [0, 2, 2, 4],
  [1, 0, 2, 2],
  [0, 1, 1, 2],
] as const;

export const isDeepGrey = (bytes: Uint8Array) =>
  ascii(bytes, 1, 8) === "PNG\r\n\x1a\n" && bytes[24] === 16 && bytes[25] === GREY;

/**
 * The same PNG in 8 bits, each level rounded.
 *
 * Throws for one whose pixels are damaged.
 */
export async function inEightBits(bytes: Uint8Array): Promise<Uint8Array[]> {
  const view = viewOf(bytes);
  const parts = [bytes.subarray(0, 8)];
  const packed: Uint8Array[] = [];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 12 + view.getUint32(at);
    const type = ascii(bytes, at + 4, at + 8);
    const content = bytes.subarray(at + 8, end - 4);
    if (type === "IHDR") parts.push(pngChunk(type, Uint8Array.from(content, (byte, i) => (i === 8 ? 8 : byte))));
    else if (type !== "IDAT") parts.push(bytes.subarray(at, end));
    else if (packed.push(content) === 1) parts.push(content); // its place
    at = end;
  }
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const deep = await through(new DecompressionStream("deflate"), packed).catch(damaged);
  const levels = rounded(deep, bytes[28] ? sizesOfPasses(width, height) : [[width, height]]);
  const place = parts.indexOf(packed[0]!);
  parts[place] = pngChunk("IDAT", await through(new CompressionStream("deflate"), [levels]));
  return parts;
}

/** Throws for a PNG's pixels whose stream has another checksum than zlib's, or is none. */
export async function checkPixels(packed: Uint8Array[]): Promise<void> {
  const stream = new Blob(packed as BlobPart[]).stream().pipeThrough(new DecompressionStream("deflate"));
  await stream.pipeTo(new WritableStream()).catch(damaged);
}

function damaged(): never {
  throw new HhdeployError("expected a whole PNG, found one whose pixels are damaged. Save it again.");
}

async function through(stream: CompressionStream | DecompressionStream, parts: Uint8Array[]): Promise<Uint8Array> {
  const passed = new Blob(parts as BlobPart[]).stream().pipeThrough(stream);
  return new Uint8Array(await new Response(passed).arrayBuffer());
}

function sizesOfPasses(width: number, height: number): [number, number][] {
  const sizes = PASSES.map(([x, y, right, down]): [number, number] => [
    Math.ceil((width - x) / right),
    Math.ceil((height - y) / down),
  ]);
  return sizes.filter(([columns, rows]) => columns > 0 && rows > 0);
}

/** Rows of 8 bits, without a filter, of filtered rows of 16; `sizes` are those of the passes. */
function rounded(deep: Uint8Array, sizes: [number, number][]): Uint8Array {
  const total = (each: number) => sizes.reduce((sum, [columns, rows]) => sum + rows * (1 + each * columns), 0);
  if (deep.length < total(2)) damaged();
  const out = new Uint8Array(total(1));
  let [from, to] = [0, 0];
  for (const [columns, rows] of sizes) {
    let above: Uint8Array = new Uint8Array(2 * columns);
    for (let row = 0; row < rows; row++) {
      const line = deep.subarray(from + 1, from + 1 + 2 * columns);
      unfilter(deep[from]!, line, above);
      to += 1; // no filter
      for (let i = 0; i < line.length; i += 2) out[to++] = Math.round((line[i]! * 256 + line[i + 1]!) / 257);
      above = line;
      from += 1 + line.length;
    }
  }
  return out;
}

/** Bytes of a row as they are, in place: what a filter left out is told by those two to the left, above, and both. */
function unfilter(filter: number, line: Uint8Array, above: Uint8Array): void {
  if (filter > 4) damaged();
  for (let i = 0; filter && i < line.length; i++) {
    const [a, b, c] = i < 2 ? [0, above[i]!, 0] : [line[i - 2]!, above[i]!, above[i - 2]!];
    line[i]! += filter === 1 ? a : filter === 2 ? b : filter === 3 ? (a + b) >> 1 : nearest(a, b, c);
  }
}

/** Paeth's: whichever is nearest to a + b - c. */
function nearest(a: number, b: number, c: number): number {
  const [toA, toB, toC] = [Math.abs(b - c), Math.abs(a - c), Math.abs(a + b - 2 * c)];
  return toA <= toB && toA <= toC ? a : toB <= toC ? b : c;
}
