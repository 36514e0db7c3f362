export { readAdapter, type Adapter } from "./adapter.js";
export { type Answer } from "./answers.js";
export { Bundle, openBundle, type OpenOptions, type Picture, type Runtime } from "./bundle.js";
export { type AdapterConfig } from "./config.js";
export { HhdeployError } from "./errors.js";
export { BACKBONE, parseManifest, type AdapterEntry, type Manifest, type ProblemType } from "./manifest.js";
export { decodePicture } from "./pictures.js";
export { packRow } from "./row.js";
export { DamagedError, fromUrl, type Progress, type Source, type UrlOptions } from "./source.js";
