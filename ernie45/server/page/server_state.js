// The server's state in words, for the header and for the empty conversation.

import { state } from "./store.js";
import { t } from "./strings.js";

const KNOWN = ["connecting", "ready", "loading", "restarting", "unreachable", "locked"];

export function serverStateText() {
  const { state: name } = state.server;
  return KNOWN.includes(name) ? t(`server_${name}`) : t("server_busy", { state: name });
}
