// The parameters of a request: what may be set, in which range, and how the fields' text becomes the request's values.

import { t, number } from "./strings.js";

const MAX_STOP = 16;

// `above`: the lower end is not allowed itself. `whole`: integers only.
export const SAMPLING = [
  { name: "temperature", low: 0, high: 2 },
  { name: "top_p", low: 0, high: 1, above: true },
  { name: "top_k", low: 0, high: 1000000, whole: true },
  { name: "min_p", low: 0, high: 1 },
  { name: "max_tokens", low: 1, high: Infinity, whole: true, context: true },
  { name: "repetition_penalty", low: 0.1, high: 2 },
  { name: "presence_penalty", low: -2, high: 2 },
  { name: "frequency_penalty", low: -2, high: 2 },
  // Beyond this, numbers of a browser skip integers: the seed sent would not be the seed written.
  { name: "seed", low: 0, high: Number.MAX_SAFE_INTEGER, whole: true },
];
export const BUDGET = { name: "reasoning_max_tokens", low: 0, high: Infinity, whole: true, context: true };
export const STOP = { name: "stop", lines: true };

/** The range of a parameter in words; `maxLength` is the model's context, or null. */
export function rangeText(parameter, maxLength) {
  if (parameter.lines) return t("range_stop", { n: MAX_STOP });
  const { low, high } = bounds(parameter, maxLength);
  const values = { low: written(low), high: written(high) };
  if (parameter.above) return t("range_above", values);
  if (!parameter.whole) return t("range", values);
  return t(high === Infinity ? "range_whole_open" : "range_whole", values);
}

/** What is wrong with a field's text, or "" if nothing is. An empty field is unset, which is never wrong. */
export function problem(parameter, text, maxLength) {
  if (text.trim() === "") return "";
  if (parameter.lines) {
    const count = stopStrings(text).length;
    return count > MAX_STOP ? t("bad_stop", { count, n: MAX_STOP }) : "";
  }
  const value = Number(text);
  const { low, high } = bounds(parameter, maxLength);
  const say = (key) => t(key, { value: text.trim(), range: rangeText(parameter, maxLength) });
  if (!Number.isFinite(value)) return say("bad_number");
  if (parameter.whole && !Number.isInteger(value)) return say("bad_whole");
  if (value < low || value > high || (parameter.above && value === low)) return say("bad_range");
  return "";
}

/** The set fields as the request's members. `model` is an entry of fetchModels, or undefined. */
export function requestFields(settings, model) {
  const fields = {};
  for (const parameter of used(model)) {
    const text = settings.values[parameter.name] ?? "";
    if (text.trim() !== "") fields[parameter.name] = parameter.lines ? stopStrings(text) : Number(text);
  }
  if (model?.thinks && model.mayNotThink) fields.enable_thinking = settings.thinking;
  if (fields.enable_thinking === false) delete fields.reasoning_max_tokens;
  return fields;
}

/** Whether every field that would be sent is in order. */
export function allValid(settings, model) {
  return used(model).every(
    (parameter) => !problem(parameter, settings.values[parameter.name] ?? "", model?.maxLength ?? null),
  );
}

function used(model) {
  return [...SAMPLING, STOP, ...(model?.thinks ? [BUDGET] : [])];
}

function bounds({ low, high, context }, maxLength) {
  return { low, high: context && maxLength ? maxLength : high };
}

function written(value) {
  return number(value, Number.isInteger(value) ? 0 : 1);
}

function stopStrings(text) {
  const lines = text.split("\n").filter((line) => line !== "");
  return lines.map((line) => line.replace(/\\([nt\\])/g, (_, c) => ({ n: "\n", t: "\t", "\\": "\\" })[c]));
}
