// What the page shows, in one place, and the one way to have it shown: change `state`, then call `changed`.

export const state = {
  /** Sent with every request; empty until it is known. Never written to localStorage. */
  key: "",
  keyDialog: null, // null, or why it is open: "missing", "refused", "change"
  server: { state: "connecting", message: "", nextTry: 0 },
  models: [],
  /** The conversation on screen: see conversation.js. */
  conversation: null,
  /** Stored conversations, the latest first: `[{id, title, updated}]`. */
  conversations: [],
  storageError: "",
  /** The answer under way: `{turn, meter, controller}`, or null. */
  run: null,
  draft: "",
  /** See settings.js. */
  settings: null,
  panel: null, // null, "conversations" or "settings": what lies open
  confirmingClear: false,
  /** Read out by screen readers when it changes. */
  announcement: "",
};

let draw = () => {};
let scheduled = false;
let cost = 0;

/** `render` is called after changes, at most once a frame. */
export function onChange(render) {
  draw = render;
}

export function changed() {
  if (scheduled) return;
  scheduled = true;
  // A long answer is parsed anew each time: a pause of three times what that took leaves a core mostly free.
  // Frames do not run in a hidden tab, where the stream goes on.
  if (document.hidden || cost > 8) setTimeout(frame, document.hidden ? 200 : 3 * cost);
  else requestAnimationFrame(frame);
}

function frame() {
  scheduled = false;
  const begin = performance.now();
  draw();
  cost = performance.now() - begin;
}
