// Where the user writes: the text, thinking on or off, send or stop.

import { canSend, send, stop } from "./chat.js";
import { Component, createRef, html } from "./html.js";
import { grow, isEnter } from "./fields.js";
import { Icon } from "./icons.js";
import { showPanel } from "./panel.js";
import { allValid } from "./parameters.js";
import { serverStateText } from "./server_state.js";
import { changeSettings, chosenModel } from "./settings.js";
import { changed, state } from "./store.js";
import { t } from "./strings.js";

export class Composer extends Component {
  field = createRef();

  componentDidMount() {
    // On a small screen the focus would bring up the keyboard over half the page.
    if (matchMedia("(min-width: 700px)").matches) this.field.current.focus();
  }

  componentDidUpdate() {
    // The draft also changes from outside: an example is taken, a message is sent.
    if (this.drawn !== state.draft) grow(this.field.current);
    this.drawn = state.draft;
  }

  onInput = (event) => {
    state.draft = event.target.value;
    changed();
  };

  onKeyDown = (event) => {
    if (!isEnter(event)) return;
    event.preventDefault();
    this.submit();
  };

  submit = () => {
    if (send(state.draft)) state.draft = "";
    changed();
  };

  render() {
    const model = chosenModel();
    const valid = allValid(state.settings, model);
    return html`<div class="composer-frame">
      ${state.conversation.turns.length > 0 && state.server.state !== "ready" && html`<${Blocked} />`}
      ${!valid && html`<${Invalid} />`}
      <div class="composer">
        <textarea
          ref=${this.field}
          rows="1"
          aria-label=${t("composer_label")}
          placeholder=${t("composer_hint")}
          value=${state.draft}
          onInput=${this.onInput}
          onKeyDown=${this.onKeyDown}
        ></textarea>
        <div class="row">
          ${model?.thinks && model.mayNotThink && html`<${ThinkToggle} />`}
          <small class="keys">${t("keys_hint")}</small>
          <div class="space"></div>
          <${MainButton} send=${this.submit} />
        </div>
      </div>
    </div>`;
  }
}

function ThinkToggle() {
  const { thinking } = state.settings;
  return html`<button
    type="button"
    class="think"
    aria-pressed=${thinking}
    title=${t(thinking ? "think_on" : "think_off")}
    onClick=${() => changeSettings({ thinking: !thinking })}
  >
    <${Icon} name="think" />${t("think")}
  </button>`;
}

/** Sends, or stops while an answer arrives: one button, so that it keeps the focus when it changes its role. */
function MainButton({ send }) {
  const running = state.run !== null;
  const ready = canSend() && state.draft.trim() !== "";
  return html`<button
    type="button"
    class=${running ? "send stop" : "send"}
    disabled=${!running && !ready}
    aria-label=${t(running ? "stop" : "send")}
    title=${running ? `${t("stop")} (Esc)` : t("send")}
    onClick=${running ? stop : send}
  >
    <${Icon} name=${running ? "stop" : "send"} />
  </button>`;
}

/** Why nothing can be sent; an empty conversation says it in its middle. */
function Blocked() {
  const { message } = state.server;
  return html`<p class="hint">${serverStateText()}${message && `: ${message}`}</p>`;
}

function Invalid() {
  return html`<p class="hint wrong" role="alert">
    ${t("invalid_settings")}${" "}
    <button type="button" class="link" onClick=${() => showPanel("settings")}>${t("invalid_open")}</button>
  </p>`;
}
