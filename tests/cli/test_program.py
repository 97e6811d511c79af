"""The program as a whole: help at once, exit codes, and JSON that a script can rely on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from polygpt import cli
from polygpt.errors import PolygptError

COSTS = {
    "parameters",
    "active_parameters",
    "non_embedding_parameters",
    "kv_cache_bytes_per_token",
    "state_bytes_at_full_context",
    "flops_per_token",
}
SHOWN = {"config", "training_bytes", "attention_implementation", "causal_in_training", "notes", *COSTS}
RESULT = {
    "run",
    "steps",
    "train_loss",
    "val_loss",
    "val_bits_per_byte",
    "tokens_per_second",
    "seconds",
    "compile_seconds",
    "warning",
}
SLOW = {"jax", "flax", "numpy", "pydantic", "matplotlib", "orbax", "grain", "tokenizers", "ruamel", "rich"}

LOADED = """
import sys
from polygpt import cli
code = cli._run(sys.argv[1:], False)
print(*sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


COMMANDS_HELP = [[name, "--help"] for name in cli.COMMANDS]


@pytest.mark.parametrize("words", [["--help"], ["--version"], [], ["dmeo"], *COMMANDS_HELP], ids=" ".join)
def test_what_needs_no_work_loads_nothing_slow(words):
    done = subprocess.run([sys.executable, "-c", LOADED, *words], capture_output=True, text=True, timeout=60)
    loaded = set(done.stderr.splitlines()[-1].split())
    assert "polygpt" in loaded
    assert not loaded & SLOW


REFUSED = """
import sys
from polygpt import cli
from polygpt.cli import settings
settings._edited = lambda: False  # whether or not this copy of the code is being worked on
for words in sys.argv[1:]:
    code = cli._run(words.split(" "), False)
    print(code, "jax" in sys.modules)
"""

MISTAKES = [
    "train demo training.stepz=3 --out run",
    "train demo training.steps=abc --out run",
    "train demo training.steps=0 --out run",
    "train demo model.attention.kind=sofmax --out run",
    "train demo data.path=missing.txt --out run",
    "train demo tokenizer.path=missing.json --out run",
    "train demo --out .",
    "train dmeo --out run",
    "train --out run",
    "train --resume --out missing",
    "train own_text --out run",
    "train finetune data.path=FILE training.initial=missing --out run",
    "demo training.optimizer.learning_rate=fast",
    "show gpt2 model.num_layer=4",
    "show gpt2 model.num_layers=four",
    "show gpt3",
    "plan gpt3",
    "plan gpt2 mesh.fdsp=8",
    "plan gpt2 --accelerator h10",
    "import missing --out model",
    "generate missing --prompt x",
    "eval missing --task perplexity",
    "report missing",
]


def test_a_mistake_is_refused_before_jax_is_imported(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", REFUSED, *MISTAKES], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    answers = dict(zip(MISTAKES, done.stdout.splitlines(), strict=True))
    assert answers == dict.fromkeys(MISTAKES, "2 False"), done.stderr
    assert not list(tmp_path.iterdir())


def test_the_keys_are_computed_where_the_code_is_newer_than_their_file(monkeypatch, tmp_path):
    from polygpt.cli import settings

    keys = tmp_path / "keys.json"
    monkeypatch.setattr(settings, "KEYS", keys)
    assert settings._edited()
    keys.write_text("{}")
    assert not settings._edited()
    os.utime(keys, (0, 0))
    assert settings._edited()


def test_help_lists_every_command(program):
    done = program("--help")
    assert done.code == 0
    assert all(f"\n  {name} " in done.out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", ["train", "show"])
def test_help_of_what_takes_a_recipe_lists_them(program, name):
    from polygpt.recipes import recipe_names

    text = program(name, "--help").out
    assert all(f"\n  {recipe} " in text for recipe in recipe_names())


@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name != "chat"])  # chat refuses it by name
def test_every_command_has_help_and_json(program, name):
    done = program(name, "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: polygpt {name} ")
    subcommands = {"tokenizer": "train", "data": "prepare"}
    if name in subcommands:
        done = program(name, subcommands[name], "--help")
    assert "--json" in done.out


def test_the_module_is_the_command(process):
    done = process("--version")
    assert (done.code, done.out.startswith("polygpt, version "), done.err) == (0, True, "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PolygptError("the disk\nis full"), 1, "the disk\nis full"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"), 1, "out of memory: lower"),
        (OSError(28, "No space left on device", "a/file"), 1, "a/file: No space left on device"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("one\ntwo"), 1, "a fault in polygpt: ZeroDivisionError: one (--debug shows where)"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_what_fails_is_told_in_a_line_and_traced_only_on_demand(monkeypatch, capsys, error, code, said, debug):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(cli.polygpt, "main", fail)
    assert cli._run(["presets"], debug) == code
    told = capsys.readouterr().err
    assert said in told[told.index("polygpt: ") :]
    assert ("Traceback" in told) == debug


def test_debug_may_stand_anywhere(process):
    done = process("show", "gtp2", "--debug")
    assert (done.code, "Traceback" in done.err, "did you mean 'gpt2'?" in done.err) == (2, True, True)


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m polygpt presets | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def one_object(ran):
    """The only line on standard output."""
    assert ran.code == 0, ran.err
    assert ran.out.count("\n") == 1
    return json.loads(ran.out, parse_constant=pytest.fail)


def test_presets_as_json_are_a_list_of_what_show_gives(program):
    from polygpt.presets import PRESETS

    rows = one_object(program("presets", "--json"))
    assert [row["preset"] for row in rows] == list(PRESETS)
    for row in rows:
        assert set(row) >= SHOWN
    shown = one_object(program("show", "gpt2", "--json"))
    row = next(row for row in rows if row["preset"] == "gpt2")
    assert {name: row[name] for name in shown} == shown


def test_presets_are_a_table_a_row_each(program):
    from polygpt.presets import PRESETS
    from polygpt.recipes import recipe_names

    table, recipes = program("presets").out.split("\n\n")
    lines = table.splitlines()
    rows = {line.split()[0]: line for line in lines[1 : len(PRESETS) + 1]}
    assert list(rows) == list(PRESETS)
    assert rows["gpt2"].split()[4:6] == ["124,439,808", "124,439,808"]
    assert rows["tiny_moe"].split()[5:7] == ["631,370,304", "248,666,688"]
    assert {name for name, row in rows.items() if "†" in row} == {"tiny_moe", "tiny_moe_2", "tiny_moe_3"}
    assert [line[0] for line in lines[len(PRESETS) + 1 :]] == ["*", "†"]
    assert [line.split()[0] for line in recipes.splitlines()[1:]] == recipe_names()


@pytest.mark.parametrize("name", ["gpt2", "demo", "tiny.yaml", "run"])
def test_show_knows_presets_recipes_files_and_runs(run, program, name):
    shown = one_object(program("show", name, "model.num_layers=3", "--json"))
    assert set(shown) == SHOWN | (set() if name == "gpt2" else {"run", "schedule"})
    assert shown["config"]["num_layers"] == 3
    assert all(isinstance(shown[key], int) and shown[key] >= 0 for key in COSTS)


def test_show_of_a_recipe_is_the_whole_run_with_its_tokenizers_vocabulary(workdir, program):
    shown = one_object(program("show", "demo", "training.steps=7", "--json"))
    assert (shown["config"]["vocab_size"], shown["parameters"]) == (4096, 893_568)
    assert (shown["run"]["training"]["steps"], shown["run"]["tokenizer"]["kind"]) == (7, "bpe")
    assert shown["training_bytes"]["parameters"] == 4 * 893_568
    done = program("show", "tiny.yaml")
    config, tree, schedule, facts = done.out.split("\n\n")
    assert "learning rate" in schedule
    (workdir / "again.yaml").write_text(config)
    assert program("show", "again.yaml").out.split("\n\n")[:2] == [config, tree]
    letters = len(set((workdir / "text.txt").read_text()))
    assert f"vocabulary         {letters} (the characters of the text)" in facts
    assert (
        "vocabulary         100 (assumed; it will be the number of characters in the text)"
        in program("show", "tiny.yaml", "data.path=absent.txt").out
    )
    assert "vocabulary         257 (every byte)" in program("show", "tiny.yaml", "tokenizer.kind=byte").out


def test_show_prints_a_configuration_that_can_be_used_again(workdir, program):
    shown = program("show", "gpt2", "model.num_layers=2")
    text, tree, facts = shown.out.split("\n\n")
    (workdir / "again.yaml").write_text(text)
    again = program("show", "again.yaml")
    assert again.out == shown.out
    assert "├── all 2 layers: pre_norm" in tree
    assert "attention here     " in facts


def test_show_is_plain_text_in_a_pipe(process):
    done = process("show", "tiny_moe_2", env=os.environ | {"COLUMNS": "60", "TERM": "xterm-256color"})
    assert done.code == 0
    assert "\x1b" not in done.out
    lines = done.out.split("\n\n")[1].splitlines()
    counts = [line.rsplit("  ", 1)[1] for line in lines if "×" in line]
    assert counts[0] == "33,804,288"
    assert len({len(line) for line in lines if "×" in line}) == 1
    assert "note: in training, feedforward moe lets" in done.out


def test_show_says_where_attention_cannot_run(program):
    words = ["show", "gpt2", "model.attention.implementation=pallas"]
    shown = one_object(program(*words, "--json"))
    if shown["attention_implementation"] is None:
        text = program(*words).out
        assert "attention here     none can run: see the note" in text
        assert f"note: {shown['notes'][0]}" in text


@pytest.mark.parametrize(("words", "drawn"), [(["run"], "jax.Array"), (["run", "model.num_layers=2"], "ShapeDtype")])
def test_show_writes_a_page_of_weights_or_of_shapes(run, program, words, drawn):
    shown = one_object(program("show", *words, "--html", "new/page.html", "--json"))
    assert shown["page"] == "new/page.html"
    assert drawn in Path("new/page.html").read_text()
    assert [path.name for path in Path("new").iterdir()] == ["page.html"]


def test_train_gives_its_result_as_json_and_all_else_on_standard_error(workdir, program):
    done = program("train", "tiny.yaml", "training.steps=4", "training.samples.every=4", "--out", "run", "--json")
    result = one_object(done)
    assert set(result) == RESULT | {"band"}
    assert result.pop("band") is None
    assert (result["run"], result["steps"]) == ("run", 4)
    assert result["val_bits_per_byte"] == pytest.approx(result["val_loss"] / 0.6931, rel=1e-3)  # a character, a byte
    assert result["tokens_per_second"] > 0
    assert result["seconds"] > result["compile_seconds"] > 0
    assert json.loads((workdir / "run/result.json").read_text()) == result
    assert "step 4: validation loss" in done.err


def test_data_may_have_any_name_that_a_file_can_have(workdir, process):
    name = os.fsdecode(b"caf\xe9 #1 {a}: [b].txt")
    shutil.copy("text.txt", name)
    for words in (["tiny.yaml", f"data.path={name}", "training.steps=2"], ["--resume", "training.steps=3"]):
        done = process("train", *words, "--out", "run", "--json")
        assert one_object(done)["val_loss"] > 0


def test_demo_gives_its_result_beside_the_baselines(workdir, program):
    small = ["training.steps=2", "training.samples.every=2", "model.num_layers=1", "model.embed_dim=16"]
    small += ["model.attention={num_heads: 2, num_kv_heads: 1}", "model.feedforward.mlp_dim=16"]
    small += ["model.context_length=16", "training.samples.max_new_tokens=4", "data.path=text.txt"]
    small += [
        "training.samples.prompts=[the]",
        "data.split=fraction",
        "tokenizer={kind: bpe, vocab_size: 300}",
        "data.validation_fraction=0.1",
    ]
    for out in ("runs/demo", "runs/demo-2"):
        result = one_object(program("demo", "--short", "--json", *small))
        assert set(result) == RESULT | {
            "bigram_bits_per_byte",
            "gzip_bits_per_byte",
            "xz_bits_per_byte",
            "report",
        }
        assert (result["run"], result["report"]) == (out, f"{out}/report.html")
        assert 0 < result["gzip_bits_per_byte"] < result["xz_bits_per_byte"] < 8
        assert "gzip -9 of the held-out text" in (workdir / out / "report.html").read_text()


def test_tokenizer_and_data_give_theirs(workdir, program):
    words = ["tokenizer", "train", "text.txt", "--kind", "bpe", "--vocab-size", "300", "--out", "t", "--json"]
    trained = one_object(program(*words))
    assert (trained["kind"], trained["path"]) == ("bpe", "t/tokenizer.json")
    assert 257 < trained["vocab_size"] <= 300
    words = ["data", "prepare", "text.txt", "--tokenizer", "t", "--out", "d", "--split", "fraction", "--json"]
    prepared = one_object(program(*words))
    assert prepared["train_bytes"] + prepared["validation_bytes"] == (workdir / "text.txt").stat().st_size
    assert (prepared["dtype"], prepared["path"]) == ("uint16", "d")
    done = program("train", "tiny.yaml", "data.path=d", "training.steps=1", "--out", "run", "--json")
    assert one_object(done)["steps"] == 1
