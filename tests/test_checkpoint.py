"""Test that checkpoints are verified, set aside if broken, and restored."""

import gc
import hashlib
import json
import os
import pathlib
import re
import shutil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from cnn_spmd.errors import UserError
from cnn_spmd.training import checkpoint, runfiles


class State(NamedTuple):
    step: jax.Array
    weights: jax.Array


class StateWithModelState(NamedTuple):
    step: jax.Array
    weights: jax.Array
    model_state: nnx.State


@pytest.fixture
def state():
    return State(step=jnp.int32(0), weights=jnp.arange(100_000.0))


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda message, *values: said.append(message % values))
    return said


def saved(directory, state, steps, keep=10, accuracies=None, run="mine"):
    """Save these steps to a new folder; return the names in it."""
    checkpoints = checkpoint.Checkpoints(directory, keep, run)
    assert checkpoints.restore(state) is None
    for step in steps:
        checkpoints.save(step, state._replace(step=jnp.int32(step)), (accuracies or {}).get(step))
    checkpoints.close()
    return names(directory)


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def restored_state(directory, state, run="mine"):
    """Restore into the shapes and shardings of `state`; None if nothing was saved."""
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    checkpoints = checkpoint.Checkpoints(directory, 10, run)
    try:
        return checkpoints.restore(target)
    finally:
        checkpoints.close()


def restored(directory, state, run="mine"):
    """Restore, check the weights, and return the step; None if nothing was saved."""
    got = restored_state(directory, state, run)
    if got is None:
        return None
    np.testing.assert_array_equal(got.weights, state.weights)
    return int(got.step)


def test_the_last_and_the_best_are_kept(tmp_path, state):
    accuracies = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}
    assert saved(tmp_path, state, range(1, 7), keep=2, accuracies=accuracies) == ["2", "5", "6"]
    assert restored(tmp_path, state) == 6


def largest_file(directory):
    return max(
        (path for path in directory.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )


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


def manifest_of_another_kind(directory):
    (directory / checkpoint.MANIFEST).write_text('{"files": ["a"]}')


def half_removed(directory):
    (directory / checkpoint.MANIFEST).unlink()
    (directory / "_CHECKPOINT_METADATA").unlink()


def another_step(directory):
    shutil.rmtree(directory)
    shutil.copytree(directory.with_name("1"), directory)


def another_run(directory):
    manifest = json.loads((directory / checkpoint.MANIFEST).read_text())
    (directory / checkpoint.MANIFEST).write_text(json.dumps(manifest | dict(run="theirs")))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_bytes, "is damaged: .* is changed"),
        (cut, "is damaged: .* is changed"),
        (remove, "is damaged: .* is missing"),
        (empty, "is empty"),
        (unreadable_manifest, "has an unreadable"),
        (empty_manifest, "has an unreadable"),
        (manifest_of_another_kind, "has an unreadable"),
        (half_removed, "is half there"),
        (another_step, "is step 1 by its"),
        (another_run, r"is of another run \(theirs, this one is mine\)"),
    ],
)
def test_a_broken_step_is_set_aside(tmp_path, state, warnings, damage, reason):
    saved(tmp_path, state, [1, 2, 3])
    damage(tmp_path / "3")
    assert restored(tmp_path, state) == 2
    assert any(re.search(f"Checkpoint .* {reason}", line) for line in warnings), warnings
    assert names(tmp_path) == ["1", "2", "broken-3"]
    assert restored(tmp_path, state) == 2  # and is not looked at again


def test_read_only_restoring_changes_nothing(tmp_path, state, warnings):
    """Broken, half-written and unverified checkpoints stay as they are."""
    saved(tmp_path, state, [1, 2, 3])
    flip_bytes(tmp_path / "3")
    (tmp_path / "2" / checkpoint.MANIFEST).unlink()
    (tmp_path / f"{checkpoint.SAVING}4").mkdir()
    before = sorted(tmp_path.rglob("*"))
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, "mine", read_only=True)
    assert int(checkpoints.restore(state).step) == 1
    assert sorted(tmp_path.rglob("*")) == before
    said = "\n".join(warnings)
    assert re.search(r"3 is damaged: .* is changed\. Checkpoint 1 is used\.", said)
    assert re.search(r"2 has no .*\. Checkpoint 1 is used\.", said)
    shutil.rmtree(tmp_path / "1")
    before = sorted(tmp_path.rglob("*"))
    assert int(checkpoints.restore(state).step) == 2
    assert sorted(tmp_path.rglob("*")) == before  # no manifest is written


