/** Reads safetensors: a length, a header in JSON, and the tensors' bytes, little-endian. */

import { HhdeployError } from "./errors.js";
import { isNone, isObject, isStrings, textOf } from "./json.js";

export interface Tensor {
  /** As the file has it: F32, F16 ... */
  dtype: string;
  shape: number[];
  /** float16 and bfloat16 are widened, which is exact; float64 is rounded. */
  data: Float32Array;
}

interface Described {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

const BYTES: Record<string, number> = { F64: 8, F32: 4, F16: 2, BF16: 2 };

/**
 * All tensors of a file.
 *
 * @param where names the file in messages.
 * @throws HhdeployError it is damaged, or a tensor is of another type than float64, float32,
 *   float16 or bfloat16.
 */
export function readSafetensors(bytes: Uint8Array, where: string): Map<string, Tensor> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.byteLength < 8 ? Infinity : Number(view.getBigUint64(0, true));
  if (8 + length > bytes.byteLength) {
    throw new HhdeployError(`${where}: expected safetensors, found ${bytes.byteLength} bytes of none.`);
  }
  let header: unknown;
  try {
    header = JSON.parse(textOf(bytes.subarray(8, 8 + length)));
  } catch (error) {
    throw new HhdeployError(`${where}: expected safetensors, found a header that is no JSON: ${(error as Error).message}.`);
  }
  const tensors = new Map<string, Tensor>();
  let position = 0; // one tensor follows the other, and nothing is between or behind them
  for (const [name, { dtype, shape, data_offsets: [begin, end] }] of described(header, where)) {
    const width = BYTES[dtype];
    if (width === undefined) {
      throw new HhdeployError(`${where}: ${name}: expected F64, F32, F16 or BF16, found ${dtype}.`);
    }
    const count = shape.reduce((a, b) => a * b, 1);
    if (begin !== position || end - begin !== count * width || 8 + length + end > bytes.byteLength) {
      throw new HhdeployError(`${where}: ${name}: its bytes are not those of [${shape}]: the file is damaged.`);
    }
    position = end;
    tensors.set(name, { dtype, shape, data: widened(view, 8 + length + begin, count, dtype) });
  }
  const behind = bytes.byteLength - 8 - length - position;
  if (behind) throw new HhdeployError(`${where}: expected its end, found ${behind} more bytes: the file is damaged.`);
  return tensors;
}

/** What a header says of its tensors, in the order of their bytes. */
function described(header: unknown, where: string): [string, Described][] {
  const { __metadata__: told, ...all } = Object(header) as Record<string, Partial<Described> | null>;
  if (!isNone(told) && !(isObject(told) && isStrings(Object.values(told)))) {
    throw new HhdeployError(`${where}: __metadata__: expected texts, found ${JSON.stringify(told)}: the file is damaged.`);
  }
  for (const [name, each] of Object.entries(all)) {
    const { dtype, shape, data_offsets: offsets } = each ?? {};
    if (typeof dtype !== "string" || !isCounts(shape) || !isCounts(offsets) || offsets.length !== 2) {
      throw new HhdeployError(
        `${where}: ${name}: expected dtype, shape and data_offsets, found ${JSON.stringify(each)}: the file is damaged.`,
      );
    }
  }
  const entries = Object.entries(all) as [string, Described][];
  return entries.sort(([, a], [, b]) => a.data_offsets[0] - b.data_offsets[0] || a.data_offsets[1] - b.data_offsets[1]);
}

function isCounts(x: unknown): x is number[] {
  return Array.isArray(x) && x.every((n) => Number.isSafeInteger(n) && n >= 0);
}

function widened(view: DataView, begin: number, count: number, dtype: string): Float32Array {
  const data = new Float32Array(count);
  if (dtype === "F32") {
    for (let i = 0; i < count; i++) data[i] = view.getFloat32(begin + 4 * i, true);
    return data;
  }
  if (dtype === "F64") {
    for (let i = 0; i < count; i++) data[i] = view.getFloat64(begin + 8 * i, true);
    return data;
  }
  const bits = new Uint32Array(data.buffer);
  for (let i = 0; i < count; i++) {
    const half = view.getUint16(begin + 2 * i, true);
    if (dtype === "BF16") bits[i] = half << 16;
    else data[i] = halfValue(half);
  }
  return data;
}

function halfValue(half: number): number {
  const sign = half & 0x8000 ? -1 : 1;
  const exponent = (half >> 10) & 31;
  const fraction = half & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent === 0
    ? sign * fraction * 2 ** -24
    : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}
