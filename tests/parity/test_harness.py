"""lm-evaluation-harness on polygpt agrees, example by example, with its own `hf` on the same weights."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from polygpt.loading import load
from polygpt.tokenizers import TokenizerConfig, train_tokenizer
from polygpt.training.run_folder import read_lines

pytestmark = pytest.mark.parity

lm_eval = pytest.importorskip("lm_eval", reason='needs lm-evaluation-harness: pip install "polygpt[eval]"')

TASK = """\
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {validation: ROWS}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{choices}}"
metric_list:
  - {metric: acc}
  - {metric: acc_norm}
"""
ROWS = [
    {"question": "The cat sat on", "choices": ["the mat", "a dog", "it"], "label": 0},
    {"question": "And then it ran to see", "choices": ["what was there", "nothing at all"], "label": 1},
    {"question": "O yes", "choices": ["speak again", "no", "ROMEO", "was"], "label": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Hugging Face folder of random weights, larger than they come so that choices differ, with a tokenizer."""
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("gpt2")
    text = "\n".join(str(row) for row in ROWS) * 3
    train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=320), [text]).save(folder / "tokenizer.json")
    sizes = {"vocab_size": 320, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
    config = transformers.GPT2Config(eos_token_id=0, bos_token_id=0, **sizes)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict({name: value * (1 if value.dim() == 1 else 5) for name, value in model.state_dict().items()})
    model.save_pretrained(folder)
    end = "<|endoftext|>"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end, "bos_token": end, "pad_token": end}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def both(folder):
    from lm_eval.models.huggingface import HFLM

    from polygpt.evaluation.harness_lm import HarnessLM

    lm = load(folder)
    theirs = HFLM(str(folder), device="cpu", dtype="float32", batch_size=2)
    assert theirs.eot_token_id == lm.tokenizer.end_of_text
    return HarnessLM(lm), theirs


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]


def test_log_likelihoods_and_greediness(both):
    long = "the cat sat on a mat and then it ran, " * 12
    pairs = [
        *(("The cat sat on", f" {ending}") for ending in ("the mat", "a dog", "it")),
        ("The cat sat on ", "the mat"),  # the space goes to the continuation
        ("The cat sat on  \n", " the mat"),
        ("The cat", "s"),  # within a word
        ("", "The cat"),
        ("", "<|endoftext|>x"),
        ("a<|endoftext|>", "b"),
        (long, " what was there"),
        (long, " nothing"),
        ("é 漢", " ü"),
    ]
    found, expected = (lm.loglikelihood(instances("loglikelihood", *pairs)) for lm in both)
    for pair, (log_p, is_greedy), (their_log_p, they_greedy) in zip(pairs, found, expected, strict=True):
        assert log_p == pytest.approx(their_log_p, rel=1e-4, abs=1e-3), pair
        assert is_greedy == they_greedy, pair


def test_what_the_model_itself_goes_on_with_is_greedy(both):
    ours = both[0]
    context = ours.tok_encode("The cat sat")
    likeliest = int(np.argmax(ours.lm.logits(np.array([context]))[0, -1]))
    asked = [(None, context, [likeliest]), (None, context, [likeliest + 1]), (None, context, [likeliest, 5])]
    found, expected = (lm._loglikelihood_tokens(asked, disable_tqdm=True) for lm in both)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found][:2] == [True, False]


def test_rolling_log_likelihoods(both):
    texts = [("The cat sat on a mat.",), ("to see what was there " * 20,), ("x",), ("",)]
    found, expected = (lm.loglikelihood_rolling(instances("loglikelihood_rolling", *texts)) for lm in both)
    assert found == pytest.approx(expected, rel=1e-4)