# Orbax leaves reads behind that nobody awaits.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_bytes, "is damaged: "),
        (another_run, "is of another run"),
        (unreadable_manifest, "has an unreadable"),
        (lambda step: (cut(step), (step / checkpoint.MANIFEST).unlink()), "does not load"),
        (
            lambda step: (step.with_name("3"), step.rename(step.with_name("broken-1"))),
            "broken-1 was set aside before",
        ),
    ],
)
def test_a_run_whose_steps_are_all_rejected_does_not_start_over(tmp_path, state, damage, reason):
    saved(tmp_path, state, [1])
    damage(tmp_path / "1")
    before = names(tmp_path)
    with pytest.raises(UserError, match=f"holds no checkpoint that can be used .*{reason}"):
        restored(tmp_path, state)
    assert names(tmp_path) == before  # so that the same command goes on once it is mended
    gc.collect()


def test_files_of_file_browsers_and_network_disks_are_ignored(tmp_path, state, warnings):
    saved(tmp_path, state, [1, 2])
    for folder in [tmp_path, *(path for path in tmp_path.rglob("*") if path.is_dir())]:
        for name in (".DS_Store", "._d", ".nfs0000a1", "Thumbs.db", "notes.txt"):
            (folder / name).write_bytes(b"\0\1")
    (tmp_path / "old 1").mkdir()
    assert restored(tmp_path, state) == 2
    assert not warnings


def test_a_step_that_says_another_number_is_rejected(tmp_path, state, warnings):
    """Without a manifest, the step in the state itself shows it."""
    saved(tmp_path, state, [1, 8])
    (tmp_path / "8").rename(tmp_path / "99")
    (tmp_path / "99" / checkpoint.MANIFEST).unlink()
    (tmp_path / "1").rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"99 holds step 8"):
        restored(tmp_path, state)


def test_an_unverified_step_is_the_last_resort(tmp_path, state, warnings):
    saved(tmp_path, state, [1, 2])
    (tmp_path / "2" / checkpoint.MANIFEST).unlink()
    assert restored(tmp_path, state) == 1
    assert names(tmp_path) == ["1", "broken-2"]
    (tmp_path / "broken-2").rename(tmp_path / "2")
    shutil.rmtree(tmp_path / "1")
    warnings.clear()
    assert restored(tmp_path, state) == 2
    assert "nobody can check its files" in warnings[0]
    assert restored(tmp_path, state) == 2  # it has its manifest now
    assert len(warnings) == 1
    flip_bytes(tmp_path / "2")
    with pytest.raises(UserError, match="2 is damaged"):
        restored(tmp_path, state)


def test_an_unverified_newer_step_does_not_push_out_what_is_saved_next(tmp_path, state, warnings):
    saved(tmp_path, state, [1, 9])
    (tmp_path / "9" / checkpoint.MANIFEST).unlink()
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, "mine")
    assert int(checkpoints.restore(state).step) == 1
    checkpoints.save(2, state._replace(step=jnp.int32(2)))
    checkpoints.close()
    assert names(tmp_path) == ["2", "broken-9"]
    assert checkpoints.last_good().endswith(str(tmp_path / "2"))


def test_a_step_has_its_name_only_with_its_manifest(tmp_path, state, monkeypatch):
    """A kill at any moment leaves only steps that can be verified."""
    seen = []
    rename = pathlib.Path.rename

    def look(path, target):
        seen.append(((path / checkpoint.MANIFEST).exists(), pathlib.Path(target).name))
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", look)
    saved(tmp_path, state, [1])
    assert (True, "1") in seen
    assert all(whole for whole, name in seen if name.isdecimal())


def test_a_checkpoint_of_earlier_versions_loads_and_is_ranked(tmp_path, state):
    """Orbax's Checkpointer wrote them, and their manifest has only the files."""
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        for step, accuracy in ((1, 0.9), (2, 0.5)):
            named = {".step": jnp.int32(step), ".weights": state.weights}
            checkpointer.save(step, named, metrics=dict(accuracy=accuracy))
            folder = tmp_path / str(step)
            files = {
                str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in folder.rglob("*")
                if path.is_file()
            }
            (folder / checkpoint.MANIFEST).write_text(json.dumps(files))
    (tmp_path / "2/metrics/metrics").write_text("garbage")
    assert restored(tmp_path, state) == 2
    checkpoints = checkpoint.Checkpoints(tmp_path, 1, "mine")
    checkpoints.save(3, state._replace(step=jnp.int32(3)), 0.1)
    checkpoints.close()
    assert names(tmp_path) == ["1", "3"]  # the best and the last


