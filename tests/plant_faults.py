"""Plants one fault at a time in a copy of the package and says whether the tests catch it.

    python tests/plant_faults.py              # all of them, one after the other
    python tests/plant_faults.py kernels      # those of files whose path has this in it

A fault is a piece of text that stands once in a file and what takes its place. Not part of `make test`: a fault that
lives shows a test that is missing, and the test is what stays.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from training.faults import TRAINING_FAULTS, Fault

ROOT = Path(__file__).parents[1]
# What the tests read beside the package and themselves.
COPIED = ("polygpt", "tests", "docs", "README.md", "pyproject.toml", "Makefile", "benchmarks", "notebooks")

TIME_LIMIT = 900.0  # seconds for the tests of one fault


FAULTS = [
    # tokenizers
    Fault("tokenizers/decoding.py", "before = REPLACEMENT  #", "pass  #", "tokenizers"),
    Fault("tokenizers/encoding.py", "if number != unknown:", "if True:", "tokenizers"),
    Fault("tokenizers/encoding.py", "twin.post_processor = None", "pass", "tokenizers"),
    Fault("tokenizers/tokenizer.py", "or tuple(context) == self.start", "", "tokenizers"),
    Fault("tokenizers/folder.py", 'and "added_tokens_decoder" not in config', "", "tokenizers"),
    Fault("tokenizers/vocab_merges.py", 'config.get("add_bos_token") and ', "", "tokenizers"),
    Fault("tokenizers/typed.py", "while pattern.search(marked):", "if pattern.search(marked):", "tokenizers"),
    Fault("tokenizers/gguf_writing.py", 'named = [roles["eos_token_id"], ', "named = [", "interop/test_roles.py"),
    Fault("tokenizers/structure.py", "if any(token.lstrip or token.rstrip for", "if any(False for", "tokenizers"),
    Fault("tokenizers/tokenizer.py", "least = -(-size // (max", "least = -(-size // (min", "tokenizers"),
    # config
    Fault("config/fields.py", "(values := _values(members)) is not None", "(values := None) is not None", "config"),
    # kernels
    Fault("kernels/blocked.py", "fold_in(self.inputs.key, first)", "fold_in(self.inputs.key, 0)", "kernels"),
    Fault("kernels/blocked.py", "before = rule.window - 1", "before = rule.window - 2", "kernels"),
    Fault("kernels/blocked.py", "return rule.scaled(_by_token(d_q))", "return _by_token(d_q)", "kernels"),
    Fault("kernels/cache.py", "(positions > last - slots)", "(positions > last - slots + 1)", "model/test_decoding.py"),
    Fault("kernels/experts.py", "d_weight.at[index].add(", "d_weight.at[index].set(", "model spec"),
    Fault("kernels/loss.py", "exps * (token_weights[:, None] / denominator)", "exps / denominator", "kernels"),
    Fault("kernels/packing.py", "largest, 1) / 127", "largest, 1) / 126", "kernels"),
    Fault("kernels/regularization.py", "x / (1 - rate)", "x", "kernels model/test_model.py"),
    Fault("kernels/scores.py", "seen & (distance < window)", "seen & (distance <= window)", "kernels"),
    Fault(
        "kernels/scores.py",
        "scores = rule.cap(products * rule.scale)",
        "scores = rule.cap(products) * rule.scale",
        "spec",
    ),
    # model
    Fault("model/block.py", "context.fold(3).key", "context.fold(1).key", "model/test_model.py"),
    Fault(
        "model/decoder.py", "context.fold(index * len(graphs) + entry)", "context.fold(entry)", "model/test_model.py"
    ),
    Fault("model/decoder.py", "index - lax.cummax(", "index - 0 * lax.cummax(", "model/test_documents.py"),
    Fault(
        "model/feedforward/moe.py",
        "jnp.sign(1 / self.num_experts - loads",
        'jnp.sign(loads["load"] - 1 / self.num_experts) * (1 + 0 * loads',
        "model/test_moe.py",
    ),
    Fault(
        "model/initial.py",
        "jax.random.fold_in(key, path_hash), block)\n        return",
        "jax.random.fold_in(key, 0), block)\n        return",
        "model/test_model.py",
    ),
    Fault(
        "model/initial.py",
        'hashlib.sha256(".".join(map(str, path))',
        "hashlib.sha256(str(path[-1])",
        "model/test_model.py",
    ),
    Fault("model/model.py", "return 3 * (2 * weights", "return 2 * (2 * weights", "model/test_model.py"),
    Fault("model/rope.py", "jnp.sin(angles) * magnitude", "jnp.sin(angles)", "spec"),
    Fault("model/parts.py", "scale *= self.residual_scale", "scale *= 1", "model/test_model.py"),
    # interop
    Fault("interop/architecture.py", "head_dim * heads != width", "head_dim * heads == width", "interop"),
    Fault("interop/architecture.py", "differences(computation(full)", "differences(computation(config)", "interop"),
    Fault("interop/names.py", "own[..., 0::2], own[..., 1::2]", "own[..., 1::2], own[..., 0::2]", "interop"),
    Fault("interop/same.py", '"window": window, ', "", "interop/test_gguf.py"),
    Fault("interop/weights.py", "for name in names:\n        value", "for name in ():\n        value", "interop"),
    Fault("interop/gguf/rope.py", "original or fields[", "fields[", "interop"),
    Fault("interop/gguf/reading.py", "del tensors[HEAD]", "pass", "interop/test_gguf.py"),
    Fault(
        "interop/huggingface/folder.py",
        "by_type or by_name or old",
        "by_name or by_type or old",
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    Fault(
        "interop/huggingface/llama.py",
        '"rope_theta": 1e6',
        '"rope_theta": 1e4',
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    Fault(
        "interop/huggingface/rules.py",
        "older is not None and older.values",
        "newer is None",
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    Fault(
        "interop/huggingface/rules.py",
        "[i % 2 == 0 for",
        "[i % 2 == 1 for",
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    Fault(
        "interop/huggingface/rules.py",
        "used and i >= first",
        "used and i > first",
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    Fault(
        "interop/huggingface/rules.py",
        "return numerator / denominator",
        "return numerator",
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    Fault(
        "interop/huggingface/safetensors_files.py",
        "if (folder / SINGLE).is_file():",
        "if False:",
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    Fault(
        "interop/huggingface/text_files.py",
        "stops if len(stops) > 1 else stops[0]",
        "stops[0]",
        "interop/test_settings.py interop/test_huggingface.py",
    ),
    # generation
    Fault("generation/slots.py", "history.length >= settings.limit", "history.length > settings.limit", "generation"),
    Fault("generation/sampling.py", "jax.random.key(seed), position)", "jax.random.key(seed), 0)", "generation"),
    Fault("generation/sampling.py", "jax.random.key(seed), position)", "jax.random.key(0), position)", "generation"),
    Fault("generation/sampling.py", "(top_p < 1) & (logits < cut)", "(top_p < 1) & (logits <= cut)", "generation"),
    Fault("generation/text.py", "min(len(word) - 1, len(text))", "min(len(word) - 2, len(text))", "generation"),
    Fault("generation/constraints.py", "        _ = self.compiled", "        pass", "generation/test_constraints.py"),
    *TRAINING_FAULTS,
    # data
    Fault("data/preparation.py", "entry.is_dir() and entry.name.isdecimal()", "True", "data/test_workers.py"),
    Fault("data/loader.py", "            self.stride,\n            self.seed,", "            self.seed,", "data"),
    Fault("data/loader.py", "shuffle(seed=spread)", "shuffle(seed=0)", "data"),
    # evaluation
    Fault("evaluation/perplexity.py", "/ math.log(2) / text.bytes", "/ text.bytes", "evaluation"),
    Fault("evaluation/hellaswag.py", "(sums / lengths).argmax(1)", "sums.argmax(1)", "evaluation"),
    Fault("evaluation/hellaswag.py", "len(ending.encode())", "len(ending)", "evaluation"),
    Fault("evaluation/baselines.py", "followers[first] * unigram", "unigram", "evaluation"),
    # interop
    Fault("interop/names.py", "return flat[::-1] if self", "return flat if self", "interop"),
]


def plant(fault: Fault, copy: Path) -> tuple[bool, float]:
    """Whether the tests caught `fault` in the copy of the project, and how long they took; the copy is restored."""
    path = copy / "polygpt" / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise SystemExit(f"polygpt/{fault.file}: {fault.old!r} stands {text.count(fault.old)} times in it, not once")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    started = time.perf_counter()
    try:
        tests = [f"tests/{name}" for name in fault.tests.split()]
        marks = "not slow and not gpu and not parity and not llamacpp"
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-m", marks, *tests]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=TIME_LIMIT
        )
    except subprocess.TimeoutExpired:  # a loop that does not end is noticed
        return True, TIME_LIMIT
    finally:
        path.write_text(text, encoding="utf-8")
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1, time.perf_counter() - started


def main() -> None:
    """Plants the faults whose file's path contains one of the arguments (all without any); exits 1 if one lived."""
    wanted = [fault for fault in FAULTS if not sys.argv[1:] or any(word in fault.file for word in sys.argv[1:])]
    lived = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "polygpt"
        copy.mkdir()
        for name in COPIED:
            copy_one = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy_one(ROOT / name, copy / name)
        for fault in wanted:
            caught, seconds = plant(fault, copy)
            lived += not caught
            print(f"{'caught' if caught else 'LIVED '} {seconds:6.1f} s  {fault.file}: {fault.new}", flush=True)
    sys.exit(1 if lived else 0)


if __name__ == "__main__":
    main()
