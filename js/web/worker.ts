/** Runs the model beside the page, which stays quick meanwhile. */

import { BACKBONE, decodePicture, fromUrl, openBundle, type Bundle, type Runtime } from "../src/index.js";
import type { FromWorker, ToWorker } from "./messages.js";

const MOST_THREADS = 4;
const tell = (message: FromWorker) => postMessage(message);
let opened: Promise<Bundle> | undefined;
let newest = 0; // the picture that counts; what is asked of an older one ends

addEventListener("message", ({ data }: MessageEvent<ToWorker>) => {
  if (data.ask === "open") void open(data);
  else void classify(data.number, data.picture);
});

async function open({ base, cache, precision }: ToWorker & { ask: "open" }): Promise<void> {
  try {
    const progress = (file: string, loaded: number) => tell({ tell: "progress", file, loaded });
    const { ort, providers, engine } = await runtime(base, precision);
    opened = openBundle(fromUrl(`${base}bundle/`, { progress, cache }), ort, {
      precision,
      session: { executionProviders: providers },
    });
    const bundle = await opened;
    await warm(bundle);
    tell({ tell: "ready", adapters: names(bundle), engine });
  } catch (error) {
    tell({ tell: "broken", error: text(error) });
  }
}

interface Chosen {
  ort: Runtime;
  providers: string[];
  engine: string;
}

/** WebGPU where the browser has it whole, and the graph has no integers that it would not run; else WebAssembly. */
async function runtime(base: string, precision: string): Promise<Chosen> {
  const gpu = precision === "int8" ? null : await adapterOfGpu();
  const build = gpu ? "jspi" : "wasm";
  const ort = await import(`${base}ort/ort.${build}.bundle.min.mjs`);
  ort.env.wasm.wasmPaths = { wasm: `${base}ort/ort-wasm-simd-threaded${gpu ? ".jspi" : ""}.wasm` };
  const threads = crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
  ort.env.wasm.numThreads = threads;
  const engine = gpu ? "WebGPU" : `WebAssembly, ${threads === 1 ? "1 thread" : `${threads} threads`}`;
  return { ort, providers: gpu ? ["webgpu", "wasm"] : ["wasm"], engine };
}

async function adapterOfGpu(): Promise<unknown> {
  // The build for WebGPU waits for the GPU by what WebAssembly calls promise integration.
  const waits = "Suspending" in WebAssembly;
  const { gpu } = navigator as { gpu?: { requestAdapter(): Promise<unknown> } };
  return waits && gpu ? gpu.requestAdapter().catch(() => null) : null;
}

/** All that can answer; the bare model too where it kept its classifier, and where there is nothing else. */
function names(bundle: Bundle): string[] {
  const adapters = [...bundle.adapters.keys()];
  return adapters.length ? adapters : [BACKBONE];
}

/** Everything runs once: then all that answers need is loaded, and kept. */
async function warm(bundle: Bundle): Promise<void> {
  const picture = { data: new Uint8Array(3 * 8 * 8), width: 8, height: 8 };
  const asked = names(bundle);
  for (const name of asked) await bundle.preprocess(picture, name);
  await bundle.classify([picture], asked[0]!);
}

async function classify(number: number, file: Blob): Promise<void> {
  newest = number;
  try {
    const bundle = await opened!;
    const picture = await decoded(file);
    const begin = performance.now();
    const asked = names(bundle);
    for (const [i, adapter] of asked.entries()) {
      const [answers] = await bundle.classify([picture], adapter);
      await new Promise((resolve) => setTimeout(resolve)); // a newer picture is heard of
      if (number !== newest) return;
      const entry = bundle.adapters.get(adapter);
      const kind = entry?.problem_type ?? (entry?.classes === 1 ? "regression" : "single_label_classification");
      const [left, ms] = [asked.length - i - 1, performance.now() - begin];
      tell({ tell: "answers", number, said: { adapter, kind, answers: answers! }, left, ms });
    }
  } catch (error) {
    tell({ tell: "refused", number, error: text(error) });
  }
}

async function decoded(file: Blob) {
  try {
    return await decodePicture(file);
  } catch {
    throw new Error("Expected a picture that this browser can read, found none: JPEG, PNG and WebP are read everywhere.");
  }
}

const text = (error: unknown) => (error instanceof Error ? error.message : String(error));
