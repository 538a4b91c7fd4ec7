// The conversation on screen: its turns, or what stands in their place, and the scrolling.

import { check } from "./connection.js";
import { Countdown } from "./countdown.js";
import { Component, createRef, html } from "./html.js";
import { Icon, IconButton } from "./icons.js";
import { serverStateText } from "./server_state.js";
import { changed, state } from "./store.js";
import { t } from "./strings.js";
import { Answer, Question } from "./view_turns.js";

// This near the end counts as being at the end.
const NEAR_PX = 40;

const EXAMPLES = ["example_explain", "example_table", "example_code", "example_translate"];

/** Follows the end of the text until the user scrolls up, and again once they are back at the end. */
export class Log extends Component {
  state = { following: true };
  element = createRef();
  lastTop = 0;

  componentDidUpdate() {
    if (this.shown !== state.conversation.id || this.turns !== state.conversation.turns.length) {
      // Another conversation, or a new turn in this one: whoever asks wants to see the answer.
      this.shown = state.conversation.id;
      this.turns = state.conversation.turns.length;
      if (!this.state.following) this.setState({ following: true });
      this.toEnd();
    } else if (this.state.following) {
      this.toEnd();
    }
  }

  componentDidMount() {
    this.componentDidUpdate();
    // Content also grows without a new state: a code block wraps, the window narrows.
    this.resizes = new ResizeObserver(() => this.state.following && this.toEnd());
    this.resizes.observe(this.element.current);
  }

  componentWillUnmount() {
    this.resizes.disconnect();
  }

  toEnd = () => {
    const log = this.element.current;
    log.scrollTop = log.scrollHeight;
    this.lastTop = log.scrollTop;
  };

  onScroll = () => {
    const log = this.element.current;
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_PX;
    const upwards = log.scrollTop < this.lastTop - 1;
    this.lastTop = log.scrollTop;
    // Text that arrives makes the end run away; only a move upwards is the user's.
    const following = atEnd || (this.state.following && !upwards);
    if (following !== this.state.following) this.setState({ following });
  };

  jump = () => {
    this.setState({ following: true });
    this.toEnd();
  };

  render() {
    const { turns, system, id } = state.conversation;
    const empty = turns.length === 0;
    return html`<div class="log-frame">
      <main class="log" ref=${this.element} onScroll=${this.onScroll} tabindex="-1">
        <div class="column">
          ${!empty && system.trim() && html`<${System} text=${system} />`}
          ${empty ? html`<${Empty} />` : turns.map((turn, index) => this.turn(turn, index, id))}
          ${state.storageError && html`<p class="notice">${t("storage_failed", { message: state.storageError })}</p>`}
        </div>
      </main>
      ${
        !this.state.following &&
        html`<${IconButton} icon="down" class="icon-button jump" label=${t("jump_down")} onClick=${this.jump} />`
      }
    </div>`;
  }

  turn(turn, index, id) {
    const { language } = state.settings;
    const key = `${id}.${index}`;
    const idle = state.run === null && state.server.state === "ready";
    if (turn.role === "user") return html`<${Question} ...${{ key, turn, index, idle, language }} />`;
    const run = state.run?.turn === turn ? state.run : null;
    const last = index === state.conversation.turns.length - 1;
    return html`<${Answer} ...${{ key, turn, run, idle: last && idle, language }} />`;
  }
}

function System({ text }) {
  return html`<details class="system">
    <summary><${Icon} name="chevron" />${t("system_prompt")}</summary>
    <p class="raw">${text}</p>
  </details>`;
}

function Empty() {
  const { state: server } = state.server;
  if (server !== "ready") return html`<${NotReady} />`;
  const fill = (text) => () => {
    state.draft = text;
    changed();
    document.querySelector(".composer textarea").focus();
  };
  return html`<section class="empty">
    <h1>${t("empty_title")}</h1>
    <p>${t("empty_note")}</p>
    <ul class="examples">
      ${EXAMPLES.map((name) => t(name)).map(
        (text) => html`<li key=${text}><button type="button" onClick=${fill(text)}>${text}</button></li>`,
      )}
    </ul>
  </section>`;
}

/** What stands in the place of an empty conversation while the server cannot answer yet. */
function NotReady() {
  const { state: server, message, nextTry } = state.server;
  const loads = !["connecting", "locked", "unreachable"].includes(server);
  return html`<section class=${`empty not-ready ${server}`}>
    ${
      server === "unreachable" || server === "locked"
        ? html`<${Icon} name=${server === "locked" ? "key" : "warning"} />`
        : html`<div class="spinner"></div>`
    }
    <h1>${serverStateText()}</h1>
    ${message && html`<p class="message">${message}</p>`}
    ${loads && html`<p>${t("server_wait")}</p>`}
    ${
      server === "unreachable" &&
      html`<p class="next"><${Countdown} until=${nextTry} text="server_next" /></p>
      <button type="button" class="button" onClick=${check}>${t("server_try")}</button>`
    }
  </section>`;
}
