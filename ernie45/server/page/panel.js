// A panel beside the conversation. On a narrow screen it lies over it, and only while it is open.

import { Component, createRef, html } from "./html.js";
import { changed, state } from "./store.js";

/** Opens the panel with this name, or closes whichever is open. */
export function showPanel(name) {
  state.panel = name;
  changed();
}

/** Whoever opens a panel by keyboard goes on inside it, and returns to the button that opened it. */
export class Panel extends Component {
  element = createRef();
  open = false;

  componentDidUpdate() {
    const { name } = this.props;
    const open = state.panel === name;
    if (open === this.open) return;
    this.open = open;
    if (open) this.element.current.querySelector("button").focus();
    else if (this.element.current.contains(document.activeElement)) document.querySelector(`.for-${name}`).focus();
  }

  render({ name, tag, label, children }) {
    return html`<${tag} class=${`panel ${name}`} aria-label=${label} ref=${this.element}>${children}<//>`;
  }
}
