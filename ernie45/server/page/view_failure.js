// What went wrong with an answer, and what can be done about it.

import { Countdown } from "./countdown.js";
import { html } from "./html.js";
import { Icon } from "./icons.js";
import { t } from "./strings.js";

/** `retry` is null where another try is not possible now. Where the server named a time, the button waits for it. */
export function Failure({ error, retry }) {
  const details = ["status", "type", "code", "param"].filter((name) => error[name] && error[name] !== 200);
  const message = error.status === 0 ? t("error_connection_note", { message: error.message }) : error.message;
  const button = html`<button type="button" class="button" onClick=${retry}>${t("retry")}</button>`;
  return html`<section class="failure" role="group" aria-label=${t(title(error))}>
    <${Icon} name="warning" />
    <div>
      <h2>${t(title(error))}</h2>
      <p>${message}</p>
      ${
        details.length > 0 &&
        html`<details>
        <summary>${t("error_details")}</summary>
        <dl>${details.map((name) => html`<dt>${name}</dt><dd>${String(error[name])}</dd>`)}</dl>
      </details>`
      }
      ${retry && html`<p class="retry"><${Countdown} until=${error.retryAt} text="error_wait">${button}<//></p>`}
    </div>
  </section>`;
}

function title({ status }) {
  if (status === 0) return "error_connection";
  if (status === 200) return "error_broken"; // the answer had begun
  if (status === 401) return "error_key";
  if (status === 429 || status === 503) return "error_busy";
  return status < 500 ? "error_refused" : "error_server";
}
