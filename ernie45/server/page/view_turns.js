// One question, one answer: how they look and what can be done with them.

import { regenerate, resend } from "./chat.js";
import { CodeBlock } from "./code_block.js";
import { CopyButton } from "./copy.js";
import { grow, isEnter } from "./fields.js";
import { Component, createRef, html } from "./html.js";
import { Icon, IconButton } from "./icons.js";
import { markdown } from "./markdown.js";
import { number, t } from "./strings.js";
import { Failure } from "./view_failure.js";
import { LiveLine, UsageLine } from "./view_figures.js";

/** Turns are drawn anew only when they, or what is passed beside them, changed: parsing a long conversation costs. */
class Turn extends Component {
  shouldComponentUpdate(next, nextState) {
    const names = Object.keys(next);
    return next.run || nextState !== this.state || names.some((name) => next[name] !== this.props[name]);
  }
}

export class Question extends Turn {
  state = { draft: null }; // the text while it is edited
  field = createRef();

  edit = () => {
    this.setState({ draft: this.props.turn.text }, () => {
      grow(this.field.current);
      this.field.current.focus();
    });
  };

  cancel = () => this.setState({ draft: null });

  submit = () => {
    if (resend(this.props.index, this.state.draft)) this.cancel();
  };

  onKeyDown = (event) => {
    if (isEnter(event)) this.submit();
    else if (event.key === "Escape") this.cancel();
    else return;
    event.preventDefault();
  };

  onInput = (event) => {
    grow(event.target);
    this.setState({ draft: event.target.value });
  };

  render({ turn, idle }, { draft }) {
    if (draft !== null) return this.editor(draft, idle);
    return html`<article class="question" aria-label=${t("you")}>
      <p class="raw bubble">${turn.text}</p>
      <div class="actions">
        <${CopyButton} label=${t("copy")} text=${turn.text} />
        ${idle && html`<${IconButton} icon="edit" label=${t("edit")} onClick=${this.edit} />`}
      </div>
    </article>`;
  }

  editor(draft, idle) {
    return html`<article class="question editing" aria-label=${t("edit")}>
      <textarea
        ref=${this.field}
        rows="1"
        aria-label=${t("edit")}
        value=${draft}
        onInput=${this.onInput}
        onKeyDown=${this.onKeyDown}
      ></textarea>
      <div class="row">
        <small>${t("edit_note")}</small>
        <div class="space"></div>
        <button type="button" class="button" onClick=${this.cancel}>${t("cancel")}</button>
        <button type="button" class="button primary" disabled=${!idle || !draft.trim()} onClick=${this.submit}>
          ${t("send")}
        </button>
      </div>
    </article>`;
  }
}

export class Answer extends Turn {
  render({ turn, run, idle }) {
    const waiting = run && run.meter.first === null;
    return html`<article class="answer" aria-label=${t("assistant")} aria-busy=${Boolean(run)}>
      ${turn.reasoning && html`<${Thought} turn=${turn} run=${run} />`}
      ${turn.text && html`<div class="text">${markdown(turn.text)}</div>`}
      ${turn.calls.map((call) => html`<${Call} ...${call} />`)}
      ${waiting && html`<${Waiting} seconds=${run.meter.elapsed()} />`}
      ${!run && html`<${End} turn=${turn} />`}
      ${turn.error && html`<${Failure} error=${turn.error} retry=${idle ? regenerate : null} />`}
      <div class="actions">
        ${!run && turn.text && html`<${CopyButton} label=${t("copy")} text=${turn.text} />`}
        ${idle && !turn.error && html`<${IconButton} icon="again" label=${t("regenerate")} onClick=${regenerate} />`}
        ${run ? html`<${LiveLine} meter=${run.meter} />` : html`<${UsageLine} turn=${turn} />`}
      </div>
    </article>`;
  }
}

function Waiting({ seconds }) {
  return html`<p class="waiting"><i class="dot"></i>${t("waiting", { seconds: number(seconds, 1) })}</p>`;
}

/** The thought: open while it lasts, then folded, with how long it took and how many tokens the server counted. */
function Thought({ turn, run }) {
  const lasts = run !== null && run.meter.thoughtEnd === null;
  const seconds = run ? run.meter.thoughtSeconds() : turn.thoughtSeconds;
  const tokens = turn.usage?.completion_tokens_details?.reasoning_tokens;
  const title =
    typeof seconds === "number"
      ? t(lasts ? "thinking" : "thought", { seconds: number(seconds, 1) })
      : t("thought_untimed");
  return html`<details class=${`thought ${lasts ? "lasts" : ""}`} open=${lasts}>
    <summary>
      <${Icon} name="chevron" />
      <span>${title}</span>
      ${tokens > 0 && html`<span class="count">${t("thought_tokens", { n: number(tokens) })}</span>`}
    </summary>
    <div class="text">${markdown(turn.reasoning)}</div>
  </details>`;
}

function Call({ name, arguments: text }) {
  return html`<section class="call">
    <p>${t("tool_call", { name })}</p>
    <${CodeBlock} language="json" text=${text} />
  </section>`;
}

/** Why the answer ended, where that is worth a word. */
function End({ turn }) {
  if (turn.stopped) return html`<p class="end">${t("stopped")}</p>`;
  if (turn.finish === "length") return html`<p class="end">${t("cut_off")}</p>`;
  if (turn.error || [null, "stop", "tool_calls"].includes(turn.finish)) return null;
  return html`<p class="end">${t("finish_other", { reason: turn.finish })}</p>`;
}
