/** An open bundle: pictures in, answers out, any adapter for each picture. */

import type { InferenceSession, Tensor as OrtTensor } from "onnxruntime-common";
import type * as OrtCommon from "onnxruntime-common";

import { readAdapter, type Adapter } from "./adapter.js";
import { answersOf, checkNumbers, type Answer } from "./answers.js";
import { rowsOf } from "./bank.js";
import { checkName } from "./checks.js";
import { HhdeployError } from "./errors.js";
import { BACKBONE, MANIFEST, readManifest, type AdapterEntry, type Manifest } from "./manifest.js";
import { upright } from "./orientation.js";
import { checkResized, graphFor, type PreprocessGraph } from "./preprocess.js";
import { packRow } from "./row.js";
import { DamagedError, readChecked, type Source } from "./source.js";
import { checkGraph, checkPictures } from "./tensors.js";

/** onnxruntime-web or onnxruntime-node, imported by whoever opens a bundle. */
export type Runtime = Pick<typeof OrtCommon, "InferenceSession" | "Tensor">;

/** A decoded picture: `data` has 3 (RGB) or 4 (RGBA, as a canvas has it) bytes a pixel. */
export interface Picture {
  data: Uint8Array | Uint8ClampedArray;
  width: number;
  height: number;
  /** EXIF's number, 1 to 8, by which adapters that see pictures upright have it turned. Default 1: it is upright. */
  orientation?: number;
}

export interface OpenOptions {
  /** Which of the bundle's graphs; default float32. */
  precision?: string;
  /** For the runtime, e.g. `executionProviders: ["webgpu"]`. */
  session?: InferenceSession.SessionOptions;
  /** Runs the graphs of pictures, which need float64: onnxruntime-web's builds for WebGPU have none. Default: the same. */
  preprocessing?: Runtime;
}

const TRIES = 3;
const FLOAT16_MAX = 65504;
// Graphs of pictures: to optimise one takes longer than it saves.
const AS_IT_IS = { graphOptimizationLevel: "disabled" } as const;

/**
 * Opens a bundle. Every file is compared with the manifest's sha256 first; if the bundle is changed meanwhile, the
 * manifest is read again.
 *
 * @throws HhdeployError no bundle, a damaged file, a precision that it does not have.
 */
export async function openBundle(source: Source, ort: Runtime, options: OpenOptions = {}): Promise<Bundle> {
  let before = "";
  for (let attempt = 1; ; attempt++) {
    const { text, manifest } = readManifest(await source.read(MANIFEST), `${source.name}/${MANIFEST}`);
    try {
      return await opened(source, ort, manifest, options);
    } catch (error) {
      // A file of another version than the manifest, unless the manifest is still the same.
      if (!(error instanceof DamagedError) || text === before || attempt === TRIES) throw error;
      before = text;
    }
  }
}

async function opened(source: Source, ort: Runtime, manifest: Manifest, options: OpenOptions): Promise<Bundle> {
  const precision = options.precision ?? "float32";
  const graph = Object.hasOwn(manifest.graphs, precision) ? manifest.graphs[precision] : undefined;
  if (!graph) {
    const there = Object.keys(manifest.graphs).join(", ");
    throw new HhdeployError(`${source.name}: expected a precision of ${there}, found ${precision}.`);
  }
  const [rows, files] = await Promise.all([rowsOf(source, manifest), filesOf(source, manifest, graph)]);
  const settings = precision === "int8" ? exactProducts(options.session) : options.session;
  const session = await sessionOf(source, ort, graph, files, settings);
  checkGraph(session, manifest, precision, `${source.name}/${MANIFEST}`);
  return new Bundle(source, ort, options.preprocessing ?? ort, manifest, session, rows);
}

/** Kernels that are right on x86 before VNNI too, where the usual ones add 8-bit products in 16 bits and overflow. */
function exactProducts(options: InferenceSession.SessionOptions = {}): InferenceSession.SessionOptions {
  const extra = (options.extra ?? {}) as { session?: object };
  return { ...options, extra: { ...extra, session: { x64quantprecision: "1", ...extra.session } } };
}

/** A graph, and its weights where they lie beside it. */
interface GraphFiles {
  bytes: Uint8Array;
  externalData: { path: string; data: Uint8Array }[];
}

