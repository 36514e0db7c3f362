/** What went wrong with a bundle, an adapter or a request: what was expected, found, and where. */
export class HhdeployError extends Error {
  override name = "HhdeployError";
}
