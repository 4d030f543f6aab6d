"""What is broken is set aside and said, and the run goes on from the newest step that is whole."""

import gc
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from cnn_spmd import checkpoint


@pytest.fixture
def state():
    return dict(step=jnp.int32(0), weights=jnp.arange(100_000.0))


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
    return said


def saved(directory, state, steps, keep=10, accuracies=None):
    checkpoints = checkpoint.Checkpoints(directory, keep)
    assert checkpoints.restore(state) is None
    for step in steps:
        checkpoints.save(step, dict(state, step=jnp.int32(step)), (accuracies or {}).get(step))
    checkpoints.close()
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def restored(directory, state):
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    checkpoints = checkpoint.Checkpoints(directory, 10)
    got = checkpoints.restore(abstract)
    checkpoints.close()
    if got is not None:
        np.testing.assert_array_equal(got["weights"], state["weights"])
    return got and int(got["step"])


def test_keeps_the_last_and_the_best(tmp_path, state):
    assert saved(tmp_path, state, range(1, 7), keep=2, accuracies={1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}) == [2, 5, 6]
    assert restored(tmp_path, state) == 6


def largest_file(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_bytes(directory):
    data = bytearray(largest_file(directory).read_bytes())
    for at in range(len(data) // 2, len(data) // 2 + 64):
        data[at] ^= 0xFF
    largest_file(directory).write_bytes(data)


def cut(directory):
    data = largest_file(directory).read_bytes()
    largest_file(directory).write_bytes(data[: len(data) // 2])


def remove(directory):
    largest_file(directory).unlink()


def empty(directory):
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def unreadable_manifest(directory):
    (directory / checkpoint.MANIFEST).write_text("{")


def empty_manifest(directory):
    (directory / checkpoint.MANIFEST).write_text("{}")


def half_removed(directory):
    (directory / checkpoint.MANIFEST).unlink()
    (directory / "_CHECKPOINT_METADATA").unlink()


def cut_and_unverified(directory):
    cut(directory)
    (directory / checkpoint.MANIFEST).unlink()


@pytest.mark.parametrize(("damage", "reason"), [
    (flip_bytes, "is damaged: .* is changed"), (cut, "is damaged: .* is changed"), (remove, "is damaged: .* is missing"),
    (empty, "is empty"),
    (unreadable_manifest, "has an unreadable"), (empty_manifest, "has an unreadable"), (half_removed, "is half there"),
    # Orbax leaves the reads of the other arrays behind, which complain when they are collected.
    pytest.param(cut_and_unverified, "does not load",
                 marks=pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"))])
def test_a_broken_step_is_set_aside(tmp_path, state, warnings, damage, reason):
    saved(tmp_path, state, [1, 2, 3])
    damage(tmp_path / "3")
    assert restored(tmp_path, state) == 2
    assert any(re.search(f"Checkpoint .* {reason}", line) for line in warnings), warnings
    assert (tmp_path / "broken-3").exists()
    assert not (tmp_path / "3").exists()
    assert restored(tmp_path, state) == 2  # and is not looked at again
    gc.collect()


def test_all_broken(tmp_path, state, warnings):
    saved(tmp_path, state, [1])
    flip_bytes(tmp_path / "1")
    assert restored(tmp_path, state) is None
    assert warnings


def test_a_step_without_its_hashes_is_used_and_said(tmp_path, state, warnings):
    saved(tmp_path, state, [1])
    (tmp_path / "1" / checkpoint.MANIFEST).unlink()
    assert restored(tmp_path, state) == 1
    assert "not verified" in warnings[0]


def test_a_save_that_was_killed_half_way_is_ignored(tmp_path, state):
    saved(tmp_path, state, [1])
    (tmp_path / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "3").write_text("not a folder")
    assert restored(tmp_path, state) == 1
    assert not (tmp_path / "2.orbax-checkpoint-tmp").exists()


def test_a_save_that_fails_is_an_error(tmp_path, state, monkeypatch):
    def full(_):
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "_hashes", full)
    for name, after in (("save", lambda c: c.save(2, state)), ("close", lambda c: c.close())):
        checkpoints = checkpoint.Checkpoints(tmp_path / name, 2)
        checkpoints.restore(state)
        checkpoints.save(1, state)
        with pytest.raises(OSError, match="disk full"):
            after(checkpoints)
