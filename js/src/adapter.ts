/** An adapter directory: adapter_config.json and adapter_model.safetensors. */

import { HhdeployError } from "./errors.js";
import type { Preprocess, ProblemType } from "./manifest.js";
import { readSafetensors, type Tensor } from "./safetensors.js";
import type { Source } from "./source.js";

export interface AdapterConfig {
  peft_type: string;
  schema_version: number;
  base_model_name_or_path: string;
  base_sha256?: string | null;
  form: "additive" | "sequential";
  reflection?: "unnormalized" | "orthogonal";
  target_modules: string[] | string;
  num_classes?: number | null;
  class_names?: string[] | null;
  problem_type?: ProblemType;
  fold_only?: boolean;
  preprocess?: AdapterPreprocess | null;
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

/** What an adapter does at one site; see docs/formats.md of hhdeploy. */
export interface SiteTensors {
  u?: Tensor;
  v?: Tensor;
  d?: Tensor;
  lora_A?: Tensor;
  lora_B?: Tensor;
  s_in?: Tensor;
  s_out?: Tensor;
  db?: Tensor;
}

export interface Adapter {
  /** For messages. */
  source: string;
  config: AdapterConfig;
  sites: Map<string, SiteTensors>;
  /** The adapter's own classifier, if it has one; its path is that of the model's. */
  head?: { path: string; weight: Tensor; bias: Tensor };
}

const NEWEST_SCHEMA = 2;
const VECTORS = ["u", "v", "d", "s_in", "s_out", "db"] as const;
const MATRICES = ["lora_A", "lora_B"] as const;
const TENSORS: ReadonlySet<string> = new Set([...VECTORS, ...MATRICES]);

/**
 * Reads an adapter directory.
 *
 * @throws HhdeployError naming file and key: no adapter, a newer schema, one that can only be folded, unknown or
 *   missing tensors, wrong dimensions, NaN or infinity.
 */
export async function readAdapter(source: Source): Promise<Adapter> {
  const config = parsed(await source.read("adapter_config.json"), source.name);
  const where = `${source.name}/adapter_model.safetensors`;
  const tensors = readSafetensors(await source.read("adapter_model.safetensors"), where);
  const groups = new Map<string, Record<string, Tensor>>();
  for (const [key, tensor] of tensors) {
    const dot = key.lastIndexOf(".");
    if (!tensor.data.every(Number.isFinite)) {
      throw new HhdeployError(`${where}: ${key}: expected finite values, found NaN or infinity.`);
    }
    const owner = key.slice(0, Math.max(dot, 0));
    groups.set(owner, { ...groups.get(owner), [key.slice(dot + 1)]: tensor });
  }
  const adapter: Adapter = { source: source.name, config, sites: new Map() };
  for (const [owner, group] of groups) {
    const { weight, bias, ...rest } = group;
    if (weight && bias && Object.keys(rest).length === 0 && !adapter.head) {
      adapter.head = { path: owner, weight, bias };
      continue;
    }
    const unknown = Object.keys(group).find((name) => !TENSORS.has(name));
    if (!owner || unknown !== undefined) {
      throw new HhdeployError(`${where}: ${owner}.${unknown}: expected tensors of sites and one classifier.`);
    }
    checkSite(`${where}: ${owner}`, group);
    adapter.sites.set(owner, group);
  }
  return adapter;
}

function parsed(bytes: Uint8Array, where: string): AdapterConfig {
  let config: AdapterConfig;
  try {
    config = JSON.parse(new TextDecoder().decode(bytes));
  } catch (error) {
    throw new HhdeployError(`${where}/adapter_config.json: expected JSON: ${error}`);
  }
  if (config.peft_type !== "HTA") {
    throw new HhdeployError(
      `${where}/adapter_config.json: peft_type: expected HTA, found ${config.peft_type}. ` +
        "`hhdeploy import` makes one of other adapters.",
    );
  }
  if (!(config.schema_version <= NEWEST_SCHEMA)) {
    throw new HhdeployError(
      `${where}/adapter_config.json: schema_version: expected at most ${NEWEST_SCHEMA}, found ` +
        `${config.schema_version}. A newer version of this package reads it.`,
    );
  }
  if (config.fold_only) {
    throw new HhdeployError(
      `${where}: the adapter replaces parameters, which no row of a bank can hold: it can only be folded, with ` +
        "`hhdeploy export --fold`.",
    );
  }
  return config;
}

function checkSite(where: string, site: SiteTensors): void {
  for (const [together, names] of [
    [["u", "v", "d"], "u, v and d"],
    [["lora_A", "lora_B"], "lora_A and lora_B"],
  ] as const) {
    const there = together.filter((name) => site[name as keyof SiteTensors]);
    if (there.length && there.length < together.length) {
      throw new HhdeployError(`${where}: expected ${names}, found ${there.join(" and ")} alone.`);
    }
  }
  for (const [names, dimensions] of [[VECTORS, 1], [MATRICES, 2]] as const) {
    for (const name of names) {
      const shape = site[name]?.shape;
      if (shape && shape.length !== dimensions) {
        throw new HhdeployError(`${where}.${name}: expected ${dimensions} dimensions, found [${shape}].`);
      }
    }
  }
}
