/** The bank's rows: one for each adapter, the first the bare backbone's. */

import { HhdeployError } from "./errors.js";
import { partsOf } from "./layout.js";
import { BACKBONE, MANIFEST, type AdapterEntry, type Manifest, type Row } from "./manifest.js";
import { readSafetensors, type Tensor } from "./safetensors.js";
import { readChecked, type Source } from "./source.js";

const BANK = /^bank(\.[0-9a-f]{8})?\.safetensors$/;

/**
 * The bank's rows, by adapter; none where the graph holds them.
 *
 * @throws HhdeployError a bank of other rows, or an adapter that is not what its row is of.
 */
export async function rowsOf(source: Source, manifest: Manifest): Promise<Map<string, Float32Array>> {
  const rows = new Map<string, Float32Array>();
  const { row: layout, bank_as_constant: constant, adapters, backbone } = manifest;
  const file = Object.keys(manifest.files).find((name) => BANK.test(name));
  if (!layout || (constant && !file)) return rows;
  const tensors = readSafetensors(await readChecked(source, file ?? "bank.safetensors", manifest.files), file ?? "");
  const bank = tensors.get("adapter_bank") ?? { dtype: "none", data: new Float32Array(), shape: [] };
  const size = layout.size;
  if (bank.dtype !== "F32" || bank.shape.length !== 2 || bank.shape[1] !== size) {
    const found = `${bank.dtype} [${bank.shape}]`;
    throw new HhdeployError(`${source.name}: ${file}: adapter_bank: expected F32 [rows, ${size}], found ${found}.`);
  }
  for (const entry of adapters) {
    const wrong = misfit(bank, layout, entry, backbone.classes);
    if (wrong) {
      throw new HhdeployError(`${source.name}/${MANIFEST}: adapter ${entry.name}: ${wrong}. Export the bundle again.`);
    }
  }
  if (constant) return rows;
  rows.set(BACKBONE, bank.data.subarray(0, size));
  for (const { name, row } of adapters) rows.set(name, bank.data.subarray(row! * size, (row! + 1) * size));
  return rows;
}

/** What is wrong with the row and the number of classes of an adapter: a softmax over a part of them would be too. */
function misfit({ data, shape }: Tensor, layout: Row, { row, classes }: AdapterEntry, backbone: number): string | undefined {
  const rows = shape[0]!;
  if (!(row! < rows)) return `expected a row from 1 to ${rows - 1}, found ${row}`;
  const offsets = new Map(partsOf(layout).map(({ part, offset }) => [part, offset]));
  const begin = row! * layout.size;
  const ownHead = layout.classes ? data[begin + offsets.get("head.own")!]! : 0;
  // Runtimes differ in what they make of NaN.
  if (ownHead !== 0 && ownHead !== 1) return `expected a head.own of 0 or 1 in its row, found ${ownHead}`;
  if (!ownHead) {
    // It answers with the backbone's classifier, where there is one.
    const same = classes === backbone || !backbone || !layout.backbone_head;
    return same ? undefined : `expected the backbone's ${backbone} classes, found ${classes}`;
  }
  const bias = data.subarray(begin + offsets.get("head.bias")!).subarray(0, layout.classes);
  // Columns that are none of its own have a bias of -Infinity.
  const own = bias.reduce((last, x, i) => (x === -Infinity ? last : i + 1), 0);
  return own > classes
    ? `expected ${own} classes, which its row has, found ${classes}`
    : undefined;
}
