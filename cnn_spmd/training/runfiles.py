"""Read and write the files of a run, of a sweep and of the pictures of a run.

This module imports neither jax nor TensorFlow Datasets, so that reports can use it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from cnn_spmd.errors import UserError

# The version of the files of a run. Raise it when a field changes its meaning or goes away, not
# when one is added. A file without `schema` was written before there were versions.
SCHEMA = 1
# The fields of summary.json that say on which hardware and by which code a run was made.
HARDWARE = ("device_kind", "host_cores", "versions", "commit")
# Metrics from 0 to 1 that are shown as percentages.
SHARES = ("accuracy", "top5")
KINDS = {
    "text": str,
    "a whole number": int,
    "a number": int | float,
    "a list": list,
    "an object": dict,
}
# The fields that the report reads of each file, by kind. "?" after a name: it may be null or
# missing. "*" stands for each item of a list or object.
FIELDS = {
    "summary.json": {
        "text": "experiment started status model parallelism dataset dtype device_kind fallback? "
        "commit? command? data_digest? collectives.*.operation",
        "a whole number": "schema? devices batch_size seed steps param_count processes mesh.* "
        " host_cores? steady_calls?",
        "a number": "epochs? images_per_second? train_seconds? compile_seconds? "
        "step_milliseconds.*? eval.accuracy? eval.loss? eval.*? bytes_per_device.*? "
        "collectives.*.ring_bytes config.dense_microbatch?",
        "a list": "collectives? parts?",
        "an object": "mesh config versions bytes_per_device eval? step_milliseconds? collectives.*",
    },
    "program.json": {
        "a whole number": "schema?",
        "an object": "memory totals overlap?",
        "a number": "memory.peak_bytes? totals.ring_bytes? closed_form_ring_bytes? "
        "overlap.hidden_share?",
    },
    "profile.json": {
        "a whole number": "schema?",
        "a number": "steps step_milliseconds compute_milliseconds communication_milliseconds "
        "exposed_milliseconds idle_milliseconds top.*.milliseconds top.*.count",
        "a list": "top",
        "an object": "top.*",
        "text": "note? top.*.name",
    },
    "pictures.json": {
        "a list": "pictures",
        "an object": "pictures.*",
        "text": "pictures.*.file pictures.*.title pictures.*.caption",
    },
    "sweep.json": {
        "text": "experiment command? started? runs.*.name runs.*.status runs.*.reason?",
        "a whole number": "devices",
        "a list": "runs",
        "an object": "hardware? config? runs.* runs.*.settings? runs.*.figures?",
    },
}
# The fields of summary.json that sweep.json repeats.
COPIED = (
    "model mesh parallelism batch_size dataset fallback seed dtype steps epochs images_per_second "
    "step_milliseconds steady_calls predicted_milliseconds train_seconds compile_seconds "
    "param_count bytes_per_device collectives eval device_kind processes"
)


# ---- Write


@contextlib.contextmanager
def atomic_write(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path to write to; it replaces `path` if the block succeeds."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # a write to a FIFO would never end
    try:
        yield temporary
        flush_to_disk(temporary)  # otherwise a power cut may leave an empty file
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: pathlib.Path) -> None:
    """Wait until the disk holds what was written to a file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def write_json(path: pathlib.Path, value: Any) -> None:
    """Write JSON so that a kill at any moment leaves either the old or the new file."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def free_old_name(path: pathlib.Path) -> pathlib.Path:
    """Return the first unused name of NAME.old, NAME.old-2, NAME.old-3, ..."""
    return free_name(path.with_name(f"{path.name}.old"))


def free_name(path: pathlib.Path) -> pathlib.Path:
    """Return a path, or the first that does not exist of NAME-2, NAME-3, ..."""
    numbered = (path.with_name(f"{path.name}-{n}") for n in itertools.count(2))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def set_foreign_aside(path: pathlib.Path, mark: str) -> None:
    """Rename a file that we did not write to NAME.old, with a warning, as we need its name.

    mark: a text in the first kilobyte of the files that we write.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        start = file.read(1024)
    if mark.encode() not in start:
        old = free_old_name(path)
        os.replace(path, old)
        logging.warning("%s was not written by this command: it is kept as %s.", path, old.name)


# ---- Read


class DamagedError(UserError):
    """A file does not hold a JSON object."""


def read_bytes(path: pathlib.Path) -> bytes:
    """Return the content of a regular file.

    Raises UserError for a file that cannot be read, and for a FIFO, whose reading may never end.
    """
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a regular file")
        return path.read_bytes()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        remedy = "" if missing else ", expected a readable file"
        raise UserError(f"{path}: {error.strerror}{remedy}") from error


