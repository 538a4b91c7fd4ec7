// Conversations in localStorage, each under its own name, so that two tabs do not overwrite each other's.

import { titleOf } from "./conversation.js";
import { changed, state } from "./store.js";

const PREFIX = "ernie45.chat.";
const OPEN = "ernie45.open"; // in sessionStorage: a reload returns to the same conversation, a new tab starts afresh

/** Writes the conversation, unless it is empty. */
export function save(conversation) {
  if (conversation.turns.length === 0) return;
  conversation.title = titleOf(conversation);
  conversation.updated = Date.now();
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
    state.storageError = "";
  } catch (error) {
    state.storageError = error.message; // full, or forbidden: shown, as the user counts on it
  }
  list();
}

export function load(id) {
  const conversation = read(PREFIX + id);
  if (conversation) remember(id);
  return conversation;
}

/** The conversation that this tab had open before a reload, or null. */
export function loadOpen() {
  try {
    return read(PREFIX + sessionStorage.getItem(OPEN));
  } catch {
    return null;
  }
}

/** Notes which conversation is open; null for a new one. */
export function remember(id) {
  try {
    if (id) sessionStorage.setItem(OPEN, id);
    else sessionStorage.removeItem(OPEN);
  } catch {
    // Without storage there is nothing to return to.
  }
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
  list();
}

export function removeAll() {
  for (const name of names()) localStorage.removeItem(name);
  list();
}

export function isStored(id) {
  return names().includes(PREFIX + id);
}

/** Refreshes `state.conversations`. */
export function list() {
  const stored = names().map(read).filter(Boolean);
  state.conversations = stored
    .map(({ id, title, updated }) => ({ id, title, updated }))
    .sort((a, b) => b.updated - a.updated);
  changed();
}

/** Follows what other tabs store. */
export function followOtherTabs() {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(PREFIX)) list();
  });
}

function names() {
  try {
    return Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
  } catch {
    return [];
  }
}

/** Null for what this page did not write: programs that were served from the same address share the storage. */
function read(name) {
  try {
    const conversation = JSON.parse(localStorage.getItem(name));
    const { id, title, system, turns } = conversation;
    const sound = [id, title, system, ...turns.map((turn) => turn.text)].every((text) => typeof text === "string");
    return sound && name === PREFIX + id ? conversation : null;
  } catch {
    return null;
  }
}
