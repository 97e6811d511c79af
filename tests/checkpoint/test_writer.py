"""Saving in the background: from a copy, one at a time, and errors are handed over rather than raised."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polygpt import checkpoint
from polygpt.checkpoint import Checkpoint, Keep, NotFiniteError, Snapshot, Writer, writer
from polygpt.errors import PolygptError

update = jax.jit(lambda x: x + 1, donate_argnums=0)


@pytest.fixture
def gate(monkeypatch):
    """Holds every save back until it is set; `calls` are those that have begun."""
    event, save = threading.Event(), checkpoint.save
    event.calls = []

    def wait(root, snapshot, keep):
        event.calls.append(snapshot.step)
        assert event.wait(30)
        return save(root, snapshot, keep)

    monkeypatch.setattr(writer, "save", wait)
    return event


def test_what_is_saved_is_a_copy_that_training_does_not_overwrite(tmp_path, gate):
    saver, array = Writer(tmp_path), update(jnp.zeros(1000))
    saver.save(Snapshot(1, {"a": array}, {"b": array}), Keep())
    for _ in range(5):
        array = update(array)
    assert saver.poll() == []
    gate.set()
    saver.close()
    (saved,) = saver.poll()
    found = checkpoint.restore(saved, {"a": array}, {"b": array})
    np.testing.assert_array_equal(found.params["a"], np.ones(1000))
    np.testing.assert_array_equal(found.training["b"], np.ones(1000))


def test_one_is_written_at_a_time(tmp_path, gate):
    saver = Writer(tmp_path)
    saver.save(Snapshot(1, {"a": jnp.zeros(3)}), Keep())
    second = threading.Thread(target=saver.save, args=(Snapshot(2, {"a": jnp.zeros(3)}), Keep()))
    second.start()
    second.join(0.2)
    assert (second.is_alive(), gate.calls) == (True, [1])
    gate.set()
    second.join(30)
    saver.close()
    assert [outcome.step for outcome in saver.poll()] == [1, 2]


@pytest.mark.parametrize("background", [True, False])
def test_an_error_is_handed_over_and_the_next_save_works(tmp_path, background):
    saver, root = Writer(tmp_path / "root", background), tmp_path / "root"
    root.write_text("in the way")
    saver.save(Snapshot(1, {"a": jnp.zeros(3)}), Keep())
    saver.wait()
    root.unlink()
    saver.save(Snapshot(2, {"a": jnp.zeros(3)}), Keep())
    saver.save(Snapshot(3, {"a": jnp.full(3, jnp.nan)}), Keep())
    saver.close()
    first, second, third = saver.poll()
    assert isinstance(first, PolygptError)
    assert "step_00000001: cannot be saved" in str(first)
    assert isinstance(second, Checkpoint)
    assert isinstance(third, NotFiniteError)
    assert checkpoint.newest(root).step == 2