def sha256(path: pathlib.Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def instead_of(folder: pathlib.Path) -> str:
    """Return the end of the error for a folder that is no run: it names the runs in it, if any.

    These are up to three runs, of the folder and of the sweeps in it.
    """
    paths = sorted(itertools.chain(folder.glob("*/config.json"), folder.glob("*/*/config.json")))
    if not paths:
        return ""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    names = ", ".join(str(path.parent) for path in paths[:3])
    return f"; give one of the runs in it: {names}{more}"


def read_json(path: pathlib.Path, required: bool = True) -> dict:
    """Return the object in a JSON file.

    The file may begin with a byte order mark, which some editors write.
    required=False: return {} for a missing file, and {} with a warning for a damaged one.
    Raises UserError, in one line, for a file that cannot be read; DamagedError, a UserError, for
    one that holds no JSON object.
    """
    if not required and not path.exists():
        return {}
    content = read_bytes(path)
    try:
        value = json.loads(content)
        reason = "not an object"
    except ValueError as error:
        value, reason = None, error
    if isinstance(value, dict):
        return value
    if required:
        raise DamagedError(f"{path}: damaged JSON ({reason})")
    logging.warning("%s is damaged and not used.", path)
    return {}


def read_metrics_rows(path: pathlib.Path) -> list[dict]:
    """Return the lines of a metrics.jsonl; [] where the file is missing.

    A kill may cut the last line, which is then left out. A damaged line elsewhere is left out with
    a warning.
    """
    rows = []
    lines = read_bytes(path).decode(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row["step"], int) and isinstance(row["split"], str)):
                raise TypeError("no step of a split")
            if not all(isinstance(row.get(name, 0), int | float) for name in ("loss", "accuracy")):
                raise TypeError("no number")
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                logging.warning("%s: line %d is damaged and left out.", path, number)
    return rows


# ---- Check


def check_fields(path: pathlib.Path, value: dict) -> dict:
    """Return `value`, the content of the file `path`, after checking its fields.

    Raises UserError for a field that is not of its kind in FIELDS.
    """
    for kind, fields in FIELDS[path.name].items():
        for field in fields.split():
            name = field.removesuffix("?")
            for found in _values_of(value, name.split(".")):
                if not isinstance(found, KINDS[kind]) and (found is not None or name == field):
                    shown = "null or missing" if found is None else json.dumps(found)[:60]
                    raise UserError(f"{path}: {name} is {shown}, expected {kind}")
    return value


def _values_of(value: Any, names: list[str]) -> Iterator[Any]:
    """Yield each value of the field `names`, of parents that are objects or lists."""
    if not names:
        yield value
    elif names[0] == "*" and isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _values_of(item, names[1:])
    elif isinstance(value, dict):
        yield from _values_of(value.get(names[0]), names[1:])


# ---- Collect


def figures_of(folder: pathlib.Path) -> dict:
    """Return the figures of the run in `folder`, as sweep.json holds them.

    They come from summary.json, from program.json, and from profile.json if there is one.
    Raises UserError for a file that is missing or damaged, and for a field that it lacks.
    """

    def read_checked(name: str) -> dict:
        return check_fields(folder / name, read_json(folder / name))

    summary, program = map(read_checked, ("summary.json", "program.json"))
    profile = read_checked("profile.json") if (folder / "profile.json").exists() else None
    evaluation = summary.get("eval") or {}
    return {name: summary.get(name) for name in COPIED.split()} | dict(
        accuracy=evaluation.get("accuracy"),
        loss=evaluation.get("loss"),
        peak_bytes=program["memory"].get("peak_bytes"),
        ring_bytes=program["totals"].get("ring_bytes"),
        closed_form_ring_bytes=program.get("closed_form_ring_bytes"),
        hidden_share=hidden_share(program),
        dense_microbatch=summary["config"].get("dense_microbatch", 0),
        profile=profile,
    )


def hidden_share(program: dict) -> float | None:
    """Return the share of communication that a program can hide; None where it is not known.

    program: program.json, which lacks it where an older version wrote it.
    """
    return (program.get("overlap") or {}).get("hidden_share")


def merge_facts(old: Any, new: Any) -> Any:
    """Merge what two runs say of one thing: "A, B" where they differ."""
    if isinstance(new, dict):
        return {key: merge_facts(old.get(key, value), value) for key, value in new.items()}
    return new if old == new else ", ".join(dict.fromkeys([*str(old).split(", "), str(new)]))


def registered_metrics(figures: Iterable[dict]) -> list[str]:
    """Return the names of the metrics in the runs' `eval` besides accuracy and loss.

    figures: of each run (figures_of); {} for a run that has none.
    """
    names = dict.fromkeys(name for run in figures for name in run.get("eval") or ())
    return [name for name in names if name not in ("accuracy", "loss", "examples")]