async function filesOf(source: Source, manifest: Manifest, graph: string): Promise<GraphFiles> {
  const path = `${graph}.data`;
  // A runtime that opens files by itself would take weights that nobody compared.
  if (source.path && !(path in manifest.files) && (await there(source, path))) {
    throw new HhdeployError(
      `${source.name}/${MANIFEST}: files: expected the sha256 of ${path}, found none. Export the bundle again.`,
    );
  }
  const [bytes, data] = await Promise.all([
    readChecked(source, graph, manifest.files),
    path in manifest.files ? readChecked(source, path, manifest.files) : undefined,
  ]);
  return { bytes, externalData: data ? [{ path, data }] : [] };
}

function there(source: Source, file: string): Promise<boolean> {
  return source.read(file).then(
    () => true,
    () => false,
  );
}

async function sessionOf(
  source: Source,
  ort: Runtime,
  graph: string,
  { bytes, externalData }: GraphFiles,
  options: InferenceSession.SessionOptions = {},
): Promise<InferenceSession> {
  try {
    if (source.path) return await ort.InferenceSession.create(source.path(graph), options);
    return await ort.InferenceSession.create(bytes, { ...options, externalData });
  } catch (error) {
    const said = error instanceof Error ? error.message : String(error);
    throw new HhdeployError(
      `${source.name}: ${graph}: expected a graph that the runtime can open: ${said.trim().replace(/\.?$/, ".")} If it is as ` +
        "it was exported, the runtime lacks what it needs; else export the bundle again.",
      { cause: error },
    );
  }
}

/** An adapter as it is at one moment: another one may get its name while a call is under way. */
interface Found {
  name: string;
  /** Undefined: the backbone. */
  entry: AdapterEntry | undefined;
  /** Its values of the bank; undefined where the graph holds them. */
  row: Float32Array | undefined;
}

export class Bundle {
  /** Adapters by name: those of the bundle, then those that were added. */
  readonly adapters = new Map<string, AdapterEntry>();
  readonly #graphs = new Map<string, Promise<InferenceSession>>();

  /** Use {@link openBundle}. */
  constructor(
    private readonly source: Source,
    private readonly ort: Runtime,
    private readonly small: Runtime,
    readonly manifest: Manifest,
    private readonly session: InferenceSession,
    private readonly rows: Map<string, Float32Array>,
  ) {
    for (const entry of manifest.adapters) this.adapters.set(entry.name, entry);
  }

  /**
   * Adds an adapter directory, or puts it in the place of one of its name. The bundle's files stay as they are.
   *
   * @throws HhdeployError a name that none may have, no adapter of this backbone, or there is no room for it.
   */
  async add(name: string, directory: Source): Promise<AdapterEntry> {
    const { row, backbone } = this.manifest;
    if (!row || this.manifest.bank_as_constant) {
      throw new HhdeployError(`${this.source.name}: its adapters are fixed. Export side branches without --fold.`);
    }
    checkName(name);
    const adapter = await readAdapter(directory);
    const packed = packRow(adapter, row, backbone);
    checkRoom(adapter, packed, this.manifest);
    const { config, head } = adapter;
    const own = config.preprocess ?? undefined;
    const graph = own ? graphFor(own, this.manifest.files) : backbone.preprocess_graph;
    const theirs = head ? {} : { names: backbone.class_names, means: backbone.problem_type };
    const means = config.problem_type ?? theirs.means;
    const entry: AdapterEntry = {
      name,
      classes: head?.weight.shape[0] ?? backbone.classes,
      class_names: config.class_names ?? theirs.names ?? null,
      preprocess: own ?? backbone.preprocess,
      ...(means ? { problem_type: means } : {}),
      ...(graph ? { preprocess_graph: graph } : {}),
    };
    this.rows.set(name, packed);
    this.adapters.set(name, entry);
    return entry;
  }

