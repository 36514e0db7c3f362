/** An adapter directory: adapter_config.json and adapter_model.safetensors. */

import { checkClassNames, checkMeaning, parseConfig, type AdapterConfig } from "./config.js";
import { HhdeployError } from "./errors.js";
import { readSafetensors, type Tensor } from "./safetensors.js";
import type { Source } from "./source.js";

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
  head?: Head;
}

export interface Head {
  path: string;
  weight: Tensor;
  bias: Tensor;
}

type Group = Record<string, Tensor>;

const VECTORS = ["u", "v", "d", "s_in", "s_out", "db"] as const;
const MATRICES = ["lora_A", "lora_B"] as const;
const TENSORS: ReadonlySet<string> = new Set([...VECTORS, ...MATRICES]);

/**
 * Reads an adapter directory.
 *
 * @throws HhdeployError naming file and key: no adapter, a newer schema, one that can only be folded, a value that can
 *   not be, unknown or missing tensors, wrong dimensions, NaN or infinity.
 */
export async function readAdapter(source: Source): Promise<Adapter> {
  const config = parseConfig(await source.read("adapter_config.json"), `${source.name}/adapter_config.json`);
  const where = `${source.name}/adapter_model.safetensors`;
  const groups = grouped(readSafetensors(await source.read("adapter_model.safetensors"), where), where);
  const heads = [...groups].filter(([, group]) => group["weight"] ?? group["bias"]);
  if (heads.length > 1) {
    throw new HhdeployError(`${where}: expected one classifier, found ${heads.map(([path]) => path).join(", ")}.`);
  }
  const sites = new Map<string, SiteTensors>([...groups].filter(([owner]) => owner !== heads[0]?.[0]));
  for (const [site, tensors] of sites) checkSite(`${where}: ${site}`, tensors);
  const targets = config.target_modules.length;
  if (sites.size && !targets) {
    throw new HhdeployError(
      `${where}: ${[...sites.keys()][0]}: found tensors of sites, and the configuration's target_modules are []: ` +
        "expected the kinds or names of the sites.",
    );
  }
  if (!sites.size && (!heads.length || targets)) {
    throw new HhdeployError(
      `${where}: zero sites found. Expected tensors such as blocks.0.attn.proj.u; an adapter that is a classifier ` +
        "alone has the target_modules [].",
    );
  }
  if (!heads[0]) return { source: source.name, config, sites };
  const head = headOf(...heads[0], config, where);
  const num_classes = head.weight.shape[0]!;
  checkClassNames(config.class_names, num_classes, source.name);
  checkMeaning(config.problem_type, num_classes, source.name);
  return { source: source.name, config: { ...config, num_classes }, sites, head };
}

/** Tensors by what they belong to, and their last name. */
function grouped(tensors: Map<string, Tensor>, where: string): Map<string, Group> {
  const groups = new Map<string, Group>();
  for (const [key, tensor] of tensors) {
    const dot = Math.max(key.lastIndexOf("."), 0);
    const [owner, name] = [key.slice(0, dot), key.slice(dot + 1)];
    if (!owner || !(TENSORS.has(name) || name === "weight" || name === "bias")) {
      throw new HhdeployError(
        `${where}: unknown tensor key ${key}: expected ${[...TENSORS].join(", ")} of sites, and the classifier's ` +
          "weight and bias.",
      );
    }
    if (!tensor.data.every(Number.isFinite)) {
      throw new HhdeployError(`${where}: ${key}: expected finite values, found NaN or infinity.`);
    }
    groups.set(owner, { ...groups.get(owner), [name]: tensor });
  }
  return groups;
}

function headOf(path: string, group: Group, config: AdapterConfig, where: string): Head {
  const { weight, bias, ...rest } = group;
  if (!weight || Object.keys(rest).length) {
    const found = Object.keys(group).join(", ");
    throw new HhdeployError(`${where}: ${path}: expected a classifier's weight and bias, found ${found}.`);
  }
  if (weight.shape.length !== 2) {
    throw new HhdeployError(`${where}: ${path}.weight: expected [classes, features], found [${weight.shape}].`);
  }
  const rows = weight.shape[0]!;
  if (rows !== (config.num_classes ?? rows)) {
    throw new HhdeployError(
      `${where}: ${path}.weight: expected ${config.num_classes} rows (num_classes), found ${rows}.`,
    );
  }
  const added = bias ?? { dtype: "F32", shape: [rows], data: new Float32Array(rows) };
  if (String(added.shape) !== String([rows])) {
    throw new HhdeployError(`${where}: ${path}.bias: expected [${rows}], found [${added.shape}].`);
  }
  return { path, weight, bias: added };
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
