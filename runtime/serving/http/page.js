// The page at `/`. Numbers come from /status, answers from the protocol's own infer.
// Names and labels are other people's text: they enter the page as textContent alone.

const EVERY_MS = 2000; // between two looks at /status
const AT_MOST_MS = 20_000; // the same, where looking takes long
const TIMEOUT_MS = 10_000; // of one look
const MOST = 200; // adapters shown, and asked, at a time
const TOP = 3; // classes of an answer; labels that are said and values are all shown
const BESIDE = 100_000; // bytes of a request beside its picture
const SMALL = 128; // pictures with fewer pixels a side are shown as they are, enlarged
const STATES = ["ready", "on disk", "broken", "unloaded"];
const NUMBERS = ["Classes", "Row", "Images answered"]; // columns of the table
const REASONS = { // why a request failed
  REJECTED: "refused",
  CANCELED: "cancelled",
  BACKEND: "in the session",
  OTHER: "wrong",
};

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");
const number = new Intl.NumberFormat("en", { maximumSignificantDigits: 6 });
const NO_NUMBER = "not a number";
const LEAD = "Every adapter says what it sees in a picture, all of them in one batch.";
const NO_ANSWERS = "This bundle gives features and no answers: ask for them over HTTP or gRPC.";
let status = null; // the last one that came
let picture = null; // the file that was chosen last
let token = sessionStorage.getItem("token") ?? ""; // what the server wants to see, if it does

// --- small things -------------------------------------------------------------------------------

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** Change a text only if it is another one: a selection survives, a reader is not told twice. */
function put(id, text) {
  if ($(id).textContent !== text) $(id).textContent = text;
}

function plural(n, one, many = `${one}s`) {
  return `${count.format(n)} ${n === 1 ? one : many}`;
}

function milliseconds(value) {
  if (value === null) return "–";
  return value < 10 ? `${value.toFixed(1)} ms` : `${count.format(Math.round(value))} ms`;
}

