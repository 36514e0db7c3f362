/** Reads safetensors: a length, a header in JSON, and the tensors' bytes, little-endian. */

import { HhdeployError } from "./errors.js";

export interface Tensor {
  shape: number[];
  /** float16 and bfloat16 are widened, which is exact. */
  data: Float32Array;
}

interface Described {
  dtype: string;
  shape: number[];
  data_offsets: [number, number];
}

const BYTES: Record<string, number> = { F32: 4, F16: 2, BF16: 2 };

/**
 * All tensors of a file.
 *
 * @param where names the file in messages.
 * @throws HhdeployError it is damaged, or a tensor is of another type than float32, float16 or
 *   bfloat16.
 */
export function readSafetensors(bytes: Uint8Array, where: string): Map<string, Tensor> {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = bytes.byteLength < 8 ? Infinity : Number(view.getBigUint64(0, true));
  if (8 + length > bytes.byteLength) {
    throw new HhdeployError(`${where}: expected safetensors, found ${bytes.byteLength} bytes of none.`);
  }
  let header: Record<string, Described>;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, 8 + length)));
  } catch (error) {
    throw new HhdeployError(`${where}: expected safetensors, found a header that is no JSON: ${error}`);
  }
  const tensors = new Map<string, Tensor>();
  for (const [name, described] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const { dtype, shape, data_offsets: [begin, end] } = described;
    const width = BYTES[dtype];
    if (width === undefined) {
      throw new HhdeployError(`${where}: ${name}: expected F32, F16 or BF16, found ${dtype}.`);
    }
    const count = shape.reduce((a, b) => a * b, 1);
    if (end - begin !== count * width || 8 + length + end > bytes.byteLength || begin < 0) {
      throw new HhdeployError(`${where}: ${name}: its bytes are not those of [${shape}]: the file is damaged.`);
    }
    tensors.set(name, { shape, data: widened(view, 8 + length + begin, count, dtype) });
  }
  return tensors;
}

function widened(view: DataView, begin: number, count: number, dtype: string): Float32Array {
  const data = new Float32Array(count);
  if (dtype === "F32") {
    for (let i = 0; i < count; i++) data[i] = view.getFloat32(begin + 4 * i, true);
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
