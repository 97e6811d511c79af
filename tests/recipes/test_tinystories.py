"""The story-teller for a CPU, made smaller and shorter, on real stories."""

from polygpt.recipes import load_recipe
from polygpt.training import Note, Sampled, train

SHAPE = {"embed_dim": 64, "num_layers": 2, "context_length": 128}


def test_sixty_steps_on_the_stories(shared_data, tmp_path):
    config = load_recipe(
        "tinystories_cpu",
        {
            "data.path": str(shared_data / "tinystories" / "stories_1800.txt"),
            **{f"model.{key}": value for key, value in SHAPE.items()},
            "model.feedforward.mlp_dim": 128,
            "training.steps": 60,
            "training.eval_every": 0,
            "training.samples.max_new_tokens": 24,
        },
    )
    events = []
    result = train(config, tmp_path / "run", listeners=[events.append])
    assert 1.95 < result.val_bits_per_byte < 2.14, "a mistake in the step, the data or the masks shows here"
    notes = " ".join(event.text for event in events if isinstance(event, Note))
    assert "of 1,724 documents to train on" in notes
    assert "of 76 documents held out (70,825 bytes)" in notes
    told = [event.prompt for event in events if isinstance(event, Sampled) and event.step == 60]
    assert told == ["Once upon a time", "One day, a little girl"]
