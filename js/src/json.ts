/** What values of JSON are, and the errors that say what they should have been. */

import { HhdeployError } from "./errors.js";

export type Json = Record<string, unknown>;

/**
 * The text of a file of JSON, which is UTF-8 without a mark in front.
 *
 * @throws TypeError it is not UTF-8.
 */
export function textOf(bytes: Uint8Array): string {
  return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
}

/**
 * `JSON.parse`, which takes the last of a key's values, and says nothing of the others.
 *
 * @throws SyntaxError no JSON. HhdeployError a key is twice in one object, a number is an infinity to it, a text no text,
 *   it is too deep.
 */
export function parseJson(text: string): unknown {
  const content: unknown = JSON.parse(text, (key, value: unknown) => {
    if (value === Infinity || value === -Infinity) throw new HhdeployError(`${key}: a number beyond the range that there is`);
    if (HALF.test(key) || (isText(value) && HALF.test(value))) throw new HhdeployError("a text with half of a character");
    return value;
  });
  const open: Set<string>[] = []; // of a list it is empty
  for (const [token, key] of text.matchAll(TOKEN)) {
    if (token === "{" || token === "[") open.push(new Set());
    else if (token === "}" || token === "]") open.pop();
    else if (key !== undefined) {
      const name: string = JSON.parse(key);
      if (open.at(-1)!.has(name)) throw new HhdeployError(`${JSON.stringify(name)} is there twice`);
      open.at(-1)!.add(name);
    }
    if (open.length > DEEPEST) throw new HhdeployError(`more than ${DEEPEST} levels of lists and objects`);
  }
  return content;
}

const HALF = /\p{Surrogate}/u; // without the other half
const DEEPEST = 100; // levels, as Python takes
// Of valid JSON: brackets, keys, and texts, which are passed over.
const TOKEN = /[{}[\]]|("(?:[^"\\]|\\.)*")(?=\s*:)|"(?:[^"\\]|\\.)*"/g;

/** `expect(key, fits, expected)` throws, naming file, key and what was found there, where it does not fit. */
export function expecting(content: Json, where: string, prefix = "") {
  return (key: string, fits: boolean, expected: string): void => {
    if (fits) return;
    const found = JSON.stringify(content[key]);
    throw new HhdeployError(`${where}: ${prefix}${key}: expected ${expected}, found ${found}.`);
  };
}

export const isNone = (x: unknown): x is null | undefined => x === null || x === undefined;
export const isObject = (x: unknown): x is Json => typeof x === "object" && x !== null && !Array.isArray(x);
export const isCount = (x: unknown): x is number => Number.isInteger(x) && (x as number) >= 0 && (x as number) < 2 ** 31;
export const isStrings = (x: unknown): x is string[] =>
  Array.isArray(x) && x.every((each) => typeof each === "string");
export const isText = (x: unknown): x is string => typeof x === "string";
export const isNumbers = (x: unknown, length: number): x is number[] =>
  Array.isArray(x) && x.length === length && x.every(Number.isFinite);
