// A conversation as a value: `{id, title, updated, system, turns}`. A turn of the user is `{role, text}`, one of the
// assistant `{role, text, reasoning, calls, finish, stopped, usage, firstSeconds, rate, thoughtSeconds, error}`.
// Turns are replaced, not changed, but for the one that is being answered.

const TITLE_LENGTH = 60;

export function newConversation(system = "") {
  // crypto.randomUUID exists in secure contexts only, and the page may be served over plain HTTP.
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", updated: 0, system, turns: [] };
}

export function newAnswer() {
  return { role: "assistant", text: "", reasoning: "", calls: [], finish: null, stopped: false };
}

/** The beginning of the first question, cut at a character, not inside one. */
export function titleOf(conversation) {
  const words = (conversation.turns[0]?.text ?? "").trim().replace(/\s+/g, " ");
  const characters = [...words];
  return characters.length > TITLE_LENGTH ? `${characters.slice(0, TITLE_LENGTH).join("")}…` : words;
}

/** The request's messages. Thoughts are not sent back: the models' templates drop them. Where an answer failed
 * without a word, the questions around it are joined, as some templates insist that the roles alternate. */
export function toMessages(conversation) {
  const messages = [];
  if (conversation.system.trim()) messages.push({ role: "system", content: conversation.system });
  for (const { role, text } of conversation.turns) {
    const last = messages.at(-1);
    if (text === "") continue;
    if (last?.role === role) last.content += `\n\n${text}`;
    else messages.push({ role, content: text });
  }
  return messages;
}

/** Takes in one chunk of a stream. Returns which part of the answer it carried: "reasoning", "text" or null. */
export function absorb(turn, chunk) {
  if (chunk.usage) turn.usage = chunk.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return null;
  const delta = choice.delta ?? {};
  turn.finish = choice.finish_reason ?? turn.finish;
  turn.reasoning += delta.reasoning_content ?? "";
  turn.text += delta.content ?? "";
  for (const { index = 0, function: call } of delta.tool_calls ?? []) {
    turn.calls[index] ??= { name: "", arguments: "" };
    turn.calls[index].name += call?.name ?? "";
    turn.calls[index].arguments += call?.arguments ?? "";
  }
  if (delta.content || delta.tool_calls) return "text";
  return delta.reasoning_content ? "reasoning" : null;
}
