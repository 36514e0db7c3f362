/** The blocks of a picture's file that say which side is up, or by which a browser shows other pixels than Python. */

import { HhdeployError } from "./errors.js";

/** A part of a file. */
export interface Block {
  /** What its content is: EXIF, ImageMagick's text of it, or XMP, of which Python looks into `xmp` first. */
  kind?: "exif" | "profile" | "xmp" | "text";
  content?: Uint8Array;
  deflated?: boolean;
  /** What a browser must not see of the file; `instead` takes its place. */
  part?: [begin: number, end: number];
  instead?: Uint8Array;
  /** All parts of a PNG's pixels, of which one has another checksum. */
  unsure?: Uint8Array[];
}

export const EXIF = "Exif\0\0";
const MARK = new TextEncoder().encode(EXIF); // which a PNG leaves out
const JPEG_XMP = "http://ns.adobe.com/xap/1.0/\0";
// Texts of a PNG by their keys.
const TEXTS: Record<string, Block["kind"]> = {
  "Raw profile type exif": "profile",
  "XML:com.adobe.xmp": "text",
  xmp: "xmp",
};
const INDEXED = 3; // a PNG's colour type
const CHUNKS: Record<string, number> = { EXIF: 8, "XMP ": 4 }; // a WebP's flags for them
const ANIMATED = ["avis", "msf1"]; // an AVIF's brands
// EXIF's numbers for an AVIF's quarter turns to the left, by how it is mirrored then: not, from above, from the left.
const TURNS = [
  [1, 8, 3, 6],
  [4, 5, 2, 7],
  [2, 7, 4, 5],
];

/**
 * Those of a JPEG, PNG, WebP or GIF, in their order: of a kind the last one counts.
 *
 * Throws for a file that Python does not read, or that browsers show otherwise.
 */
export function blocksOf(bytes: Uint8Array): Block[] {
  if (bytes[0] === 0xff && bytes[1] === 0xd8) return [...inJpeg(bytes)];
  if (ascii(bytes, 1, 8) === "PNG\r\n\x1a\n") return [...inPng(bytes)];
  if (ascii(bytes, 0, 4) === "RIFF" && ascii(bytes, 8, 12) === "WEBP") return [...inWebp(bytes)];
  if (ascii(bytes, 0, 4) === "GIF8") return [...inGif(bytes)];
  if (ascii(bytes, 0, 2) === "BM") checkBmp(bytes);
  return [];
}

/** Segments before the first scan. EXIF goes on in further ones that begin as its first one does. */
function* inJpeg(bytes: Uint8Array): Generator<Block> {
  const view = viewOf(bytes);
  let exif: Uint8Array | undefined;
  for (let at = 2; at + 4 <= bytes.length; ) {
    const marker = bytes[at + 1]!;
    if (bytes[at] !== 0xff || marker === 0xff || marker === 0) {
      at += 1; // padding, or nothing that belongs there
      continue;
    }
    if (marker === 0xda || marker === 0xd9) return;
    if (marker >= 0xd0 && marker < 0xd8) {
      at += 2; // which has no length
      continue;
    }
    const end = at + 2 + view.getUint16(at + 2);
    const content = bytes.subarray(at + 4, end);
    if (marker === 0xe1) {
      if (ascii(content, 0, EXIF.length) === EXIF) {
        exif = exif ? concat([exif, content.subarray(EXIF.length)]) : content;
        yield { kind: "exif", content: exif };
      }
      if (ascii(content, 0, 5) === "Exif\0") yield { part: [at, end] }; // the sixth byte is no browser's business
      if (ascii(content, 0, JPEG_XMP.length) === JPEG_XMP) yield { kind: "xmp", content };
    }
    at = end;
  }
}

/**
 * Without the numbers of an animation a browser shows the picture for those who show none, as Python reads it; without
 * those of transparency it shows all colours. Python asks the pixels' chunks for no checksum, but zlib's stream in them,
 * and for no end behind them.
 */
