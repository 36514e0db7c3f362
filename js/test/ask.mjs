// Answers the tests' questions: a JSON list of them on standard input, a JSON list of answers on standard output.
// An answer is what was found, or {"error": message}. Arrays of numbers travel as base64 of float32.

import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const dist = process.argv[2];
const { HhdeployError, fromFolder, fromUrl, openBundle, packRow, parseManifest, readAdapter } = await import(
  pathToFileURL(`${dist}/node.js`)
);

const { orientationOf, stored, upright } = await import(pathToFileURL(`${dist}/orientation.js`));
const { selectSites } = await import(pathToFileURL(`${dist}/sites.js`));

const runtimes = { node: () => import("onnxruntime-node"), web: () => import("onnxruntime-web") };
const encode = (x) => Buffer.from(x.buffer, x.byteOffset, x.byteLength).toString("base64");
const decode = (text) => new Float32Array(new Uint8Array(Buffer.from(text, "base64")).buffer);
const picture = ({ data, ...size }) => ({ data: new Uint8Array(Buffer.from(data, "base64")), ...size });

/** A source of which the first reading of a file is this one. */
function once(source, file, first) {
  let read = (name) => {
    if (name !== file) return source.read(name);
    read = source.read;
    return first();
  };
  return { ...source, read: (name) => read(name) };
}

/** A runtime that tells no shapes. */
function untelling({ InferenceSession, Tensor }) {
  const create = async (graph, options) => {
    const session = await InferenceSession.create(graph, options);
    const { inputNames, outputNames } = session;
    return { inputNames, outputNames, run: (feeds) => session.run(feeds), release: () => session.release() };
  };
  return { InferenceSession: { create }, Tensor };
}

/** `before`: another bundle, whose manifest is read first; `failing`: a file that cannot be read the first time. */
async function bundle({ where, runtime = "node", precision, added = {}, before, failing, untold }) {
  let source = where.includes("://") ? fromUrl(where) : fromFolder(where);
  if (before) source = once(source, "hhdeploy.json", () => fromFolder(before).read("hhdeploy.json"));
  if (failing) source = once(source, failing, () => Promise.reject(new HhdeployError(`${failing}: planted`)));
  const ort = await runtimes[runtime]();
  const opened = await openBundle(source, untold ? untelling(ort) : ort, precision ? { precision } : {});
  for (const [name, folder] of Object.entries(added)) await opened.add(name, fromFolder(folder));
  return opened;
}

const questions = {
  async logits({ images, adapters, ...rest }) {
    const opened = await bundle(rest);
    const logits = await opened.run(decode(images), adapters);
    await opened.close();
    return encode(logits);
  },
  /** What the runtime is told beyond its own options, of the model's graph. */
  async settings({ where, precision, session }) {
    const { InferenceSession, Tensor } = await runtimes.node();
    const told = [];
    const create = (graph, options) => told.push(options) && InferenceSession.create(graph, options);
    const opened = await openBundle(fromFolder(where), { InferenceSession: { create }, Tensor }, { precision, session });
    await opened.close();
    return told[0].extra ?? null;
  },
  async classify({ pictures, adapters, ...rest }) {
    const opened = await bundle(rest);
    const answers = await opened.classify(pictures.map(picture), adapters);
    await opened.close();
    return answers;
  },
  /** Asked twice: the first error, and the answers. */
  async again({ pictures, adapters, ...rest }) {
    const opened = await bundle(rest);
    const error = await opened.classify(pictures.map(picture), adapters).then(
      () => null,
      ({ message }) => message,
    );
    const answers = await opened.classify(pictures.map(picture), adapters);
    await opened.close();
    return [error, answers.length];
  },
  /** What an adapter says of a picture while another one takes its place and back: answers that neither gives. */
  async replaced({ picture: seen, name, folders, rounds, ...rest }) {
    const opened = await bundle(rest);
    const ask = () => opened.classify([picture(seen)], name).then(([said]) => JSON.stringify(said));
    const right = new Set();
    for (const folder of folders) {
      await opened.add(name, fromFolder(folder));
      right.add(await ask());
    }
    const wrong = [];
    for (let i = 0; i < rounds; i++) {
      const adding = opened.add(name, fromFolder(folders[i % 2]));
      // Now the one, now the other is under way first.
      for (let turn = 0; turn < (i >> 1) % 30; turn++) await new Promise((resolve) => setImmediate(resolve));
      wrong.push(...(await Promise.all([ask(), ask()])).filter((said) => !right.has(said)));
      await adding;
    }
    await opened.close();
    return { right: right.size, wrong };
  },
  async images({ pictures, adapters, ...rest }) {
    const opened = await bundle(rest);
    const found = [];
    for (const [i, each] of pictures.entries()) {
      found.push(encode(await opened.preprocess(picture(each), adapters[i])));
    }
    await opened.close();
    return found;
  },
  /** What an adapter's preprocessing graph is fed; null where it has none. */
  async graph({ adapter, ...rest }) {
    const opened = await bundle(rest);
    await opened.close();
    return opened.adapters.get(adapter).preprocess_graph ?? null;
  },
  /** Adds each of some adapters and lets it answer: its error, null without one. */
  async refusals({ picture: seen, adapters, ...rest }) {
    const opened = await bundle(rest);
    const found = {};
    for (const [name, folder] of Object.entries(adapters)) {
      found[name] = await opened
        .add("omega", fromFolder(folder))
        .then(() => opened.classify([picture(seen)], "omega"))
        .then(() => null, refused);
    }
    await opened.close();
    return found;
  },
  /** The same adapter under some names: the error of each, null without one. */
  async names({ names, adapter, ...rest }) {
    const opened = await bundle(rest);
    const found = [];
    for (const name of names) found.push(await opened.add(name, fromFolder(adapter)).then(() => null, refused));
    await opened.close();
    return found;
  },
  /** Files and their stored pictures: the pictures turned as the files say, and back, and the files without that. */
  async upright({ cases }) {
    const found = {};
    for (const [name, { file, picture: seen }] of Object.entries(cases)) {
      const { orientation, parts } = await orientationOf(new Uint8Array(Buffer.from(file, "base64")));
      const { data, ...size } = upright({ ...picture(seen), orientation });
      const back = stored({ data, ...size, orientation }).data;
      found[name] = { data: encode(data), ...size, back: encode(back), plain: Buffer.concat(parts).toString("base64") };
    }
    return found;
  },
  /** What targets stand for among some Linears. */
  async sites({ linears, targets }) {
    return targets.map((target) => selectSites(linears, target));
  },
  async row({ where, adapter }) {
    const manifest = parseManifest(readFileSync(`${where}/hhdeploy.json`, "utf8"), where);
    return encode(packRow(await readAdapter(fromFolder(adapter)), manifest.row, manifest.backbone));
  },
};

/** A message; what is no error of the package is a fault of it. */
function refused(error) {
  if (!(error instanceof HhdeployError)) throw error;
  return error.message;
}

const answers = [];
for (const { ask, ...rest } of JSON.parse(readFileSync(0, "utf8"))) {
  try {
    answers.push(await questions[ask](rest));
  } catch (error) {
    if (error.name !== "HhdeployError" && error.name !== "DamagedError") throw error;
    answers.push({ error: `${error.name}: ${error.message}` });
  }
}
process.stdout.write(JSON.stringify(answers));
