// What the user can do with a conversation. One answer at a time: whatever leaves or changes the conversation stops it.

import { ApiError, streamChat } from "./api.js";
import { check, keyRefused } from "./connection.js";
import { absorb, newAnswer, newConversation, toMessages } from "./conversation.js";
import * as history from "./history.js";
import { Meter } from "./meter.js";
import { showPanel } from "./panel.js";
import { allValid, requestFields } from "./parameters.js";
import { chosenModel } from "./settings.js";
import { changed, state } from "./store.js";
import { t } from "./strings.js";

// How often figures that only time changes are drawn: waiting, thinking.
const TICK_MS = 200;

export function openFirst() {
  state.conversation = history.loadOpen() ?? newConversation();
  history.list();
  // A page that is left in the middle of an answer keeps what there is of it.
  addEventListener("pagehide", () => {
    if (!state.run) return;
    state.run.turn.stopped = true;
    history.save(state.conversation);
  });
}

/** Whether `send` would send: the server is ready, nothing is being answered, every setting is in order. */
export function canSend() {
  const model = chosenModel();
  return model !== undefined && state.server.state === "ready" && !state.run && allValid(state.settings, model);
}

export function send(text) {
  if (!canSend() || text.trim() === "") return false;
  state.conversation.turns.push({ role: "user", text });
  answer();
  return true;
}

/** Replaces the question at `index`, drops what came after it, and asks again. */
export function resend(index, text) {
  if (!canSend() || text.trim() === "") return false;
  state.conversation.turns.splice(index, Infinity, { role: "user", text });
  answer();
  return true;
}

/** Drops the last answer and asks for another. */
export function regenerate() {
  if (!canSend()) return;
  if (state.conversation.turns.at(-1).role === "assistant") state.conversation.turns.pop();
  answer();
}

export function stop() {
  state.run?.controller.abort();
}

export function startNew() {
  show(newConversation(state.conversation.system));
  history.remember(null);
}

/** Shows a stored conversation. The one on screen stays as it is: what is stored of it may be older. */
export function open(id) {
  if (id === state.conversation.id) showPanel(null);
  else show(history.load(id) ?? newConversation());
}

export function remove(id) {
  if (id === state.conversation.id) startNew();
  history.remove(id);
}

export function removeAll() {
  startNew();
  history.removeAll();
}

export function setSystem(text) {
  state.conversation.system = text;
  if (!state.run) history.save(state.conversation);
  changed();
}

function show(conversation) {
  stop();
  state.conversation = conversation;
  showPanel(null);
}

async function answer() {
  const { conversation } = state;
  const model = chosenModel();
  const body = { model: model.id, messages: toMessages(conversation), ...requestFields(state.settings, model) };
  const run = { turn: newAnswer(), meter: new Meter(), controller: new AbortController() };
  const index = conversation.turns.push(run.turn) - 1;
  state.run = run;
  state.announcement = t("said_started");
  history.save(conversation);
  history.remember(conversation.id);
  const ticking = setInterval(changed, TICK_MS);
  try {
    await receive(run, body);
    state.announcement = t("said_done");
  } catch (error) {
    note(run.turn, error);
  }
  clearInterval(ticking);
  finish(run);
  // The turn as it stands from now on; a new object, by which the view knows that it changed a last time.
  conversation.turns[index] = { ...run.turn };
  if (state.run === run) state.run = null;
  // Stopped because it was deleted: it must not come back.
  if (conversation === state.conversation || history.isStored(conversation.id)) history.save(conversation);
  changed();
}

async function receive({ turn, meter, controller }, body) {
  for await (const chunk of streamChat(state.key, body, controller.signal)) {
    meter.piece(absorb(turn, chunk));
    changed();
  }
  if (turn.finish === null) throw new ApiError(t("error_incomplete"), { status: 200 });
}

function note(turn, error) {
  if (error.name === "AbortError") {
    turn.stopped = true;
    state.announcement = t("said_stopped");
    return;
  }
  const { status, message, type, param, code, waitSeconds } = error;
  turn.error = { status, message, type, param, code, retryAt: waitSeconds ? Date.now() + 1000 * waitSeconds : 0 };
  state.announcement = t("said_failed", { message });
  if (status === 401) keyRefused();
  else if (status === 0 || status === 503) check();
}

function finish({ turn, meter }) {
  turn.firstSeconds = meter.firstSeconds();
  turn.thoughtSeconds = meter.thoughtSeconds(meter.last);
  turn.rate = turn.usage ? meter.rate(turn.usage.completion_tokens) : null;
}
