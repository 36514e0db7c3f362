/** Logits to answers: what an adapter's numbers mean. */

import { HhdeployError } from "./errors.js";
import type { AdapterEntry, ProblemType } from "./manifest.js";

/** One class, label or value of one picture. */
export interface Answer {
  /** Its name; its number if it has none. */
  label: string;
  /** Its probability, from 0 to 1; of a regression the value itself. */
  score: number;
  /** The adapter says it: the most probable class alone, a label of 0.5 or more; no value. */
  positive: boolean;
  /** Its column. */
  index: number;
}

const SAID = 0.5;

/**
 * All answers of one picture, the most probable first; values in the order of their columns.
 *
 * @param logits of the picture; what follows the adapter's own columns is padding.
 * @param entry of its adapter; undefined: the backbone, whose classes have numbers only.
 * @param classes own columns.
 */
export function answersOf(
  logits: Float32Array,
  entry: AdapterEntry | undefined,
  classes: number,
): Answer[] {
  const kind = meaningOf(entry, classes);
  const own = Array.from(logits.subarray(0, classes));
  const scores =
    kind === "regression" ? own : kind === "multi_label_classification" ? own.map(sigmoid) : softmax(own);
  const order = own.map((_, i) => i);
  if (kind !== "regression") order.sort((a, b) => own[b]! - own[a]! || a - b);
  return order.map((index, place) => ({
    label: entry?.class_names?.[index] ?? String(index),
    score: scores[index]!,
    positive:
      (kind === "single_label_classification" && place === 0) ||
      (kind === "multi_label_classification" && scores[index]! >= SAID),
    index,
  }));
}

/**
 * Throws where logits are no answers: -Infinity is one (a class that is ruled out), but no value of a regression; NaN and
 * Infinity, or -Infinity alone, are none.
 *
 * @param where names picture and adapter in the message; otherwise as `answersOf`.
 */
export function checkNumbers(
  logits: Float32Array,
  entry: AdapterEntry | undefined,
  classes: number,
  where: string,
): void {
  const own = logits.subarray(0, classes);
  const finite = meaningOf(entry, classes) === "regression" ? own.every(Number.isFinite) : own.some(Number.isFinite);
  if (!finite || own.some((x) => Number.isNaN(x) || x === Infinity)) {
    throw new HhdeployError(
      `${where}: the logits are no numbers (NaN or infinity). Open the bundle in another precision; if float32 gives ` +
        "none either, compare it with its reference: `hhdeploy verify`.",
    );
  }
}

function meaningOf(entry: AdapterEntry | undefined, classes: number): ProblemType {
  return entry?.problem_type ?? (entry && classes === 1 ? "regression" : "single_label_classification");
}

function softmax(values: number[]): number[] {
  const largest = values.reduce((a, b) => Math.max(a, b), -Infinity);
  const shares = values.map((x) => Math.exp(x - largest));
  const sum = shares.reduce((a, b) => a + b, 0);
  return shares.map((x) => x / sum);
}

function sigmoid(x: number): number {
  const small = Math.exp(-Math.abs(x)); // never of a positive number, which could be too large
  return (x >= 0 ? 1 : small) / (1 + small);
}
