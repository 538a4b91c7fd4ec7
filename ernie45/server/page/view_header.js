// The bar on top: which model answers, how the server is, colours and language.

import { askForKey } from "./connection.js";
import { html } from "./html.js";
import { Icon, IconButton } from "./icons.js";
import { showPanel } from "./panel.js";
import { serverStateText } from "./server_state.js";
import { changeSettings, chosenModel, isDark, toggleTheme } from "./settings.js";
import { state } from "./store.js";
import { t } from "./strings.js";

export function Header() {
  const other = state.settings.language === "zh" ? "en" : "zh";
  return html`<header>
    <${PanelButton} panel="conversations" icon="menu" label=${t("menu_open")} />
    <${ModelChoice} />
    <${ServerState} />
    <div class="space"></div>
    <button
      type="button"
      class="text-button language"
      lang=${other === "zh" ? "zh-CN" : "en"}
      title=${t("language_switch")}
      aria-label=${t("language_switch")}
      onClick=${() => changeSettings({ language: other })}
    >
      ${t("language_other")}
    </button>
    <${IconButton}
      icon=${isDark() ? "sun" : "moon"}
      label=${t(isDark() ? "theme_light" : "theme_dark")}
      onClick=${toggleTheme}
    />
    <${PanelButton} panel="settings" icon="sliders" label=${t("settings_open")} />
  </header>`;
}

function PanelButton({ panel, icon, label }) {
  const open = state.panel === panel;
  const toggle = () => showPanel(open ? null : panel);
  return html`<${IconButton}
    icon=${icon}
    label=${label}
    class=${`icon-button for-${panel}`}
    aria-expanded=${open}
    onClick=${toggle}
  />`;
}

function ModelChoice() {
  const { models } = state;
  const chosen = chosenModel();
  if (!chosen) return html`<span class="model">ernie45</span>`;
  if (models.length === 1) return html`<span class="model" title=${chosen.id}>${chosen.id}</span>`;
  return html`<select
    class="model"
    aria-label=${t("model")}
    value=${chosen.id}
    onChange=${(event) => changeSettings({ model: event.target.value })}
  >
    ${models.map(({ id }) => html`<option key=${id} value=${id}>${id}</option>`)}
  </select>`;
}

function ServerState() {
  const { state: name } = state.server;
  if (name === "locked") {
    return html`<button type="button" class="server locked" onClick=${() => askForKey("change")}>
      <${Icon} name="key" /> <span>${t("server_locked")}</span>
    </button>`;
  }
  const kind = name === "ready" || name === "unreachable" ? name : "pending";
  return html`<span class=${`server ${kind}`} role="status">
    <i class="dot"></i><span>${serverStateText()}</span>
  </span>`;
}
