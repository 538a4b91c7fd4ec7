// Helpers of text fields.

/** Enter without Shift, and not the Enter that accepts an input method's suggestion (Safari: 229, afterwards). */
export function isEnter(event) {
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

/** Makes a textarea as high as its text; the style sheet sets the most. */
export function grow(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}
