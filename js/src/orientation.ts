/** Which side of a picture is up: what its file says of it, read as Python reads it. */

import { ascii, blocksOf, EXIF, turnOfAvif, viewOf, type Block } from "./blocks.js";
import type { Picture } from "./bundle.js";
import { asStored, checkPixels } from "./deep.js";

export interface Orientation {
  /** EXIF's number, 1 to 8: 1 is upright, or says nothing. */
  orientation: number;
  /** The file in parts, without what a browser would turn it by, or show other pixels for. */
  parts: Uint8Array[];
  /** Whether a browser turns it so nevertheless. */
  turned: boolean;
}

const TAG = 274;
const WIDTHS: Record<number, 2 | 4> = { 3: 2, 4: 4 }; // a short, but some write a long
const IN_XMP = /tiff:Orientation(?:="|>)([1-8])/;
// The same picture again, turned back.
const BACK = [1, 1, 2, 3, 4, 5, 8, 7, 6];

/** What the metadata of a JPEG, PNG, WebP or AVIF say; of other files a browser knows as much. */
export async function orientationOf(bytes: Uint8Array): Promise<Orientation> {
  const turn = turnOfAvif(bytes);
  if (turn !== undefined) return { orientation: turn, parts: [bytes], turned: true };
  const blocks = blocksOf(bytes);
  const parts: Uint8Array[] = [];
  let kept = 0;
  for (const { part, instead, unsure } of blocks) {
    if (unsure) await checkPixels(unsure);
    if (!part) continue;
    parts.push(bytes.subarray(kept, part[0]));
    if (instead) parts.push(instead);
    kept = part[1];
  }
  parts.push(bytes.subarray(kept));
  return { orientation: await told(blocks), parts: await asStored(parts), turned: false };
}

/** EXIF before XMP; ImageMagick's text where there is no EXIF. */
async function told(blocks: Block[]): Promise<number> {
  const last = (kind: Block["kind"]) => blocks.filter((block) => block.kind === kind).at(-1);
  const [exif, profile] = [last("exif"), last("profile")];
  const found = exif ? inExif(exif.content!) : profile && inExif(await digitsOf(profile));
  if (found !== undefined) return found;
  for (const block of [last("xmp"), last("text")]) {
    const said = block && IN_XMP.exec(await textOf(block));
    if (said) return Number(said[1]);
  }
  return 1;
}

/** EXIF of lines of hexadecimal digits behind its name and length. */
async function digitsOf(profile: Block): Promise<Uint8Array> {
  const digits = (await textOf(profile)).trim().split(/\s+/).slice(2).join("");
  const pairs = digits.match(/[0-9a-f]{2}/gi) ?? [];
  return Uint8Array.from(pairs, (pair) => parseInt(pair, 16));
}

async function textOf({ content, deflated }: Block): Promise<string> {
  const bytes = content!;
  if (!deflated) return ascii(bytes, 0, bytes.length);
  const stream = new Blob([bytes.slice()]).stream().pipeThrough(new DecompressionStream("deflate"));
  const whole = await new Response(stream).arrayBuffer().catch(() => new ArrayBuffer(0)); // damaged: says nothing
  return ascii(new Uint8Array(whole), 0, whole.byteLength);
}

/** The orientation of an EXIF block; undefined if it has none. Some write its mark twice. */
function inExif(bytes: Uint8Array): number | undefined {
  const unmarked = (part: Uint8Array) => part.subarray(ascii(part, 0, EXIF.length) === EXIF ? EXIF.length : 0);
  const block = unmarked(unmarked(bytes));
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

/** The picture before it was turned as its orientation says, which it keeps. */
export function stored(turned: Picture): Picture {
  const { orientation = 1 } = turned;
  return { ...upright({ ...turned, orientation: BACK[orientation]! }), orientation };
}
