/** Where everything stands in a row of the bank. */

import type { Row } from "./manifest.js";

/** A part of a row. */
export interface Part {
  part: string;
  /** Its first index. */
  offset: number;
  shape: number[];
}

/** All parts of a row, in their order. */
export function partsOf(row: Row): Part[] {
  const parts: Part[] = [];
  let offset = 0;
  const add = (part: string, ...shape: number[]) => {
    parts.push({ part, offset, shape });
    offset += shape.reduce((a, b) => a * b, 1);
  };
  for (const b of row.branches) {
    const n = b.sites.length;
    const name = `${b.linear}/${b.form}`;
    add(`${name}/diag`, n, Math.min(b.out, b.in));
    add(`${name}/right`, n, b.rank, b.in);
    add(`${name}/left_t`, n, b.rank, b.out);
    if (b.parts?.includes("s_in")) add(`${name}/s_in`, 1, b.in);
    for (const extra of ["s_out", "db"] as const) if (b.parts?.includes(extra)) add(`${name}/${extra}`, n, b.out);
  }
  if (row.classes) {
    add("head.weight", row.classes, row.dim);
    add("head.bias", row.classes);
    add("head.own", 1);
  }
  return parts;
}
