// What the page remembers: the settings and texts that a link shares, and what this visit knows beside them.

export const DEFAULTS = {
  view: "write",
  mode: "completion",
  model: "",
  other: "", // the second model of a comparison
  text: "",
  messages: [],
  system: "",
  max_tokens: 128,
  temperature: 0.8,
  top_p: 0.95,
  top_k: 0,
  min_p: 0,
  repetition_penalty: 1,
  presence_penalty: 0,
  frequency_penalty: 0,
  seed: "",
  n: 1,
  stop: "",
  schema: "",
  tint: "probability",
};

export const state = structuredClone(DEFAULTS);

/** Of this visit: what the server said of itself, and the text that is looked into ({model, ids}). */
export const visit = { server: null, subject: null };

const listeners = new Set();

export function subscribe(listener) {
  listeners.add(listener);
}

/** Changes the state; listeners get the changed fields. */
export function update(changes) {
  const changed = Object.fromEntries(Object.entries(changes).filter(([name, value]) => state[name] !== value));
  if (!Object.keys(changed).length) return;
  Object.assign(state, changed);
  for (const listener of listeners) listener(changed);
}

export const modelFacts = (name = state.model) => visit.server?.models.find((model) => model.name === name) ?? null;
