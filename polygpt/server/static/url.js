// The state in the address's fragment, which never reaches the server. Fields at their default are left out.

import { DEFAULTS, state } from "./state.js";

const LONGEST = 60_000; // characters of an address that browsers still take without trouble

export function toFragment() {
  const fields = new URLSearchParams();
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    const value = state[name];
    if (JSON.stringify(value) === JSON.stringify(standard)) continue;
    fields.set(name, typeof standard === "string" ? value : JSON.stringify(value));
  }
  return fields.toString();
}

/** The state that a fragment stands for; what is not understood is left out. */
export function fromFragment(fragment) {
  const found = structuredClone(DEFAULTS);
  for (const [name, text] of new URLSearchParams(fragment.replace(/^#/, ""))) {
    if (!(name in DEFAULTS)) continue;
    try {
      const value = typeof DEFAULTS[name] === "string" ? text : JSON.parse(text);
      if (typeof value === typeof DEFAULTS[name] && Array.isArray(value) === Array.isArray(DEFAULTS[name])) found[name] = value;
    } catch {
      // not JSON: the default stays
    }
  }
  found.messages = found.messages.filter((message) => typeof message?.content === "string" && ["user", "assistant"].includes(message.role));
  return found;
}

/** Puts the state into the address; false if it is too long for one. */
export function writeFragment() {
  const fragment = toFragment();
  if (fragment.length > LONGEST) return false;
  history.replaceState(null, "", fragment ? `#${fragment}` : location.pathname);
  return true;
}