def test_what_a_kill_leaves_behind_is_removed(tmp_path, state):
    saved(tmp_path, state, [1])
    for name in ("saving-3.orbax-checkpoint-tmp", "saving-3", "removing-1"):
        (tmp_path / name).mkdir()
    assert restored(tmp_path, state) == 1
    assert names(tmp_path) == ["1"]


def test_a_file_in_the_place_of_a_folder_is_refused_and_kept(tmp_path, state):
    saved(tmp_path / "a", state, [1])
    (tmp_path / "a/3").write_text("precious")
    with pytest.raises(UserError, match=r"a/3: is a file, expected a checkpoint's folder"):
        restored(tmp_path / "a", state)
    assert (tmp_path / "a/3").read_text() == "precious"


@pytest.mark.parametrize("fails", ["sha256", "disk_usage"])
def test_a_failed_save_is_one_line_and_leaves_the_other_steps(tmp_path, state, monkeypatch, fails):
    saved(tmp_path, state, [1])

    def full(*_):
        raise OSError("disk full\nand more")

    monkeypatch.setattr(shutil if fails == "disk_usage" else runfiles, fails, full)
    for after in (lambda c: (c.save(3, state), c.save(4, state)), lambda c: c.close()):
        checkpoints = checkpoint.Checkpoints(tmp_path, 2, "mine")
        with pytest.raises(
            checkpoint.SaveError, match=r"checkpoint of step [23] cannot be saved .*disk full"
        ) as error:
            checkpoints.save(2, state)
            after(checkpoints)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(f"the last good checkpoint is {tmp_path / '1'}")
        assert names(tmp_path) == ["1"]


def test_after_a_save_that_fails_the_next_one_is_tried(tmp_path, state, monkeypatch, warnings):
    """A disk may be full for a moment only. Two failures in a row end the run."""
    sha256, fails = runfiles.sha256, {2: True, 3: False, 4: True, 5: True, 6: True}
    checkpoints = checkpoint.Checkpoints(tmp_path, 9, "mine")

    def digest(path):
        if fails[int(path.relative_to(tmp_path).parts[0].removeprefix(checkpoint.SAVING))]:
            raise OSError("disk full")
        return sha256(path)

    monkeypatch.setattr(runfiles, "sha256", digest)
    for step in (2, 3, 4, 5):
        checkpoints.save(step, state._replace(step=jnp.int32(step)))
    assert [text.partition(" cannot")[0].rpartition(" ")[2] for text in warnings] == ["2", "4"]
    assert warnings[0].endswith("no checkpoint was saved yet. Step 3 is saved next.")
    with pytest.raises(checkpoint.SaveError, match="step 5 cannot be saved"):
        checkpoints.save(6, state)
    assert names(tmp_path) == ["3"]


def test_a_checkpoint_that_does_not_fit_on_the_disk_is_not_begun(tmp_path, state, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(checkpoint.SaveError, match="400,004 bytes are needed and 1 are free"):
        checkpoint.Checkpoints(tmp_path, 2, "mine").save(2, state)


def test_a_folder_that_cannot_be_written_is_refused_before_orbax_is_called(
    tmp_path, state, monkeypatch
):
    """Orbax would wait for five minutes."""

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refused)
    monkeypatch.setattr(ocp, "save_async", lambda *_, **__: pytest.fail("Orbax was called"))
    with pytest.raises(checkpoint.SaveError, match="Permission denied"):
        checkpoint.Checkpoints(tmp_path, 2, "mine").save(2, state)


def test_the_first_save_is_read_back(tmp_path, state, monkeypatch):
    monkeypatch.setattr(
        ocp, "save_async", lambda path, *_, **__: (path.mkdir(parents=True), Done())[1]
    )
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, "mine")
    checkpoints.save(2, state)
    with pytest.raises(
        checkpoint.SaveError, match=r"step 2 cannot be read back .* no checkpoint was saved yet"
    ):
        checkpoints.wait()
    assert names(tmp_path) == ["broken-2"]


def test_a_good_checkpoint_that_is_not_read_back_is_kept(tmp_path, state, monkeypatch):
    """Its checksums are right: the reading failed, or a process of the cluster is lost."""

    def lost(*_):
        raise RuntimeError("Timeout waiting at barrier")

    monkeypatch.setattr(ocp, "load", lost)
    checkpoints = checkpoint.Checkpoints(tmp_path, 2, "mine")
    checkpoints.save(0, state)
    with pytest.raises(checkpoint.SaveError, match=r"step 0 cannot be read back .*barrier"):
        checkpoints.wait()
    assert names(tmp_path) == ["0"]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RuntimeError, match=r"^Timeout waiting at barrier$"):  # for cluster.crash
        checkpoint.Checkpoint(tmp_path / "0").load(state)
    monkeypatch.undo()
    assert restored(tmp_path, state) == 0


