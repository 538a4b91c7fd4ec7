// The two questions that the page asks by itself: for the key, and whether to delete everything.

import { removeAll } from "./chat.js";
import { useKey } from "./connection.js";
import { Component, createRef, html } from "./html.js";
import { changed, state } from "./store.js";
import { t } from "./strings.js";

/** A modal dialog, open for as long as it is drawn. The browser keeps the focus inside. */
class Dialog extends Component {
  element = createRef();

  componentDidMount() {
    this.element.current.showModal();
  }

  render({ title, onClose, onSubmit, children }) {
    const submit = (event) => {
      event.preventDefault();
      onSubmit();
    };
    return html`<dialog ref=${this.element} aria-labelledby="dialog-title" onCancel=${onClose}>
      <form onSubmit=${submit}>
        <h2 id="dialog-title">${title}</h2>
        ${children}
      </form>
    </dialog>`;
  }
}

export class KeyDialog extends Component {
  state = { key: "" };

  submit = () => this.state.key.trim() && useKey(this.state.key);

  render({ reason }, { key }) {
    return html`<${Dialog} title=${t("key_title")} onClose=${closeKeyDialog} onSubmit=${this.submit}>
      ${reason === "missing" && html`<p>${t("key_missing")}</p>`}
      ${reason === "refused" && html`<p class="wrong" role="alert">${t("key_refused")}</p>`}
      <div class="field">
        <label for="key">${t("key_label")}</label>
        <input
          id="key"
          aria-describedby="about-key"
          type="password"
          autocomplete="off"
          autofocus
          value=${key}
          onInput=${(event) => this.setState({ key: event.target.value })}
        />
        <small id="about-key">${t("key_note")}</small>
      </div>
      <div class="row">
        <div class="space"></div>
        <button type="button" class="button" onClick=${closeKeyDialog}>${t("cancel")}</button>
        <button type="submit" class="button primary" disabled=${!key.trim()}>${t("key_use")}</button>
      </div>
    <//>`;
  }
}

export function ClearDialog() {
  const submit = () => {
    closeClearDialog();
    removeAll();
  };
  return html`<${Dialog} title=${t("clear_title")} onClose=${closeClearDialog} onSubmit=${submit}>
    <p>${t("clear_note")}</p>
    <div class="row">
      <div class="space"></div>
      <button type="button" class="button" autofocus onClick=${closeClearDialog}>${t("cancel")}</button>
      <button type="submit" class="button danger">${t("clear_confirm")}</button>
    </div>
  <//>`;
}

function closeKeyDialog() {
  state.keyDialog = null;
  changed();
}

function closeClearDialog() {
  state.confirmingClear = false;
  changed();
}
