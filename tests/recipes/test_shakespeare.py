"""A short version of nanoGPT's small run on the real text ends where it should."""

from polygpt.recipes import load_recipe
from polygpt.training import train


def test_two_hundred_steps_land_in_their_band(shared_data, tmp_path):
    config = load_recipe(
        "shakespeare_char_cpu",
        {
            "data.path": str(shared_data / "tinyshakespeare" / "input.txt"),
            "training.steps": 200,
            "training.eval_every": 0,
            "training.samples.every": 0,
            "training.schedule.warmup_steps": 20,
        },
    )
    result = train(config, tmp_path / "run", listeners=[])
    assert config.model.vocab_size is None
    assert 2.30 < result.val_loss < 2.48, "a mistake in the step, the data or the masks shows here"
    assert abs(result.train_loss - result.val_loss) < 0.15
