/** Where a bundle's files come from. */

import { HhdeployError } from "./errors.js";

/** Files of one directory, by their names in the manifest. */
export interface Source {
  /** For messages. */
  readonly name: string;
  /** The bytes of a file. */
  read(file: string): Promise<Uint8Array>;
  /** Where the runtime itself can open a file, if it can. */
  path?(file: string): string;
  /** The bytes that were kept of a file with this sha256; whoever asks compares them with it. */
  kept?(sha256: string): Promise<Uint8Array | undefined>;
  /** Keeps bytes of this sha256 for another time. */
  keep?(sha256: string, bytes: Uint8Array): Promise<void>;
}

/** Bytes of one file so far; `total` is not known everywhere. */
export type Progress = (file: string, loaded: number, total: number | undefined) => void;

export interface UrlOptions {
  /** Told as bytes arrive. */
  progress?: Progress;
  /** Aborts what is under way. */
  signal?: AbortSignal;
  /** Of the browser's Cache Storage: where files of a bundle are kept, by their sha256; without, nothing is kept. */
  cache?: string;
}

/** Files below a URL, e.g. of a static web server. */
export function fromUrl(base: string | URL, options: UrlOptions = {}): Source {
  const root = new URL(base, globalThis.location?.href);
  if (!root.pathname.endsWith("/")) root.pathname += "/";
  return {
    name: root.href,
    async read(file) {
      const url = new URL(file.split("/").map(encodeURIComponent).join("/"), root);
      const request: RequestInit = options.signal ? { signal: options.signal } : {};
      const response = await fetch(url, request);
      if (!response.ok) {
        throw new HhdeployError(`${url}: expected a file, found status ${response.status}.`);
      }
      return received(response, file, options.progress);
    },
    ...(options.cache && globalThis.caches ? keeper(root, options.cache) : {}),
  };
}

/** Keeps files in the Cache Storage of a browser. A browser that keeps nothing, e.g. of a full disk, reads again. */
function keeper(root: URL, cache: string): Required<Pick<Source, "kept" | "keep">> {
  const key = (sha256: string) => new URL(`.sha256/${sha256}`, root);
  return {
    async kept(sha256) {
      const there = await (await caches.open(cache)).match(key(sha256));
      return there && new Uint8Array(await there.arrayBuffer());
    },
    async keep(sha256, bytes) {
      const store = await caches.open(cache);
      await store.put(key(sha256), new Response(bytes as Uint8Array<ArrayBuffer>)).catch(() => undefined);
    },
  };
}

async function received(response: Response, file: string, progress?: Progress): Promise<Uint8Array> {
  if (!progress || !response.body) return new Uint8Array(await response.arrayBuffer());
  // The length of what travels, which is not that of what arrives where it is compressed.
  const plain = !response.headers.get("content-encoding");
  const total = plain ? Number(response.headers.get("content-length")) || undefined : undefined;
  const pieces: Uint8Array[] = [];
  let loaded = 0;
  const reader = response.body.getReader();
  for (let step = await reader.read(); !step.done; step = await reader.read()) {
    pieces.push(step.value);
    loaded += step.value.length;
    progress(file, loaded, total);
  }
  const whole = new Uint8Array(loaded);
  let position = 0;
  for (const piece of pieces) {
    whole.set(piece, position);
    position += piece.length;
  }
  return whole;
}

/**
 * The bytes of a file, if they are those that the manifest knows.
 *
 * @throws DamagedError they are not.
 */
export async function readChecked(
  source: Source,
  file: string,
  files: Record<string, string>,
): Promise<Uint8Array> {
  const expected = files[file];
  if (expected === undefined) {
    throw new HhdeployError(`${source.name}: the manifest names no file ${file}.`);
  }
  const kept = await source.kept?.(expected);
  if (kept && (await sha256(kept)) === expected) return kept;
  const bytes = await source.read(file);
  const found = await sha256(bytes);
  if (found !== expected) {
    throw new DamagedError(
      `${source.name}: ${file}: expected the sha256 ${expected.slice(0, 12)}…, found ` +
        `${found.slice(0, 12)}…: the file is damaged, or of another version of the bundle.`,
    );
  }
  await source.keep?.(expected, bytes);
  return bytes;
}

/** A file is not what the manifest says. */
export class DamagedError extends HhdeployError {
  override name = "DamagedError";
}

async function sha256(bytes: Uint8Array): Promise<string> {
  if (!globalThis.crypto?.subtle) {
    throw new HhdeployError(
      "crypto.subtle: expected it, to compare files with their sha256; browsers have it on pages " +
        "of https and of localhost alone. Serve the page so.",
    );
  }
  const digest = await crypto.subtle.digest("SHA-256", bytes as Uint8Array<ArrayBuffer>);
  return Array.from(new Uint8Array(digest), (b) => b.toString(16).padStart(2, "0")).join("");
}
