/**
 * Keeps the page, so that it opens without a network. Each file is kept by its sha256 and compared with it whenever it
 * is read: a kept file that was changed is fetched again. The model's own files are kept by the package, in the same
 * cache. Not a module: not every browser takes a service worker that is one.
 */

/** Path below the page -> sha256, of all files; `hhdeploy web` writes it above this code. */
declare const FILES: Record<string, string>;

interface Lasting extends Event {
  waitUntil(work: Promise<unknown>): void;
}
interface Fetching extends Lasting {
  request: Request;
  respondWith(response: Promise<Response>): void;
}
declare const registration: { scope: string };
declare const clients: { claim(): Promise<void> };
declare function skipWaiting(): Promise<void>;

const SCOPE = registration.scope;
const CACHE = `hhdeploy:${new URL(SCOPE).pathname}`;
// The runtime comes in two builds of many megabytes: kept is the one that the page used.
const later = (path: string) => path.startsWith("ort/");
const ofPackage = (path: string) => path.startsWith("bundle/") && path !== "bundle/hhdeploy.json";
const keyOf = (sha256: string) => `${SCOPE}.sha256/${sha256}`;

addEventListener("install", (event) => {
  const first = Object.keys(FILES).filter((path) => !later(path) && !ofPackage(path));
  (event as Lasting).waitUntil(Promise.all(first.map(keepNew)).then(skipWaiting));
});

addEventListener("activate", (event) => {
  (event as Lasting).waitUntil(sweep().then(() => clients.claim()));
});

addEventListener("fetch", (event) => {
  const { request } = event as Fetching;
  const path = pathOf(request.url);
  if (request.method !== "GET" || FILES[path] === undefined || ofPackage(path)) return;
  (event as Fetching).respondWith(answered(path, event as Lasting));
});

function pathOf(address: string): string {
  const url = new URL(address);
  const whole = url.origin + url.pathname;
  return whole.startsWith(SCOPE) ? decodeURIComponent(whole.slice(SCOPE.length)) || "index.html" : "";
}

/** From the network a file is answered while it comes: the runtime is compiled meanwhile. */
async function answered(path: string, event: Lasting): Promise<Response> {
  const there = await kept(path);
  if (there) return there;
  const response = await fetched(path);
  event.waitUntil(keep(path, response.clone()));
  return response;
}

/** A file of this version is there, or comes now: a site that is half replaced is not kept. */
async function keepNew(path: string): Promise<void> {
  if (await kept(path)) return;
  if (await keep(path, await fetched(path))) return;
  throw new Error(`${path}: expected the sha256 ${FILES[path]}, found another: the site is being replaced.`);
}

async function kept(path: string): Promise<Response | undefined> {
  const store = await caches.open(CACHE);
  const response = await store.match(keyOf(FILES[path]!));
  if (!response) return undefined;
  return (await sha256(await response.clone().arrayBuffer())) === FILES[path] ? response : undefined;
}

async function fetched(path: string): Promise<Response> {
  const response = await fetch(new URL(path === "index.html" ? "./" : path, SCOPE), { cache: "no-cache" });
  if (!response.ok) return response;
  const headers = new Headers(response.headers);
  headers.delete("content-encoding"); // the bytes are decoded by now
  headers.delete("content-length");
  return new Response(response.body, { headers });
}

/** Keeps a file, if it is the one of this version: whether it is. */
async function keep(path: string, response: Response): Promise<boolean> {
  const bytes = await response.arrayBuffer();
  if (!response.ok || (await sha256(bytes)) !== FILES[path]) return false;
  const store = await caches.open(CACHE);
  const whole = new Response(bytes, { headers: response.headers });
  await store.put(keyOf(FILES[path]!), whole).catch(() => undefined); // the disk may be full
  return true;
}

/** Files of older versions go. */
async function sweep(): Promise<void> {
  const store = await caches.open(CACHE);
  const right = new Set(Object.values(FILES));
  const old = (await store.keys()).filter(({ url }) => !right.has(url.slice(-64)));
  await Promise.all(old.map((request) => store.delete(request)));
}

async function sha256(bytes: ArrayBuffer): Promise<string> {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
}
