/** What the page and its worker tell each other. */

import type { Answer, ProblemType } from "../src/index.js";

/** page.json: what `hhdeploy web` wrote. */
export interface PageFacts {
  title: string;
  version: string;
  precision: string;
  /** Bytes of each file of the page. */
  sizes: Record<string, number>;
}

/** What one adapter says of a picture. */
export interface Said {
  adapter: string;
  kind: ProblemType;
  answers: Answer[];
  /** Why it has none. */
  error?: string;
}

/** What the address asks for, as ?engine=wasm; without, the page chooses. */
export type Engine = "wasm" | "webgpu";

export type ToWorker =
  | { ask: "open"; base: string; cache: string; precision: string; engine?: Engine }
  | { ask: "classify"; number: number; picture: Blob };

export type FromWorker =
  | { tell: "progress"; file: string; loaded: number }
  | { tell: "ready"; adapters: string[]; engine: string }
  | { tell: "broken"; error: string }
  | { tell: "answers"; number: number; said: Said; left: number; ms: number; transparent: boolean }
  | { tell: "refused"; number: number; error: string };