def test_an_old_checkpoint_that_cannot_be_deleted_stays(tmp_path, state, monkeypatch, warnings):
    rename = pathlib.Path.rename

    def refused(self, target):
        if checkpoint.REMOVING in target.name:
            raise PermissionError(1, "Operation not permitted")
        return rename(self, target)

    monkeypatch.setattr(pathlib.Path, "rename", refused)
    assert saved(tmp_path, state, [1, 2], keep=1) == ["1", "2"]
    assert warnings == [f"Checkpoint {tmp_path / '1'} is not deleted: Operation not permitted."]


def test_a_file_that_cannot_be_read_costs_one_checkpoint(tmp_path, state, monkeypatch, warnings):
    """Such as one on a bad sector of the disk."""
    saved(tmp_path, state, [1, 2])
    sha256 = runfiles.sha256

    def digest(path):
        if tmp_path / "2" in path.parents:
            raise OSError(5, "Input/output error")
        return sha256(path)

    monkeypatch.setattr(runfiles, "sha256", digest)
    assert restored(tmp_path, state) == 1
    assert names(tmp_path) == ["1", "broken-2"]
    assert "cannot be read: " in warnings[0]


class Done:
    def result(self):
        pass


def with_model_state(state, mesh_shape):
    """Return a state with a batch norm's mean [16], split over a mesh of 8 devices."""
    mesh = jax.make_mesh(mesh_shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("model"))
    mean = jax.device_put(jnp.arange(16.0), sharding)
    return StateWithModelState(*state, nnx.State(dict(bn=dict(mean=nnx.BatchStat(mean)))))


def test_a_checkpoint_without_model_state_restores_into_an_empty_one(tmp_path, state):
    saved(tmp_path, state, [1])
    empty = StateWithModelState(*state, nnx.State({}))
    got = restored_state(tmp_path, empty)
    np.testing.assert_array_equal(got.weights, state.weights)
    assert jax.tree.structure(got) == jax.tree.structure(empty)


def test_an_empty_model_state_leaves_no_trace_in_a_checkpoint(tmp_path, state):
    saved(tmp_path, StateWithModelState(*state, nnx.State({})), [1])
    assert ocp.metadata(tmp_path / "1").metadata.keys() == {".step", ".weights"}
    assert restored(tmp_path, state) == 1


def test_model_state_restores_on_another_mesh(tmp_path, state):
    saved(tmp_path, with_model_state(state, (4, 2)), [1])
    target = with_model_state(state, (1, 8))
    mean = restored_state(tmp_path, target).model_state["bn"]["mean"][...]
    np.testing.assert_array_equal(mean, np.arange(16.0))
    assert mean.sharding == target.model_state["bn"]["mean"][...].sharding


def test_a_checkpoint_that_lacks_arrays_or_has_more_is_refused_in_one_line(tmp_path, state):
    full = with_model_state(state, (4, 2))
    saved(tmp_path / "lacks", state, [1])
    with pytest.raises(UserError) as error:
        restored(tmp_path / "lacks", full)
    reason = r"1 lacks arrays of this run's state: \.model_state\['bn'\]\['mean'\]\S*"
    assert re.search(rf"holds no checkpoint that can be used \({reason}\)", str(error.value))
    assert "\n" not in str(error.value)
    saved(tmp_path / "more", full, [1])
    with pytest.raises(UserError, match=r"1 has arrays that this run's state lacks: \.model_state"):
        restored(tmp_path / "more", state)


def test_all_processes_load_the_step_that_process_0_chooses(tmp_path, state, monkeypatch):
    saved(tmp_path, state, [1, 2])
    monkeypatch.setattr(checkpoint.cluster, "exchange", lambda mine: [1, mine])
    other = checkpoint.Checkpoints(tmp_path, 10, "mine")
    other._is_main = False
    assert int(other.restore(state).step) == 1
    assert names(tmp_path) == ["1", "2"]


def test_several_processes_do_not_fall_back_after_a_load_that_fails(tmp_path, state, monkeypatch):
    """It may have succeeded on another process, and all must restore the same step."""
    saved(tmp_path, state, [1, 2])

    def fails(*_):
        raise checkpoint.Rejected("does not load")

    monkeypatch.setattr(checkpoint.Checkpoint, "load", fails)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="2: does not load: move it away, or mend it"):
        checkpoint.Checkpoints(tmp_path, 10, "mine").restore(state)
    assert names(tmp_path) == ["1", "2"]
