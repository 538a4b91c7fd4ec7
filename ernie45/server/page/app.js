// The page: what is on it, and what happens at its start.

import * as chat from "./chat.js";
import { connect } from "./connection.js";
import { followOtherTabs } from "./history.js";
import { html, render } from "./html.js";
import { showPanel } from "./panel.js";
import { loadSettings } from "./settings.js";
import { changed, onChange, state } from "./store.js";
import { Composer } from "./view_composer.js";
import { ConversationsPanel } from "./view_conversations.js";
import { ClearDialog, KeyDialog } from "./view_dialogs.js";
import { Header } from "./view_header.js";
import { Log } from "./view_log.js";
import { SettingsPanel } from "./view_settings.js";

function App() {
  return html`
    <div class=${`layout ${state.panel ? `open-${state.panel}` : ""}`}>
      <${ConversationsPanel} />
      <div class="middle">
        <${Header} />
        <${Log} />
        <${Composer} />
      </div>
      <${SettingsPanel} />
      ${state.panel && html`<div class="scrim" onClick=${() => showPanel(null)}></div>`}
    </div>
    ${state.keyDialog && html`<${KeyDialog} reason=${state.keyDialog} />`}
    ${state.confirmingClear && html`<${ClearDialog} />`}
    <div class="offscreen" role="status" aria-live="polite">${state.announcement}</div>
  `;
}

// Escape closes what lies open, else it stops the answer. Dialogs handle it themselves.
function onKeyDown(event) {
  if (event.key !== "Escape" || event.defaultPrevented || event.isComposing || document.querySelector("dialog")) return;
  if (state.panel) showPanel(null);
  else chat.stop();
}

loadSettings();
chat.openFirst();
followOtherTabs();
connect();
document.addEventListener("keydown", onKeyDown);
onChange(() => render(html`<${App} />`, document.getElementById("app")));
changed();
