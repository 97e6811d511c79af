"""The faults that `tests/plant_faults.py` plants in training and in checkpoints: above all, each guard taken out."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """`old` in polygpt/`file` becomes `new`; `tests` are those below tests/ that should notice."""

    file: str
    old: str
    new: str
    tests: str


TRAINING_FAULTS = [
    Fault("training/step.py", "jnp.minimum(1.0, self.config", "jnp.minimum(2.0, self.config", "training/test_step.py"),
    Fault("training/step.py", "self.config.seeds.dropout), state.step)", "self.config.seeds.dropout), 0)", "training"),
    Fault("training/step.py", "batch.mask / jnp", "jnp.ones_like(batch.mask) / jnp", "training/test_step.py"),
    Fault("training/optimizers/groups.py", "weight_decay * where(info)", "weight_decay", "training/optimizers"),
    Fault("training/optimizers/groups.py", "ratio(info) * self", "self", "training/optimizers"),
    Fault("training/optimizers/groups.py", "-rate * f, u.dtype", "-rate, u.dtype", "training/optimizers"),
    Fault("training/optimizers/groups.py", "and info.trained", "", "training/optimizers"),
    Fault("training/optimizers/schedules.py", "start = peak / max(warmup, 1)", "start = 0.0", "training/optimizers"),
    Fault("training/optimizers/schedules.py", "step + warmup, first", "step, first", "training/optimizers"),
    Fault("training/optimizers/schedule_free.py", "learning_rate(count - 1)", "learning_rate(count)", "training"),
    Fault("training/optimizers/average.py", "(10 + count)", "(20 + count)", "training/optimizers"),
    Fault("training/optimizers/matrices.py", "_for_each_matrix(direction, parameters.infos)", "direction", "training"),
    Fault(
        "training/jobs.py",
        "np.linspace(0, count - 1, min(self.batches or count, count))",
        "np.arange(min(self.batches or count, count))",
        "training",
    ),
    Fault("training/loop.py", "self.loader, step + self.saving", "self.loader, step + 1 + self.saving", "training"),
    Fault("training/loop.py", "if fetch and self.interrupt", "if self.interrupt", "training/test_restoring.py"),
    Fault("training/restoring.py", "saving.batch_offset += spike - step", "pass", "training/test_restoring.py"),
    Fault(
        "training/restoring.py",
        "= snapshot.batch_offset, snapshot.rollbacks",
        "= 0, snapshot.rollbacks",
        "training/test_restoring.py",
    ),
    Fault(
        "training/restoring.py",
        "= snapshot.batch_offset, snapshot.rollbacks",
        "= snapshot.batch_offset, 0",
        "training/test_restoring.py",
    ),
    Fault("training/restoring.py", "and step % every == 0", "", "training/test_restoring.py"),
    Fault("training/resume.py", "if differ:", "if False:", "training/test_faults.py"),
    Fault("training/saving.py", "if last:\n            self.writer.wait()", "if last:\n            pass", "training"),
    Fault("checkpoint/lock.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH", "checkpoint training/test_faults.py"),
    Fault("checkpoint/writer.py", "snapshot.copied()", "snapshot", "checkpoint training"),
    Fault("checkpoint/steps.py", "complete[keep.last :]", "complete[keep.last + 1 :]", "checkpoint training"),
    Fault("training/step.py", "lax.cond(finite & ~stopped", "lax.cond(~stopped", "training/test_guard.py"),
    Fault("training/step.py", "lax.cond(finite & ~stopped", "lax.cond(finite", "training/test_guard.py"),
    Fault("training/step.py", "jnp.isfinite(metrics.loss) & ", "", "training/test_guard.py"),
    Fault("training/step.py", " & jnp.isfinite(norm) & jnp.isfinite(params_norm)", "", "training/test_guard.py"),
    Fault("training/step.py", " & jnp.isfinite(params_norm)", "", "training/test_not_finite.py"),
    Fault("training/step.py", "guard=choose(stopped, state.guard, guard)", "guard=guard", "training/test_guard.py"),
    Fault("training/loss_scale.py", "jnp.maximum(self.scale / 2, 1)", "self.scale", "training/test_guard.py"),
    Fault(
        "training/loss_scale.py",
        "jnp.where(grows, jnp.minimum",
        "jnp.where(False, jnp.minimum",
        "training/test_guard.py",
    ),
    Fault("training/meter.py", "if metrics.stopped:", "if False:", "training/test_guard.py"),
    Fault(
        "training/meter.py",
        "if metrics.spike:\n            self.emit(Spiked",
        "if False:\n            self.emit(Spiked",
        "training/test_guard.py",
    ),
    Fault("training/meter.py", "if metrics.spike and self.roll_back", "if False", "training/test_guard.py"),
    Fault("training/guard.py", "jnp.minimum(loss, limit) - self.mean", "loss - self.mean", "training/test_guard.py"),
    Fault(
        "training/restoring.py",
        "if saving.rollbacks > self.training.max_skipped_steps:",
        "if False:",
        "training/test_guard.py::test_a_run_that_spikes_after_every_rollback_stops",
    ),
    Fault(
        "training/loop.py",
        "if updated and (self.meter.finite_loss",
        "if False and (self.meter.finite_loss",
        "training/test_guard.py",
    ),
    Fault(
        "training/loop.py",
        "(self.meter.finite_loss or self.saving.saved_step is None)",
        "True",
        "training/test_not_finite.py",
    ),
    Fault(
        "training/loop.py",
        "with self.interrupt.at_once():  # everything",
        "with ExitStack():  # everything",
        "training/test_interrupt.py",
    ),
    Fault(
        "training/loop.py",
        "if self.interrupt.raised:\n            self._stop(state)\n        return",
        "if False:\n            self._stop(state)\n        return",
        "training/test_interrupt.py",
    ),
    Fault(
        "training/loop.py",
        "        if step > 0:\n            try:",
        "        if False:\n            try:",
        "training/test_interrupt.py",
    ),
    Fault(
        "training/loop.py",
        "if is_main() and resume and (out / CONFIG).is_file():  # whoever",
        "if False:  # whoever",
        "training/test_faults.py training/test_saving.py",
    ),
    Fault("training/loop.py", "lock.enter_context(checkpoint.folder_lock(out))", "pass", "training/test_faults.py"),
    Fault(
        "training/interrupt.py",
        "            raise KeyboardInterrupt",
        "            return",
        "training/test_interrupt.py",
    ),
    Fault("cli/__init__.py", "        os._exit(code)", "        sys.exit(code)", "training/test_interrupt.py"),
    Fault(
        "training/listeners/files.py",
        "up_to(step, read_metrics(folder))",
        "read_metrics(folder)",
        "training/listeners/test_listeners.py",
    ),
    Fault(
        "training/saving.py",
        "isinstance(outcome, NotFiniteError) or (last and",
        "True or (last and",
        "training/test_saving.py",
    ),
    Fault("training/saving.py", "(last and index == len(done) - 1)", "False", "training/test_saving.py"),
    Fault("training/saving.py", "latest.val_loss <= 1.01 * best.val_loss", "True", "training/test_saving.py"),
    Fault(
        "training/saving.py",
        "best = self.best.step if self.training.keep_best and self.best is not None else None",
        "best = None",
        "training/test_saving.py",
    ),
    Fault(
        "training/saving.py",
        "if v is not None and v is not params",
        'if v is not None and v is not params and k != "average"',
        "training/test_resume.py",
    ),
    Fault("training/saving.py", '"data": run.shards.train.fingerprint', '"data": ""', "training/test_faults.py"),
    Fault("training/saving.py", '"tokenizer": run.tokenizer.fingerprint', '"tokenizer": ""', "training/test_faults.py"),
    Fault(
        "training/resume.py",
        "for key, had, asked in differences(mine, theirs, name):",
        "for key, had, asked in ():",
        "training/test_resume.py",
    ),
    Fault(
        "training/resume.py",
        "        except NotFiniteError as error:\n            emit",
        "        except ZeroDivisionError as error:\n            emit",
        "training/test_not_finite.py",
    ),
    Fault("checkpoint/steps.py", "if _fingerprint(folder / name) != expected:", "if False:", "training/test_faults.py"),
    Fault("checkpoint/steps.py", 'warn(f"{error}; trying', 'str(f"{error}; trying', "training/test_faults.py"),
    Fault(
        "checkpoint/steps.py",
        '        check_finite(f"step {snapshot.step}: {name}", tree)',
        "        pass",
        "checkpoint/test_saving.py",
    ),
    Fault(
        "checkpoint/steps.py",
        '    _write_json(folder / "info.json", snapshot.info)\n',
        '    _write_json(folder / MANIFEST, {})\n    _write_json(folder / "info.json", snapshot.info)\n',
        "checkpoint/test_saving.py",
    ),
    Fault(
        "checkpoint/steps.py",
        'lambda: f".{final.name}.{secrets.token_hex(4)}.partial")',
        "lambda: final.name)",
        "checkpoint/test_saving.py",
    ),
    Fault("checkpoint/steps.py", "return step == self.best or ", "return ", "checkpoint/test_saving.py"),
    Fault(
        "checkpoint/arrays.py",
        "    check_finite(str(folder), arrays)",
        "    pass",
        "checkpoint/test_steps.py training/test_not_finite.py",
    ),
    Fault(
        "checkpoint/arrays.py",
        "(cast and differ == same_but_dtype)",
        "differ == same_but_dtype",
        "checkpoint/test_steps.py",
    ),
    Fault("checkpoint/lock.py", "if _is_file(descriptor, path):", "if True:", "checkpoint/test_lock.py"),
]
