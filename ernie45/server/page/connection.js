// Key, readiness and models: what has to be there before anything can be sent.

import { fetchModels, fetchReadiness } from "./api.js";
import { changed, state } from "./store.js";

const KEY = "ernie45.key";
const FIRST_WAIT_MS = 1000;
const LONGEST_WAIT_MS = 10000;
const READY_WAIT_MS = 30000;

let timer = 0;
let wait = FIRST_WAIT_MS;

/** Takes the key from the address or from this tab's storage, and starts to look after the server. */
export function connect() {
  takeKeyFromAddress();
  addEventListener("hashchange", () => takeKeyFromAddress() && check());
  // A hidden tab asks nothing; back in sight it asks at once.
  document.addEventListener("visibilitychange", () => !document.hidden && !state.keyDialog && check());
  check();
}

export function useKey(key) {
  state.key = key.trim();
  try {
    sessionStorage.setItem(KEY, state.key);
  } catch {
    // Without storage the key holds until the page is reloaded.
  }
  state.keyDialog = null;
  state.server = { state: "connecting", message: "", nextTry: 0 };
  check();
}

export function askForKey(reason) {
  state.keyDialog = reason;
  changed();
}

/** A 401, from whichever request: what was known of the key no longer holds. */
export function keyRefused() {
  clearTimeout(timer);
  state.server = { state: "locked", message: "", nextTry: 0 };
  askForKey(state.key ? "refused" : "missing");
}

/** Asks the server how it is, now, and again later: soon and ever more slowly until it is ready, then now and then. */
export async function check() {
  clearTimeout(timer);
  const key = state.key;
  // No header can carry anything else, so no server can have given it out.
  if (!/^[\x21-\x7e]*$/.test(key)) {
    keyRefused();
    return;
  }
  let server;
  try {
    server = await fetchReadiness(key);
    // Each time, not only once: a server that was restarted may serve another model.
    if (server.state === "ready") state.models = await fetchModels(key);
  } catch (error) {
    if (key !== state.key) return;
    if (error.status === 401 || error.status === 403) {
      keyRefused();
      return;
    }
    // Of a failed connection the browser says no more than that; where to may be what is wrong.
    server = { state: "unreachable", message: error.status ? error.message : location.host };
  }
  if (key !== state.key) return; // a newer key has its own check under way
  const ready = server.state === "ready";
  const pause = ready ? READY_WAIT_MS : wait;
  wait = ready ? FIRST_WAIT_MS : Math.min(1.5 * wait, LONGEST_WAIT_MS);
  state.server = { ...server, nextTry: Date.now() + pause };
  clearTimeout(timer);
  timer = setTimeout(() => !document.hidden && check(), pause);
  changed();
}

/** `#key=...` moves to this tab's storage and out of the address, where it could be seen, copied or bookmarked. */
function takeKeyFromAddress() {
  const given = decoded(/[#&]key=([^&]+)/.exec(location.hash)?.[1] ?? "");
  if (given) history.replaceState(null, "", location.pathname + location.search);
  try {
    if (given) sessionStorage.setItem(KEY, given);
    state.key = given || (sessionStorage.getItem(KEY) ?? "");
  } catch {
    state.key = given;
  }
  return Boolean(given);
}

/** A key may stand in the address as it is, or escaped. */
function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