function* inPng(bytes: Uint8Array): Generator<Block> {
  const view = viewOf(bytes);
  let pixels = false; // Python looks at the checksums before them
  let wrong = false;
  const packed: Uint8Array[] = [];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const end = at + 12 + view.getUint32(at); // its checksum's
    const type = ascii(bytes, at + 4, at + 8);
    const content = bytes.subarray(at + 8, end - 4);
    pixels ||= type === "IDAT";
    if (type === "IDAT") packed.push(content);
    if (end <= bytes.length && view.getUint32(end - 4) !== crc32(bytes.subarray(at + 4, end - 4))) {
      if (!pixels) {
        throw new HhdeployError(`expected a whole PNG, found one whose ${type} has another checksum. Save it again.`);
      }
      if (type === "IDAT") {
        wrong = true;
        yield { part: [at, end], instead: pngChunk(type, content) };
      }
    }
    if (type === "eXIf") yield { kind: "exif", content: concat([MARK, content]), part: [at, end] };
    else if (type === "acTL" || type === "tRNS") yield { part: [at, end] };
    else if (type === "PLTE" && bytes[25] === INDEXED) {
      yield { part: [at, end], instead: wholePalette(content, bytes[24]!) };
    } else if (type.endsWith("Xt")) yield* inText(type, content);
    at = end;
    if (type === "IEND") break;
    if (pixels && at === bytes.length) yield { part: [at, at], instead: pngChunk("IEND", new Uint8Array()) };
  }
  if (wrong) yield { unsure: packed };
}

/** Indices past a palette's end are black to Python, and to a browser anything. */
function wholePalette(colours: Uint8Array, depth: number): Uint8Array {
  const whole = new Uint8Array(Math.max(colours.length, 3 << depth));
  whole.set(colours);
  return pngChunk("PLTE", whole);
}

/** A chunk with its length and its checksum. */
export function pngChunk(type: string, content: Uint8Array): Uint8Array {
  const chunk = new Uint8Array(12 + content.length);
  viewOf(chunk).setUint32(0, content.length);
  chunk.set(new TextEncoder().encode(type), 4);
  chunk.set(content, 8);
  viewOf(chunk).setUint32(8 + content.length, crc32(chunk.subarray(4, 8 + content.length)));
  return chunk;
}

const REMAINDERS = Uint32Array.from({ length: 256 }, (_, crc) => {
  for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  return crc;
});

function crc32(bytes: Uint8Array): number {
  let crc = -1;
  for (const byte of bytes) crc = (crc >>> 8) ^ REMAINDERS[(crc ^ byte) & 0xff]!;
  return ~crc >>> 0;
}

/** tEXt is a key and a text, in zTXt it is deflated, and in iTXt it may be, behind two more texts. */
function* inText(type: string, content: Uint8Array): Generator<Block> {
  const behind = (from: number) => content.indexOf(0, from) + 1 || content.length;
  const text = behind(0);
  const kind = TEXTS[ascii(content, 0, text - 1)];
  if (!kind) return;
  if (type === "tEXt") yield { kind, content: content.subarray(text) };
  if (type === "zTXt") yield { kind, content: content.subarray(text + 1), deflated: true };
  if (type === "iTXt") {
    const said = { content: content.subarray(behind(behind(text + 2))), deflated: content[text] === 1 };
    yield { kind, ...said };
    if (kind === "text") yield { kind: "xmp", ...said };
  }
}

/**
 * Without a table of colours the indices are levels of grey to Python, and to a browser anything. Of the first picture no
 * index is transparent.
 *
 * Throws where that picture leaves a part of the whole out, which each fills in its own way.
 */
function* inGif(bytes: Uint8Array): Generator<Block> {
  const flags = bytes[10]!;
  const hasTable = (flags & 0x80) > 0;
  if (!hasTable) {
    const greys = Uint8Array.from({ length: 3 << 8 }, (_, i) => Math.floor(i / 3));
    yield { part: [10, 13], instead: concat([Uint8Array.of(flags | 0x87, bytes[11]!, bytes[12]!), greys]) };
  }
  let at = 13 + (hasTable ? 6 << (flags & 7) : 0);
  while (bytes[at] === 0x21) {
    // An extension: its kind, and parts behind their lengths.
    if (bytes[at + 1] === 0xf9) yield { part: [at + 3, at + 4], instead: Uint8Array.of(bytes[at + 3]! & ~1) };
    at += 2;
    while (bytes[at]) at += bytes[at]! + 1;
    at += 1;
  }
  if (bytes[at] === 0x2c && at + 9 <= bytes.length) checkFrame(viewOf(bytes), at + 1);
}

