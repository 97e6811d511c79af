// Server-sent events out of a response's body.

/** Cuts text that comes in any pieces into the data of events; comments are skipped. */
export class EventParser {
  #rest = "";
  #data = [];

  feed(text) {
    const events = [];
    const lines = (this.#rest + text).split(/\r\n|\n|\r(?!$)/);
    this.#rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.#data.length) events.push(this.#data.join("\n"));
        this.#data = [];
      } else if (line.startsWith("data:")) {
        this.#data.push(line.slice(5).replace(/^ /, ""));
      }
    }
    return events;
  }
}

/** The JSON of each event up to [DONE]. Throws if the stream ends without it: the server went away. */
export async function* events(body) {
  const parser = new EventParser();
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      for (const data of parser.feed(value)) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        yield event;
        if (event.error) return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new TypeError("the stream was cut");
}
