// The panel of conversations that this browser keeps.

import { open, remove, startNew } from "./chat.js";
import { html } from "./html.js";
import { Icon, IconButton } from "./icons.js";
import { Panel } from "./panel.js";
import { changed, state } from "./store.js";
import { t } from "./strings.js";

export function ConversationsPanel() {
  const { conversations, conversation } = state;
  return html`<${Panel} name="conversations" tag="nav" label=${t("conversations")}>
    <p class="brand"><img src="page/icon.svg" alt="" width="26" height="26" />ernie45</p>
    <button type="button" class="button new" onClick=${begin}><${Icon} name="plus" />${t("conversation_new")}</button>
    <ul>
      ${conversations.map(
        (entry) => html`<${Entry} key=${entry.id} entry=${entry} current=${entry.id === conversation.id} />`,
      )}
    </ul>
    ${
      conversations.length === 0
        ? html`<p class="none">${t("conversation_none")}</p>`
        : html`<button type="button" class="link clear" onClick=${confirmClear}>${t("conversation_clear")}</button>`
    }
  <//>`;
}

function Entry({ entry, current }) {
  const title = entry.title || t("untitled");
  return html`<li class=${current ? "current" : ""}>
    <button
      type="button"
      class="entry"
      aria-current=${current ? "true" : null}
      title=${title}
      onClick=${() => open(entry.id)}
    >
      ${title}
    </button>
    <${IconButton} icon="trash" label=${t("conversation_delete", { title })} onClick=${() => remove(entry.id)} />
  </li>`;
}

function begin() {
  startNew();
  document.querySelector(".composer textarea").focus();
}

function confirmClear() {
  state.confirmingClear = true;
  changed();
}