function duration(seconds) {
  const units = [["day", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  const first = units.findIndex(([, size]) => seconds >= size);
  if (first < 0) return "0 s";
  let left = Math.floor(seconds);
  return units.slice(first, first + 2).map(([unit, size]) => {
    const whole = Math.floor(left / size);
    left -= whole * size;
    return unit === "day" ? plural(whole, unit) : `${whole} ${unit}`;
  }).join(" ");
}

function bytes(n) {
  if (n < 1e3) return plural(n, "byte");
  const [unit, size] = n < 1e6 ? ["kB", 1e3] : ["MB", 1e6];
  return `${(n / size).toFixed(1)} ${unit}`;
}

const canAnswer = (adapter) => adapter.state === "ready" || adapter.state === "on disk";

function matching() {
  const wanted = $("filter").value.trim().toLowerCase();
  return status.adapters.filter(
    (a) => a.name.toLowerCase().includes(wanted) || a.state.startsWith(wanted),
  );
}

// --- numbers ------------------------------------------------------------------------------------

function show() {
  document.title = `${status.model} – hhdeploy`;
  put("model", status.model);
  put("about", [status.device, status.precision, `up ${duration(status.uptime_seconds)}`]
    .filter(Boolean).join(" · "));
  put("version", `hhdeploy ${status.version}`);
  put("answered", count.format(status.requests.answered));
  put("failed", failures(status.requests.failed));
  put("images", count.format(status.images));
  put("batches", status.images
    ? `${(status.images / status.batches).toFixed(1)} in a batch on average` : "");
  put("queued", count.format(status.queued_images));
  put("largest", `up to ${status.max_batch} go in one batch`);
  $("playground").hidden = !status.answers;
  put("lead", status.answers ? LEAD : NO_ANSWERS);
  $("bank").hidden = !status.bank;
  if (status.bank) {
    const { rows_used: used, rows, evictions, load_failures: failed } = status.bank;
    put("rows", `${count.format(used)} of ${count.format(rows)}`);
    put("evictions", [plural(evictions, "eviction"), failed && plural(failed, "failed load")]
      .filter(Boolean).join(", "));
  }
  showLatency(status.latency_ms);
  showAdapters();
}

function failures(byReason) {
  const found = Object.entries(byReason).filter(([, n]) => n);
  if (!found.length) return "none failed";
  const all = found.reduce((sum, [, n]) => sum + n, 0);
  const why = found.map(([reason, n]) => `${count.format(n)} ${REASONS[reason]}`).join(", ");
  return `${count.format(all)} failed: ${why}`;
}

/** One line a request, the newest at the right. */
function showLatency({ p50, p95, p99, recent }) {
  put("p50", milliseconds(p50));
  put("p95", milliseconds(p95));
  put("p99", milliseconds(p99));
  const most = Math.max(0, ...recent);
  const top = Math.min(most, 1.5 * p99); // a single slow one would flatten all others
  const width = Math.max(recent.length, 100);
  const start = width - recent.length + 0.5;
  $("strip").setAttribute("viewBox", `0 0 ${width} 100`);
  $("strip-bars").setAttribute("d", recent.map(
    (ms, i) => `M${start + i},100V${(100 - (100 * Math.min(ms, top)) / top).toFixed(1)}`,
  ).join(""));
  const note = recent.length
    ? `Latency of the last ${plural(recent.length, "request")}` : "No request yet";
  const longest = `longest ${milliseconds(most)}`;
  put("strip-note", note);
  put("strip-most", recent.length ? `0 to ${milliseconds(top)}, ${longest}` : "");
  $("strip").setAttribute("aria-label", `${note}: median ${milliseconds(p50)}, ${longest}`);
}

let shown = ""; // what the table shows, so that it is made anew only for something new

function showAdapters() {
  const found = matching();
  const rows = found.slice(0, MOST);
  const states = STATES.map((state) => [
    state, status.adapters.filter((adapter) => adapter.state === state).length,
  ]);
  put("shown", [
    `${plural(status.adapters.length, "adapter")}: ` +
      states.filter(([, n]) => n).map(([state, n]) => `${count.format(n)} ${state}`).join(", "),
    found.length < status.adapters.length && `${count.format(found.length)} match the filter`,
    rows.length < found.length && `the first ${rows.length} are shown`,
  ].filter(Boolean).join("; ") + ".");
  const text = JSON.stringify(rows);
  if (text === shown) return;
  shown = text;
  $("adapters").replaceChildren(...rows.map(adapterRow));
}

function adapterRow(adapter) {
  const row = element("tr");
  const name = element("th", "", adapter.name);
  name.scope = "row";
  const state = element("td");
  const text = adapter.pinned ? `${adapter.state}, pinned` : adapter.state;
  state.append(element("span", `state ${adapter.state}`, text));
  if (adapter.problem) state.append(element("div", "problem", adapter.problem));
  const numbers = [adapter.classes, adapter.row, adapter.images];
  row.append(name, state, ...numbers.map((n, i) => {
    const cell = element("td", "number", n === null ? "–" : count.format(n));
    cell.dataset.label = NUMBERS[i];
    return cell;
  }));
  return row;
}

// --- polling ------------------------------------------------------------------------------------

function health(kind, text) {
  $("health").className = `health ${kind}`;
  put("health", text);
  document.body.classList.toggle("stale", kind === "bad");
}

/** Show what the server is at now; whether it said so. */
async function look() {
  try {
    const response = await asked("status", { signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (response.status === 401) {
      wantToken();
      return true;
    }
    status = await contentOf(response);
  } catch (error) {
    const why = error instanceof TypeError || error.name === "TimeoutError"
      ? "The server does not answer" : error.message;
    health("bad", why);
    return false;
  }
  $("login").hidden = true;
  show();
  if (status.ready) health("good", "Ready");
  else health("", "Not ready");
  return true;
}

/** A request, with the token where one was given. One that no header holds is wrong without asking: fetch calls it no answer. */
async function asked(path, options) {
  if (/[^\x21-\x7e]/.test(token)) return new Response('{"error": "the token is wrong."}', { status: 401 });
  const headers = { ...options.headers, ...(token && { authorization: `Bearer ${token}` }) };
  return fetch(path, { ...options, headers });
}

function wantToken() {
  health("bad", token ? "The token is wrong" : "This server wants a token");
  $("login").hidden = false;
  for (const link of document.querySelectorAll("a.open")) link.hidden = true; // links have none
}

let timer = 0;

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  const begin = performance.now();
  const answered = await look();
  // A long list of adapters costs the server something: look at most a tenth of the time. But one
  // that did not answer in time may do so in a moment.
  const spent = performance.now() - begin;
  clearTimeout(timer);
  timer = setTimeout(poll, answered ? Math.min(AT_MOST_MS, Math.max(EVERY_MS, 10 * spent)) : EVERY_MS);
}

// --- playground ---------------------------------------------------------------------------------

async function contentOf(response) {
  if (!response.ok) throw new Error(await problemOf(response));
  try {
    return await response.json();
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new Error("What answers is not the server: it sent no JSON.");
  }
}

async function problemOf(response) {
  try {
    return (await response.json()).error ?? `status ${response.status}`;
  } catch {
    return `status ${response.status} ${response.statusText}`;
  }
}

/** The first of some files. */
function take(files) {
  if (!files?.length || status?.answers === false) return;
  picture = files[0];
  preview(picture, files.length);
  ask();
}

function preview(file, among) {
  const image = $("preview");
  URL.revokeObjectURL(image.src);
  const first = among > 1 ? `the first of ${plural(among, "file")}: ` : "";
  const about = `${first}${file.name || "pasted picture"}, ${bytes(file.size)}`;
  put("picture", about);
  image.onload = () => {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) < SMALL);
    put("picture", `${about}, ${image.naturalWidth} × ${image.naturalHeight} pixels`);
  };
  image.onerror = () => { image.hidden = true; $("invitation").hidden = false; };
  image.alt = `The picture: ${file.name}`;
  image.src = URL.createObjectURL(file);
  image.hidden = false;
  $("invitation").hidden = true;
  $("playground").classList.remove("empty");
}

function refuse(text) {
  $("refused").hidden = !text;
  put("refused", text);
}

let asking = new AbortController(); // of the questions under way; a new picture ends them

/** Ask the adapters that match the filter, as many at a time as one batch and the bank take. */
async function ask() {
  asking.abort();
  const { signal } = (asking = new AbortController());
  $("again").hidden = false;
  $("answers").replaceChildren();
  put("said", "");
  refuse("");
  if (!status) return refuse(`${$("login").hidden ? "The server has not answered yet" : "The server wants a token first"}. Ask again.`);
  if (picture.size + BESIDE > status.body_bytes) {
    return refuse(`The picture is too large: the server takes requests of ${bytes(status.body_bytes)}.`);
  }
  const found = matching().filter(canAnswer);
  const chosen = found.slice(0, MOST);
  orient(chosen);
  if (!chosen.length) return refuse("No adapter that answers matches the filter.");
  put("said", `Asking ${plural(chosen.length, "adapter")} …`);
  const content = await picture.arrayBuffer().catch((error) => error);
  if (signal.aborted) return;
  if (content instanceof Error) {
    put("said", "No adapter answered.");
    return refuse(`${picture.name || "The picture"} cannot be read: ${content.message}`);
  }
  const begin = performance.now();
  let requests = 0;
  const said = [];
  try {
    for (const some of batches(chosen)) {
      said.push(...await inferPatiently(some, content, signal));
      said.sort(([one, a], [other, b]) => confidence(b) - confidence(a) || byName(one, other));
      $("answers").replaceChildren(...said.map(([name, answer]) => answerCard(name, answer)));
      requests += 1;
    }
  } catch (error) {
    if (signal.aborted) return;
    refuse(error instanceof TypeError ? "The server does not answer." : error.message);
  }
  if (!said.length) return put("said", "No adapter answered.");
  const ms = milliseconds(performance.now() - begin);
  put("said", [
    `${plural(said.length, "adapter")} answered in ${plural(requests, "request")}, ${ms}`,
    chosen.length < found.length && `the first ${chosen.length} of ${count.format(found.length)} were asked: narrow the filter for others`,
  ].filter(Boolean).join("; ") + ".");
}

/** How sure an adapter is of its best answer; values have no such thing, and come last. */
function confidence({ problem_type: kind, answers }) {
  return kind === "regression" ? -1 : Math.max(0, ...answers.map((answer) => answer.score ?? 0));
}

const byName = (one, other) => (one < other ? -1 : Number(one > other));

/** Show the picture as the adapters see it: not all of them heed a photo's orientation. */
function orient(adapters) {
  const upright = adapters.filter((a) => a.exif).length;
  $("preview").classList.toggle("lying", !upright && adapters.length > 0);
  put("orientation", upright && upright < adapters.length
    ? `A photo that was taken on its side is so for ${plural(adapters.length - upright, "adapter")}.` : "");
}

/** Names in groups that fit one batch, and the rows that no pinned adapter keeps. */
function* batches(adapters) {
  let most = status.max_batch;
  let loads = most; // of those that have no row yet
  if (status.bank) {
    const pinned = status.adapters.filter((a) => a.pinned).length;
    const replicas = status.replicas ?? 1; // rows of all replicas are added up
    most = Math.max(1, Math.min(most, Math.floor(status.bank.rows / replicas) - pinned));
    loads = Math.min(most, Math.floor(status.bank.visitor_rows / replicas));
  }
  const there = adapters.filter((a) => a.state === "ready").map((a) => a.name);
  const others = adapters.filter((a) => a.state !== "ready").map((a) => a.name);
  for (let i = 0; i < there.length; i += most) yield there.slice(i, i + most);
  for (let i = 0; i < others.length; i += loads) yield others.slice(i, i + loads);
}

/** One request. If an adapter turns out to be broken or gone, the others are asked again. */
async function inferPatiently(names, content, signal) {
  try {
    return await infer(names, content, signal);
  } catch (error) {
    if (signal.aborted || error instanceof TypeError) throw error;
    await look();
    signal.throwIfAborted();
    const left = new Set(status.adapters.filter(canAnswer).map((a) => a.name));
    const some = names.filter((name) => left.has(name));
    if (!some.length || some.length === names.length) throw error;
    refuse(error.message);
    return infer(some, content, signal);
  }
}

/** One picture, every name: [[name, { problem_type, answers }], ...]. Its bytes go behind the JSON, which is shorter. */
async function infer(names, content, signal) {
  const size = content.byteLength + 4; // each element says its own length before
  const head = new TextEncoder().encode(JSON.stringify({
    inputs: [
      { name: "images", datatype: "BYTES", shape: [1], parameters: { binary_data_size: size } },
      { name: "adapters", datatype: "BYTES", shape: [names.length], data: names },
    ],
    parameters: { visitor: true },
    outputs: [{ name: "answers", parameters: { classification: TOP } }],
  }));
  const length = new DataView(new ArrayBuffer(4));
  length.setUint32(0, content.byteLength, true);
  const response = await asked(`v2/models/${encodeURIComponent(status.model)}/infer`, {
    method: "POST",
    headers: { "content-type": "application/octet-stream", "inference-header-content-length": head.length },
    signal,
    body: new Blob([head, length, content]),
  });
  const [{ data }] = (await contentOf(response)).outputs;
  return names.map((name, i) => [name, JSON.parse(data[i])]);
}

function answerCard(name, { problem_type: kind, answers }) {
  const card = element("li");
  const list = element("ol");
  for (const { label, score, positive } of answers) {
    const item = element("li", positive || kind === "regression" ? "said" : "");
    item.append(element("span", "label", label));
    if (kind === "regression") {
      item.append(element("span", "share", score === null ? NO_NUMBER : number.format(score)));
    } else {
      const track = element("span", "track");
      const bar = element("i");
      bar.style.width = `${100 * score}%`;
      track.append(bar);
      item.append(element("span", "share", percent(score)), track);
    }
    list.append(item);
  }
  card.append(element("h3", "", name), list);
  return card;
}

function percent(score) {
  if (score === null) return NO_NUMBER;
  return `${(100 * score).toFixed(score < 0.0995 ? 1 : 0)} %`;
}

// --- what people do -----------------------------------------------------------------------------

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  token = $("token").value.trim();
  sessionStorage.setItem("token", token);
  $("token").value = "";
  poll();
});
$("file").addEventListener("change", (event) => take(event.target.files));
$("again").addEventListener("click", ask);
$("filter").addEventListener("input", () => status && showAdapters());
document.addEventListener("paste", (event) => take(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault(); // a picture that misses the field must not replace the page
  $("drop").classList.add("over");
});
document.addEventListener("dragleave", () => $("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("visibilitychange", poll);
poll();
