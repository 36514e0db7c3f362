/** What values of JSON are, and the errors that say what they should have been. */

import { HhdeployError } from "./errors.js";

export type Json = Record<string, unknown>;

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
export const isCount = (x: unknown): x is number => Number.isSafeInteger(x) && (x as number) >= 0;
export const isStrings = (x: unknown): x is string[] =>
  Array.isArray(x) && x.every((each) => typeof each === "string");
export const isNumbers = (x: unknown, length: number): x is number[] =>
  Array.isArray(x) && x.length === length && x.every(Number.isFinite);
