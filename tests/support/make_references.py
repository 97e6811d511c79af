"""Makes `tests/interop/references`: tiny models of every architecture as transformers writes them, and its logits.

    python tests/support/make_references.py [FOLDER]

Needs torch and transformers (`make test-parity` installs them, and checks that this makes what is stored). Each folder
holds what transformers saved, and `expected.npz` with `tokens` [B, T] and float32 `logits` [B, T, V].
"""

import shutil
import sys
from pathlib import Path

import numpy as np
from families import MODELS, build, logits, tokens

REFERENCES = Path(__file__).parents[1] / "interop" / "references"


def make(folder: Path) -> None:
    """Writes every reference below `folder`, in the place of what is there."""
    for name, foreign in MODELS.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        model = build(foreign)
        model.save_pretrained(folder / name)
        (folder / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / name / "expected.npz", tokens=tokens(), logits=logits(model))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if sys.argv[1:] else REFERENCES)
