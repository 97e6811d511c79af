"""The bodies of requests, field by field. A field that is none of these is refused with the nearest that exists."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from polygpt.config import Config, Tuple
from polygpt.server.errors import invalid

Penalty = Annotated[float, Field(ge=-2, le=2)]
MOST_LOGPROBS = 20


class Nested(Config):
    """An object within a body. As in the body itself, null counts as absent."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {name: field for name, field in value.items() if field is not None} if isinstance(value, dict) else value


class StreamOptions(Nested):
    """`stream_options`: whether the last event tells the numbers of tokens; obfuscation does nothing here."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Named(Config):
    """What names a model."""

    model: str


class Sampled(Named):
    """The fields that both kinds of completion share.

    `IGNORED` are OpenAI's that do nothing here; `REFUSED` those that would change the answer, with what to do instead.
    """

    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})
    REFUSED: ClassVar[dict[str, str]] = {}

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: PositiveInt | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    max_tokens: PositiveInt | None = None
    n: PositiveInt = 1
    seed: int | None = None
    stop: str | list[str] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions | None = None
    regex: str | None = None
    grammar: str | None = None
    beams: PositiveInt | None = None
    return_token_ids: bool = False

    @classmethod
    def without_ignored(cls, value: dict[str, Any]) -> dict[str, Any]:
        """The body without OpenAI's fields that do nothing here.

        Raises:
            ApiError: it has one of those that would change the answer.
        """
        for name, reason in cls.REFUSED.items():
            if value.get(name) is not None:
                raise invalid(f"{name} is not supported: {reason}", param=name)
        return {name: field for name, field in value.items() if name not in cls.IGNORED}

    @model_validator(mode="after")
    def _check_stream(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: goes with stream: true; leave it out, or ask for a stream")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop strings; a single one may stand alone."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class Completion(Sampled):
    """The body of `/v1/completions`."""

    REFUSED: ClassVar[dict[str, str]] = {"suffix": "these models do not fill in text between a prompt and a suffix"}

    prompt: Any
    max_tokens: NonNegativeInt = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: PositiveInt | None = None


class JsonSchema(Nested):
    """`response_format.json_schema`."""

    name: str = ""
    description: str = ""
    strict: bool = True
    schema_: dict[str, Any] | bool = Field(default=True, alias="schema")


class ResponseFormat(Nested):
    """`response_format`: text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Function(Nested):
    """What a tool is: its name, what it does, and the JSON schema of its parameters."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(Nested):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class ChatCompletion(Sampled):
    """The body of `/v1/chat/completions`."""

    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {
            "user",
            "store",
            "metadata",
            "service_tier",
            "reasoning_effort",
            "verbosity",
            "safety_identifier",
            "prompt_cache_key",
            "prompt_cache_retention",
            "prediction",
        }
    )
    REFUSED: ClassVar[dict[str, str]] = {
        "functions": "use 'tools' instead",
        "function_call": "use 'tool_choice' instead",
        "audio": "these models give text",
        "web_search_options": "this server searches nothing",
    }

    messages: list[dict[str, Any]]
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    modalities: list[Literal["text"]] = Field(default_factory=lambda: ["text"])
    response_format: ResponseFormat | None = None
    tools: Tuple[Tool] = ()
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True


class Tokenize(Named):
    """The body of `/tokenize`: a prompt, or messages that are laid out by the chat template."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None


class Detokenize(Named):
    """The body of `/detokenize`."""

    tokens: list[NonNegativeInt]
