/** What a graph takes and gives: as the manifest tells it, and as it is. */

import type { InferenceSession } from "onnxruntime-common";

import { HhdeployError } from "./errors.js";
import { expecting, isCount, isNone, isObject, type Json } from "./json.js";
import type { Manifest } from "./manifest.js";

const INPUTS = ["images", "adapter_ids", "adapter_bank"];
const OUTPUTS = ["logits", "features", "tokens"];

/** Throws where a manifest's tensors are not those of its sizes; `content` is right in all else. */
export function checkTensors(content: Json, where: string): void {
  const { row, classes, bank_as_constant: constant } = content;
  const size = isObject(row) ? row.size : undefined;
  const { input_size: images } = (content.backbone as Json).preprocess as Json;
  const tensors = content.tensors as Json;
  const { logits } = tensors;
  const columns = classes ? ["batch", classes] : undefined;
  expecting(content, where)("classes", alike(logits, columns), `those of tensors.logits, [${logits}]`);
  const expect = expecting(tensors, where, "tensors.");
  expect("images", alike(tensors.images, ["batch", ...(images as number[])]), `[batch,${images}], as the backbone's`);
  const ids = isNone(row) ? undefined : ["batch"];
  const bank = isNone(row) || constant ? undefined : ["slots", size];
  for (const [name, shape] of Object.entries({ adapter_ids: ids, adapter_bank: bank })) {
    expect(name, alike(tensors[name], shape), shape ? `[${shape}], as its row has it` : "none");
  }
  for (const name of OUTPUTS.slice(1)) {
    const [batch, ...sizes] = Array.isArray(tensors[name]) ? (tensors[name] as unknown[]) : [];
    expect(name, tensors[name] === undefined || (batch === "batch" && sizes.every(isCount)), "[batch, sizes]");
  }
}

const alike = (one: unknown, other: unknown) => JSON.stringify(one) === JSON.stringify(other);

/** Throws where a graph takes or gives others than the manifest tells; of runtimes that tell no shapes names alone. */
export function checkGraph(session: InferenceSession, { graphs, tensors }: Manifest, precision: string, where: string): void {
  const { inputNames, inputMetadata, outputNames, outputMetadata } = session;
  for (const [what, known, names, metadata] of [
    ["inputs", INPUTS, inputNames, inputMetadata],
    ["outputs", OUTPUTS, outputNames, outputMetadata],
  ] as const) {
    const told = Object.fromEntries(known.filter((name) => tensors[name]).map((name) => [name, tensors[name]!]));
    const found = names.map((name, i) => [name, shapeOf(metadata?.[i]) ?? told[name]] as const);
    if (names.length !== Object.keys(told).length || !found.every(([name, shape]) => fits(shape, told[name]))) {
      const expected = Object.fromEntries(found.map(([name, shape]) => [name, shape ?? null]));
      throw new HhdeployError(
        `${where}: tensors: expected the ${what} of ${graphs[precision]}, ${JSON.stringify(expected)}, ` +
          `found ${JSON.stringify(told)}. Copy or export the bundle again.`,
      );
    }
  }
}

/** The session of a graph of pictures. Throws where it takes or gives others than a picture, its numbers, and images. */
export function checkPictures(session: InferenceSession, inputs: object, where: string): InferenceSession {
  const [takes, gives] = [[...session.inputNames].sort(), session.outputNames];
  const expected = ["image", ...Object.keys(inputs)].sort();
  if (!alike(takes, expected) || !alike(gives, ["images"])) {
    throw new HhdeployError(
      `${where}: expected a graph that makes images of ${expected.join(", ")}, found one that makes ${gives.join(", ")} ` +
        `of ${takes.join(", ")}. Copy or export the bundle again.`,
    );
  }
  return session;
}

type Shape = readonly (string | number)[];

function shapeOf(value: InferenceSession.ValueMetadata | undefined): Shape | undefined {
  return value?.isTensor ? value.shape : undefined;
}

/** The first size is open, and so is one that is no number. */
function fits(shape: Shape | undefined, told: Shape | undefined): boolean {
  if (!shape || !told || shape.length !== told.length) return false;
  return shape.every((size, i) => !i || !isCount(size) || size === told[i]);
}
