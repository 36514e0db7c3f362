/** Which sites `target_modules` name, as hhdeploy/backbones/sites.py has it; a test compares the two. */

import type { Branch } from "./manifest.js";

export const KINDS = ["q", "k", "v", "proj", "fc1", "fc2"];
/** The sequential form acts on a whole Linear's output. */
export const SEQUENTIAL_KINDS = ["proj", "fc2"];

// Kind -> what the path of its Linears ends in; of several that fit, the longest counts.
const SUFFIXES: Record<string, string> = {
  q: "attn.q attn.q_proj attention.q_proj self_attn.q_proj attention.query self.query attn.query",
  k: "attn.k attn.k_proj attention.k_proj self_attn.k_proj attention.key self.key attn.key",
  v: "attn.v attn.v_proj attention.v_proj self_attn.v_proj attention.value self.value attn.value",
  proj:
    "attn.proj attention.o_proj self_attn.out_proj attention.output.dense self_attention.out_proj attn.out_proj " +
    "attn.out",
  fc1: "mlp.fc1 intermediate.dense mlp.0 mlp.linear_1 mlp.c_fc linear1 ffn.fc1",
  fc2: "mlp.fc2 output.dense mlp.3 mlp.linear_2 mlp.c_proj linear2 ffn.fc2",
};
const KIND_OF = Object.entries(SUFFIXES).flatMap(([kind, all]) => all.split(" ").map((suffix) => ({ suffix, kind })));
// Fused q, k and v, whose sites are thirds of one Linear.
const FUSED = ["attn.qkv", "attention.qkv", "in_proj"];
// What pools the tokens for the classifier is reached by its path, never by a kind.
const POOLING = ["attn_pool", "head", "pooler"];

/** A Linear and its sites, as a branch has them. */
export type Linear = Pick<Branch, "linear" | "sites">;

/** The sites that a target stands for: a kind, a site, a Linear, the end of one, or an expression for whole names. */
export function selectSites(linears: Linear[], target: string): string[] {
  if (KINDS.includes(target)) return chosen(linears, (site, linear) => kindOf(site, linear) === target);
  const named = chosen(linears, (site, { linear }) => target === site || target === linear);
  if (named.length) return named;
  const expression = expressionOf(target);
  return chosen(linears, (site, { linear }) =>
    [site, linear].some((name) => name.endsWith(`.${target}`) || expression?.test(name)),
  );
}

/** The Linears of an adapter's sites, which have their names and kinds, whatever the backbone. */
export function linearsOf(sites: Iterable<string>): Linear[] {
  const names = [...sites];
  const owners = new Set(names.map((site) => site.slice(0, Math.max(site.lastIndexOf("."), 0))));
  const fused = [...owners].filter((owner) => FUSED.some((suffix) => endsIn(owner, suffix)));
  return [
    ...names.map((site) => ({ linear: site, sites: [site] })),
    ...fused.map((owner) => ({ linear: owner, sites: ["q", "k", "v"].map((third) => `${owner}.${third}`) })),
  ];
}

/** A target as an expression that matches whole names; undefined where it is none that JavaScript can read. */
export function expressionOf(target: string): RegExp | undefined {
  // How Python writes the name of a group, and begin and end of a text.
  const written = target.replaceAll("(?P<", "(?<").replaceAll("\\A", "^").replaceAll("\\Z", "$");
  try {
    return new RegExp(`^(?:${written})$`);
  } catch {
    return undefined;
  }
}

function chosen(linears: Linear[], fits: (site: string, linear: Linear) => boolean | undefined): string[] {
  return linears.flatMap((linear) => linear.sites.filter((site) => fits(site, linear)));
}

/** The kind of a site, "" if none; of the thirds of a fused qkv their last letter. */
function kindOf(site: string, { linear, sites }: Linear): string {
  if (linear.split(".").some((part) => POOLING.includes(part))) return "";
  if (sites.length > 1) return site.slice(linear.length + 1);
  const fitting = KIND_OF.filter(({ suffix }) => endsIn(linear, suffix));
  return fitting.sort((a, b) => b.suffix.length - a.suffix.length)[0]?.kind ?? "";
}

const endsIn = (path: string, suffix: string) => path === suffix || path.endsWith(`.${suffix}`);
