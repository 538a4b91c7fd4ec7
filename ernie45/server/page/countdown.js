// A number of seconds that runs down on its own.

import { Component } from "./html.js";
import { t } from "./strings.js";

/** Whole seconds until a moment, in the words of `text`. Once it has passed, its children. */
export class Countdown extends Component {
  componentDidMount() {
    this.timer = setInterval(() => this.setState({}), 250);
  }

  componentWillUnmount() {
    clearInterval(this.timer);
  }

  render({ until, text, children }) {
    const seconds = Math.ceil((until - Date.now()) / 1000);
    return seconds > 0 ? t(text, { seconds }) : children;
  }
}
