"""A run's folder: made or checked, locked against a second run, its config remembered."""

import contextlib
import fcntl
import json
import pathlib
import re
from collections.abc import Iterator

import jax
from absl import logging

from cnn_spmd import config as configs
from cnn_spmd.errors import UserError

LOCK = ".lock"
FILES = ("config.json", "program.json", "metrics.jsonl", "summary.json", "profile.json")
UNREADABLE = "*?[\\"  # Orbax writes paths with these without an error and does not find them again
OURS = {
    LOCK,
    "program.json",
}  # what may be in a folder that holds no run yet: a lock, and what a dry run wrote


def local(text: str) -> pathlib.Path:
    """Reads a --workdir. Raises UserError for another machine's, and for a name that is not UTF-8."""
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
    """The folder, made where it is missing, for this process alone; yields the names of what is in it.

    flag: by which it was given, for what is raised. Raises UserError where it cannot be written or is in use, and for a path
    in which no checkpoint could be read again.
    """
    try:
        whole = str(folder.resolve())
    except RuntimeError:
        raise UserError(
            f"{flag}{folder}: is behind links that go in a circle: give another folder"
        ) from None
    if bad := sorted({*whole} & {*UNREADABLE}) or [part for part in (":/",) if part in whole]:
        raise UserError(
            f"{flag}{folder}: no checkpoint could be read again from {whole}, because of {' '.join(bad)} in it: "
            f"give a folder whose whole path has none of {' '.join(UNREADABLE)} :/"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        content = {path.name for path in folder.iterdir()}
        lock = (folder / LOCK).open("a")
    except OSError as error:
        raise UserError(
            f"{flag}{folder}: cannot be written ({error.strerror}): give another folder"
        ) from None
    with lock:
        if jax.process_index() == 0:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"{flag}{folder}: another run is using it: wait for it, or give another folder"
                ) from None
            except OSError as error:
                logging.warning(
                    "%s cannot be locked (%s): make sure that no other run uses it.",
                    folder,
                    error.strerror,
                )
        yield content


@contextlib.contextmanager
def opened(workdir: pathlib.Path, config: dict) -> Iterator[dict]:
    """The folder of a run of this resolved config, for this process alone; yields its old summary, {} where there is none.

    Raises UserError for a folder that cannot be written, is in use, is not a run's, or whose run had another config.
    Nothing in it is changed.
    """
    with locked(workdir) as content:
        if content <= OURS:
            yield {}
            return
        for name in sorted(content & {*FILES}):
            if not (workdir / name).is_file():  # to open a pipe would wait for ever
                raise UserError(
                    f"{workdir / name}: is no regular file, expected a file: move it away"
                )
        if "checkpoints" in content and not (workdir / "checkpoints").is_dir():
            raise UserError(
                f"{workdir / 'checkpoints'}: is no folder, expected a folder: move it away"
            )
        if "config.json" not in content:
            (workdir / LOCK).unlink()
            raise UserError(
                f"--workdir={workdir}: is not empty and holds no run (no config.json): give a new folder"
            )
        old = read(workdir / "config.json", warn=False)
        if old is None:
            raise UserError(
                f"--workdir={workdir}: config.json is damaged, so nobody knows what ran here: give a new folder"
            )
        configs.refuse_changes(f"--workdir={workdir}", old, config)
        yield read(workdir / "summary.json") or {}


def read(path: pathlib.Path, warn: bool = True) -> dict | None:
    """The JSON object in a file; None, with a warning, where there is no such thing in it.

    A byte order mark, which some editors write, is no damage.
    """
    try:
        value = json.loads(path.read_text("utf-8-sig"))
        if isinstance(value, dict):
            return value
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}, expected a readable file") from None
    except ValueError:
        pass
    if warn:
        logging.warning("%s is damaged and not used.", path)
    return None
