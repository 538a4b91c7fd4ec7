// What the user chose, kept in localStorage: parameters, model, language, colours. The key is not among it.

import { changed, state } from "./store.js";
import { useLanguage } from "./strings.js";

const NAME = "ernie45.settings";

const DEFAULTS = {
  language: navigator.language.startsWith("zh") ? "zh" : "en",
  theme: "system", // "light" or "dark" once chosen against the system's
  model: "",
  thinking: true,
  values: {}, // name of a parameter -> text of its field
};

export function loadSettings() {
  let stored = null;
  try {
    stored = JSON.parse(localStorage.getItem(NAME));
  } catch {
    // Unreadable settings, or no storage: the defaults hold.
  }
  const texts = Object.entries(stored?.values ?? {}).filter(([, text]) => typeof text === "string");
  state.settings = { ...DEFAULTS, ...stored, values: Object.fromEntries(texts) };
  apply();
}

export function changeSettings(changes) {
  state.settings = { ...state.settings, ...changes };
  try {
    localStorage.setItem(NAME, JSON.stringify(state.settings));
  } catch {
    // Without storage the choice holds for as long as the page is open.
  }
  apply();
  changed();
}

export function setValue(name, text) {
  changeSettings({ values: { ...state.settings.values, [name]: text } });
}

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
systemIsDark.addEventListener("change", changed);

export function isDark() {
  const { theme } = state.settings;
  return theme === "system" ? systemIsDark.matches : theme === "dark";
}

/** To the other colours. Back at the system's own, the page follows the system again. */
export function toggleTheme() {
  const dark = !isDark();
  changeSettings({ theme: dark === systemIsDark.matches ? "system" : dark ? "dark" : "light" });
}

/** The chosen model's entry; the first one where nothing was chosen or the choice is gone; undefined without models. */
export function chosenModel() {
  return state.models.find((model) => model.id === state.settings.model) ?? state.models[0];
}

function apply() {
  const { language, theme } = state.settings;
  useLanguage(language);
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}
