// The panel of settings: system prompt, parameters with their ranges, the server.

import { setSystem } from "./chat.js";
import { askForKey } from "./connection.js";
import { html } from "./html.js";
import { Icon, IconButton } from "./icons.js";
import { Panel, showPanel } from "./panel.js";
import { BUDGET, problem, rangeText, SAMPLING, STOP } from "./parameters.js";
import { changeSettings, chosenModel, setValue } from "./settings.js";
import { state } from "./store.js";
import { number, t } from "./strings.js";

export function SettingsPanel() {
  const model = chosenModel();
  return html`<${Panel} name="settings" tag="aside" label=${t("settings")}>
    <div class="panel-title">
      <h2>${t("settings")}</h2>
      <${IconButton} icon="close" label=${t("close")} onClick=${() => showPanel(null)} />
    </div>
    <label class="field">
      <span>${t("settings_system")}</span>
      <textarea
        rows="4"
        placeholder=${t("settings_system_hint")}
        value=${state.conversation.system}
        onInput=${(event) => setSystem(event.target.value)}
      ></textarea>
    </label>
    ${
      model?.thinks &&
      html`<h3>${t("settings_thinking")}</h3>
      <${Field} parameter=${BUDGET} maxLength=${model.maxLength} />`
    }
    <h3>${t("settings_sampling")}</h3>
    <p class="note">${t("settings_note")}</p>
    ${[...SAMPLING, STOP].map(
      (parameter) => html`<${Field} key=${parameter.name} parameter=${parameter} maxLength=${model?.maxLength} />`,
    )}
    <button type="button" class="button" disabled=${!anySet()} onClick=${reset}>${t("settings_reset")}</button>
    <h3>${t("settings_server")}</h3>
    ${model?.maxLength && html`<p class="note">${t("settings_context", { n: number(model.maxLength) })}</p>`}
    <button type="button" class="button" onClick=${() => askForKey("change")}>
      <${Icon} name="key" />${t("key_change")}
    </button>
  <//>`;
}

function Field({ parameter, maxLength }) {
  const { name } = parameter;
  const text = state.settings.values[name] ?? "";
  const wrong = problem(parameter, text, maxLength);
  const attributes = {
    id: `set-${name}`,
    value: text,
    placeholder: t("settings_unset"),
    "aria-invalid": wrong ? "true" : null,
    "aria-describedby": `about-${name}`,
    onInput: (event) => setValue(name, event.target.value),
  };
  return html`<div class=${`field ${parameter.lines ? "" : "short"}`}>
    <label for=${`set-${name}`}>${t(`p_${name}`)}<code>${name}</code></label>
    ${
      parameter.lines
        ? html`<textarea rows="2" ...${attributes}></textarea>`
        : html`<input type="text" inputmode="decimal" autocomplete="off" ...${attributes} />`
    }
    <small id=${`about-${name}`} class=${wrong ? "wrong" : ""}>${wrong || rangeText(parameter, maxLength)}</small>
  </div>`;
}

function anySet() {
  return Object.values(state.settings.values).some((text) => text !== "");
}

function reset() {
  changeSettings({ values: {} });
}
