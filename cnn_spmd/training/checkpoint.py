"""Save the state of a run, verify it, and restore the newest whole checkpoint.

Orbax writes the arrays in the background and reads them back onto any mesh. It neither notices
flipped bits nor falls back to an older checkpoint. This module does both.

The folder `checkpoints/` of a run holds:
    <step>/           a checkpoint: Orbax's files and the manifest, SHA256.json
    saving-<step>/    a checkpoint that is being written
    removing-<step>/  a checkpoint that is being deleted
    broken-<step>/    a checkpoint that was set aside (see below); it is never deleted

Saving takes these steps, in this order:
 1. Orbax writes the arrays to saving-<step>.
 2. Process 0 adds the manifest: the run, the step, its accuracy, and the SHA-256 of each file.
 3. Process 0 renames the folder to <step>, so a kill at any moment leaves no half-written <step>.
 4. Process 0 deletes all checkpoints except the last `keep` and the one of best accuracy.
 5. The first checkpoint of a command is read back, as some paths and disks only accept writes.

Restoring tries, in this order:
 1. the checkpoints that their manifest verifies: it names this run and this step, and each file
    has its checksum; the newest first;
 2. the checkpoints without a manifest, the newest first, each with a warning;
 3. step 0, if the folder holds no checkpoint at all.
If there are checkpoints and none can be used, restoring raises UserError and renames nothing: a
run never starts over in silence. If one is used, each checkpoint that was rejected is set aside,
and so is each newer one without a manifest. Otherwise these would count among the last `keep`, and
the next saves would push out good checkpoints. Commands that save nothing, such as an evaluation,
restore in the same order, and only warn of these.
"""

import concurrent.futures
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from cnn_spmd.errors import UserError, one_line
from cnn_spmd.training import cluster
from cnn_spmd.training.one_checkpoint import (
    BROKEN,
    MANIFEST,
    Checkpoint,
    Rejected,
    arrays_by_name,
    orbax,
)

SAVING = "saving-"
REMOVING = "removing-"


def _save_async(path: pathlib.Path, named: dict[str, jax.Array]) -> Any:
    """Let Orbax write arrays in the background; return its response.

    Weights hardly become smaller by compression, which takes far longer than writing them.
    """
    context = orbax().Context()
    context.array.saving.use_compression = False
    with context:
        return orbax().save_async(path, named, overwrite=True)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class _Pending(NamedTuple):
    """A save that runs in the background."""

    step: int
    saved: concurrent.futures.Future
    on_host: dict[str, np.ndarray]  # arrays of the shapes that are saved, to read them back


