/** Whether an adapter belongs to a bundle: name, backbone, sites, classifier, image size. The checks are Python's. */

import type { Adapter } from "./adapter.js";
import { checkClassNames } from "./config.js";
import { HhdeployError } from "./errors.js";
import { BACKBONE, type Backbone, type Branch, type Row } from "./manifest.js";
import { linearsOf, selectSites } from "./sites.js";

const NAME = /^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$/;
const SHOWN = 8;
// Arguments of timm's models that shape no parameter, and of which two values are never the same; of a classifier of its
// own also what it reads.
const DECIDING = ["num_heads", "act_layer"];
const DECIDING_OF_HEADS = [...DECIDING, "global_pool"];

/** What an adapter may be called. */
export function checkName(name: string): void {
  if (name === BACKBONE) throw new HhdeployError(`the name ${BACKBONE} is reserved for the bare model.`);
  if (!NAME.test(name)) {
    throw new HhdeployError(
      `adapter name ${JSON.stringify(name)}: expected letters, digits, '.', '-' and '_' (at most 128, first a letter ` +
        "or digit).",
    );
  }
}

/**
 * All that needs both the adapter and the bundle, but for room in its rows.
 *
 * @throws HhdeployError another backbone (name or digest), sites that are missing, a classifier of another place or
 *   size, class names that are not one per class, another image size.
 */
export function checkBelongs(adapter: Adapter, row: Row, backbone: Backbone): void {
  checkBase(adapter, backbone);
  checkComplete(adapter, row);
  checkHead(adapter, backbone);
  const found = String((adapter.config.preprocess ?? backbone.preprocess).input_size);
  const expected = String(backbone.preprocess.input_size);
  if (found !== expected) {
    throw new HhdeployError(
      `${adapter.source}: preprocess.input_size: expected the backbone's [${expected}], found [${found}].`,
    );
  }
}

/** The digest of the weights decides, unless both say that they compute otherwise with them; without one timm's names. */
function checkBase({ source, config, head }: Adapter, backbone: Backbone): void {
  const { base_sha256, base_signs_sha256: signs, base_model_name_or_path: model } = config;
  const [mine, theirs] = [plain(config.base_model_args), plain(backbone.args)];
  for (const arg of isTimms(model) && isTimms(backbone.model) ? (head ? DECIDING_OF_HEADS : DECIDING) : []) {
    const alike = arg in mine && arg in theirs && typeof mine[arg] === typeof theirs[arg];
    if (alike && JSON.stringify(mine[arg]) !== JSON.stringify(theirs[arg])) {
      throw new HhdeployError(
        `${source}: base_model_args: it was trained with ${arg} ${JSON.stringify(mine[arg])}, the backbone has ` +
          `${JSON.stringify(theirs[arg])}: the weights may be the same, what they compute is not.`,
      );
    }
  }
  // Of weights that were not float32 the signs alone are the same in every type.
  const bySigns = !base_sha256 && signs && backbone.signs_sha256;
  const [key, digest, expected] = bySigns
    ? ["base_signs_sha256", signs, backbone.signs_sha256!]
    : ["base_sha256", base_sha256, backbone.sha256];
  if (digest !== expected && !sameModel(model, backbone.model)) {
    throw new HhdeployError(
      `${source}: base_model_name_or_path: expected the backbone's ${backbone.model}, found ${model}.`,
    );
  }
  if (typeof digest === "string" && digest !== expected) {
    throw new HhdeployError(
      `${source}: ${key}: expected the backbone's ${expected!.slice(0, 12)}…, found ` +
        `${digest.slice(0, 12)}…: the adapter was trained on other weights.`,
    );
  }
  const [own, known] = [config.base_buffers_sha256, backbone.buffers_sha256];
  if (own && known && own !== known) {
    throw new HhdeployError(
      `${source}: base_buffers_sha256: expected the backbone's ${known.slice(0, 12)}…, found ${own.slice(0, 12)}…: ` +
        "the adapter was trained with other statistics of BatchNorm, or masks.",
    );
  }
}

const isTimms = (model: string) => !model.includes(":");

/** Arguments by the first of two names that timm has for an activation; "" is the model's own. */
function plain(args: Record<string, unknown> | null | undefined): Record<string, unknown> {
  const { act_layer: activation, ...rest } = args ?? {};
  return activation ? { ...rest, act_layer: activation === "swish" ? "silu" : activation } : rest;
}

/** As far as names tell: those of timm have no colon, and a tag counts only where both have one. */
function sameModel(one: string, other: string): boolean {
  if (!isTimms(one) || !isTimms(other)) return true;
  const [[mine, tag], [theirs, otherTag]] = [halves(one), halves(other)];
  return mine === theirs && (!tag || !otherTag || tag === otherTag);
}

function halves(model: string): [string, string] {
  const dot = model.indexOf(".");
  return dot < 0 ? [model, ""] : [model.slice(0, dot), model.slice(dot + 1)];
}

/** Every site that `target_modules` name has tensors; what names none that the row knows names some of the adapter's. */
function checkComplete({ source, config, sites }: Adapter, row: Row): void {
  // The sequential form needs the outputs alone, which any branch tells.
  const fitting = row.branches.filter((b) => config.form === "sequential" || b.form === config.form);
  const linears = [...new Map(fitting.map((b): [string, Branch] => [b.linear, b])).values()];
  const targets = [config.target_modules].flat();
  const selected = targets.map((target) => selectSites(linears, target));
  const own = linearsOf(sites.keys());
  const others = targets.filter((target, i) => !selected[i]!.length && !selectSites(own, target).length);
  const missing = [...new Set(selected.flat()), ...others].filter((site) => !sites.has(site));
  if (missing.length) {
    const shown = missing.slice(0, SHOWN).join(", ") + (missing.length > SHOWN ? `, … (${missing.length} in all)` : "");
    throw new HhdeployError(
      `${source}: missing tensor keys for ${shown}: target_modules ${JSON.stringify(targets)} name these sites. Save ` +
        "the adapter whole, or list the sites it has by their full names in target_modules.",
    );
  }
}

/** There is a classifier, the adapter's at the backbone's place, and it is named whole. */
function checkHead({ source, config, head }: Adapter, backbone: Backbone): void {
  if (head) {
    const { path, weight } = head;
    if (path !== backbone.classifier || weight.shape[1] !== backbone.dim) {
      throw new HhdeployError(
        `${source}: expected a classifier ${backbone.classifier}.weight of [classes, ${backbone.dim}], found ` +
          `${path}.weight of [${weight.shape}].`,
      );
    }
  } else if (!backbone.classes && backbone.classifier) {
    throw new HhdeployError(`${source}: it has no classifier ${backbone.classifier}, and the backbone has none either.`);
  } else if ((config.num_classes ?? backbone.classes) !== backbone.classes) {
    throw new HhdeployError(
      `${source}: num_classes: expected ${backbone.classes} (the backbone's classifier; the adapter brings none), ` +
        `found ${config.num_classes}.`,
    );
  }
  checkClassNames(config.class_names, head?.weight.shape[0] ?? backbone.classes, source);
}
