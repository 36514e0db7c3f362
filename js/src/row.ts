/**
 * One adapter as a row of the bank, by the manifest's layout: canonical deltas in float64, cast once to float32.
 *
 * A site's matrix H_u D H_v + lora_B lora_A (HTA, arXiv 2410.22952, with H = I - tau x xᵀ) is a diagonal plus a thin
 * product of rank 2 + r: left [u, D v, lora_B], right [-tau_u (Dᵀu)ᵀ + tau_u tau_v s vᵀ ; -tau_v vᵀ ; lora_A],
 * s = uᵀ D v.
 */

import type { Adapter, SiteTensors } from "./adapter.js";
import { checkBelongs } from "./checks.js";
import { HhdeployError } from "./errors.js";
import { partsOf } from "./layout.js";
import type { Backbone, Branch, Row } from "./manifest.js";

/** diag + left @ right; `left` holds its columns, `right` its rows. */
interface Delta {
  diag: Float64Array;
  left: Float64Array[];
  right: Float64Array[];
}

/** First index of every part of a row, by its name. */
function offsetsOf(row: Row): Map<string, number> {
  return new Map(partsOf(row).map(({ part, offset }) => [part, offset]));
}

/**
 * The row of an adapter, float32 [row.size].
 *
 * @throws HhdeployError the adapter belongs to another backbone or does not fit, naming the site, and the option of
 *   `hhdeploy export` that would have made room.
 */
export function packRow(adapter: Adapter, row: Row, backbone: Backbone): Float32Array {
  checkBelongs(adapter, row, backbone);
  const packed = new Float32Array(row.size);
  const offsets = offsetsOf(row);
  for (const [site, tensors] of adapter.sites) {
    if (tensors.u || tensors.lora_A) {
      const place = placeOf(adapter, row, site, adapter.config.form);
      packDelta(adapter, site, tensors, place, packed, offsets);
    }
    packParts(adapter, site, tensors, row, packed, offsets);
  }
  packHead(adapter, row, packed, offsets);
  return packed;
}

interface Place {
  branch: Branch;
  index: number;
}

function placeOf(adapter: Adapter, row: Row, site: string, form: Branch["form"]): Place {
  const branch = row.branches.find((b) => b.form === form && b.sites.includes(site));
  if (!branch) {
    throw new HhdeployError(
      `${adapter.source}: it changes ${site} (${form}), which this bundle has no branch for. Export again with this ` +
        "adapter, or reserve the site with --sites.",
    );
  }
  return { branch, index: branch.sites.indexOf(site) };
}

function packDelta(
  adapter: Adapter,
  site: string,
  tensors: SiteTensors,
  { branch, index }: Place,
  packed: Float32Array,
  offsets: Map<string, number>,
): void {
  checkSizes(adapter, site, tensors, branch);
  const delta = deltaOf(tensors, branch, adapter.config.reflection ?? "unnormalized");
  if (branch.form === "sequential") delta.diag.forEach((x, i) => (delta.diag[i] = x - 1)); // M - I
  if (delta.left.length > branch.rank) {
    // What is zero needs no room.
    const used = (_: unknown, k: number) => delta.left[k]!.some(Boolean) && delta.right[k]!.some(Boolean);
    [delta.left, delta.right] = [delta.left.filter(used), delta.right.filter(used)];
  }
  if (delta.left.length > branch.rank) {
    throw new HhdeployError(
      `${adapter.source}: ${site} needs rank ${delta.left.length}, the bundle has room for ${branch.rank}. Export ` +
        `with --max-rank ${delta.left.length}.`,
    );
  }
  const at = (part: string) => offsets.get(`${branch.linear}/${branch.form}/${part}`)!;
  packed.set(delta.diag, at("diag") + index * delta.diag.length);
  delta.right.forEach((r, k) => packed.set(r, at("right") + (index * branch.rank + k) * branch.in));
  delta.left.forEach((l, k) => packed.set(l, at("left_t") + (index * branch.rank + k) * branch.out));
  if (delta.diag.some(beyond) || [...delta.left, ...delta.right].some((x) => x.some(beyond))) {
    throw new HhdeployError(`${adapter.source}: ${site}: its values leave the range of float32.`);
  }
}

function beyond(value: number): boolean {
  return !Number.isFinite(Math.fround(value));
}

function checkSizes(adapter: Adapter, site: string, t: SiteTensors, branch: Branch): void {
  const sequential = branch.form === "sequential";
  const [out, into] = [branch.out, sequential ? branch.out : branch.in];
  const expected: Partial<Record<keyof SiteTensors, number[]>> = {
    u: [out],
    v: [into],
    d: [Math.min(out, into)],
    lora_A: [t.lora_A?.shape[0] ?? 0, into],
    lora_B: [out, t.lora_A?.shape[0] ?? 0],
  };
  for (const [name, shape] of Object.entries(expected)) {
    const found = t[name as keyof SiteTensors]?.shape;
    if (found && String(found) !== String(shape)) {
      throw new HhdeployError(`${adapter.source}: ${site}.${name}: expected [${shape}], found [${found}].`);
    }
  }
}

