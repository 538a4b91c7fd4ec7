// The line of figures under an answer. A figure that was not measured is not shown.

import { html } from "./html.js";
import { number, t } from "./strings.js";

/** While the answer arrives: what the page itself can tell. */
export function LiveLine({ meter }) {
  const first = meter.firstSeconds();
  if (first === null) return null;
  const rate = meter.rate();
  const parts = [t("live_first", { seconds: number(first, 2) })];
  if (rate !== null) parts.push(t("live_rate", { rate: number(rate, rate < 10 ? 1 : 0) }));
  return html`<p class="figures live">${joined(parts)} <span class="note">${t("live_note")}</span></p>`;
}

/** At the end: the server's counts, and the times that the page measured. */
export function UsageLine({ turn }) {
  const { usage, firstSeconds, rate } = turn;
  const cached = usage?.prompt_tokens_details?.cached_tokens;
  const thinking = usage?.completion_tokens_details?.reasoning_tokens;
  const parts = [];
  if (usage) {
    parts.push(counted("usage_in", usage.prompt_tokens, "usage_cached", cached));
    parts.push(counted("usage_out", usage.completion_tokens, "usage_thinking", thinking));
  }
  if (typeof firstSeconds === "number") parts.push(t("live_first", { seconds: number(firstSeconds, 2) }));
  if (typeof rate === "number") parts.push(t("usage_rate", { rate: number(rate, rate < 10 ? 1 : 0) }));
  if (parts.length === 0) return null;
  return html`<p class="figures" title=${t("usage_note")}>${joined(parts)}</p>`;
}

/** Lines break between figures, not inside one. */
function joined(parts) {
  return parts.map((part, index) => html`${index > 0 && " · "}<span class="part">${part}</span>`);
}

function counted(name, count, partName, part) {
  const text = t(name, { n: number(count) });
  return part ? `${text} ${t(partName, { n: number(part) })}` : text;
}
