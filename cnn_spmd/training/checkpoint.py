"""Save, verify, reshard, resume.

Orbax writes and reads the arrays, asynchronously, and places them on any mesh. This module adds what
a run needs around that. A step is written as `saving-<step>`, gets a manifest (which run and step it
is, and the SHA-256 of each of its files) and only then its name, `<step>`: there is no moment at
which a step has its name and no manifest. Orbax itself does not notice flipped bits.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from cnn_spmd.errors import UserError

MANIFEST = "SHA256.json"
SAVING, REMOVING = "saving-", "removing-"  # names of a step that is not whole yet, or no longer

# Orbax logs an error that it raises as well, with hundreds of lines of traceback.
logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)


class SaveError(RuntimeError):
    """A checkpoint could not be written; the earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one run: `directory`/<step>, the last `keep` and the one of best accuracy.

    run: the run's name for itself, which config.json holds; a checkpoint of another run is refused.
    """

    def __init__(self, directory: pathlib.Path, keep: int, run: str):
        self.directory, self.keep, self.run = directory, keep, run
        self._readable = False  # whether a save of this command has been read back
        self._pending: tuple[concurrent.futures.Future, int, dict] | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1)

    def restore(self, abstract_state: Any) -> Any | None:
        """Load the newest state that is whole, or None where no step was ever saved.

        It is placed as `abstract_state` says, on any mesh; `abstract_state.step` is the step.
        A step without a manifest is used only where no step with one can be. The steps that are rejected,
        or passed over, are then renamed to broken-<step>, never deleted, with a warning.
        Raises UserError, and changes nothing, where steps were saved and none of them can be used.
        """
        named = _named(abstract_state)
        rejected: dict[int, str] = {}
        while True:
            step = self._newest_usable(rejected)
            if step is None:
                return None
            try:
                loaded = ocp.load(self.directory / str(step), named)
                if (found := int(loaded[".step"])) != step:
                    raise ValueError(f"holds step {found}")
                break
            except Exception as error:  # Orbax raises many kinds for files that are cut, missing or of another shape
                if jax.process_count() > 1:
                    raise  # the processes must agree on the step: a person decides
                rejected[step] = f"does not load ({_first_line(error)})"
        if jax.process_index() == 0:
            # A newer step that stayed would count among the last `keep`, and push out the next good one.
            newer = [other for other in self._steps() if other > step]
            passed_over = dict.fromkeys(
                newer, f"has no {MANIFEST}, and an older checkpoint has one"
            )
            for broken, reason in (passed_over | rejected).items():
                _set_aside(self.directory / str(broken), reason)
            if not (self.directory / str(step) / MANIFEST).exists():
                self._write_manifest(self.directory / str(step), step, None)
        return jax.tree.unflatten(
            jax.tree.structure(abstract_state), [loaded[name] for name in named]
        )

    def _newest_usable(self, rejected: dict[int, str]) -> int | None:
        """The step to load, the same on every process; None where none was ever saved.

        rejected: steps that are known to be broken, and why; this adds those that it finds.
        """
        step, problem = -1, ""
        if jax.process_index() == 0:
            try:
                step = self._choose(rejected)
            except UserError as error:
                problem = str(error)
        if jax.process_count() > 1:
            step = int(multihost_utils.broadcast_one_to_all(np.int32(-2 if problem else step)))
        if problem or step == -2:
            raise UserError(
                problem or f"{self.directory}: process 0 finds no checkpoint that can be used"
            )
        return None if step == -1 else step

    def _choose(self, rejected: dict[int, str]) -> int:
        """The newest step that is not rejected and holds what its manifest says; -1 where there are no steps."""
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory}: is a file, expected a folder: move it away")
        steps, unverified = self._steps(), []
        self._clean()
        for step in steps:
            if step in rejected:
                continue
            try:
                if self._verified(step):
                    return step
                unverified.append(step)
            except ValueError as error:
                rejected[step] = str(error)
        if unverified:
            logging.warning(
                "Checkpoint %s has no %s, so nobody can check its files. It is used, as no checkpoint with "
                "one can be.",
                self.directory / str(unverified[0]),
                MANIFEST,
            )
            return unverified[0]
        broken = {f"{step}": reason for step, reason in rejected.items()}
        broken |= {
            path.name: "was set aside before" for path in sorted(self.directory.glob("broken-*"))
        }
        if broken:
            raise UserError(
                f"{self.directory}: holds no checkpoint that can be used ("
                + "; ".join(f"{name} {reason}" for name, reason in broken.items())
                + "): put a good copy there, or give a new --workdir to begin at step 0"
            )
        return -1

    def save(self, step: int, state: Any, accuracy: float | None = None) -> None:
        """Start a save in the background; `accuracy` (of the evaluation at this step) ranks it.

        Raises SaveError where this save cannot begin, or the one before it failed.
        """
        self.wait()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=SAVING, dir=self.directory):
                pass  # where Orbax cannot make a folder, its threads wait for it for five minutes
            needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // jax.process_count()
            if (free := shutil.disk_usage(self.directory).free) < needed:
                raise OSError(f"{needed:,} bytes are needed and {free:,} are free")
            named = _named(state)
            response = ocp.save_async(self.directory / f"{SAVING}{step}", named, overwrite=True)
        except Exception as error:
            raise self._failed(step, error) from error
        on_host = {
            name: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
            for name, leaf in named.items()
        }
        self._pending = (
            self._background.submit(self._finish, step, response, accuracy),
            step,
            on_host,
        )

    def _finish(self, step: int, response, accuracy: float | None) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                self._commit(step, accuracy)
        except Exception as error:
            raise self._failed(step, error) from error

    def _commit(self, step: int, accuracy: float | None) -> None:
        """Give a written step its manifest and its name; remove the steps that need not be kept."""
        written, final = self.directory / f"{SAVING}{step}", self.directory / str(step)
        self._write_manifest(written, step, accuracy)
        if final.exists():
            _set_aside(final, "is in the way of a new save of this step")
        written.rename(final)
        steps = self._steps()
        accuracies = {
            step: accuracy
            for step in steps
            if (accuracy := _accuracy_of(self.directory / str(step))) is not None
        }
        best = [max(accuracies, key=lambda step: (accuracies[step], step))] if accuracies else []
        for old in set(steps) - {*steps[: self.keep], *best}:
            removed = (self.directory / str(old)).rename(self.directory / f"{REMOVING}{old}")
            shutil.rmtree(removed, ignore_errors=True)

    def _failed(self, step: int, error: Exception) -> SaveError:
        """The error to raise for a save that failed; what it left behind is removed."""
        if jax.process_index() == 0:
            self._clean()
        return SaveError(
            f"{self.directory}: the checkpoint of step {step} cannot be saved ({_first_line(error)}); "
            f"{self.last_good()}"
        )

    def wait(self) -> None:
        """Return once the last save is whole on disk, and the first one has been read back too.

        Whatever makes a path or a disk unreadable shows then. Raises SaveError where it failed.
        """
        if self._pending is None:
            return
        (saved, step, on_host), self._pending = self._pending, None
        saved.result()
        if self._readable:
            return
        if (
            jax.process_count() > 1
        ):  # Orbax counts what each process asks of it: all must read, or none
            multihost_utils.sync_global_devices(f"step {step} has its name")
        try:
            ocp.load(self.directory / str(step), on_host)
        except Exception as error:
            if jax.process_index() == 0:
                _set_aside(self.directory / str(step), "cannot be read back")
            raise self._failed(step, error) from error
        self._readable = True

    def last_good(self) -> str:
        """Where a person finds the newest checkpoint, in words."""
        steps = self._steps()
        return (
            f"the last good checkpoint is {self.directory / str(steps[0])}"
            if steps
            else "no checkpoint was saved yet"
        )

    def close(self) -> None:
        """Wait for the last save and end the thread. Raises SaveError where it failed."""
        try:
            self.wait()
        finally:
            self._background.shutdown()

    def _steps(self) -> list[int]:
        """The steps that have their name, newest first. Raises UserError for a file of such a name."""
        found = []
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.name.isdecimal() and path.name == str(int(path.name)):
                if not path.is_dir():
                    raise UserError(
                        f"{path}: is a file, expected a checkpoint's folder: move it away"
                    )
                found.append(int(path.name))
        return sorted(found, reverse=True)

    def _clean(self) -> None:
        """Remove what a kill or a failed save left behind."""
        for path in self.directory.iterdir() if self.directory.is_dir() else ():
            if path.name.startswith((SAVING, REMOVING)) or path.name.endswith(
                ".orbax-checkpoint-tmp"
            ):
                shutil.rmtree(path, ignore_errors=True)

    def _write_manifest(self, directory: pathlib.Path, step: int, accuracy: float | None) -> None:
        manifest = dict(run=self.run, step=step, accuracy=accuracy, files=_hashes(directory))
        temporary = directory / (MANIFEST + ".tmp")
        temporary.write_text(json.dumps(manifest, indent=1))
        os.replace(temporary, directory / MANIFEST)

    def _verified(self, step: int) -> bool:
        """Whether a manifest vouches for a step; False where it has none.

        Files that the manifest does not name are ignored: file browsers and network disks leave
        some everywhere. Raises ValueError, saying why, where the step cannot be trusted.
        """
        directory = self.directory / str(step)
        if not (directory / MANIFEST).exists():
            if not (directory / "_CHECKPOINT_METADATA").exists():
                raise ValueError("is half there" if any(directory.iterdir()) else "is empty")
            return False
        manifest = _read_manifest(directory)
        if not manifest.get("files"):
            raise ValueError(f"has an unreadable {MANIFEST}")
        if (run := manifest.get("run") or self.run) != self.run:
            raise ValueError(f"is of another run ({run}, this one is {self.run})")
        if (named := manifest.get("step", step)) != step:
            raise ValueError(f"is step {named} by its {MANIFEST}")
        wanted = {
            name: digest
            for name, digest in manifest["files"].items()
            if not name.startswith("metrics/")
        }
        found = _hashes(directory, wanted)
        for name in sorted(wanted):
            if found.get(name) != wanted[name]:
                raise ValueError(
                    f"is damaged: {name} is {'changed' if name in found else 'missing'}"
                )
        return True


def _named(state: Any) -> dict[str, Any]:
    """The leaves of a state by the names that they have in a checkpoint."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _read_manifest(directory: pathlib.Path) -> dict:
    """A step's manifest: run, step, accuracy and files; {} where it cannot be read.

    Before there were runs and steps in it, a manifest was what `files` is now.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        return manifest if isinstance(manifest["files"], dict) else {}
    except KeyError:
        return dict(files=manifest)
    except (OSError, ValueError, TypeError):
        return {}


def _accuracy_of(directory: pathlib.Path) -> float | None:
    """The accuracy that a step was saved with, if any; earlier versions kept it in a file of its own."""
    accuracy = _read_manifest(directory).get("accuracy")
    if accuracy is None:
        try:
            accuracy = json.loads((directory / "metrics" / "metrics").read_text())["accuracy"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
    return accuracy if isinstance(accuracy, float) else None


def _hashes(directory: pathlib.Path, names: Any = None) -> dict[str, str]:
    """SHA-256 of each file below `directory` (or of those of these `names`), by its relative path."""
    if names is None:
        paths = (
            path for path in sorted(directory.rglob("*")) if not path.name.startswith(MANIFEST)
        )
    else:
        paths = (directory / name for name in names)
    hashes = {}
    for path in paths:
        if path.is_file():
            with path.open("rb") as file:
                hashes[str(path.relative_to(directory))] = hashlib.file_digest(
                    file, "sha256"
                ).hexdigest()
    return hashes


def _set_aside(directory: pathlib.Path, reason: str) -> None:
    aside = directory.with_name(f"broken-{directory.name}")
    number = 1
    while aside.exists():
        number += 1
        aside = directory.with_name(f"broken-{directory.name}-{number}")
    directory.rename(aside)
    logging.warning("Checkpoint %s %s. It is set aside as %s.", directory, reason, aside.name)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