class Checkpoints:
    """The checkpoints of one run.

    directory: the folder that holds them. keep: how many of the newest are kept, beside the best.
    run: the name that config.json has for the run; checkpoints of another run are rejected.
    read_only: whether restoring leaves the folder as it is.
    """

    def __init__(self, directory: pathlib.Path, keep: int, run: str, read_only: bool = False):
        self.directory = directory
        self.keep = keep
        self.run_name = run
        self.read_only = read_only
        self._is_main = jax.process_index() == 0
        self._was_read_back = False  # whether a checkpoint of this command was
        self._has_failed = False  # whether the last save did
        self._pending: _Pending | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1)

    # ---- Restore

    def restore(self, target: Any) -> Any | None:
        """Return the newest state that can be used; None if no step was ever saved.

        target: the shapes and shardings of the state (see Checkpoint.load). The mesh may differ
        from the one on which the state was saved.
        Raises UserError, and renames nothing, if there are checkpoints and none can be used.
        """
        rejected: dict[int, str] = {}
        for step in self._candidates(rejected):
            checkpoint = self._checkpoint(step)
            try:
                state = checkpoint.load(target)
            except Rejected as error:
                if jax.process_count() > 1:  # it may have loaded on the other processes
                    raise UserError(
                        f"{checkpoint.path}: {error}: move it away, or mend it, and give the same "
                        "command again"
                    ) from error
                rejected[step] = str(error)
                continue
            if self._is_main:
                self._set_aside_unused(step, rejected)
                if not (self.read_only or checkpoint.has_manifest()):
                    checkpoint.write_manifest(self.run_name, step, None)
            return state
        return None

    def _candidates(self, rejected: dict[int, str]) -> Iterator[int]:
        """Yield the steps that process 0 finds, on every process."""
        found = self._search(rejected) if self._is_main else iter(())
        while (step := cluster.exchange(next(found, None))[0]) is not None:
            yield step

    def _search(self, rejected: dict[int, str]) -> Iterator[int]:
        """Yield the steps to try, the best first.

        rejected: steps that cannot be used, and why; this adds those that it finds.
        Raises UserError at the end if there are checkpoints.
        """
        steps = self._steps()
        if not self.read_only:
            self._remove_leftovers()
        unverified = []
        for step in steps:
            try:
                is_verified = self._checkpoint(step).verify(self.run_name)
            except Rejected as error:
                rejected[step] = str(error)
                continue
            if is_verified:
                yield step
            else:
                unverified.append(step)
        for step in unverified:
            logging.warning(
                "Checkpoint %s has no %s, so nobody can check its files. It is used, because no "
                "checkpoint with one can be.",
                self.directory / str(step),
                MANIFEST,
            )
            yield step
        self._refuse_to_start_over(rejected)

    def _refuse_to_start_over(self, rejected: dict[int, str]) -> None:
        """Raise UserError if there is any checkpoint, in use or set aside."""
        reasons = [f"{step} {reason}" for step, reason in rejected.items()]
        for path in sorted(self.directory.glob(f"{BROKEN}*")):
            reasons.append(f"{path.name} was set aside before")
        if reasons:
            raise UserError(
                f"{self.directory}: holds no checkpoint that can be used ({'; '.join(reasons)}): "
                "put a good copy there, or give a new --workdir to begin at step 0"
            )

    def _set_aside_unused(self, used: int, rejected: dict[int, str]) -> None:
        """Set aside the rejected steps, and the newer ones that were passed over.

        If the folder is to be left as it is, only warn of them.
        """
        passed_over = [step for step in self._steps() if step > used]
        reason = f"has no {MANIFEST}, and an older checkpoint has one"
        for step, why in (dict.fromkeys(passed_over, reason) | rejected).items():
            if self.read_only:
                path = self.directory / str(step)
                logging.warning("Checkpoint %s %s. Checkpoint %d is used.", path, why, used)
            else:
                self._checkpoint(step).set_aside(why)

    # ---- Save

    def save(self, step: int, state: Any, accuracy: float | None = None) -> None:
        """Start to save a state in the background, after the save before it has ended.

        accuracy: what the evaluation at this step gave, from 0 to 1; it decides which is the best.
        If the save before it failed, a warning says so, and this one is tried: the disk may have
        room again. Raises SaveError if this save cannot begin, or if the two before it failed.
        """
        try:
            self.wait()
        except SaveError as error:
            if self._has_failed or jax.process_count() > 1:  # the others may have saved theirs
                raise
            self._has_failed = True
            logging.warning("%s. Step %d is saved next.", error, step)
        else:
            self._has_failed = False
        named = arrays_by_name(state)
        try:
            self._check_disk(sum(array.nbytes for array in named.values()))
            written = _save_async(self.directory / f"{SAVING}{step}", named)
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = _Pending(
            step,
            self._background.submit(self._finish, step, written, accuracy),
            {name: _empty(array) for name, array in named.items()},
        )

    def record_accuracy(self, step: int, accuracy: float) -> None:
        """Add the accuracy to a checkpoint that was saved before it was evaluated."""
        if self._is_main:
            self._checkpoint(step).write_manifest(self.run_name, step, accuracy)

    def wait(self) -> None:
        """Wait for the last save. Raises SaveError if it failed."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.saved.result()
        except Exception as error:
            raise self._failed(pending.step, error) from error
        if not self._was_read_back:
            self._read_back(pending)

    def close(self) -> None:
        """Wait for the last save and end the thread. Raises SaveError if the save failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def last_good(self) -> str:
        """Say which checkpoint is the newest, for messages."""
        steps = self._steps()
        if not steps:
            return "no checkpoint was saved yet"
        return f"the last good checkpoint is {self.directory / str(steps[0])}"

    def _check_disk(self, total_bytes: int) -> None:
        """Raise OSError if the folder cannot be written, or the disk has no room.

        If Orbax cannot make a folder, its threads wait five minutes for the folder to appear.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=self.directory):
            pass
        needed = total_bytes // jax.process_count()
        if (free := shutil.disk_usage(self.directory).free) < needed:
            raise OSError(f"{needed:,} bytes are needed and {free:,} are free")

    def _finish(self, step: int, written: Any, accuracy: float | None) -> None:
        """Wait in the background for Orbax, then make a checkpoint of what it wrote."""
        written.result()
        if not self._is_main:
            return
        saving = self._checkpoint(f"{SAVING}{step}")
        saving.write_manifest(self.run_name, step, accuracy)
        final = self._checkpoint(step)
        if final.path.exists():
            final.set_aside("is in the way of a new save of this step")
        saving.path.rename(final.path)
        self._delete_old()

    def _delete_old(self) -> None:
        """Delete all checkpoints except the last `keep` and the one of best accuracy."""
        steps = self._steps()
        kept = set(steps[: self.keep])
        accuracies = {step: self._checkpoint(step).accuracy() for step in steps}
        ranked = [step for step in steps if accuracies[step] is not None]
        if ranked:
            kept.add(max(ranked, key=lambda step: (accuracies[step], step)))
        for step in set(steps) - kept:
            old, removed = self._checkpoint(step).path, self.directory / f"{REMOVING}{step}"
            try:
                old.rename(removed)
            except OSError as error:
                logging.warning("Checkpoint %s is not deleted: %s.", old, error.strerror)
            shutil.rmtree(removed, ignore_errors=True)

    def _read_back(self, pending: _Pending) -> None:
        """Read a new checkpoint to the host, on each process: Orbax waits for all of them.

        Raises SaveError if it cannot be read, and sets it aside unless its manifest verifies it:
        then the reading failed, and not the save.
        """
        cluster.exchange(None)  # wait until process 0 has renamed the folder
        checkpoint = self._checkpoint(pending.step)
        try:
            orbax().load(checkpoint.path, pending.on_host)
        except Exception as error:
            if self._is_main:
                try:
                    checkpoint.verify(self.run_name)
                except Rejected:
                    checkpoint.set_aside("cannot be read back")
            raise self._failed(pending.step, error, "read back") from error
        self._was_read_back = True

    def _failed(self, step: int, error: Exception, what: str = "saved") -> SaveError:
        """Remove what a failed save left behind; return the error to raise.

        Raises `error` itself where another process of the cluster may be lost.
        """
        cluster.raise_if_peer_trouble(error)
        if self._is_main:
            self._remove_leftovers()
        return SaveError(
            f"{self.directory}: the checkpoint of step {step} cannot be {what} "
            f"({one_line(error)}); {self.last_good()}"
        )

    # ---- The folder

    def _checkpoint(self, name: int | str) -> Checkpoint:
        return Checkpoint(self.directory / str(name))

    def _steps(self) -> list[int]:
        """Return the steps, newest first. Raises UserError if one is a file."""
        steps = []
        for path in self._entries():
            if not path.name.isdecimal() or path.name != str(int(path.name)):
                continue
            if not path.is_dir():
                raise UserError(f"{path}: is a file, expected a checkpoint's folder: move it away")
            steps.append(int(path.name))
        return sorted(steps, reverse=True)

    def _remove_leftovers(self) -> None:
        """Remove what a kill or a failed save left behind."""
        for path in self._entries():
            if path.name.startswith((SAVING, REMOVING)):
                shutil.rmtree(path, ignore_errors=True)

    def _entries(self) -> list[pathlib.Path]:
        return list(self.directory.iterdir()) if self.directory.is_dir() else []


def _empty(array: Any) -> np.ndarray:
    """Return a host array of this shape that takes the memory of one element."""
    return np.broadcast_to(np.zeros((), array.dtype), array.shape)
