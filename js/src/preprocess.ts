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

export const preprocessDefaults = { interpolation: "bicubic", crop_pct: 0.875, crop_mode: "center" } as const;

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
