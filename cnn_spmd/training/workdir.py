"""Check the folder of a run, lock it against a second run, write its files."""

import contextlib
import fcntl
import os
import pathlib
import re
from collections.abc import Iterator

import jax
from absl import logging

from cnn_spmd import config as configs
from cnn_spmd.errors import UserError
from cnn_spmd.training import runfiles

LOCK = ".lock"
FILES = ("config.json", "program.json", "metrics.jsonl", "summary.json", "profile.json")
# Orbax writes below a path with one of these without an error, and does not find the files again.
UNREADABLE = "*?[\\"
# These may lie in a folder that holds no run and no sweep yet: the lock, what a dry run wrote, and
# what a kill leaves of the first file.
BEFORE_A_RUN = {LOCK, "program.json", "program.json.tmp", "config.json.tmp", "sweep.json.tmp"}


def parse(text: str) -> pathlib.Path:
    """Return the path that --workdir gives.

    Raises UserError for a path on another machine, and for a path that is not UTF-8.
    """
    if re.match(r"[A-Za-z][\w+.-]*://", text):
        raise UserError(
            f"--workdir={text}: is not on this machine: give a local folder, or a mounted one"
        )
    path = configs.expanded("--workdir", text)
    try:
        str(path.absolute()).encode()
    except OSError as error:
        raise UserError(
            f"--workdir={text}: the current folder is gone ({error.strerror}): give a whole path"
        ) from None
    except UnicodeEncodeError:
        raise UserError(
            f"--workdir={text}: {path.absolute()} is not UTF-8, or this locale is not, and "
            "checkpoints need both: give another folder"
        ) from None
    return path


@contextlib.contextmanager
def locked(folder: pathlib.Path, flag: str = "--workdir=") -> Iterator[set[str]]:
    """Make a folder, unless it exists, and lock it; yield the names in it.

    Where nothing was written in it, the folder is at the end as it was before, or absent again.
    flag: the command-line flag that gave the folder, for messages.
    Raises UserError for a folder that cannot be written, that another process has locked, or below
    which Orbax could not read a checkpoint.
    """
    _refuse_unreadable(folder, flag)
    try:
        absent = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(
            f"{flag}{folder}: cannot be written ({error.strerror}): give another folder"
        ) from None
    with lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(lock.fileno()).st_nlink:  # another run has just removed it
                    raise BlockingIOError
            except BlockingIOError:
                raise UserError(
                    f"{flag}{folder}: another run is using it: wait for it, or give another folder"
                ) from None
            except OSError as error:  # some network disks know no locks
                logging.warning(
                    "%s cannot be locked (%s): make sure that no other run uses it.",
                    folder,
                    error.strerror,
                )
        try:
            yield names
        finally:
            if jax.process_count() == 1:  # in a cluster, other processes may still need the lock
                _restore(folder, names, absent)


def _restore(folder: pathlib.Path, names: set[str], absent: list[pathlib.Path]) -> None:
    """Remove a new lock, and folders that were absent, unless there is something new beside it."""
    with contextlib.suppress(OSError):
        if {path.name for path in folder.iterdir()} - names == {LOCK}:
            (folder / LOCK).unlink()
            for path in absent:
                path.rmdir()


def _refuse_unreadable(folder: pathlib.Path, flag: str) -> None:
    """Raise UserError for a path below which Orbax could not read a checkpoint."""
    try:
        path = str(folder.resolve())
    except RuntimeError:
        raise UserError(
            f"{flag}{folder}: is behind links that go in a circle: give another folder"
        ) from None
    found = sorted({*path} & {*UNREADABLE})
    if ":/" in path and not found:  # as in gs:/bucket
        found = [":/"]
    if found:
        raise UserError(
            f"{flag}{folder}: no checkpoint could be read again from {path}, because of "
            f"{' '.join(found)} in it: give a folder whose whole path has none of "
            f"{' '.join(UNREADABLE)} :/"
        )


@contextlib.contextmanager
def locked_run(workdir: pathlib.Path, config: dict) -> Iterator[dict]:
    """Lock the folder of a run; yield its old summary, {} if it has none.

    Nothing in the folder is changed.
    config: what config.json of this run holds or will hold.
    Raises UserError for a folder that cannot be written, is in use, holds something other than a
    run, or holds a run with another config.
    """
    with locked(workdir) as names:
        if names <= BEFORE_A_RUN:
            yield {}
            return
        _refuse_other_kinds(workdir, names)
        if "config.json" not in names:
            raise UserError(
                f"--workdir={workdir}: is not empty and holds no run (no config.json): "
                "give a new folder"
            )
        try:
            old = runfiles.read_json(workdir / "config.json")
        except runfiles.DamagedError:
            raise UserError(
                f"--workdir={workdir}: config.json is damaged, so nobody knows what ran here: "
                "give a new folder"
            ) from None
        old.pop("schema", None)
        configs.refuse_changes(f"--workdir={workdir}", old, config)
        yield runfiles.read_json(workdir / "summary.json", required=False)


def _refuse_other_kinds(workdir: pathlib.Path, names: set[str]) -> None:
    """Raise UserError where a file of a run is a folder or a pipe, or the reverse."""
    for name in sorted(names & {*FILES}):
        if not (workdir / name).is_file():  # to open a pipe would wait for ever
            raise UserError(f"{workdir / name}: is no regular file, expected a file: move it away")
    if "checkpoints" in names and not (workdir / "checkpoints").is_dir():
        raise UserError(f"{workdir / 'checkpoints'}: is no folder, expected a folder: move it away")


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Return whether the folder of a run holds a checkpoint, usable or not."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def write_run_file(path: pathlib.Path, value: dict) -> None:
    """Write a JSON file of a run with its schema number, on process 0 of a cluster."""
    if jax.process_index() == 0:
        runfiles.write_json(path, dict(schema=runfiles.SCHEMA) | value)
