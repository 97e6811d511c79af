// From the page's settings to the bodies of requests.

import { modelFacts, state } from "./state.js";

const SEEDS = 2 ** 31;

/** The sampling fields that differ from what the API does by itself; no longer a text than the model's context. */
export function sampling(model, seed = chosenSeed()) {
  const max_tokens = Math.min(state.max_tokens, modelFacts(model)?.context_length ?? Infinity);
  const body = { max_tokens, temperature: state.temperature, top_p: state.top_p, seed };
  if (state.top_k > 0) body.top_k = state.top_k;
  if (state.min_p > 0) body.min_p = state.min_p;
  if (state.repetition_penalty !== 1) body.repetition_penalty = state.repetition_penalty;
  for (const name of ["presence_penalty", "frequency_penalty"]) if (state[name]) body[name] = state[name];
  const stops = state.stop.split("\n").filter(Boolean).map((word) => word.replaceAll("\\n", "\n"));
  if (stops.length) body.stop = stops;
  return body;
}

/** The seed that the user typed, or a new one. */
export const chosenSeed = () => (/^\d+$/.test(state.seed.trim()) ? Number(state.seed) : Math.floor(Math.random() * SEEDS));

/** The JSON schema of the settings, or null. Throws an Error that says what is wrong with it. */
export function schema() {
  if (!state.schema.trim()) return null;
  try {
    return JSON.parse(state.schema);
  } catch (error) {
    throw new Error(`The JSON schema in the settings is not JSON: ${error.message}`);
  }
}

/** A completion of text, or of token ids. */
export function completionBody(prompt, { model = state.model, n = state.n, seed } = {}) {
  const body = { model, prompt, n, logprobs: 10, return_token_ids: true, ...sampling(model, seed) };
  const wanted = schema();
  if (wanted !== null) body.grammar = `start: %json ${JSON.stringify(wanted)}`;
  return body;
}

/** The conversation with its system message. */
export const conversation = (messages) => (state.system.trim() ? [{ role: "system", content: state.system }, ...messages] : messages);

/** The answer to a conversation. */
export function chatBody(messages, { model = state.model, seed } = {}) {
  const body = { model, messages: conversation(messages), logprobs: true, top_logprobs: 10, return_token_ids: true, ...sampling(model, seed) };
  const wanted = schema();
  if (wanted !== null) body.response_format = { type: "json_schema", json_schema: { name: "answer", schema: wanted } };
  return body;
}
