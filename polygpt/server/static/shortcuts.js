// Keyboard shortcuts, and the dialog that lists them.

import { $, h } from "./dom.js";

const LIST = [
  ["Ctrl ↵", "Write, send or compare"],
  ["Esc", "Stop; close what is open"],
  ["Alt 1 · 2 · 3", "Write, Look inside, Compare"],
  ["Alt S", "Settings"],
  ["← →", "From token to token"],
  ["↵", "The alternatives to a token; continue from one"],
  ["?", "This list"],
];

export function start({ submit, stop, view, settings }) {
  const dialog = $("#shortcuts");
  const rows = LIST.flatMap(([keys, what]) => [h("dt", {}, h("kbd", {}, keys)), h("dd", {}, what)]);
  dialog.append(h("h2", {}, "Keyboard shortcuts"), h("dl", {}, ...rows), h("button", { onclick: () => dialog.close() }, "Close"));
  addEventListener("keydown", (event) => {
    const typing = event.target.matches?.("input, textarea, select");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit();
    else if (event.key === "Escape" && !dialog.open) return stop();
    else if (event.altKey && "123".includes(event.key)) view(["write", "inspect", "compare"][event.key - 1]);
    else if (event.altKey && event.code === "KeyS") settings();
    else if (event.key === "?" && !typing) dialog.showModal();
    else return;
    event.preventDefault();
  });
}
