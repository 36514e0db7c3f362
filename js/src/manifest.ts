/** hhdeploy.json: what a bundle holds. Only the parts that a client needs are described. */

import { HhdeployError } from "./errors.js";

/** What a head's numbers mean. */
export const PROBLEM_TYPES = ["single_label_classification", "multi_label_classification", "regression"] as const;
export type ProblemType = (typeof PROBLEM_TYPES)[number];

/** What a preprocessing graph takes beside the picture. */
export interface PreprocessGraph {
  file: string;
  inputs: Record<string, { dtype: "float32" | "int64"; value: number[] }>;
}

export interface Preprocess {
  input_size: [number, number, number];
  exif?: boolean;
}

export interface Backbone {
  model: string;
  sha256: string;
  classifier: string | null;
  dim: number;
  classes: number;
  /** What its classifier means to an adapter without one of its own. */
  class_names?: string[];
  problem_type?: ProblemType;
  preprocess: Preprocess;
  preprocess_graph?: PreprocessGraph;
}

export interface AdapterEntry {
  name: string;
  /** Its row of the bank; absent where the adapter is folded. */
  row?: number | null;
  classes: number;
  class_names?: string[] | null;
  problem_type?: ProblemType;
  preprocess: Preprocess;
  preprocess_graph?: PreprocessGraph;
}

export interface Branch {
  linear: string;
  form: "additive" | "sequential";
  sites: string[];
  out: number;
  in: number;
  rank: number;
  parts?: ("s_in" | "s_out" | "db")[];
}

export interface Row {
  size: number;
  classes: number;
  dim: number;
  backbone_head: boolean;
  branches: Branch[];
}

export interface Manifest {
  schema_version: number;
  kind: "branches" | "folded";
  backbone: Backbone;
  classes: number;
  adapters: AdapterEntry[];
  row?: Row | null;
  bank_as_constant: boolean;
  tensors: Record<string, (string | number)[]>;
  graphs: Record<string, string>;
  /** Name of each file -> its sha256, in hexadecimal digits. */
  files: Record<string, string>;
}

const NEWEST_SCHEMA = 2;

/**
 * A manifest from its JSON.
 *
 * @throws HhdeployError it is none, or of a newer schema.
 */
export function parseManifest(text: string, where: string): Manifest {
  let content: unknown;
  try {
    content = JSON.parse(text);
  } catch (error) {
    throw new HhdeployError(`${where}: expected a bundle's manifest, found no JSON: ${error}`);
  }
  const manifest = content as Manifest;
  if (typeof manifest?.schema_version !== "number" || typeof manifest.files !== "object") {
    throw new HhdeployError(`${where}: expected a bundle's manifest, found other JSON.`);
  }
  if (manifest.schema_version > NEWEST_SCHEMA) {
    throw new HhdeployError(
      `${where}: schema_version: expected at most ${NEWEST_SCHEMA}, found ` +
        `${manifest.schema_version}. A newer version of this package reads it.`,
    );
  }
  return manifest;
}
