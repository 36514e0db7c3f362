/** Which side of a picture is up: what its file says of it, read as Python reads it. */

import type { Picture } from "./bundle.js";

/** A file's blocks of metadata: each begins and ends somewhere in it. */
interface Block {
  kind: "exif" | "xmp" | "profile";
  begin: number;
  end: number;
  deflated?: boolean;
  /** The file's part by which a browser may turn the picture itself; `blank`: zeros take its place. */
  part?: [begin: number, end: number];
  blank?: boolean;
}

export interface Orientation {
  /** EXIF's number, 1 to 8: 1 is upright, or says nothing. */
  orientation: number;
  /** The file in parts, without what a browser would turn it by. */
  parts: Uint8Array[];
}

const TAG = 274;
const WIDTHS: Record<number, 2 | 4> = { 3: 2, 4: 4 }; // a short, but some write a long
const IN_XMP = /tiff:Orientation(?:="|>)([1-8])/;
const EXIF = "Exif\0\0";
const JPEG_XMP = "http://ns.adobe.com/xap/1.0/\0";
// Texts of a PNG by their keys; the first is ImageMagick's.
const TEXTS: Record<string, "profile" | "xmp"> = {
  "Raw profile type exif": "profile",
  "XML:com.adobe.xmp": "xmp",
  xmp: "xmp",
};

/** What the metadata of a JPEG, PNG or WebP say; of other files a browser knows as much. */
export async function orientationOf(bytes: Uint8Array): Promise<Orientation> {
  const blocks = [...blocksOf(bytes)];
  const parts: Uint8Array[] = [];
  let kept = 0;
  for (const { part, blank } of blocks) {
    if (!part) continue;
    parts.push(bytes.subarray(kept, part[0]));
    if (blank) parts.push(new Uint8Array(bytes.subarray(...part).length));
    kept = part[1];
  }
  parts.push(bytes.subarray(kept));
  return { orientation: await told(bytes, blocks), parts };
}

/** EXIF before XMP; ImageMagick's text where there is no EXIF. */
async function told(bytes: Uint8Array, blocks: Block[]): Promise<number> {
  const exif = blocks.find(({ kind }) => kind === "exif");
  const found = exif ? inExif(bytes.subarray(exif.begin, exif.end)) : await inProfile(bytes, blocks);
  if (found !== undefined) return found;
  for (const block of blocks) {
    const said = block.kind === "xmp" && IN_XMP.exec(await textOf(bytes, block));
    if (said) return Number(said[1]);
  }
  return 1;
}

/** EXIF as lines of hexadecimal digits behind its name and length. */
async function inProfile(bytes: Uint8Array, blocks: Block[]): Promise<number | undefined> {
  const block = blocks.find(({ kind }) => kind === "profile");
  if (!block) return undefined;
  const digits = (await textOf(bytes, block)).trim().split(/\s+/).slice(2).join("");
  const pairs = digits.match(/[0-9a-f]{2}/gi) ?? [];
  return inExif(Uint8Array.from(pairs, (pair) => parseInt(pair, 16)));
}

async function textOf(bytes: Uint8Array, { begin, end, deflated }: Block): Promise<string> {
  if (!deflated) return ascii(bytes, begin, end);
  const stream = new Blob([bytes.slice(begin, end)]).stream().pipeThrough(new DecompressionStream("deflate"));
  const whole = await new Response(stream).arrayBuffer().catch(() => new ArrayBuffer(0)); // damaged: says nothing
  return ascii(new Uint8Array(whole), 0, whole.byteLength);
}

/** The orientation of an EXIF block; undefined if it has none. */
function inExif(bytes: Uint8Array): number | undefined {
  const block = bytes.subarray(ascii(bytes, 0, EXIF.length) === EXIF ? EXIF.length : 0);
  const order = ascii(block, 0, 4);
  if (order !== "II*\0" && order !== "MM\0*") return undefined;
  const little = order === "II*\0";
  const view = viewOf(block);
  try {
    const at = view.getUint32(4, little);
    const entries = view.getUint16(at, little);
    for (let entry = at + 2; entry < at + 2 + 12 * entries; entry += 12) {
      const width = WIDTHS[view.getUint16(entry + 2, little)];
      if (view.getUint16(entry, little) === TAG && width && view.getUint32(entry + 4, little) === 1) {
        return width === 2 ? view.getUint16(entry + 8, little) : view.getUint32(entry + 8, little);
      }
    }
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // it ends early
  }
  return undefined;
}

function blocksOf(bytes: Uint8Array): Iterable<Block> {
  if (bytes[0] === 0xff && bytes[1] === 0xd8) return inJpeg(bytes);
  if (ascii(bytes, 1, 8) === "PNG\r\n\x1a\n") return inPng(bytes);
  if (ascii(bytes, 0, 4) === "RIFF" && ascii(bytes, 8, 12) === "WEBP") return inWebp(bytes);
  return [];
}

/** Segments before the first scan. */
function* inJpeg(bytes: Uint8Array): Generator<Block> {
  const view = viewOf(bytes);
  for (let at = 2; at + 4 <= bytes.length && bytes[at] === 0xff; ) {
    const marker = bytes[at + 1]!;
    if (marker === 0xda || marker === 0xd9) return;
    if (marker === 0xff) {
      at += 1; // it may be padded
      continue;
    }
    const [begin, end] = [at + 4, at + 2 + view.getUint16(at + 2)];
    if (marker === 0xe1) {
      if (ascii(bytes, begin, begin + EXIF.length) === EXIF) yield { kind: "exif", begin, end, part: [at, end] };
      if (ascii(bytes, begin, begin + JPEG_XMP.length) === JPEG_XMP) yield { kind: "xmp", begin, end };
    }
    at = end;
  }
}

function* inPng(bytes: Uint8Array): Generator<Block> {
  const view = viewOf(bytes);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const [begin, end] = [at + 8, at + 8 + view.getUint32(at)];
    const type = ascii(bytes, at + 4, begin);
    if (type === "eXIf") yield { kind: "exif", begin, end, part: [at, end + 4] };
    else if (type.endsWith("Xt")) yield* inText(bytes, type, begin, end);
    at = end + 4; // its checksum
  }
}

