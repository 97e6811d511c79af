"""`/v1/inspect`: its numbers are those of `polygpt.inspection`, its limits are kept, its errors name the field."""

import base64
import threading

import httpx
import numpy as np
import pytest
import serving
import zoo

from polygpt.inspection import attention_maps, expert_shares, logit_lens, pool_maps, score_tokens
from polygpt.server import inspection

TEXT = "the cat sat on the mat, é漢字 and on"
EXPERTS = {"num_layers": 2, "pattern": [{"feedforward": zoo.MOE}, {"attention": zoo.LINEAR}]}


@pytest.fixture(scope="module")
def mixed():
    return serving.language_model(context=64, seed=1, **EXPERTS)


@pytest.fixture(scope="module")
def ask(mixed):
    with serving.running({"mixed": mixed}, slots=1) as live, httpx.Client(base_url=live.url, timeout=60) as client:

        def ask(**body):
            return client.post("/v1/inspect", json={"model": "mixed", **body})

        ask.client = client
        yield ask


def found(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


def bytes_of(name):
    return bytes.fromhex(name[6:].replace("\\x", "")) if name.startswith("bytes:") else name.encode()


def test_scores(ask, mixed):
    answer = found(ask(text=TEXT, what=["scores"], top=4))
    ids = mixed.prompt_tokens(TEXT)
    scores = score_tokens(mixed.model, mixed.params, ids, top=4)
    tokens = answer["tokens"]
    assert [token["id"] for token in tokens] == ids
    assert tokens[0]["logprob"] is None
    assert tokens[0]["top"] == []
    assert [token["logprob"] for token in tokens[1:]] == pytest.approx(scores.logprobs.tolist(), abs=1e-5)
    assert [token["rank"] for token in tokens[1:]] == scores.ranks.tolist()
    entropies = [token["entropy"] for token in tokens[1:]] + [answer["next"]["entropy"]]
    assert entropies == pytest.approx(scores.entropies.tolist(), abs=1e-5)
    tops = [token["top"] for token in tokens[1:]] + [answer["next"]["top"]]
    assert [[other["id"] for other in top] for top in tops] == scores.top_tokens.tolist()
    assert b"".join(bytes_of(token["text"]) for token in tokens).decode() == TEXT


def test_ids_are_taken_as_they_are(ask, mixed):
    ids = mixed.prompt_tokens(TEXT)
    assert found(ask(tokens=ids, what=["scores"])) == found(ask(text=TEXT, what=["scores"]))


def test_attention_as_thumbnails_and_in_full(ask, mixed):
    ids = mixed.prompt_tokens(TEXT)[:40]
    maps = attention_maps(mixed.model, mixed.params, ids)
    small = found(ask(tokens=ids, what=["attention"]))["attention"]
    assert small["heads"] == [4, 4]
    for text, layer in zip(small["thumbnails"], maps, strict=True):
        assert base64.b64decode(text) == pool_maps(layer, small["size"]).tobytes()
    full = found(ask(tokens=ids, what=["attention"], layer=1))["attention"]
    assert (full["layer"], full["size"]) == (1, len(ids))
    assert base64.b64decode(full["maps"]) == maps[1].tobytes()
    one = found(ask(tokens=ids, what=["attention"], layer=0, head=2))["attention"]
    assert base64.b64decode(one["maps"]) == maps[0][2].tobytes()


def test_thumbnails_of_a_long_text_are_small(ask, mixed):
    small = found(ask(tokens=[5] * 64, what=["attention"]))["attention"]
    assert small["size"] == inspection.THUMBNAIL
    assert len(base64.b64decode(small["thumbnails"][0])) == 4 * inspection.THUMBNAIL**2


def test_logit_lens(ask, mixed):
    ids = mixed.prompt_tokens(TEXT)
    lens = found(ask(tokens=ids, what=["logit_lens"], start=4, count=39, top=3))["logit_lens"]
    assert (lens["start"], lens["count"]) == (4, len(ids) - 4)
    rows = logit_lens(mixed.model, mixed.params, ids, 4, len(ids) - 4, top=3)
    for cells, row in zip(lens["layers"], rows, strict=True):
        assert [[other["id"] for other in cell["top"]] for cell in cells] == row.top_tokens.tolist()
        assert [cell["logprob"] for cell in cells[:-1]] == pytest.approx(row.logprobs[:-1].tolist(), abs=1e-5)
        assert cells[-1]["logprob"] is cells[-1]["rank"] is None


def test_experts(ask, mixed):
    ids = mixed.prompt_tokens(TEXT)
    experts = found(ask(tokens=ids, what=["experts"]))["experts"]["layers"]
    shares = expert_shares(mixed.model, mixed.params, ids)
    assert experts[1] is shares[1] is None
    assert experts[0]["num_experts"] == 4
    assert experts[0]["mean"] == pytest.approx(shares[0].mean(0).tolist(), abs=1e-4)
    for chosen, row in zip(experts[0]["tokens"], shares[0], strict=True):
        assert [expert for expert, _ in chosen] == np.argsort(-row, kind="stable")[:2].tolist()
        assert [share for _, share in chosen] == pytest.approx(sorted(row, reverse=True)[:2], abs=1e-4)


def test_several_parts_at_once(ask):
    answer = found(ask(text="the cat", what=["scores", "attention", "logit_lens", "experts"]))
    assert set(answer) == {"model", "tokens", "next", "attention", "logit_lens", "experts"}


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({"text": "a", "tokens": [1], "what": ["scores"]}, 400, "text", "either text or tokens"),
        ({"what": ["scores"]}, 400, "text", "either text or tokens"),
        ({"tokens": [], "what": ["scores"]}, 400, "tokens", "empty"),
        ({"tokens": [10**6], "what": ["scores"]}, 400, "tokens", "outside the model's vocabulary"),
        ({"text": "a", "what": []}, 400, "what", "what"),
        ({"text": "a", "what": ["hearts"]}, 400, "what", "hearts"),
        ({"text": "a", "what": ["scores"], "top": 21}, 400, "top", "top"),
        ({"text": "a", "what": ["attention"], "layer": 2}, 400, "layer", "layers 0 to 1"),
        ({"text": "a", "what": ["attention"], "layer": 0, "head": 4}, 400, "head", "0 to 3"),
        ({"text": "a", "what": ["attention"], "head": 0}, 400, "head", "goes with layer"),
        ({"text": "a", "what": ["logit_lens"], "start": 1}, 400, "start", "past the text's 1 tokens"),
        ({"text": "a", "what": ["logit_lens"], "count": 65}, 400, "count", "count"),
        ({"tokens": [5] * 65, "what": ["scores"]}, 413, "tokens", "at most 64 tokens, and this text has 65"),
        ({"text": "a", "what": ["scores"], "model": "none"}, 404, "model", "no model"),
        ({"text": "a", "what": ["scores"], "layers": 1}, 400, None, "layers"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(ask, body, status, param, said):
    answer = ask(**body)
    error = answer.json()["error"]
    assert (answer.status_code, said in error["message"]) == (status, True), error
    assert param is None or error["param"] == param


def test_maps_of_all_heads_together_are_limited(ask, monkeypatch):
    monkeypatch.setattr(inspection, "MAP_BYTES", 8 * 16**2)
    answer = ask(tokens=[5] * 17, what=["attention"])
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "inspection_too_long")
    assert "at most 16 tokens, and this text has 17" in answer.json()["error"]["message"]
    assert ask(tokens=[5] * 16, what=["attention"]).status_code == 200
    assert ask(tokens=[5] * 17, what=["scores"]).status_code == 200


def test_the_settings_tell_the_limits(ask):
    (model,) = ask.client.get("/v1/settings").json()["models"]
    assert model["inspect"] == {"tokens": 64, "attention_tokens": 64, "lens_positions": 64}


def test_what_nobody_waits_for_any_more_is_not_computed(mixed, monkeypatch):
    begun, computing = threading.Event(), threading.Event()
    texts = []

    def slow(served, ids, body):
        texts.append(body.text)
        begun.set()
        computing.wait(20)
        return {}

    monkeypatch.setattr(inspection, "answer", slow)
    with serving.running({"mixed": mixed}, slots=1) as live:
        background = live.served.background
        bodies = [{"model": "mixed", "text": text, "what": ["scores"]} for text in ("the", "cat", "mat")]
        first = live.connect("/v1/inspect", bodies[0])
        begun.wait(20)
        second, third = (live.connect("/v1/inspect", body) for body in bodies[1:])
        live.until(lambda: background.waiting == 3)
        second.close()
        live.until(lambda: background.waiting == 2)
        computing.set()
        live.until(lambda: live.idle)
        first.close()
        third.close()
    assert texts == ["the", "mat"]
