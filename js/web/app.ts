/** The page that `hhdeploy web` writes: pictures in, answers of all adapters out, on this device. */
// Names and labels are other people's text: they enter the page as textContent alone.

import type { Answer } from "../src/index.js";
import type { Engine, FromWorker, PageFacts, Said, ToWorker } from "./messages.js";

const TOP = 3; // classes of an answer; labels that are said and values are all shown
const SMALL = 128; // pictures with fewer pixels a side are shown as they are, enlarged
const CONTROL_MS = 3000; // how long the page waits for its service worker
const TRANSPARENT = " What is transparent in the picture counted as black.";
const BASE = new URL("./", location.href).href;
const CACHE = `hhdeploy:${new URL(BASE).pathname}`;

const at = <E extends HTMLElement = HTMLElement>(id: string) => document.getElementById(id) as E;
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 6 });
let worker: Worker;
let adapters: string[] = []; // that answer; none yet
let waiting = "Asked as soon as the model is loaded."; // what a picture is told while there is none
let picture: Blob | undefined;
let asked = 0; // pictures so far
let said: Said[] = []; // of the newest one

// --- small things -------------------------------------------------------------------------------

function element(name: string, className = "", text?: string): HTMLElement {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

const plural = (n: number, one: string) => `${n} ${n === 1 ? one : `${one}s`}`;

function state(kind: "" | "good" | "bad", text: string): void {
  at("state").className = `state ${kind}`;
  at("state").textContent = text;
}

function refuse(text: string): void {
  at("refused").hidden = !text;
  at("refused").textContent = text;
}

const megabytes = (n: number) => `${(n / 1e6).toFixed(1)} MB`;

// --- loading ------------------------------------------------------------------------------------

async function start(): Promise<void> {
  await controlled();
  const response = await fetch("page.json");
  if (!response.ok) throw new Error(`page.json: expected a file, found status ${response.status}.`);
  const facts: PageFacts = await response.json();
  document.title = facts.title;
  at("title").textContent = facts.title;
  at("version").textContent = `hhdeploy ${facts.version} · ${facts.precision}`;
  // A worker of a blob keeps to this page's policy; one of an address would have none.
  const code = `import ${JSON.stringify(`${BASE}js/web/worker.js`)};postMessage("here");`;
  const address = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  worker = new Worker(address, { type: "module" });
  worker.onerror = (event) => broken(event.message || "The code of this page did not load.");
  await new Promise((resolve) => worker.addEventListener("message", resolve, { once: true }));
  URL.revokeObjectURL(address);
  worker.onmessage = ({ data }: MessageEvent<FromWorker>) => heard(data, facts);
  const engine = new URLSearchParams(location.search).get("engine");
  const wanted = engine === "wasm" || engine === "webgpu" ? { engine: engine as Engine } : {};
  tell({ ask: "open", base: BASE, cache: CACHE, precision: facts.precision, ...wanted });
}

const tell = (message: ToWorker) => worker.postMessage(message);

/** Waits until the service worker keeps what is loaded; the page works without one, in need of the network. */
async function controlled(): Promise<void> {
  const { serviceWorker } = navigator;
  if (!serviceWorker) return;
  const control = new Promise((resolve) => serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
  try {
    await serviceWorker.register("sw.js");
  } catch {
    return;
  }
  if (!serviceWorker.controller) {
    await Promise.race([control, new Promise((resolve) => setTimeout(resolve, CONTROL_MS))]);
  }
}

const loaded = new Map<string, number>();

function progressed(file: string, bytes: number, { sizes }: PageFacts): void {
  loaded.set(file, bytes);
  const sum = (numbers: number[]) => numbers.reduce((a, b) => a + b, 0);
  const ofBundle = Object.keys(sizes).filter((path) => path.startsWith("bundle/"));
  const [now, all] = [sum([...loaded.values()]), sum(ofBundle.map((path) => sizes[path]!))];
  at<HTMLProgressElement>("progress").value = now / all;
  at("loaded").textContent =
    `Loading the model, once: ${megabytes(now)} of ${megabytes(all)}. It is kept for the next time.`;
}

function broken(error: string): void {
  state("bad", "Not running");
  at("loading").hidden = true;
  refuse(error);
  adapters = [];
  waiting = "No adapter answers: the model is not running.";
  if (picture) at("said").textContent = waiting;
}

function heard(message: FromWorker, facts: PageFacts): void {
  if (message.tell === "progress") return progressed(message.file, message.loaded, facts);
  if (message.tell === "broken") return broken(message.error);
  if (message.tell === "ready") return ready(message.adapters, message.engine);
  if (message.number !== asked) return;
  if (message.tell === "refused") return unreadable(message.error);
  said.push(message.said);
  show(message.left, message.ms, message.transparent);
}

function ready(names: string[], engine: string): void {
  adapters = names;
  state("good", "Ready");
  at("loading").hidden = true;
  at("engine").textContent = engine;
  at("said").textContent = `${plural(names.length, "adapter")}: ${names.slice(0, 8).join(", ")}${names.length > 8 ? " …" : ""}`;
  if (picture) ask(picture);
}

// --- answers ------------------------------------------------------------------------------------

function take(file: Blob | null | undefined, name = "picture"): void {
  if (!file) return;
  picture = file;
  preview(file, name);
  if (adapters.length) ask(file);
  else at("said").textContent = waiting;
}

function preview(file: Blob, name: string): void {
  const image = at<HTMLImageElement>("preview");
  URL.revokeObjectURL(image.src);
  at("picture").textContent = name;
  image.onload = () => {
    const { naturalWidth: width, naturalHeight: height } = image;
    image.classList.toggle("small", Math.max(width, height) < SMALL);
    at("picture").textContent = `${name}, ${width} × ${height} pixels`;
  };
  image.alt = `The picture: ${name}`;
  image.src = URL.createObjectURL(file);
  image.hidden = false;
  at("invitation").hidden = true;
}

function ask(file: Blob): void {
  asked += 1;
  said = [];
  refuse("");
  at("answers").classList.add("older");
  at("said").textContent = `Asking ${plural(adapters.length, "adapter")} …`;
  tell({ ask: "classify", number: asked, picture: file });
}

function unreadable(error: string): void {
  at("preview").hidden = true;
  at("invitation").hidden = false;
  at("answers").replaceChildren();
  at("picture").textContent = "";
  at("said").textContent = "No adapter answered.";
  picture = undefined;
  refuse(error);
}

function show(left: number, ms: number, transparent: boolean): void {
  said.sort((a, b) => confidence(b) - confidence(a) || (a.adapter < b.adapter ? -1 : 1));
  at("answers").classList.remove("older");
  at("answers").replaceChildren(...said.map(card));
  const all = said.length + left;
  const answered = said.filter(({ error }) => error === undefined).length;
  const who = answered === all ? plural(all, "adapter") : `${answered} of ${plural(all, "adapter")}`;
  const time = ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
  at("said").textContent = left
    ? `${answered} of ${plural(all, "adapter")} answered …`
    : `${who} answered in ${time}.${transparent ? TRANSPARENT : ""}`;
}

/** How sure an adapter is of its best answer; values have no such thing, and come behind, errors last. */
function confidence({ kind, answers, error }: Said): number {
  if (error !== undefined) return -2;
  return kind === "regression" ? -1 : Math.max(0, ...answers.map((answer) => answer.score));
}

function card({ adapter, kind, answers, error }: Said): HTMLElement {
  const made = element("li");
  if (error !== undefined) {
    made.append(element("h3", "", adapter), element("p", "failed", error));
    return made;
  }
  const list = element("ol");
  const shown = kind === "regression" ? answers : answers.filter((a, i) => i < TOP || a.positive);
  list.append(...shown.map((answer) => line(answer, kind === "regression")));
  made.append(element("h3", "", adapter), list);
  return made;
}

function line({ label, score, positive }: Answer, value: boolean): HTMLElement {
  const item = element("li", positive || value ? "said" : "");
  const share = element("span", "share", value ? number.format(score) : percent(score));
  share.dataset["score"] = String(score);
  item.append(element("span", "label", label), share);
  if (!value) {
    const meter = element("meter") as HTMLMeterElement;
    meter.value = score;
    meter.setAttribute("aria-label", label);
    item.append(meter);
  }
  return item;
}

function percent(score: number): string {
  return Number.isNaN(score) ? "not a number" : `${(100 * score).toFixed(score < 0.0995 ? 1 : 0)} %`;
}

// --- the camera ---------------------------------------------------------------------------------

async function look(): Promise<void> {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    const video = at<HTMLVideoElement>("video");
    video.srcObject = stream;
    await video.play();
    at<HTMLDialogElement>("viewfinder").showModal();
  } catch (error) {
    refuse(`The camera did not open: ${(error as Error).message}. Choose a picture instead.`);
  }
}

function shut(): void {
  const video = at<HTMLVideoElement>("video");
  (video.srcObject as MediaStream | null)?.getTracks().forEach((track) => track.stop());
  video.srcObject = null;
}

function shoot(): void {
  const video = at<HTMLVideoElement>("video");
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [video.videoWidth, video.videoHeight];
  canvas.getContext("2d")!.drawImage(video, 0, 0);
  canvas.toBlob((blob) => take(blob, "taken now"));
  at<HTMLDialogElement>("viewfinder").close();
}

// --- what people do -----------------------------------------------------------------------------

function takeFile(file: File | undefined): void {
  take(file, file?.name || "pasted picture");
}

at("camera").hidden = !navigator.mediaDevices;
at("camera").addEventListener("click", () => void look());
at("shutter").addEventListener("click", shoot);
at("leave").addEventListener("click", () => at<HTMLDialogElement>("viewfinder").close());
at("viewfinder").addEventListener("close", shut);
at("file").addEventListener("change", (event) => takeFile((event.target as HTMLInputElement).files?.[0]));
document.addEventListener("paste", (event) => takeFile(event.clipboardData?.files[0]));
document.addEventListener("dragover", (event) => {
  event.preventDefault(); // a picture that misses the field must not replace the page
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", () => at("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  takeFile(event.dataTransfer?.files[0]);
});
start().catch((error) => broken(error.message));