/** tEXt is a key and a text, in zTXt it is deflated, and in iTXt it may be, behind two more texts. */
function* inText(bytes: Uint8Array, type: string, begin: number, end: number): Generator<Block> {
  const behind = (from: number) => bytes.indexOf(0, from) + 1 || end;
  const text = behind(begin);
  const kind = TEXTS[ascii(bytes, begin, text - 1)];
  if (!kind) return;
  if (type === "tEXt") yield { kind, begin: text, end };
  if (type === "zTXt") yield { kind, begin: text + 1, end, deflated: true };
  if (type === "iTXt") yield { kind, begin: behind(behind(text + 2)), end, deflated: bytes[text] === 1 };
}

/** A chunk stays, as the file's header counts its bytes, but nobody reads one that begins with zeros. */
function* inWebp(bytes: Uint8Array): Generator<Block> {
  const view = viewOf(bytes);
  for (let at = 12; at + 8 <= bytes.length; ) {
    const [begin, end] = [at + 8, at + 8 + view.getUint32(at + 4, true)];
    const type = ascii(bytes, at, at + 4);
    if (type === "EXIF") yield { kind: "exif", begin, end, part: [begin, Math.min(begin + 10, end)], blank: true };
    if (type === "XMP ") yield { kind: "xmp", begin, end };
    at = end + (end % 2);
  }
}

/** A picture turned as its orientation says. */
export function upright(picture: Picture): Picture {
  const { data, width, height, orientation = 1 } = picture;
  if (!(orientation > 1 && orientation <= 8)) return picture;
  const turned = orientation > 4; // its rows are columns
  const fromRight = [2, 3, 7, 8].includes(orientation);
  const fromBelow = [3, 4, 6, 7].includes(orientation);
  const each = data.length / (width * height);
  const out = new Uint8Array(data.length);
  const size = turned ? { width: height, height: width } : { width, height };
  for (let y = 0, to = 0; y < size.height; y++) {
    for (let x = 0; x < size.width; x++) {
      const [row, column] = turned ? [x, y] : [y, x];
      const from = (fromBelow ? height - 1 - row : row) * width + (fromRight ? width - 1 - column : column);
      for (let c = 0; c < each; c++) out[to++] = data[each * from + c]!;
    }
  }
  return { data: out, ...size };
}

const viewOf = (bytes: Uint8Array) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
const ascii = (bytes: Uint8Array, begin: number, end: number) => new TextDecoder("latin1").decode(bytes.subarray(begin, end));
