"""A server of tiny models over real sockets, in this process."""

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import tokenizers as hf
import uvicorn
import zoo

from polygpt.config import validate
from polygpt.language_model import LanguageModel, Origin
from polygpt.model import Model, ModelConfig
from polygpt.server import Served, ServerSettings, create_app, listen
from polygpt.server.launch import address_of, uvicorn_config
from polygpt.tokenizers import Tokenizer

TEMPLATE = (
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool | tojson }}{% endfor %} as <tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONTEXT = 1024


def tokenizer():
    """Bytes, a few words, and special tokens; 0 ends a text."""
    from polygpt.tokenizers import TokenizerConfig, train_tokenizer

    words = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["the cat sat on the mat, é漢字 " * 20])
    plain = hf.Tokenizer.from_str(words.to_json())
    plain.add_special_tokens(["<|tools|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"])
    return Tokenizer(plain)


def language_model(context=CONTEXT, seed=0, template=TEMPLATE, **changes):
    """A model of random weights that are large enough to prefer some tokens."""
    tokens = tokenizer()
    fields = {**zoo.BASE, "vocab_size": tokens.vocab_size, "context_length": context, **changes}
    model = Model(validate(ModelConfig, fields))
    return LanguageModel(model.config, zoo.lively(model), tokens, Origin(chat_template=template))


class Live:
    """A running server: where it listens, what it serves."""

    def __init__(self, models, settings, keys, server, url):
        self.models, self.settings, self.keys, self.server, self.url = models, settings, keys, server, url
        self.state = server.config.app.state.server

    @property
    def served(self):
        return self.models[0]

    @property
    def address(self):
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)

    def client(self, **options):
        import openai

        key = self.keys[0] if self.keys else "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60, **options)

    def raw(self, data, seconds=20.0):
        """What comes back for bytes, until the server closes or nothing comes for so long."""
        with socket.create_connection(self.address, timeout=seconds) as connection:
            connection.sendall(data)
            received = b""
            with suppress(TimeoutError, ConnectionResetError):
                while piece := connection.recv(65536):
                    received += piece
            return received

    def connect(self, path, body, key=None):
        """A connection with a request on its way, for those that read the answer as they like."""
        connection = socket.create_connection(self.address, timeout=30)
        connection.sendall(post(path, body, key))
        return connection

    def until(self, condition, seconds=20.0):
        """Waits for a condition; fails where it does not come true."""
        ends = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < ends, "the condition did not come true"
            time.sleep(0.005)

    @contextmanager
    def slowly(self, seconds=0.01):
        """While inside, a step of the engine takes so long and decodes one token a sequence."""
        engine = self.served.runner._engine
        step = engine.step

        def slow_step(*_):
            time.sleep(seconds)
            return step(1)

        engine.step = slow_step
        try:
            yield
        finally:
            del engine.step
            self.until(lambda: self.idle)

    @property
    def idle(self):
        """Whether nothing runs or waits, in the server or in its engines."""
        loads = [served.runner.load for served in self.models]
        return (
            not self.state.active
            and all(load == (0, 0) for load in loads)
            and not any(served.runner.in_flight for served in self.models)
        )


def post(path, body, key=None, kind="application/json"):
    """A request as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", f"content-type: {kind}", f"content-length: {len(data)}"]
    lines += [f"authorization: Bearer {key}"] if key else []
    return "\r\n".join([*lines, "", ""]).encode() + data


@contextmanager
def running(models, keys=(), draft=None, **settings):
    """A server of `models`, a mapping from names, while inside."""
    chosen = ServerSettings(**{"port": 0, **settings})
    served = [Served(name, lm, chosen, draft) for name, lm in models.items()]
    app, listening = create_app(served, chosen, keys), listen(chosen)
    server = uvicorn.Server(uvicorn_config(app, chosen))
    thread = threading.Thread(target=asyncio.run, args=(server.serve([listening]),), daemon=True)
    thread.start()
    live = Live(served, chosen, keys, server, address_of(listening))
    live.until(lambda: server.started)
    try:
        yield live
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not stop"


def body_of(raw):
    """The JSON of a response's bytes, and its status."""
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)
