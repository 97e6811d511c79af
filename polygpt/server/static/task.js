// One thing at a time: the work that "Stop" stops, and the error that it may end with.

export class Task {
  /** `show(busy)` is told when work begins and ends; `fail(message)` what went wrong, or null. */
  constructor({ show, fail }) {
    Object.assign(this, { show, fail, controller: null });
  }

  get busy() {
    return this.controller !== null;
  }

  stop() {
    this.controller?.abort();
  }

  /** Runs `work(signal)`; what ran before is stopped first. */
  async run(work) {
    this.stop();
    const controller = (this.controller = new AbortController());
    this.fail(null);
    this.show(true);
    try {
      await work(controller.signal);
    } catch (error) {
      if (error.name !== "AbortError") this.fail(sentence(error.message));
    } finally {
      if (this.controller === controller) {
        this.controller = null;
        this.show(false);
      }
    }
  }
}

/** An error's message as a sentence of the page. */
export function sentence(message) {
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return /[.!?]$/.test(text) ? text : `${text}.`;
}

/** Shows or hides a line with role=alert. */
export function alertLine(element) {
  return (message) => {
    element.textContent = message ?? "";
    element.hidden = !message;
  };
}
