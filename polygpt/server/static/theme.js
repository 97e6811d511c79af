// Light or dark: as the system has it, or as the switch says.

import { $ } from "./dom.js";

const KEY = "polygpt-theme";
const THEMES = { system: "as the system", light: "light", dark: "dark" };

function apply(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const button = $("#theme");
  button.dataset.theme = theme;
  button.setAttribute("aria-label", `Theme: ${THEMES[theme]}`);
  button.title = `Theme: ${THEMES[theme]}`;
}

export function start() {
  let theme = localStorage.getItem(KEY) in THEMES ? localStorage.getItem(KEY) : "system";
  apply(theme);
  $("#theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    theme = names[(names.indexOf(theme) + 1) % names.length];
    localStorage.setItem(KEY, theme);
    apply(theme);
    dispatchEvent(new Event("theme"));
  });
}