function deltaOf(t: SiteTensors, branch: Branch, reflection: "unnormalized" | "orthogonal"): Delta {
  const [out, into] = [branch.out, branch.in];
  const diag = new Float64Array(Math.min(out, into));
  const left: Float64Array[] = [];
  const right: Float64Array[] = [];
  if (t.u && t.v && t.d) {
    const [u, v] = [Float64Array.from(t.u.data), Float64Array.from(t.v.data)];
    diag.set(t.d.data);
    const [tauU, tauV] = [tau(u, reflection), tau(v, reflection)];
    const dv = new Float64Array(out);
    const first = new Float64Array(into);
    let s = 0;
    diag.forEach((d, i) => {
      dv[i] = d * v[i]!;
      first[i] = -tauU * d * u[i]!;
      s += u[i]! * dv[i]!;
    });
    first.forEach((x, i) => (first[i] = x + tauU * tauV * s * v[i]!));
    left.push(u, dv);
    right.push(first, v.map((x) => -tauV * x));
  }
  const rank = t.lora_A?.shape[0] ?? 0;
  for (let k = 0; k < rank; k++) {
    right.push(Float64Array.from(t.lora_A!.data.subarray(k * into, (k + 1) * into)));
    left.push(Float64Array.from({ length: out }, (_, i) => t.lora_B!.data[i * rank + k]!));
  }
  return { diag, left, right };
}

/** Coefficient of H = I - tau x xᵀ: 1, or 2 / |x|², and 0 for x = 0. */
function tau(x: Float64Array, reflection: "unnormalized" | "orthogonal"): number {
  if (reflection === "unnormalized") return 1;
  // Scaled by the largest entry: the squared norm of a tiny vector would underflow.
  const largest = x.reduce((a, b) => Math.max(a, Math.abs(b)), 0);
  if (largest === 0) return 0;
  const norm = x.reduce((a, b) => a + (b / largest) ** 2, 0);
  return 2 / norm / largest / largest;
}

/** s_in - 1, s_out - 1 and db, which an additive branch has room for, or none has. */
function packParts(
  adapter: Adapter,
  site: string,
  tensors: SiteTensors,
  row: Row,
  packed: Float32Array,
  offsets: Map<string, number>,
): void {
  for (const part of ["s_in", "s_out", "db"] as const) {
    const trained = tensors[part];
    if (!trained) continue;
    const { branch, index } = placeOf(adapter, row, site, "additive");
    if (!branch.parts?.includes(part)) {
      throw new HhdeployError(
        `${adapter.source}: it has ${site}.${part}, and the rows of this bundle have no ${part} at ${branch.linear}. ` +
          `Export again with this adapter, or with --parts ${part}.`,
      );
    }
    const size = part === "s_in" ? branch.in : branch.out;
    if (trained.data.length !== size) {
      throw new HhdeployError(`${adapter.source}: ${site}.${part}: expected [${size}], found [${trained.shape}].`);
    }
    if (part === "s_in") checkOneInput(adapter, branch);
    const neutral = part === "db" ? 0 : 1;
    const begin = offsets.get(`${branch.linear}/additive/${part}`)! + (part === "s_in" ? 0 : index * size);
    trained.data.forEach((x, i) => (packed[begin + i] = x - neutral));
  }
}

/** q, k and v of a fused qkv read one input, so a row has one s_in for all three. */
function checkOneInput(adapter: Adapter, branch: Branch): void {
  const found = branch.sites.map((site) => String(adapter.sites.get(site)?.s_in?.data ?? ""));
  const ones = String(new Float32Array(branch.in).fill(1));
  if (new Set(found.map((x) => x || ones)).size > 1) {
    throw new HhdeployError(
      `${adapter.source}: s_in of ${branch.sites.join(", ")}: expected the same values, found different ones: they ` +
        "are thirds of one Linear. Such an adapter can only be folded.",
    );
  }
}

function packHead(
  adapter: Adapter,
  row: Row,
  packed: Float32Array,
  offsets: Map<string, number>,
): void {
  if (!row.classes) return; // the graph gives features alone
  const head = adapter.head;
  if (!head) {
    if (row.backbone_head) return;
    throw new HhdeployError(`${adapter.source}: it has no classifier, and the bundle did not keep the backbone's.`);
  }
  const classes = head.weight.shape[0]!;
  if (classes > row.classes) {
    throw new HhdeployError(
      `${adapter.source}: it has ${classes} classes, the bundle has room for ${row.classes}. Export with ` +
        `--max-classes ${classes}.`,
    );
  }
  const bias = offsets.get("head.bias")!;
  packed.set(head.weight.data, offsets.get("head.weight")!);
  packed.fill(-Infinity, bias, bias + row.classes);
  packed.set(head.bias.data, bias);
  packed[offsets.get("head.own")!] = 1;
}
