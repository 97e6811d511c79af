"""Training that goes on from a model made elsewhere: its weights, tokenizer and origin; what does not fit is told."""

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from foreign import with_tokenizer
from make_references import REFERENCES

import polygpt
from polygpt.errors import RequestError
from polygpt.recipes import load_recipe
from polygpt.training import Interrupted, Note, Stepped, train
from polygpt.training.listeners import standard_listeners

SHORT = {
    "data.path": "text.txt",
    "model.context_length": 16,
    "training.steps": 2,
    "training.batch_size": 2,
    "training.eval_every": 0,
    "training.save_every": 1,
    "training.samples.every": 0,
}


@pytest.fixture
def theirs(workdir):
    folder = with_tokenizer(workdir / "theirs")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


def finetune(out="out", listeners=(), **changes):
    config = load_recipe("finetune", {"training.initial": "theirs", **SHORT, **changes})
    return train(config, out, listeners=[*standard_listeners(quiet=True), *listeners])


def leaves(lm):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(lm.params)]


def test_training_begins_with_the_models_own_weights_and_tokenizer(theirs):
    finetune(**{"training.optimizer.learning_rate": 1e-30, "training.optimizer.weight_decay": 0.0})
    before, after = polygpt.load("theirs"), polygpt.load("out")
    assert all(np.array_equal(a, b) for a, b in zip(leaves(before), leaves(after), strict=True))
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert after.config.context_length == 16
    assert after.origin.chat_template == before.origin.chat_template
    assert after.origin.stop_tokens == before.origin.stop_tokens
    assert after.origin.facts["source"] == "theirs"


def test_what_is_computed_differently_from_the_initial_model_is_said(theirs):
    events = []
    finetune(
        "one", listeners=[events.append], **{"model.norm.eps": 1e-3, "model.dropout": 0.1, "model.scan_layers": True}
    )
    (told,) = (event.text for event in events if isinstance(event, Note) and event.text.startswith("weights: "))
    assert re.fullmatch(
        r"weights: from theirs, with model\.context_length \d+ → 16, model\.norm\.eps \S+ → 0\.001", told
    )


def test_two_steps_change_the_weights_and_a_resumed_run_comes_to_the_same(theirs):
    def interrupt(event):
        if isinstance(event, Stepped) and event.step == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        finetune("parts", listeners=[interrupt])
    (theirs / "config.json").unlink()  # what it began from is not needed to go on
    train(None, "parts", resume=True)
    shutil.copytree(REFERENCES / "llama", theirs, dirs_exist_ok=True)
    finetune("whole")
    ours, whole, parts = (polygpt.load(name) for name in ("theirs", "whole", "parts"))
    assert not all(np.array_equal(a, b) for a, b in zip(leaves(ours), leaves(whole), strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(leaves(parts), leaves(whole), strict=True))


def test_from_a_folder_to_an_exported_finetuned_model_by_commands(theirs, program):
    words = [f"{key}={value}" for key, value in SHORT.items()]
    done = program("train", "finetune", "training.initial=theirs", *words, "--out", "out")
    assert done.code == 0, done.err
    done = program("export", "out", "--format", "hf", "--out", "exported", "--json")
    assert json.loads(done.out)["architecture"] == "LlamaForCausalLM"
    exported, run = polygpt.load("exported"), polygpt.load("out")
    assert all(np.array_equal(a, b) for a, b in zip(leaves(exported), leaves(run), strict=True))
    assert "| imported from | theirs |" in Path("exported/README.md").read_text()


# changes of the recipe -> what the complaint must say
REFUSED = {
    "another tokenizer": ({"tokenizer": {"kind": "byte"}}, "training.initial=theirs brings its own tokenizer"),
    "another width": (
        {"model.embed_dim": 32},
        r"initial=theirs: .* is \[.*16.*\] in the checkpoint and \[.*32.*\] in the model",
    ),
    "another depth": (
        {"model.num_layers": 3},
        r"training\.initial=theirs: .* is .* in the checkpoint and .* in the model asked for",
    ),
    "another feed-forward": (
        {"model.feedforward": {"kind": "mlp", "mlp_dim": 24}},
        r"feedforward\.down_bias is missing in the checkpoint",
    ),
    "a tied head": ({"model.head": "tied"}, r"head is \[16, 50\] in the checkpoint and missing in the model asked for"),
    "fewer ids": ({"model.vocab_size": 49}, "model.vocab_size=49: this model has 50 ids"),
    "nothing": ({"training.initial": "none"}, "no model 'none'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(theirs, workdir, changes, message):
    with pytest.raises(RequestError, match=message):
        finetune(**changes)
    assert not (workdir / "out").exists()


def test_a_model_without_tokenizer_cannot_be_trained_on(theirs, workdir):
    (theirs / "tokenizer.json").unlink()
    with pytest.raises(RequestError, match=r"training\.initial=theirs: it has no tokenizer to prepare text with"):
        finetune()
    assert not (workdir / "out").exists()
