// htm's templates, bound to Preact's vnodes: markup in the page's modules without a build step.

import htm from "./vendor/htm.mjs";
import { h } from "./vendor/preact.mjs";

export { Component, createRef, Fragment, render } from "./vendor/preact.mjs";

export const html = htm.bind(h);
