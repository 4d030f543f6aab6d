"""Verify and load one checkpoint: Orbax's files, and a manifest of their checksums."""

import dataclasses
import json
import pathlib
from collections.abc import Set
from typing import Any

import jax
from absl import logging

from cnn_spmd.errors import one_line
from cnn_spmd.training import cluster, runfiles

MANIFEST = "SHA256.json"
BROKEN = "broken-"  # begins the name of a checkpoint that was set aside

# Orbax logs each error that it raises, with hundreds of lines of traceback.
logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)


def orbax() -> Any:
    """Import Orbax, which takes a while; programs.py does so while XLA compiles."""
    from orbax.checkpoint import v1

    return v1


class Rejected(Exception):
    """A checkpoint cannot be used; the text completes "Checkpoint 300 ..."."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One checkpoint: a folder with Orbax's files and the manifest."""

    path: pathlib.Path

    def write_manifest(self, run: str, step: int, accuracy: float | None) -> None:
        """Write which run and step this is, its accuracy, and the SHA-256 of each file.

        The disk then holds all files: a save deletes older checkpoints next.
        """
        paths = [path for path in sorted(self.path.rglob("*")) if path.is_file()]
        for path in paths:
            runfiles.flush_to_disk(path)
        files = {
            str(path.relative_to(self.path)): runfiles.sha256(path)
            for path in paths
            if not path.name.startswith(MANIFEST)
        }
        manifest = dict(run=run, step=step, accuracy=accuracy, files=files)
        runfiles.write_json(self.path / MANIFEST, manifest)

    def has_manifest(self) -> bool:
        """Return whether the checkpoint has a manifest, readable or not."""
        return (self.path / MANIFEST).exists()

    def manifest(self) -> dict:
        """Return the manifest; {} if it cannot be read.

        The earliest runs wrote only what is now `files`.
        """
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            return manifest if isinstance(manifest["files"], dict) else {}
        except KeyError:
            return dict(files=manifest)
        except (OSError, ValueError, TypeError):
            return {}

    def accuracy(self) -> float | None:
        """Return the accuracy that the step was saved with, if any, from 0 to 1."""
        accuracy = self.manifest().get("accuracy")
        if accuracy is None:  # the earliest runs wrote it to a file of its own
            try:
                text = (self.path / "metrics" / "metrics").read_text()
                accuracy = json.loads(text)["accuracy"]
            except (OSError, ValueError, KeyError, TypeError):
                return None
        return accuracy if isinstance(accuracy, float) else None

    def verify(self, run: str) -> bool:
        """Return whether a manifest vouches for this checkpoint; False if it has none.

        Files that the manifest does not name are ignored: file browsers and network disks leave
        some everywhere. Raises Rejected if the checkpoint is damaged, or is of another run or step.
        """
        if not self.has_manifest():
            if not (self.path / "_CHECKPOINT_METADATA").exists():  # Orbax writes it in each one
                raise Rejected("is half there" if any(self.path.iterdir()) else "is empty")
            return False
        manifest = self.manifest()
        if not manifest.get("files"):
            raise Rejected(f"has an unreadable {MANIFEST}")
        saved_run = manifest.get("run") or run  # the earliest runs had no name
        if saved_run != run:
            raise Rejected(f"is of another run ({saved_run}, this one is {run})")
        step = manifest.get("step", self.path.name)
        if str(step) != self.path.name:
            raise Rejected(f"is step {step} by its {MANIFEST}")
        for name, digest in sorted(manifest["files"].items()):
            if name.startswith("metrics/"):  # no part of the state
                continue
            if not (self.path / name).is_file():
                raise Rejected(f"is damaged: {name} is missing")
            try:
                is_changed = runfiles.sha256(self.path / name) != digest
            except OSError as error:  # such as a bad sector of the disk
                raise Rejected(f"cannot be read: {name}: {error.strerror}") from error
            if is_changed:
                raise Rejected(f"is damaged: {name} is changed")
        return True

    def load(self, target: Any) -> Any:
        """Return the saved state, placed as `target` says.

        target: a pytree of arrays or of shapes with shardings; its field `step` is the step.
        Raises Rejected if the files do not hold exactly the arrays of `target`, and what Orbax
        raised where another process of the cluster was lost.
        """
        named = arrays_by_name(target)
        try:
            _check_names(named.keys(), orbax().metadata(self.path).metadata.keys())
            loaded = orbax().load(self.path, named)
        except Rejected:
            raise
        except Exception as error:  # of many kinds, for files that are cut, missing or misshapen
            cluster.raise_if_peer_trouble(error)
            raise Rejected(f"does not load ({one_line(error)})") from error
        if (step := int(loaded[".step"])) != int(self.path.name):
            raise Rejected(f"holds step {step}")
        return jax.tree.unflatten(jax.tree.structure(target), [loaded[name] for name in named])

    def set_aside(self, reason: str) -> None:
        """Rename the folder to broken-<step>, with a warning that says why."""
        aside = runfiles.free_name(self.path.with_name(f"{BROKEN}{self.path.name}"))
        self.path.rename(aside)
        logging.warning("Checkpoint %s %s. It is set aside as %s.", self.path, reason, aside.name)


def arrays_by_name(state: Any) -> dict[str, Any]:
    """Return the arrays of a state by the names that they have in a checkpoint.

    A field without arrays, such as the model state of a network without batch norm, leaves no
    trace. So a checkpoint from before there was such a field restores into a state that has it.
    """
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _check_names(wanted: Set[str], saved: Set[str]) -> None:
    """Raise Rejected if a checkpoint lacks arrays of the state, or has others."""
    for problem, names in (
        ("lacks arrays of this run's state", wanted - saved),
        ("has arrays that this run's state lacks", saved - wanted),
    ):
        if names:
            shown = ", ".join(sorted(names)[:2]) + (", ..." if len(names) > 2 else "")
            raise Rejected(f"{problem}: {shown}")
