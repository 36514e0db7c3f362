/** What Node has and browsers have not: files. */

import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";

import { HhdeployError } from "./errors.js";
import type { Source } from "./source.js";

export * from "./index.js";

/** Files of a folder; onnxruntime-node opens graphs and their weights by itself. */
export function fromFolder(folder: string): Source {
  return {
    name: folder,
    path: (file) => join(folder, file),
    async read(file) {
      try {
        // A pipe would be waited for, a device may have no end.
        if (!(await stat(join(folder, file))).isFile()) throw new Error("found something else");
        return await readFile(join(folder, file));
      } catch (error) {
        throw new HhdeployError(`${join(folder, file)}: expected a file: ${(error as Error).message}`);
      }
    },
  };
}
