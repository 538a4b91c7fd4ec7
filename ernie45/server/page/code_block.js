// A block of code with its language and a button that copies it.

import { CopyButton } from "./copy.js";
import { html } from "./html.js";
import { t } from "./strings.js";

export function CodeBlock({ language, text }) {
  // An info string may go on behind the language: ```python title="a.py"
  const name = language.split(/\s/)[0];
  return html`<div class="code">
    <div class="code-bar">
      <span>${name}</span>
      <${CopyButton} label=${t("code_copy")} text=${text} />
    </div>
    <pre tabindex="0"><code>${text}</code></pre>
  </div>`;
}
