/**
 * A PNG's pixels: of 16 bits of grey browsers drop the lower eight where Python rounds, of what is transparent their canvas
 * loses the colours, which Python takes as they are stored, and of damaged ones they show some.
 */

import { HhdeployError } from "./errors.js";
import { ascii, concat, pngChunk, viewOf } from "./blocks.js";

const [GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA] = [0, 2, 4, 6]; // a PNG's colour types
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

/** How the pixels are stored: levels, those that are no transparency, and the bytes of a level. */
interface Stored {
  levels: number;
  shown: number;
  size: number;
}

/** Of a PNG that a browser shows otherwise, by how it begins; undefined of any other file. */
function storedOtherwise(bytes: Uint8Array): Stored | undefined {
  if (ascii(bytes, 1, 8) !== "PNG\r\n\x1a\n") return undefined;
  const [depth, kind] = [bytes[24]!, bytes[25]!];
  if (kind === GREY && depth === 16) return { levels: 1, shown: 1, size: 2 };
  if (kind === GREY_ALPHA) return { levels: 2, shown: 1, size: depth >> 3 };
  if (kind === COLOUR_ALPHA) return { levels: 4, shown: 3, size: depth >> 3 };
  return undefined;
}

/**
 * The parts of a picture's file; of a PNG that a browser shows otherwise those of the same in 8 bits and without
 * transparency.
 *
 * Throws for one whose pixels are damaged.
 */
export async function asStored(parts: Uint8Array[]): Promise<Uint8Array[]> {
  const how = storedOtherwise(parts[0]!);
  return (how && (await rewritten(concat(parts), how))) ?? parts;
}

async function rewritten(bytes: Uint8Array, how: Stored): Promise<Uint8Array[] | undefined> {
  const view = viewOf(bytes);
  const parts = [bytes.subarray(0, 8)];
  const packed: Uint8Array[] = [];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 12 + view.getUint32(at);
    const type = ascii(bytes, at + 4, at + 8);
    const content = bytes.subarray(at + 8, end - 4);
    if (type === "IHDR") {
      const header = content.slice();
      header.set([8, how.shown === 1 ? GREY : COLOUR], 8);
      parts.push(pngChunk(type, header));
    } else if (type !== "IDAT") parts.push(bytes.subarray(at, end));
    else if (packed.push(content) === 1) parts.push(content); // its place
    at = end;
  }
  const [width, height] = [view.getUint32(16), view.getUint32(20)];
  const deep = await through(new DecompressionStream("deflate"), packed).catch(damaged);
  const levels = inEightBits(deep, bytes[28] ? sizesOfPasses(width, height) : [[width, height]], how);
  if (!levels) return undefined;
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

/**
 * Rows of 8 bits, without a filter and without transparency, of filtered rows; `sizes` are those of the passes. Undefined
 * where nothing is transparent: browsers show the colours as they are.
 *
 * Of grey alone 16 bits are rounded, as Python does; of others it takes the upper eight.
 */
function inEightBits(deep: Uint8Array, sizes: [number, number][], how: Stored): Uint8Array | undefined {
  const { levels, shown, size } = how;
  const each = levels * size;
  const total = (of: number) => sizes.reduce((sum, [columns, rows]) => sum + rows * (1 + of * columns), 0);
  if (deep.length < total(each)) damaged();
  const lines = unfiltered(deep, sizes, each);
  if (levels > shown && lines.every((line) => isOpaque(line, shown * size, each))) return undefined;
  const out = new Uint8Array(total(shown));
  let to = 0;
  for (const line of lines) {
    to += 1; // no filter
    for (let i = 0; i < line.length; i += each) {
      if (levels === 1) out[to++] = Math.round((line[i]! * 256 + line[i + 1]!) / 257);
      else for (let at = i; at < i + shown * size; at += size) out[to++] = line[at]!;
    }
  }
  return out;
}

function isOpaque(line: Uint8Array, shown: number, each: number): boolean {
  for (let i = 0; i < line.length; i += each) {
    for (let at = i + shown; at < i + each; at++) if (line[at] !== 255) return false;
  }
  return true;
}

/** All rows as they are, in place; `each`: bytes of a pixel. */
function unfiltered(deep: Uint8Array, sizes: [number, number][], each: number): Uint8Array[] {
  const lines: Uint8Array[] = [];
  let from = 0;
  for (const [columns, rows] of sizes) {
    let above: Uint8Array = new Uint8Array(each * columns);
    for (let row = 0; row < rows; row++) {
      const line = deep.subarray(from + 1, from + 1 + each * columns);
      unfilter(deep[from]!, line, above, each);
      lines.push(line);
      above = line;
      from += 1 + line.length;
    }
  }
  return lines;
}

/** What a filter left out of a row's bytes is told by those a pixel to the left, above, and both. */
function unfilter(filter: number, line: Uint8Array, above: Uint8Array, each: number): void {
  if (filter > 4) damaged();
  for (let i = 0; filter && i < line.length; i++) {
    const a = i < each ? 0 : line[i - each]!;
    const b = above[i]!;
    const c = i < each ? 0 : above[i - each]!;
    line[i]! += filter === 1 ? a : filter === 2 ? b : filter === 3 ? (a + b) >> 1 : nearest(a, b, c);
  }
}

/** Paeth's: whichever is nearest to a + b - c. */
function nearest(a: number, b: number, c: number): number {
  const toA = Math.abs(b - c);
  const toB = Math.abs(a - c);
  const toC = Math.abs(a + b - 2 * c);
  return toA <= toB && toA <= toC ? a : toB <= toC ? b : c;
}
