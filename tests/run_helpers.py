"""Helpers for tests of whole runs: stop one, and read what it left in its folder."""

import json
import warnings

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from tensorboard.backend.event_processing import event_accumulator

from cnn_spmd.training import checkpoint, loop, runfiles


def lines(workdir, split):
    """Return the lines of metrics.jsonl that belong to a split."""
    rows = runfiles.read_metrics_rows(workdir / "metrics.jsonl")
    return [row for row in rows if row["split"] == split]


def rows(workdir, split):
    """Return these lines without what differs between equal runs, such as seconds."""
    keys = ("step", "loss", "accuracy", "learning_rate", "examples")
    return [{key: row[key] for key in keys if key in row} for row in lines(workdir, split)]


def saved_state(workdir, step):
    """Return the whole state in a checkpoint, by name, as Orbax itself reads it."""
    # Orbax warns that it takes the sharding from the checkpoint, which is intended here.
    with warnings.catch_warnings(action="ignore"):
        tree = ocp.load(workdir / "checkpoints" / str(step), checkpointable_name="state")
    return {name: np.asarray(leaf) for name, leaf in tree.items()}


def stop_after(step, config, workdir):
    """Run until the checkpoint of `step` is complete, then die as if killed."""

    class Killed(BaseException):
        pass

    save = checkpoint.Checkpoints.save

    def save_and_die(self, at, state, accuracy=None):
        save(self, at, state, accuracy)
        if at == step:
            self.wait()
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint.Checkpoints, "save", save_and_die)
        loop.train(config, workdir)
    assert json.loads((workdir / "summary.json").read_text())["status"] == "failed"


def scalars(workdir, tag):
    """Return {step: value of `tag`} as TensorBoard reads it from all event files."""
    board = event_accumulator.EventAccumulator(str(workdir), size_guidance=dict(scalars=0))
    board.Reload()
    return {event.step: event.value for event in board.Scalars(tag)}
