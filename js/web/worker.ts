/** Runs the model beside the page, which stays quick meanwhile. */

import {
  BACKBONE,
  decodePicture,
  fromUrl,
  HhdeployError,
  openBundle,
  type Bundle,
  type Picture,
  type Runtime,
  type Source,
} from "../src/index.js";
import type { Engine, FromWorker, Said, ToWorker } from "./messages.js";

const MOST_THREADS = 4;
// It cuts a row of the bank into more pieces than a shader may write.
const WIDE = ["branch/bank/split"];
const tell = (message: FromWorker) => postMessage(message);
let opened: Bundle | undefined;
let newest = 0; // the picture that counts; what is asked of an older one ends

addEventListener("message", ({ data }: MessageEvent<ToWorker>) => {
  if (data.ask === "open") void open(data);
  else void classify(data.number, data.picture);
});

async function open({ base, cache, precision, engine }: ToWorker & { ask: "open" }): Promise<void> {
  try {
    const progress = (file: string, loaded: number) => tell({ tell: "progress", file, loaded });
    const source = fromUrl(`${base}bundle/`, { progress, cache });
    const threads = crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
    const cpu = await build(base, "wasm", "", threads);
    let runs = `WebAssembly, ${threads === 1 ? "1 thread" : `${threads} threads`}`;
    if (await wantsGpu(precision, engine)) {
      try {
        opened = await openOnGpu(source, base, cpu, precision);
        runs = "WebGPU";
      } catch (error) {
        console.warn(`WebGPU does not run this graph: ${text(error)}`);
        runs += "; WebGPU does not run this graph";
      }
    }
    opened ??= await ran(openBundle(source, cpu, { precision, session: onCpu(precision) }), false);
    tell({ tell: "ready", adapters: names(opened), engine: runs });
  } catch (error) {
    tell({ tell: "broken", error: text(error) });
  }
}

/**
 * Optimising a graph of floats takes most of the time until the first answer, code that runs once and is compiled for
 * it, and saves a twentieth of an answer; what stands between integers in INT8 becomes integers by it.
 */
function onCpu(precision: string) {
  return precision === "int8" ? {} : { graphOptimizationLevel: "disabled" as const };
}

/** The GPU computes the graph; its build of the runtime lacks what pictures need. */
async function openOnGpu(source: Source, base: string, preprocessing: Runtime, precision: string): Promise<Bundle> {
  const ort = await build(base, "jspi", ".jspi", 1);
  const provider = { name: "webgpu" as const, forceCpuNodeNames: WIDE };
  const session = { executionProviders: [provider, "wasm"] };
  return ran(openBundle(source, ort, { precision, preprocessing, session }), true);
}

/** One of the runtime's builds; it loads its own code of WebAssembly when it is first used. */
async function build(base: string, name: string, suffix: string, threads: number) {
  const ort = await import(`${base}ort/ort.${name}.bundle.min.mjs`);
  ort.env.wasm.wasmPaths = { wasm: `${base}ort/ort-wasm-simd-threaded${suffix}.wasm` };
  ort.env.wasm.numThreads = threads;
  return ort as Runtime;
}

/** Where a GPU is, and the graph has no integers that it would not run. */
async function wantsGpu(precision: string, engine: Engine | undefined): Promise<boolean> {
  // The build for WebGPU waits for the GPU by what WebAssembly calls promise integration.
  const { gpu } = navigator as Navigator & { gpu?: { requestAdapter(): Promise<GpuAdapter | null> } };
  if (engine === "wasm" || precision === "int8" || !gpu || !("Suspending" in WebAssembly)) return false;
  const adapter = await gpu.requestAdapter().catch(() => null);
  return adapter !== null && (engine === "webgpu" || !adapter.info?.isFallbackAdapter);
}

/** `isFallbackAdapter`: software, slower than WebAssembly. */
interface GpuAdapter {
  info?: { isFallbackAdapter?: boolean };
}

/** All that can answer; the bare model too where it kept its classifier, and where there is nothing else. */
function names(bundle: Bundle): string[] {
  const adapters = [...bundle.adapters.keys()];
  return adapters.length ? adapters : [BACKBONE];
}

/**
 * A bundle of which everything ran once: then all that answers need is loaded, and kept. An adapter that has no answer
 * says so on its card; where none has one, a GPU may be why.
 */
async function ran(opening: Promise<Bundle>, onGpu: boolean): Promise<Bundle> {
  const bundle = await opening;
  const picture = { data: new Uint8Array(3 * 8 * 8), width: 8, height: 8 };
  const asked = names(bundle);
  for (const name of asked) await bundle.preprocess(picture, name);
  for (const name of asked) {
    try {
      await bundle.classify([picture], name);
      break;
    } catch (error) {
      if (!(error instanceof HhdeployError) || (onGpu && name === asked.at(-1))) throw error;
    }
  }
  return bundle;
}

/** What one adapter says; an error is its own, and takes no other's answer away. */
async function saidBy(bundle: Bundle, adapter: string, picture: Picture): Promise<Said> {
  const entry = bundle.adapters.get(adapter);
  const kind = entry?.problem_type ?? (entry?.classes === 1 ? "regression" : "single_label_classification");
  try {
    const [answers] = await bundle.classify([picture], adapter);
    return { adapter, kind, answers: answers! };
  } catch (error) {
    return { adapter, kind, answers: [], error: text(error) };
  }
}

async function classify(number: number, file: Blob): Promise<void> {
  newest = number;
  try {
    const bundle = opened!;
    const picture = await decodePicture(file);
    const transparent = isTransparent(picture);
    const begin = performance.now();
    const asked = names(bundle);
    for (const [i, adapter] of asked.entries()) {
      const said = await saidBy(bundle, adapter, picture);
      await new Promise((resolve) => setTimeout(resolve)); // a newer picture is heard of
      if (number !== newest) return;
      const [left, ms] = [asked.length - i - 1, performance.now() - begin];
      tell({ tell: "answers", number, said, left, ms, transparent });
    }
  } catch (error) {
    tell({ tell: "refused", number, error: text(error) });
  }
}

/** Whether anything can be seen through: canvases lose the colours there, which Python sees. */
function isTransparent({ data }: Picture): boolean {
  for (let i = 3; i < data.length; i += 4) if (data[i]! < 255) return true;
  return false;
}

const text = (error: unknown) => (error instanceof Error ? error.message : String(error));
