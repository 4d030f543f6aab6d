"""Save, verify, reshard, resume.

Orbax's v1 training API writes and reads; async saving, keep-N and best-of, and loading onto another mesh all work there.
Orbax does not notice flipped bits and does not fall back to an older step by itself, so each step also gets the SHA-256
of its files, and what fails the check or does not load is set aside, said aloud, and the next older step is taken.
"""

import concurrent.futures
import hashlib
import json
import pathlib
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

MANIFEST = "SHA256.json"


class Checkpoints:
    """The checkpoints of one run: `directory`/<step>, the last `keep` of them and the one of best accuracy."""

    def __init__(self, directory: pathlib.Path, keep: int):
        self.directory, self.keep = directory, keep
        self._checkpointer = None
        self._pending: concurrent.futures.Future | None = None
        self._background = concurrent.futures.ThreadPoolExecutor(1)

    def restore(self, abstract_state: Any) -> Any | None:
        """The newest state that is whole, placed as `abstract_state` says (any mesh), or None where there is none.

        Broken steps are renamed to broken-<step>, never deleted, with a warning that says what was wrong.
        """
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(abstract_state)]
        leaves, tree = jax.tree.flatten(abstract_state)
        while True:
            self._set_broken_aside()
            self._checkpointer = ocp.training.Checkpointer(self.directory, preservation_policy=_keep(self.keep),
                                                           cleanup_tmp_directories=True)
            latest = self._checkpointer.latest
            if latest is None:
                return None
            try:
                loaded = self._checkpointer.load(latest.step, dict(zip(names, leaves, strict=True)))
                return jax.tree.unflatten(tree, [loaded[name] for name in names])
            except Exception as error:  # Orbax raises many kinds for files that are cut, missing or of another shape
                if jax.process_count() > 1:
                    raise  # the processes must agree on the step: a person decides
                self._checkpointer.close()
                _set_aside(self.directory / str(latest.step), f"does not load ({_first_line(error)})")

    def save(self, step: int, state: Any, accuracy: float | None = None) -> None:
        """Starts an atomic save in the background; `accuracy` (of the evaluation at this step) ranks it."""
        self.wait()
        named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        response = self._checkpointer.save_async(step, named, overwrite=True,
                                                 metrics=None if accuracy is None else {"accuracy": accuracy})
        self._pending = self._background.submit(self._finish, self.directory / str(step), response)

    def _finish(self, directory: pathlib.Path, response) -> None:
        response.result()
        if jax.process_index() == 0:
            temporary = directory / (MANIFEST + ".tmp")
            temporary.write_text(json.dumps(_hashes(directory), indent=1))
            temporary.replace(directory / MANIFEST)

    def wait(self) -> None:
        """Returns once the last save is whole on disk; raises what went wrong with it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def last_good(self) -> str:
        """Where a person finds the newest checkpoint, in words."""
        latest = self._checkpointer.latest
        return f"the last good checkpoint is {self.directory / str(latest.step)}" if latest else "no checkpoint was saved yet"

    def close(self) -> None:
        """Waits for the last save and frees Orbax's threads."""
        self.wait()
        self._background.shutdown()
        if self._checkpointer is not None:
            self._checkpointer.close()

    def _set_broken_aside(self) -> None:
        if jax.process_index() == 0 and self.directory.exists():
            for directory in sorted(self.directory.iterdir()):
                if directory.name.isdecimal() and directory.is_dir() and (reason := _what_is_wrong(directory)):
                    _set_aside(directory, reason)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints verified")


def _keep(last: int):
    """Orbax's policy for: the last `last`, and the best by accuracy."""
    policies = ocp.training.preservation_policies
    best = policies.BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1, keep_checkpoints_without_metrics=False)
    return policies.AnyPreservationPolicy([policies.LatestN(last), best])


def _hashes(directory: pathlib.Path) -> dict[str, str]:
    """SHA-256 of each file below `directory`, by its path relative to it."""
    hashes = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and not path.name.startswith(MANIFEST):
            with path.open("rb") as file:
                hashes[str(path.relative_to(directory))] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _what_is_wrong(directory: pathlib.Path) -> str:
    """Why a step cannot be trusted, or "" where it can."""
    manifest = directory / MANIFEST
    if not any(directory.iterdir()):
        return "is empty"
    if not manifest.exists():
        if not (directory / "_CHECKPOINT_METADATA").exists():
            return "is half there"
        logging.warning("Checkpoint %s has no %s (the run was killed while saving or removing it): not verified.",
                        directory, MANIFEST)
        return ""
    try:
        wanted = json.loads(manifest.read_text())
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict) or not wanted:
        return f"has an unreadable {MANIFEST}"
    found = _hashes(directory)
    changed = sorted(name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name))
    if changed:
        what = "missing" if changed[0] not in found else "not from this save" if changed[0] not in wanted else "changed"
        return f"is damaged: {changed[0]} is {what}"
    return ""


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
