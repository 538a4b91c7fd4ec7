// A button that copies a text and says whether it worked.

import { Component, html } from "./html.js";
import { Icon } from "./icons.js";
import { t } from "./strings.js";

const SHOWN_MS = 1600;

export class CopyButton extends Component {
  state = { result: null }; // null, "copied" or "copy_failed"

  copy = async () => {
    const worked = await copyText(this.props.text);
    this.setState({ result: worked ? "copied" : "copy_failed" });
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.setState({ result: null }), SHOWN_MS);
  };

  componentWillUnmount() {
    clearTimeout(this.timer);
  }

  render({ label }, { result }) {
    const text = result ? t(result) : label;
    return html`<button type="button" class="icon-button" aria-label=${text} title=${text} onClick=${this.copy}>
      <${Icon} name=${result === "copied" ? "check" : "copy"} />
      ${result && html`<span class="said">${text}</span>`}
    </button>`;
  }
}

/** Copies; returns whether it worked. The clipboard exists in secure contexts only, the older way everywhere. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = document.createElement("textarea");
    field.value = text;
    field.className = "offscreen";
    document.body.append(field);
    field.select();
    const worked = document.execCommand("copy");
    field.remove();
    return worked;
  }
}
