// Server-sent events out of a fetch body. EventSource itself can neither POST nor carry a key.

/** Yields the data of each event. Comments and unknown fields are skipped; an event cut off by the end is dropped. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest += value;
      // A carriage return at the end may be the first half of a line end.
      const held = rest.endsWith("\r") ? 1 : 0;
      const lines = rest.slice(0, rest.length - held).split(/\r\n|\n|\r/);
      rest = lines.pop() + rest.slice(rest.length - held);
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    // Whoever stops reading closes the connection, and the server stops generating. Nothing waits for the close.
    reader.cancel().catch(() => {});
  }
}
