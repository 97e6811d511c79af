// The server's API. An error that the server words is an ApiError; a server that does not answer is Offline.
// Where the server asks for a key, the browser does so (Basic) and sends it along with what the page asks for.

import { events } from "./sse.js";

export class ApiError extends Error {
  constructor({ message, code, param }, status) {
    super(message ?? `the server answered with status ${status}`);
    Object.assign(this, { status, code, param });
  }
}

export class Offline extends Error {
  constructor() {
    super("The server does not answer.");
  }
}

let offline = () => {};

/** `listener` is called whenever the server does not answer. */
export const onOffline = (listener) => (offline = listener);

function gone(error) {
  if (error.name === "AbortError") return error;
  offline();
  return new Offline();
}

async function request(path, { body, signal } = {}) {
  const options = { signal };
  if (body !== undefined) Object.assign(options, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw gone(error);
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new ApiError(told.error ?? {}, response.status);
}

const json = async (path, options) => {
  const response = await request(path, options);
  try {
    return await response.json();
  } catch (error) {
    throw gone(error);
  }
};

export const serverSettings = () => json("/v1/settings");
export const inspect = (body, signal) => json("/v1/inspect", { body, signal });
export const tokenize = async (body, signal) => (await json("/tokenize", { body, signal })).tokens;

/** Whether the server answers and works. */
export async function healthy() {
  try {
    return (await fetch("/health", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

/** The chunks of a streamed completion. */
export async function* stream(path, body, signal) {
  const response = await request(path, { body: { ...body, stream: true, stream_options: { include_usage: true } }, signal });
  try {
    for await (const event of events(response.body)) {
      if (event.error) throw new ApiError(event.error, 500);
      yield event;
    }
  } catch (error) {
    throw error instanceof ApiError ? error : gone(error);
  }
}
