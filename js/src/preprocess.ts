/** How pictures become a model's input, as adapters and manifests say it. */

import { HhdeployError } from "./errors.js";
import { expecting, isCount, isNone, isNumbers, isObject, type Json } from "./json.js";

export interface Preprocess {
  input_size: [number, number, number];
  exif?: boolean;
}

/** What is absent is as `preprocessDefaults` has it. */
export interface AdapterPreprocess extends Preprocess {
  mean: number[];
  std: number[];
  interpolation?: string;
  crop_pct?: number;
  crop_mode?: string;
}

/** What a preprocessing graph takes beside the picture. */
export interface PreprocessGraph {
  file: string;
  inputs: Record<string, { dtype: "float32" | "int64"; value: number[] }>;
}

export const preprocessDefaults = { interpolation: "bicubic", crop_pct: 0.875, crop_mode: "center" } as const;

// Pixels, as Python's `_MOST_RESIZED`.
const MOST_RESIZED = 1 << 28;
const KEYS = ["input_size", "mean", "std", ...Object.keys(preprocessDefaults), "exif"];
const FILTERS = ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"];
const CROP_MODES = ["center", "squash", "border"];

/**
 * Throws where a transform can not be; none is as the backbone's.
 *
 * @param imgSize what the model was made for, if that is said.
 * @param where names the file in messages, `prefix` the object in it.
 */
export function checkPreprocess(given: unknown, imgSize: unknown, where: string, prefix = ""): void {
  if (isNone(given)) return;
  const own: Json = { ...preprocessDefaults, exif: false, ...(isObject(given) ? given : {}) };
  const missing = ["input_size", "mean", "std"].filter((key) => own[key] === undefined);
  if (missing.length) throw new HhdeployError(`${where}: ${prefix}preprocess lacks ${missing.join(", ")}.`);
  const unknown = Object.keys(own).filter((key) => !KEYS.includes(key));
  if (unknown.length) {
    throw new HhdeployError(`${where}: ${prefix}preprocess: expected keys among ${KEYS.join(", ")}, found ${unknown.join(", ")}.`);
  }
  const { input_size: size, mean, std, crop_pct: share } = own;
  const expect = expecting(own, where, `${prefix}preprocess.`);
  expect("input_size", isNumbers(size, 3) && size.every((n) => isCount(n) && n > 0), "[channels, H, W]");
  const [channels, ...sides] = size as number[];
  expect("mean", isNumbers(mean, channels!), `${channels} finite numbers (a channel each)`);
  const positive = isNumbers(std, channels!) && std.every((x) => x > 0);
  expect("std", positive, `${channels} finite, positive numbers (a channel each)`);
  expect("interpolation", FILTERS.includes(own.interpolation as string), `one of ${FILTERS.join(", ")}`);
  expect("crop_mode", CROP_MODES.includes(own.crop_mode as string), `one of ${CROP_MODES.join(", ")}`);
  expect("crop_pct", typeof share === "number" && share > 0 && share <= 2, "a number in (0, 2]");
  expect("exif", typeof own.exif === "boolean", "true or false");
  const made = Array.isArray(imgSize) ? imgSize : [imgSize, imgSize];
  if (!isNone(imgSize) && String(made) !== String(sides)) {
    throw new HhdeployError(
      `${where}: the image sizes disagree: base_model_args.img_size is ${imgSize}, preprocess.input_size is [${size}].`,
    );
  }
}

/** The graph among a bundle's files that does a transform, and its numbers; undefined where there is none. */
export function graphFor(given: AdapterPreprocess, files: object): PreprocessGraph | undefined {
  const own = { ...preprocessDefaults, ...given };
  const role = new RegExp(`^preprocess\\.${own.crop_mode}\\.${own.interpolation}(\\.[0-9a-f]{8})?\\.onnx$`);
  const file = Object.keys(files).find((name) => role.test(name));
  if (file === undefined) return undefined;
  const [, height, width] = own.input_size;
  const fill = own.mean.map((m) => (own.crop_mode === "border" ? halfEven(255 * m) : 0));
  const float32 = (value: number[]) => ({ dtype: "float32" as const, value });
  const int64 = (value: number[]) => ({ dtype: "int64" as const, value });
  const inputs = {
    mean: float32(own.mean),
    std: float32(own.std),
    resize: int64([Math.floor(height / own.crop_pct), Math.floor(width / own.crop_pct)]),
    crop: int64([height, width]),
    fill: float32(fill),
  };
  return { file, inputs };
}

/** Throws for a picture that a graph would resize to more pixels than Python makes, of which its crop keeps a few. */
export function checkResized({ file, inputs }: PreprocessGraph, width: number, height: number): void {
  const mode = file.split(".")[1];
  if (mode === "squash") return; // to the same size, whatever the picture's is
  const [rows, columns] = inputs["resize"]!.value as [number, number];
  const ratios = [height / rows, width / columns];
  const ratio = mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
  const exact = mode === "center" && rows === columns; // the longer side is cut off then
  const [across, down] = [width, height].map((side) => Math.max(1, (exact ? Math.floor : Math.round)(side / ratio))) as [number, number];
  if (across * down > MOST_RESIZED) {
    throw new HhdeployError(
      `a picture of ${width} x ${height} pixels: its shorter edge as long as the model wants it makes ${across} x ${down} ` +
        "of it. Cut it first.",
    );
  }
}

/** Throws where a graph and its numbers are not those of the transform beside it, which Python goes by; none is fine. */
export function checkGraph(given: unknown, own: AdapterPreprocess, files: object, where: string, prefix: string): void {
  if (isNone(given)) return;
  const { file, inputs } = graphFor(own, files) ?? { file: null, inputs: {} };
  const found = isObject(given) ? given : {};
  const numbers = isObject(found.inputs) ? found.inputs : {};
  expecting(found, where, `${prefix}preprocess_graph.`)("file", found.file === file, `${file}, as its preprocess has it`);
  for (const name of Object.keys({ ...inputs, ...numbers })) {
    const expected: unknown = Object.hasOwn(inputs, name) ? (inputs as Json)[name] : undefined;
    const expect = expecting(numbers, where, `${prefix}preprocess_graph.inputs.`);
    expect(name, same(numbers[name], expected), `${JSON.stringify(expected)}, as its preprocess has it`);
  }
}

function same(found: unknown, expected: unknown): boolean {
  if (!isObject(found) || !isObject(expected)) return found === expected;
  return found.dtype === expected.dtype && JSON.stringify(found.value) === JSON.stringify(expected.value);
}

/** As Python rounds. */
function halfEven(x: number): number {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}
