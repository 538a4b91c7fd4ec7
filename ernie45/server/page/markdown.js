// Markdown as vnodes: marked finds the tokens, this file decides what each may become. Nothing of an answer is ever
// parsed as HTML: a tag is shown as the text that it is, a link goes to http, https or mailto or is no link, and an
// image is a link, as loading it would tell another server that somebody reads this.

import { CodeBlock } from "./code_block.js";
import { decodeEntities } from "./entities.js";
import { html } from "./html.js";
import { Marked } from "./vendor/marked.esm.js";

// Deeper than anybody writes on purpose; thousands of levels would overflow the stack of whoever walks them.
const MAX_DEPTH = 24;

// TeX is shown as it was written: Markdown would drop its backslashes and set its underscores in italics.
const formula = {
  name: "formula",
  level: "inline",
  start: (source) => source.match(/\\[([]|\$\$/)?.index,
  tokenizer(source) {
    const match = /^(?:\\\([^]+?\\\)|\\\[[^]+?\\\]|\$\$[^]+?\$\$)/.exec(source);
    return match ? { type: "formula", raw: match[0] } : undefined;
  },
};

const marked = new Marked({ gfm: true, extensions: [formula] });

/** The vnodes of a text in Markdown. Text that the parser gives up on is shown as it is. */
export function markdown(text) {
  let tokens;
  try {
    tokens = marked.lexer(text);
  } catch {
    return html`<p class="raw">${text}</p>`;
  }
  return blocks(tokens, 0);
}

function blocks(tokens, depth) {
  return tokens.map((token) => (depth > MAX_DEPTH ? token.raw : block(token, depth + 1)));
}

function block(token, depth) {
  switch (token.type) {
    case "paragraph":
      return html`<p>${inlines(token.tokens, depth)}</p>`;
    case "heading":
      return heading(token, depth);
    case "code":
      return html`<${CodeBlock} language=${token.lang ?? ""} text=${token.text} />`;
    case "blockquote":
      return html`<blockquote>${blocks(token.tokens, depth)}</blockquote>`;
    case "list":
      return list(token, depth);
    case "table":
      return table(token, depth);
    case "hr":
      return html`<hr />`;
    case "html":
      return html`<p class="raw">${token.raw.trimEnd()}</p>`;
    case "checkbox":
      return html`<span aria-hidden="true">${token.checked ? "☑ " : "☐ "}</span>`;
    case "text": // a list item's words, without a paragraph of their own
      return token.tokens ? inlines(token.tokens, depth) : decodeEntities(token.text);
    case "space":
    case "def":
      return null;
    default:
      return token.raw;
  }
}

function inlines(tokens, depth) {
  return tokens.map((token) => (depth > MAX_DEPTH ? token.raw : inline(token, depth + 1)));
}

function inline(token, depth) {
  switch (token.type) {
    case "text":
      return decodeEntities(token.text);
    case "escape":
      return token.text;
    case "strong":
      return html`<strong>${inlines(token.tokens, depth)}</strong>`;
    case "em":
      return html`<em>${inlines(token.tokens, depth)}</em>`;
    case "del":
      return html`<del>${inlines(token.tokens, depth)}</del>`;
    case "codespan":
      return html`<code>${token.text}</code>`;
    case "br":
      return html`<br />`;
    case "link":
      return link(token.href, inlines(token.tokens, depth), token.raw);
    case "image":
      return link(token.href, `🖼 ${decodeEntities(token.text || token.href)}`, token.raw);
    case "formula":
      return html`<code class="formula">${token.raw}</code>`;
    case "checkbox":
      return block(token, depth);
    default: // "html" among them: a tag is text
      return token.raw;
  }
}

/** A link, if its address may be followed; otherwise the source, so that nobody is misled about where it led. */
function link(href, content, raw) {
  const address = decodeEntities(href);
  if (!isSafe(address)) return raw;
  return html`<a href=${address} target="_blank" rel="noopener noreferrer" title=${address}>${content}</a>`;
}

/** Absolute addresses of three schemes. The browser's own parser decides, as it is the one that would follow them. */
function isSafe(address) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(address).protocol);
  } catch {
    return false;
  }
}

// The page's own headings are h1 and h2; those of an answer begin below.
function heading(token, depth) {
  const level = `h${Math.min(token.depth + 2, 6)}`;
  return html`<${level} class=${`level${token.depth}`}>${inlines(token.tokens, depth)}<//>`;
}

function list(token, depth) {
  const items = token.items.map(
    (item) => html`<li class=${item.task ? "task" : null}>${blocks(item.tokens, depth)}</li>`,
  );
  return token.ordered ? html`<ol start=${token.start}>${items}</ol>` : html`<ul>${items}</ul>`;
}

function table(token, depth) {
  const cells = (row, tag) =>
    row.map(
      (cell) => html`<${tag} class=${cell.align ? `align-${cell.align}` : null}>${inlines(cell.tokens, depth)}<//>`,
    );
  return html`<div class="table" tabindex="0" role="group">
    <table>
      <thead>
        <tr>
          ${cells(token.header, "th")}
        </tr>
      </thead>
      <tbody>
        ${token.rows.map((row) => html`<tr>${cells(row, "td")}</tr>`)}
      </tbody>
    </table>
  </div>`;
}
