/** adapter_config.json: what it says, and whether it can. The checks are Python's; a test gives both the same files. */

import { HhdeployError } from "./errors.js";
import { expecting, isCount, isNone, isNumbers, isObject, isStrings, parseJson, textOf, type Json } from "./json.js";
import { isLicence, isLoss, PROBLEM_TYPES, type ProblemType } from "./manifest.js";
import { checkPreprocess, type AdapterPreprocess } from "./preprocess.js";
import { expressionOf, KINDS, SEQUENTIAL_KINDS } from "./sites.js";

export interface AdapterConfig {
  peft_type: string;
  schema_version: number;
  base_model_name_or_path: string;
  base_model_args?: Record<string, unknown> | null;
  base_sha256?: string | null;
  /** Of the weights' signs, where they were not float32. */
  base_signs_sha256?: string | null;
  base_buffers_sha256?: string | null;
  /** What the bare backbone computed of a fixed image; nothing is compared with it here. */
  base_answer?: Json | null;
  form: "additive" | "sequential";
  reflection?: "unnormalized" | "orthogonal";
  target_modules: string[] | string;
  num_classes?: number | null;
  class_names?: string[] | null;
  problem_type?: ProblemType | null;
  fold_only?: boolean;
  preprocess?: AdapterPreprocess | null;
}

const NEWEST_SCHEMA = 2;
const FORMS = ["additive", "sequential"];
const REFLECTIONS = ["unnormalized", "orthogonal"];

/**
 * Reads the bytes of an adapter_config.json; `where` names the file in messages. What the file leaves out of form,
 * reflection and targets is filled in.
 *
 * @throws HhdeployError naming file and key: no JSON object, a newer schema, an adapter that can only be folded, or a
 *   value that can not be.
 */
export function parseConfig(bytes: Uint8Array, where: string): AdapterConfig {
  const content = objectOf(bytes, where);
  if (content.peft_type !== "HTA") {
    throw new HhdeployError(
      `${where}: peft_type: expected HTA, found ${content.peft_type}. \`hhdeploy adapter import\` makes one of other ` +
        "adapters.",
    );
  }
  const { schema_version: version, base_model_args: given, num_classes: classes, problem_type: means } = content;
  const { form = "additive", reflection = "unnormalized", r = 1, fold_only = false, class_names: names } = content;
  const { target_modules = ["q", "k", "v", "proj"], base_sha256: digest, license, compressed } = content;
  const { base_signs_sha256: signs, base_buffers_sha256: buffers, base_answer: answer } = content;
  const expect = expecting(content, where);
  expect("schema_version", isCount(version), `an integer up to ${NEWEST_SCHEMA}`);
  if ((version as number) > NEWEST_SCHEMA) {
    throw new HhdeployError(
      `${where}: schema_version: expected at most ${NEWEST_SCHEMA}, found ${version}. A newer version of this package ` +
        "reads it.",
    );
  }
  const model = content.base_model_name_or_path;
  expect("base_model_name_or_path", typeof model === "string" && model !== "", "the name of a model");
  const args = given ?? {};
  expect("base_model_args", isObject(args), "an object or null");
  expect("form", FORMS.includes(form as string), `one of ${FORMS.join(", ")}`);
  expect("reflection", REFLECTIONS.includes(reflection as string), `one of ${REFLECTIONS.join(", ")}`);
  expect("r", isCount(r), "a rank of 0 or more");
  expect("fold_only", typeof fold_only === "boolean", "true or false");
  const targets = typeof target_modules === "string" ? [target_modules] : target_modules;
  expect(
    "target_modules",
    isStrings(targets) && targets.every((t) => t !== "" && expressionOf(t) !== undefined),
    `a list of ${KINDS.join(", ")}, site names or expressions that JavaScript reads too`,
  );
  expect(
    "target_modules",
    form !== "sequential" || !KINDS.some((k) => (targets as string[]).includes(k) && !SEQUENTIAL_KINDS.includes(k)),
    `${SEQUENTIAL_KINDS.join(", ")} or site names (form ${form})`,
  );
  expect("num_classes", isNone(classes) || (isCount(classes) && classes > 0), "a positive integer or null");
  expect("class_names", isNone(names) || isStrings(names), "a list of strings or null");
  const known = [...PROBLEM_TYPES, null, undefined] as unknown[];
  expect("problem_type", known.includes(means), `one of ${PROBLEM_TYPES.join(", ")}, or null`);
  expect("compressed", isLoss(compressed), "rank, max_range_error and worst_site, or null");
  expect("license", isLicence(license), "the name of a licence, a list of them, or null");
  expect("base_sha256", isNone(digest) || typeof digest === "string", "64 hex digits or null");
  expect("base_signs_sha256", isNone(signs) || typeof signs === "string", "64 hex digits or null");
  expect("base_buffers_sha256", isNone(buffers) || typeof buffers === "string", "64 hex digits or null");
  const answered = "input_size, classifier, rms, values, made_with and maybe full_precision, or null";
  expect("base_answer", isNone(answer) || isAnswer(answer), answered);
  checkPreprocess(content.preprocess, (args as Json).img_size, where);
  const config = { ...content, form, reflection, target_modules: targets } as AdapterConfig;
  checkClassNames(config.class_names, config.num_classes ?? undefined, where);
  checkMeaning(config.problem_type, config.num_classes ?? undefined, where);
  if (fold_only) {
    throw new HhdeployError(
      `${where}: fold_only: the adapter replaces parameters, which no row of a bank can hold: it can only be folded, ` +
        "with `hhdeploy export --fold`.",
    );
  }
  return config;
}

/** There is a name for each class, where both are known. */
export function checkClassNames(names: AdapterConfig["class_names"], classes: number | undefined, where: string): void {
  if (names && classes !== undefined && names.length !== classes) {
    throw new HhdeployError(
      `${where}: class_names: expected ${classes} names, one per class, found ${names.length}.`,
    );
  }
}

/** The softmax of one class is always 1. */
export function checkMeaning(means: AdapterConfig["problem_type"], classes: number | undefined, where: string): void {
  if (means === "single_label_classification" && classes === 1) {
    throw new HhdeployError(
      `${where}: problem_type: ${means} needs 2 classes or more, found 1, which would always be certain. Say ` +
        "regression (the output is a value) or multi_label_classification (a yes or no).",
    );
  }
}

function objectOf(bytes: Uint8Array, where: string): Json {
  let content: unknown;
  try {
    content = parseJson(textOf(bytes));
  } catch (error) {
    throw new HhdeployError(`${where}: expected JSON: ${(error as Error).message}.`);
  }
  if (!isObject(content)) throw new HhdeployError(`${where}: expected a JSON object, found ${JSON.stringify(content)}.`);
  return content;
}

function isAnswer(x: unknown): boolean {
  if (!isObject(x)) return false;
  const { input_size: size, classifier, rms, values, made_with: versions, full_precision: full, ...more } = x;
  const none = Object.keys(more).length === 0 && (full === undefined || typeof full === "boolean");
  const sized = isNumbers(size, 3) && size.every((n) => isCount(n) && n > 0);
  const counted = Array.isArray(values) && values.length > 0 && values.length <= 32;
  const texts = typeof classifier === "string" && typeof versions === "string";
  const known = counted && isNumbers([rms, ...values], values.length + 1) && (rms as number) > 0;
  return none && sized && texts && known && [rms as number, ...values].every((n) => Math.abs(n) < 1e38);
}
