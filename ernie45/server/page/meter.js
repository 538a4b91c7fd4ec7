// Times of one answer, taken where they are felt: in the page. Tokens are counted by the server, at the end; until
// then a rate counts one token per event, which the page says beside it.

// Shorter answers are over before a rate means anything.
const MIN_RATE_SECONDS = 0.05;

export class Meter {
  constructor(now = performance.now()) {
    this.begin = now;
    this.first = null; // when the first piece of the answer arrived
    this.last = null;
    this.pieces = 0;
    this.thoughtBegin = null;
    this.thoughtEnd = null;
  }

  /** Notes that a piece arrived; `kind` is what `absorb` returned. */
  piece(kind, now = performance.now()) {
    if (kind === null) return;
    this.first ??= now;
    this.last = now;
    this.pieces += 1;
    if (kind === "reasoning") this.thoughtBegin ??= now;
    else if (this.thoughtBegin !== null) this.thoughtEnd ??= now;
  }

  /** Seconds since the request went out. */
  elapsed(now = performance.now()) {
    return (now - this.begin) / 1000;
  }

  firstSeconds() {
    return this.first === null ? null : (this.first - this.begin) / 1000;
  }

  /** Length of the thought, up to now while it lasts; null if there is none. */
  thoughtSeconds(now = performance.now()) {
    return this.thoughtBegin === null ? null : ((this.thoughtEnd ?? now) - this.thoughtBegin) / 1000;
  }

  /** Tokens per second from the first piece to the last, for `tokens` of them; null where that means nothing. */
  rate(tokens = this.pieces) {
    const seconds = (this.last - this.first) / 1000;
    return tokens > 1 && seconds >= MIN_RATE_SECONDS ? (tokens - 1) / seconds : null;
  }
}
