/** hhdeploy.json: what a bundle holds. Only the parts that a client needs are described. */

import { HhdeployError } from "./errors.js";
import { expecting, isCount, isNone, isObject, isStrings, isText, parseJson, textOf, type Json } from "./json.js";
import { partsOf, type Part } from "./layout.js";
import { checkGraph, checkPreprocess, type AdapterPreprocess, type Preprocess, type PreprocessGraph } from "./preprocess.js";
import { checkTensors } from "./tensors.js";

/** What a bundle calls it. */
export const MANIFEST = "hhdeploy.json";
const SIGNATURE = "model.sig";
/** The backbone without an adapter; none has this name. */
export const BACKBONE = "backbone";

/** What a head's numbers mean. */
export const PROBLEM_TYPES = ["single_label_classification", "multi_label_classification", "regression"] as const;
export type ProblemType = (typeof PROBLEM_TYPES)[number];

export interface Backbone {
  model: string;
  /** It was made with. */
  args?: Record<string, unknown>;
  sha256: string;
  /** Of the weights' signs, for adapters that were trained on them in another type; newer bundles have it. */
  signs_sha256?: string;
  /** Of the buffers beside the weights (statistics of BatchNorm); newer bundles have it. */
  buffers_sha256?: string;
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
const PRECISIONS = ["float32", "float16", "bfloat16", "int8", "fp8", "int8-weights"];
const SHA256 = /^[0-9a-f]{64}$/;
// A file that a change put there has eight digits of its content before its suffix.
const DIGITS = /\.[0-9a-f]{8}(?=\.(safetensors|json|onnx|onnx\.data|engine)$)/;

/**
 * A manifest and its text, from the file's bytes.
 *
 * @throws HhdeployError see `parseManifest`; or the bytes are not UTF-8.
 */
export function readManifest(bytes: Uint8Array, where: string): { text: string; manifest: Manifest } {
  let text: string;
  try {
    text = textOf(bytes);
  } catch (error) {
    throw new HhdeployError(`${where}: expected a bundle's manifest in UTF-8: ${(error as Error).message}.`);
  }
  return { text, manifest: parseManifest(text, where) };
}

/**
 * A manifest from its JSON.
 *
 * @throws HhdeployError it is none, of a newer schema, or says what cannot be.
 */
export function parseManifest(text: string, where: string): Manifest {
  let content: unknown;
  try {
    content = parseJson(text);
  } catch (error) {
    throw new HhdeployError(`${where}: expected a bundle's manifest in JSON: ${(error as Error).message}.`);
  }
  if (!isObject(content) || !Number.isInteger(content.schema_version) || !isObject(content.files)) {
    throw new HhdeployError(`${where}: expected a bundle's manifest, found other JSON.`);
  }
  expecting(content, where)("schema_version", (content.schema_version as number) > 0, "1 or more");
  if ((content.schema_version as number) > NEWEST_SCHEMA) {
    throw new HhdeployError(
      `${where}: schema_version: expected at most ${NEWEST_SCHEMA}, found ` +
        `${content.schema_version}. A newer version of this package reads it.`,
    );
  }
  checkManifest(content, where);
  return content as unknown as Manifest;
}

/** What of a manifest belongs together; wrong, it would be an answer that is wrong. The checks are Python's. */
function checkManifest(content: Json, where: string): void {
  const expect = expecting(content, where);
  for (const key of ["backbone", "graphs", "files", "versions", "tensors"]) {
    expect(key, isObject(content[key]), "an object");
  }
  expect("row", Object.hasOwn(content, "row"), "an object with branches, or null");
  expect("kind", content.kind === (isNone(content.row) ? "folded" : "branches"), "branches with a row, else folded");
  expect("classes", isCount(content.classes), "a number of classes");
  for (const key of ["adapters", "engines"]) expect(key, Array.isArray(content[key]), "a list");
  (content.engines as unknown[]).forEach((engine, i) => checkEngine(engine, where, `engines[${i}]`));
  const adapters = content.adapters as Json[];
  adapters.forEach((entry, i) => {
    const place = `adapters[${i}]`;
    expecting({ [place]: entry }, where)(place, isObject(entry), "an object");
    checkEntry(entry, content, where, `${place}.`);
  });
  for (const key of ["name", "row"]) {
    const values = adapters.map((entry) => entry[key]).filter((value) => !isNone(value));
    if (new Set(values).size < values.length) {
      throw new HhdeployError(`${where}: adapters: expected every ${key} once, found ${JSON.stringify(values)}.`);
    }
  }
  checkBackbone(content.backbone as Json, where, "backbone.");
  expect("bank_as_constant", typeof content.bank_as_constant === "boolean", "true or false");
  const { input_size: size } = (content.backbone as Json).preprocess as Json;
  adapters.forEach(({ preprocess: own }, i) => {
    const given = own as Json;
    const same = String(given.input_size) === String(size);
    expecting(given, where, `adapters[${i}].preprocess.`)("input_size", same, `the backbone's [${size}]`);
  });
  const files = content.files as Json;
  const checkItsGraph = ({ preprocess_graph: graph, preprocess: own }: Json, prefix: string) =>
    checkGraph(graph, own as AdapterPreprocess, files, where, prefix);
  checkItsGraph(content.backbone as Json, "backbone.");
  adapters.forEach((entry, i) => checkItsGraph(entry, `adapters[${i}].`));
  checkFiles(files, where);
  for (const [precision, name] of Object.entries(content.graphs as Json)) {
    const there = typeof name === "string" && Object.hasOwn(files, name);
    expecting(content.graphs as Json, where, "graphs.")(precision, there, "the name of one of its files");
    if (!PRECISIONS.includes(precision)) {
      throw new HhdeployError(`${where}: graph ${precision}: expected one of ${PRECISIONS.join(", ")}.`);
    }
  }
  if (!isNone(content.row)) checkRow(content.row, where);
  checkTensors(content, where);
  checkClasses(content, where);
}

/** A file of a bundle, and nothing beside it. */
function isInside(name: string): boolean {
  const outside = /[\\\0]/.test(name) || name.split("/").some((part) => ["", ".", ".."].includes(part));
  return !outside && !name.startsWith(".") && name !== MANIFEST && name !== SIGNATURE;
}

/** Every file is the bundle's, and has a digest and a role of its own: of two banks, say, that a merge left, one would be taken. */
function checkFiles(files: Json, where: string): void {
  const roles = new Map<string, string>();
  for (const [name, digest] of Object.entries(files)) {
    if (!isInside(name)) throw new HhdeployError(`${where}: files: ${JSON.stringify(name)}: expected a path inside of the bundle.`);
    expecting(files, where, "files.")(name, typeof digest === "string" && SHA256.test(digest), "64 hex digits");
    const role = name.replace(DIGITS, "");
    const other = roles.get(role);
    if (other !== undefined) throw new HhdeployError(`${where}: files: expected one ${role}, found ${other} and ${name}.`);
    roles.set(role, name);
  }
}

/**
 * The columns of the graph's logits are those of the heads that answer: of the only one in a folded bundle, else of the
 * widest. The softmax over a part of them would be wrong.
 */
function checkClasses(content: Json, where: string): void {
  const { classes, row } = content;
  if (!classes) return;
  if (isNone(row)) {
    (content.adapters as Json[]).forEach((entry, i) =>
      expecting(entry, where, `adapters[${i}].`)("classes", entry.classes === classes, `the graph's ${classes}`),
    );
    return;
  }
  const { classes: own, backbone_head: kept } = row as Row;
  const backbone = kept ? ((content.backbone as Json).classes as number) : 0;
  const widest = Math.max(own, backbone);
  const why = `${widest}, the most of row.classes (${own}) and of the backbone's own classifier (${kept ? backbone : "none"})`;
  expecting(content, where)("classes", classes === widest, why);
}

function checkEntry(entry: Json, { classes: most, row }: Json, where: string, prefix: string): void {
  const { name, classes, problem_type: means, verified, strength = 1 } = entry;
  const expect = expecting(entry, where, prefix);
  expect("name", typeof name === "string", "a name");
  expect("name", isInside(name as string) && !(name as string).includes("/"), "a name that a folder can have");
  expect("name", name !== BACKBONE, "another name than the bare model's");
  const placed = isCount(entry.row) && entry.row > 0;
  expect("row", placed || (isNone(row) && entry.row === null), "1 or more, or null in a folded bundle");
  expect("verified", typeof verified === "boolean", "true or false");
  expect("strength", Number.isFinite(strength), "a finite number");
  checkLicence(entry, where, prefix);
  expect("compressed", isLoss(entry.compressed), "an object of rank, max_range_error and worst_site, or null");
  expect("classes", isCount(classes), "a number of classes");
  expect("classes", !most || (classes as number) <= (most as number), `at most the graph's ${most}`);
  expect("class_names", Object.hasOwn(entry, "class_names"), "a list of names, or null");
  checkNames(entry, where, prefix);
  expect("problem_type", isNone(means) || isMeaning(means), `one of ${PROBLEM_TYPES.join(", ")}, or null`);
  expect("preprocess", isObject(entry.preprocess), "an object");
  checkPreprocess(entry.preprocess, undefined, where, prefix);
}

function checkBackbone(backbone: Json, where: string, prefix: string): void {
  const expect = expecting(backbone, where, prefix);
  for (const key of ["model", "sha256"]) expect(key, isText(backbone[key]), "a text");
  expect("args", isObject(backbone.args), "an object");
  expect("classifier", typeof backbone.classifier === "string", "a module's path");
  expect("dim", isCount(backbone.dim), "a number");
  for (const key of ["signs_sha256", "buffers_sha256"]) {
    expect(key, !(key in backbone) || typeof backbone[key] === "string", "a text");
  }
  expect("classes", isCount(backbone.classes), "a number of classes");
  checkNames(backbone, where, prefix);
  checkLicence(backbone, where, prefix);
  const { problem_type: means } = backbone;
  expect("problem_type", isNone(means) || isMeaning(means), `one of ${PROBLEM_TYPES.join(", ")}, or null`);
  expect("preprocess", isObject(backbone.preprocess), "an object");
  checkPreprocess(backbone.preprocess, undefined, where, prefix);
}

function checkNames(entry: Json, where: string, prefix: string): void {
  const { class_names: names, classes } = entry;
  expecting(entry, where, prefix)("class_names", isNone(names) || isStrings(names), "a list of names, or null");
  if (isStrings(names) && names.length && names.length !== classes) {
    throw new HhdeployError(`${where}: ${prefix}class_names: expected ${classes} names, found ${names.length}.`);
  }
}

function checkLicence(owner: Json, where: string, prefix: string): void {
  expecting(owner, where, prefix)("license", isLicence(owner.license), "a licence's name, a list of them, or null");
}

export const isLicence = (x: unknown) => isNone(x) || isText(x) || isStrings(x);

/** What an adapter lost by its compression, or nothing. */
export function isLoss(x: unknown): boolean {
  if (!isObject(x)) return isNone(x);
  return Object.keys(x).length === 3 && isCount(x.rank) && Number.isFinite(x.max_range_error) && isText(x.worst_site);
}

const isRange = (x: unknown) => Array.isArray(x) && x.length === 3 && x.every(isCount);
const orNull = (fits: (x: unknown) => boolean) => (x: unknown) => x === null || fits(x);
const isDigest = (x: unknown) => isText(x) && SHA256.test(x);

// An engine's entry; only Python can load what it is of.
const OF_ENGINES: Record<string, [(x: unknown) => boolean, string]> = {
  file: [isText, "a text"],
  backend: [(x) => x === "tensorrt" || x === "tensorrt-rtx", "one of tensorrt, tensorrt-rtx"],
  version: [isText, "a text"],
  precision: [(x) => isText(x) && PRECISIONS.includes(x), `one of ${PRECISIONS.join(", ")}`],
  architectures: [isStrings, "a list of names"],
  gpu: [orNull(isText), "a text, or null"],
  batch: [isRange, "three numbers"],
  slots: [orNull(isRange), "three numbers, or null"],
  bank_sha256: [orNull(isDigest), "64 hex digits, or null"],
  graph_sha256: [isText, "a text"],
  optimization_level: [orNull(isCount), "a number, or null"],
  build_seconds: [Number.isFinite, "a finite number"],
  bytes: [Number.isFinite, "a finite number"],
};

function checkEngine(engine: unknown, where: string, place: string): void {
  expecting({ [place]: engine }, where)(place, isObject(engine), "an object");
  const given = engine as Json;
  for (const [key, [fits, expected]] of Object.entries(OF_ENGINES)) {
    expecting(given, where, `${place}.`)(key, fits(given[key]), expected);
  }
  const more = Object.keys(given).filter((key) => !Object.hasOwn(OF_ENGINES, key));
  if (more.length) throw new HhdeployError(`${where}: ${place}: expected keys of an engine, found ${more.join(", ")}.`);
}

function checkRow(row: unknown, where: string): void {
  expecting({ row }, where)("row", isObject(row) && Array.isArray(row.branches), "an object with branches, or null");
  const given = row as Json;
  (given.branches as unknown[]).forEach((branch, i) => {
    const place = `row.branches[${i}]`;
    expecting({ [place]: branch }, where)(place, isBranch(branch), "a Linear's path, form, sites, sizes and rank");
  });
  for (const key of ["classes", "dim"]) expecting(given, where, "row.")(key, isCount(given[key]), "a number");
  expecting(given, where, "row.")("backbone_head", typeof given.backbone_head === "boolean", "true or false");
  const parts = partsOf(given as unknown as Row);
  const told: unknown[] = Array.isArray(given.parts) ? given.parts : [];
  if (told.length !== parts.length || !parts.every((part, i) => isPart(told[i], part))) {
    throw new HhdeployError(`${where}: row.parts: expected those of row.branches, in their order.`);
  }
  const size = parts.reduce((sum, { shape }) => sum + shape.reduce((a, b) => a * b, 1), 0);
  expecting(given, where, "row.")("size", given.size === size, `the ${size} values of its parts`);
}

function isPart(x: unknown, { part, offset, shape }: Part): boolean {
  const known = isObject(x) && Object.keys(x).length === 3 && x.part === part && x.offset === offset;
  return known && JSON.stringify(x.shape) === JSON.stringify(shape);
}

function isBranch(x: unknown): boolean {
  if (!isObject(x)) return false;
  const sizes = [x.out, x.in, x.rank].every(isCount) && (isNone(x.parts) || isStrings(x.parts));
  return sizes && typeof x.linear === "string" && typeof x.form === "string" && isStrings(x.sites);
}

const isMeaning = (x: unknown): x is ProblemType => PROBLEM_TYPES.includes(x as ProblemType);