def test_generation_up_to_a_stop_string(both):
    theirs = both[1]
    plain = {"until": [], "max_gen_toks": 12}
    contexts = ["The cat sat", "O yes", "and then it ran, " * 20]
    whole = theirs.generate_until(instances("generate_until", *((context, plain) for context in contexts)))
    stop = whole[0][3:6]
    asked = [
        *((context, plain) for context in contexts),
        *((context, {"until": [stop], "max_gen_toks": 12}) for context in contexts),
        ("The cat sat", {"until": stop, "max_new_tokens": 5, "do_sample": False, "temperature": 0.0}),
    ]
    found, expected = (lm.generate_until(instances("generate_until", *asked)) for lm in both)
    assert found == expected
    assert all(whole)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with one task on local rows: nothing is downloaded."""
    tasks = tmp_path_factory.mktemp("tasks")
    (tasks / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tasks / "local_choice.yaml").write_text(TASK.replace("ROWS", str(tasks / "rows.json")))
    return tasks


def test_polygpt_eval_runs_a_task_of_the_harness(folder, tasks, both, process, tmp_path):
    words = ["eval", folder, "--task", "local_choice", "--include-path", tasks, "--num-fewshot", 0, "--json"]
    done = process(*words, "--out", tmp_path / "samples.jsonl", timeout=300)
    assert done.code == 0, done.err
    result = json.loads(done.out)
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    theirs = simple_evaluate(both[1], tasks=["local_choice"], task_manager=TaskManager(include_path=str(tasks)))
    expected = theirs["results"]["local_choice"]
    assert (result["acc"], result["acc_norm"]) == (expected["acc,none"], expected["acc_norm,none"])
    assert result["acc_stderr"] == pytest.approx(expected["acc_stderr,none"])
    assert (result["n"], result["task"]) == (3, "local_choice")
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2]


def test_a_run_measures_a_task_of_the_harness_as_eval_does(tasks, workdir, program):
    asked = {"kind": "lm_eval", "task": "local_choice", "include_path": str(tasks), "every": 3}
    changes = ["data.path=text.txt", "tokenizer={kind: bpe, vocab_size: 300}", "model.context_length=64"]
    done = program("train", "tiny.yaml", *changes, f"training.evaluations=[{json.dumps(asked)}]", "--out", "run")
    assert done.code == 0, done.err
    lines = [line for line in read_lines(workdir / "run/metrics.jsonl") if "local_choice/acc" in line]
    assert [line["step"] for line in lines] == [3, 6]
    evaluated = program("eval", "run", "--task", "local_choice", "--include-path", tasks, "--json")
    found = json.loads(evaluated.out)
    assert {name: found[name] for name in ("acc", "acc_norm")} == {
        name: lines[-1][f"local_choice/{name}"] for name in ("acc", "acc_norm")
    }


def test_the_harness_own_command_knows_polygpt(folder, tasks):
    command = [sys.executable, "-m", "polygpt.harness", "run", "--model", "polygpt", "--model_args", f"model={folder}"]
    command += ["--tasks", "local_choice", "--include_path", str(tasks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "local_choice" in done.stdout
    assert "acc_norm" in done.stdout


def test_an_unknown_task_is_named_with_the_nearest(folder, tasks, program):
    done = program("eval", folder, "--task", "hellaswg", "--data", "x")
    assert (done.code, len(done.complaint)) == (2, 1)
    done = program("eval", folder, "--task", "hellaswg")
    assert done.code == 2
    assert "no task 'hellaswg'; did you mean 'hellaswag'?" in done.err


def test_without_the_package_the_mend_is_named(folder, tmp_path, process):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "lm_eval.py").write_text("raise ImportError('not here')")
    done = process("eval", tmp_path / "model", "--task", "arc_easy", cwd=tmp_path)
    assert (done.code, done.out) == (2, "")
    assert 'pip install "polygpt[eval]"' in done.err


def test_the_harness_gets_the_same_from_the_server(folder):
    """Its `local-completions`, over a socket, beside `polygpt eval`'s own adapter in this process."""
    pytest.importorskip("tenacity", reason="local-completions needs lm_eval[api]")
    serving = pytest.importorskip("serving", reason="the server's packages are not installed")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from polygpt.evaluation.harness_lm import HarnessLM

    lm = load(folder)
    pairs = [
        *(("The cat sat on", f" {ending}") for ending in ("the mat", "a dog", "it")),
        ("The cat", "s"),
        ("é 漢", " ü"),
    ]  # none is cut: local-completions keeps one token of the context for an answer, and so cuts elsewhere
    generations = [("The cat sat", {"until": [], "max_gen_toks": 12}), ("O yes", {"until": ["a"], "max_gen_toks": 12})]
    with serving.running({"served": lm}, slots=2) as live:
        theirs = LocalCompletionsAPI(
            base_url=f"{live.url}/v1/completions",
            model="served",
            tokenizer_backend="huggingface",
            tokenizer=str(folder),
            max_length=lm.config.context_length,
            num_concurrent=1,
            batch_size=2,
        )
        found = theirs.loglikelihood(instances("loglikelihood", *pairs), disable_tqdm=True)
        texts = theirs.generate_until(instances("generate_until", *generations), disable_tqdm=True)
        rolling = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", ("The cat sat on a mat.",)))
    ours = HarnessLM(lm)
    expected = ours.loglikelihood(instances("loglikelihood", *pairs))
    for pair, (log_p, is_greedy), (own_log_p, own_greedy) in zip(pairs, found, expected, strict=True):
        assert log_p == pytest.approx(own_log_p, rel=1e-4, abs=1e-3), pair
        assert is_greedy == own_greedy, pair
    assert texts == ours.generate_until(instances("generate_until", *generations))
    assert rolling == pytest.approx(
        ours.loglikelihood_rolling(instances("loglikelihood_rolling", ("The cat sat on a mat.",))), rel=1e-4
    )