function checkFrame(view: DataView, at: number): void {
  const [width, height, left, top, columns, rows] = [6, 8, at, at + 2, at + 4, at + 6].map((i) => view.getUint16(i, true));
  if (left || top || columns! < width! || rows! < height!) {
    throw new HhdeployError(
      `expected a GIF that its first picture fills, found ${width} x ${height} pixels with one of ${columns} x ${rows} ` +
        `at (${left}, ${top}). Save it as a PNG.`,
    );
  }
}

/** Throws for runs of pixels, of which Python and browsers put some elsewhere, and for 16 bits, which they round otherwise. */
function checkBmp(bytes: Uint8Array): void {
  if (bytes.length < 34) return;
  const view = viewOf(bytes);
  const [header, coding, bits] = [view.getUint32(14, true), view.getUint32(30, true), view.getUint16(28, true)];
  const runs = coding === 1 || coding === 2;
  if (header >= 40 && (runs || bits === 16)) {
    const found = runs ? "found one of runs (RLE)" : "8 bits of each colour, found one of 16 bits a pixel";
    throw new HhdeployError(`expected a BMP with all its pixels, ${found}. Save it as a PNG.`);
  }
}

/**
 * The first chunk of each kind, if the file's header says that there is one. It stays, as the file's header counts its
 * bytes, but nobody reads one that begins with zeros.
 */
function* inWebp(bytes: Uint8Array): Generator<Block> {
  const view = viewOf(bytes);
  const whole = 8 + view.getUint32(4, true);
  const flags = ascii(bytes, 12, 16) === "VP8X" ? bytes[20]! : 0;
  const seen = new Set<string>();
  for (let at = 12; at + 8 <= bytes.length; ) {
    const [begin, end] = [at + 8, at + 8 + view.getUint32(at + 4, true)];
    const type = ascii(bytes, at, begin - 4);
    if (flags & (CHUNKS[type] ?? 0) && end <= whole && !seen.has(type)) {
      yield { kind: type === "EXIF" ? "exif" : "xmp", content: bytes.subarray(begin, end) };
      seen.add(type);
    }
    const zeros = bytes.subarray(begin, Math.min(begin + 10, end)).length;
    if (type === "EXIF") yield { part: [begin, begin + zeros], instead: new Uint8Array(zeros) };
    at = end + (end % 2);
  }
}

/**
 * EXIF's number for how any browser turns an AVIF; undefined of other files.
 *
 * Throws for one whose pixels browsers and Python take from different places.
 */
export function turnOfAvif(bytes: Uint8Array): number | undefined {
  if (ascii(bytes, 4, 8) !== "ftyp") return undefined;
  if (ANIMATED.includes(ascii(bytes, 8, 12))) {
    throw new HhdeployError(
      "expected a still picture, found an animated AVIF, which browsers show in other colours. Save one of its pictures.",
    );
  }
  const [angle, axis] = ["irot", "imir"].map((type) => only(type, bytes));
  return TURNS[axis === undefined ? 0 : 1 + (axis & 1)]![(angle ?? 0) & 3];
}

/** The byte of a property of an AVIF's one picture. */
function only(type: string, bytes: Uint8Array): number | undefined {
  let parts = boxes(bytes, "meta").map((meta) => meta.subarray(4)); // its version
  for (const inner of ["iprp", "ipco", type]) parts = parts.flatMap((part) => boxes(part, inner));
  if (parts.length > 1) {
    throw new HhdeployError(
      `expected an AVIF that says once how it is turned, found ${parts.length} times (${type}). Save it again.`,
    );
  }
  return parts[0]?.[0];
}

/** The contents of a type's boxes. */
function boxes(bytes: Uint8Array, type: string): Uint8Array[] {
  const found: Uint8Array[] = [];
  const view = viewOf(bytes);
  for (let at = 0; at + 8 <= bytes.length; ) {
    const size = view.getUint32(at) || bytes.length - at; // 0: to the end
    if (size < 8) break; // 1: larger than any picture's headers
    if (ascii(bytes, at + 4, at + 8) === type) found.push(bytes.subarray(at + 8, at + size));
    at += size;
  }
  return found;
}

export function concat(parts: Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}

export const viewOf = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
export const ascii = (bytes: Uint8Array, begin: number, end: number) =>
  new TextDecoder("latin1").decode(bytes.subarray(begin, end));
