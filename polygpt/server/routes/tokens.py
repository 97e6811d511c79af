"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse

from polygpt.server.bodies import read_body
from polygpt.server.errors import invalid
from polygpt.server.messages import read_messages
from polygpt.server.schemas import Detokenize, Tokenize
from polygpt.server.state import state_of


async def tokenize(request: Request) -> JSONResponse:
    """The ids of a prompt or of a conversation, however long it is."""
    state = state_of(request)
    body = await read_body(request, Tokenize, state.settings.json_depth)
    served = state.model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise invalid("give a prompt or messages, one of the two", param="prompt")
    if body.prompt is not None:
        tokens = await served.text_ids(body.prompt)
    else:
        tokens = await served.chat_ids(read_messages(body.messages), limited=False)
    return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": served.length})


async def detokenize(request: Request) -> JSONResponse:
    """The text of ids."""
    state = state_of(request)
    body = await read_body(request, Detokenize, state.settings.json_depth)
    served = state.model(body.model)
    served.check_ids(body.tokens, "tokens")
    return JSONResponse({"prompt": served.lm.tokenizer.decode(body.tokens)})