  /**
   * All answers of each picture, the most probable first.
   *
   * @param pictures decoded, of any sizes.
   * @param adapters one name for all, or one for each; {@link BACKBONE} is the bare model.
   * @throws HhdeployError no picture, an unknown adapter, or logits that are no numbers.
   */
  async classify(pictures: Picture[], adapters: string | string[] = this.#only()): Promise<Answer[][]> {
    const names = typeof adapters === "string" ? pictures.map(() => adapters) : adapters;
    if (names.length !== pictures.length || !names.length) {
      throw new HhdeployError(
        `expected one adapter for all of at least one picture, or one for each, found ${names.length} for ` +
          `${pictures.length} pictures.`,
      );
    }
    const found = this.#found(names);
    const images = await Promise.all(pictures.map((picture, i) => this.#preprocess(picture, found[i]!)));
    const size = images[0]!.length;
    const batch = new Float32Array(images.length * size);
    images.forEach((image, i) => batch.set(image, i * size));
    const logits = await this.#run(batch, found);
    const columns = logits.length / found.length;
    return found.map(({ name, entry }, i) => {
      const classes = entry?.classes ?? this.manifest.backbone.classes;
      const own = logits.subarray(i * columns, (i + 1) * columns);
      checkNumbers(own, entry, classes, `picture ${i}, adapter ${name}`);
      return answersOf(own, entry, classes);
    });
  }

  /** A picture as the model takes it for an adapter: float32 [channels, H, W], flat. */
  async preprocess(picture: Picture, adapter: string): Promise<Float32Array> {
    return this.#preprocess(picture, this.#found([adapter])[0]!);
  }

  async #preprocess(picture: Picture, { name: adapter, entry }: Found): Promise<Float32Array> {
    const { preprocess, preprocess_graph: graph } = entry ?? this.manifest.backbone;
    if (!graph) {
      throw new HhdeployError(
        `${adapter}: the bundle has no graph that preprocesses pictures for it. Export it again with a newer ` +
          "hhdeploy; filters beside bicubic and bilinear have none, nor have models of other channels than 1 or 3.",
      );
    }
    const session = await this.#graph(graph);
    const turned = preprocess.exif ? upright(picture) : picture;
    checkResized(graph, turned.width, turned.height);
    const feeds: Record<string, OrtTensor> = { image: this.#image(turned) };
    for (const [name, { dtype, value }] of Object.entries(graph.inputs)) {
      feeds[name] =
        dtype === "int64"
          ? new this.small.Tensor("int64", BigInt64Array.from(value, BigInt), [value.length])
          : new this.small.Tensor("float32", Float32Array.from(value), [value.length]);
    }
    return (await session.run(feeds))["images"]!.data as Float32Array;
  }

  /**
   * Logits of preprocessed images, float32 [batch, classes], flat; columns past an adapter's own are -Infinity.
   *
   * @param images float32 [batch, channels, H, W], flat.
   * @param adapters one name for each image.
   * @throws HhdeployError another number of values than the names need, or an unknown adapter.
   */
  async run(images: Float32Array, adapters: string[]): Promise<Float32Array> {
    const [, ...shape] = this.manifest.tensors["images"] as [string, number, number, number];
    const each = shape.reduce((a, b) => a * b, 1);
    if (!adapters.length || images.length !== adapters.length * each) {
      throw new HhdeployError(
        `images: expected ${each} values ([${shape}]) for each of at least one name, found ${images.length} values ` +
          `for ${adapters.length} names.`,
      );
    }
    return this.#run(images, this.#found(adapters));
  }

  async #run(images: Float32Array, found: Found[]): Promise<Float32Array> {
    const [, ...shape] = this.manifest.tensors["images"] as [string, number, number, number];
    const feeds: Record<string, OrtTensor> = {
      images: new this.ort.Tensor("float32", images, [found.length, ...shape]),
    };
    if (this.manifest.row) Object.assign(feeds, this.#branches(found));
    else found.forEach(({ name }) => this.#folded(name));
    const outputs = await this.session.run(feeds);
    const logits = outputs["logits"];
    if (!logits) throw new HhdeployError(`${this.source.name}: its graph has no logits.`);
    const { classes } = this.manifest;
    if (logits.dims[1] !== classes) {
      throw new HhdeployError(
        `${this.source.name}: expected logits of ${classes} classes, as its manifest has it, found [${logits.dims}].`,
      );
    }
    return logits.data as Float32Array;
  }

  /** Frees what the runtime holds. */
  async close(): Promise<void> {
    const graphs = await Promise.all(this.#graphs.values());
    await Promise.all([this.session, ...graphs].map((session) => session.release()));
  }

  /** Row numbers, and a bank of no more rows than the batch needs: the runtime copies it at every run. */
  #branches(found: Found[]): Record<string, OrtTensor> {
    const ids = new this.ort.Tensor("int64", new BigInt64Array(found.length), [found.length]);
    const numbers = ids.data as BigInt64Array;
    if (this.manifest.bank_as_constant) {
      found.forEach(({ entry }, i) => (numbers[i] = BigInt(entry?.row ?? 0)));
      return { adapter_ids: ids };
    }
    const used = [...new Set(found.map(({ row }) => row!))];
    found.forEach(({ row }, i) => (numbers[i] = BigInt(used.indexOf(row!))));
    const size = this.manifest.row!.size;
    const bank = new Float32Array(used.length * size);
    used.forEach((row, i) => bank.set(row, i * size));
    return { adapter_ids: ids, adapter_bank: new this.ort.Tensor("float32", bank, [used.length, size]) };
  }

  /** Adapters with their rows, all at the same moment. */
  #found(names: string[]): Found[] {
    return names.map((name) => ({ name, entry: this.#entry(name), row: this.rows.get(name) }));
  }

  /** The entry of an adapter; undefined for the backbone. */
  #entry(name: string): AdapterEntry | undefined {
    const entry = this.adapters.get(name);
    if (!entry && name !== BACKBONE) {
      throw new HhdeployError(`expected an adapter of ${[...this.adapters.keys()].join(", ")}, found ${name}.`);
    }
    if (!entry && this.manifest.row && !this.manifest.row.backbone_head) {
      throw new HhdeployError("the bundle did not keep the backbone's own classifier.");
    }
    return entry;
  }

  #folded(name: string): void {
    if (name !== this.#only()) {
      throw new HhdeployError(`${this.source.name}: ${this.#only()} is folded into it, found ${name}.`);
    }
  }

  /** The adapter where there is no choice. */
  #only(): string {
    const names = [...this.adapters.keys()];
    if (names.length > 1) throw new HhdeployError(`expected the name of an adapter: ${names.join(", ")}.`);
    return names[0] ?? BACKBONE;
  }

  /** A session of a preprocessing graph, opened once; one that did not open is tried again. */
  #graph({ file, inputs }: PreprocessGraph): Promise<InferenceSession> {
    const there = this.#graphs.get(file);
    if (there) return there;
    const opening = filesOf(this.source, this.manifest, file)
      .then((files) => sessionOf(this.source, this.small, file, files, AS_IT_IS))
      .then((session) => checkPictures(session, inputs, `${this.source.name}: ${file}`));
    this.#graphs.set(file, opening);
    opening.catch(() => this.#graphs.delete(file));
    return opening;
  }

  #image({ data, width, height }: Picture): OrtTensor {
    const pixels = width * height;
    const each = data.length / pixels;
    if (!(pixels > 0) || (each !== 3 && each !== 4)) {
      throw new HhdeployError(`expected 3 or 4 bytes for each of ${width} x ${height} pixels, found ${data.length}.`);
    }
    const rgb = new Uint8Array(pixels * 3);
    for (let i = 0; i < pixels; i++) {
      for (let c = 0; c < 3; c++) rgb[3 * i + c] = data[each * i + c]!;
    }
    return new this.small.Tensor("uint8", rgb, [height, width, 3]);
  }
}

/** What rows of the graphs that there are can not hold. */
function checkRoom({ source, head }: Adapter, packed: Float32Array, { row, classes, graphs }: Manifest): void {
  if (head && classes && !row?.classes) {
    throw new HhdeployError(
      `${source}: it has a classifier, the bundle has room for none. Export with --max-classes ${head.weight.shape[0]}.`,
    );
  }
  const beyond = "float16" in graphs && packed.find((x) => Number.isFinite(x) && Math.abs(x) > FLOAT16_MAX);
  if (beyond) {
    throw new HhdeployError(
      `${source}: a value of ${beyond.toPrecision(3)} in its row is beyond float16's range (${FLOAT16_MAX}), and the ` +
        "bundle has a float16 graph. Use bfloat16.",
    );
  }
}
