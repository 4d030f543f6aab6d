"""Read and write a run's files; imports neither jax nor TFDS, so that reports can use it."""

import contextlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging

from cnn_spmd.errors import UserError

# The fields of config.json that are not fields of the config.
NOT_CONFIG = (
    "schema",
    "run",
    "dataset",
    "fallback",
    "data_files",
    "data_digest",
    "skipped_images",
)
HARDWARE = (
    "device_kind",
    "host_cores",
    "versions",
    "commit",
)  # what a summary.json says of where and by what code it ran
KINDS = {
    "text": str,
    "a whole number": int,
    "a number": int | float,
    "a list": list,
    "an object": dict,
}
# What the report reads of each file, by kind; "?": or null, "*": each item of a list or object.
FIELDS = {
    "summary.json": {
        "text": "experiment started status model parallelism dataset dtype device_kind fallback? "
        "commit? data_digest? collectives.*.operation",
        "a whole number": "devices batch_size seed steps param_count processes mesh.data mesh.model "
        "host_cores? steady_calls?",
        "a number": "images_per_second? train_seconds? compile_seconds? step_milliseconds.*? "
        "eval.accuracy? eval.loss? eval.*? bytes_per_device.*? collectives.*.ring_bytes "
        "config.dense_microbatch?",
        "a list": "collectives?",
        "an object": "mesh config versions bytes_per_device eval? step_milliseconds? collectives.*",
    },
    "program.json": {
        "an object": "memory totals",
        "a number": "memory.peak_bytes? totals.ring_bytes? closed_form_ring_bytes?",
    },
    "profile.json": {
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
        "an object": "hardware? runs.* runs.*.settings? runs.*.figures?",
    },
}


@contextlib.contextmanager
def whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a name to write to, which becomes `path` unless writing fails."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.unlink(missing_ok=True)  # to write to a FIFO would never end
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON whole or not at all: a kill in between leaves the old file."""
    with whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")


def contents(path: pathlib.Path) -> bytes:
    """Reads a regular file; raises UserError for a FIFO, which may never end."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: expected a regular file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def check(path: pathlib.Path, value: dict) -> dict:
    """Returns what the file holds, once each field is of its kind in FIELDS.

    Raises UserError for a field that is not.
    """
    for kind, fields in FIELDS[path.name].items():
        for field in fields.split():
            name = field.removesuffix("?")
            for found in _found(value, name.split(".")):
                if not isinstance(found, KINDS[kind]) and (found is not None or name == field):
                    said = "null or missing" if found is None else json.dumps(found)[:60]
                    raise UserError(f"{path}: {name} is {said}, expected {kind}")
    return value


def _found(value: Any, names: list[str]) -> Iterator[Any]:
    """Each value of a field; none where what should hold it is no object or list."""
    if not names:
        yield value
    elif names[0] == "*" and isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _found(item, names[1:])
    elif isinstance(value, dict):
        yield from _found(value.get(names[0]), names[1:])


def read(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl. A last line that was cut by a kill is left out; a damaged one elsewhere, with a warning."""
    rows, lines = [], contents(path).decode(errors="replace").splitlines() if path.exists() else []
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


def aside(path: pathlib.Path) -> pathlib.Path:
    """The first free name for the old metrics: metrics.jsonl.old, metrics.jsonl.old-2, ..."""
    names = itertools.chain(
        [f"{path.name}.old"], (f"{path.name}.old-{n}" for n in itertools.count(2))
    )
    return next(kept for name in names if not (kept := path.with_name(name)).exists())


def figures_of(folder: pathlib.Path) -> dict:
    """The figures of the run in `folder`, as sweep.json holds them: from summary.json, program.json and profile.json if any.

    Raises UserError for a file that is missing or damaged.
    """

    def read_checked(name: str) -> dict:
        return check(folder / name, read_json(folder / name))

    summary, program = map(read_checked, ("summary.json", "program.json"))
    profile = read_checked("profile.json") if (folder / "profile.json").exists() else None
    try:
        same = (
            "model",
            "mesh",
            "parallelism",
            "batch_size",
            "dataset",
            "fallback",
            "seed",
            "dtype",
            "steps",
            "images_per_second",
            "step_milliseconds",
            "train_seconds",
            "compile_seconds",
            "param_count",
            "bytes_per_device",
            "collectives",
            "device_kind",
            "processes",
        )
        evaluation = summary["eval"] or dict(accuracy=None, loss=None)
        return {name: summary[name] for name in same} | dict(
            steady_calls=summary.get("steady_calls"),
            accuracy=evaluation["accuracy"],
            loss=evaluation["loss"],
            eval=summary["eval"],
            peak_bytes=program["memory"]["peak_bytes"],
            ring_bytes=program["totals"]["ring_bytes"],
            closed_form_ring_bytes=program["closed_form_ring_bytes"],
            dense_microbatch=summary["config"].get("dense_microbatch", 0),
            profile=profile,
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: summary.json or program.json lacks {error}") from error


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises UserError, in one line, where there is none."""
    text = contents(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged JSON (not an object)")
    return value


def joined(old: Any, new: Any) -> Any:
    """What two runs say of one thing, such as their commit: both, where they differ."""
    if isinstance(new, dict):
        return {key: joined(old.get(key, value), value) for key, value in new.items()}
    return new if old == new else ", ".join(dict.fromkeys([*str(old).split(", "), str(new)]))


def registered_metrics(figures: Iterable[dict]) -> list[str]:
    """Return the names of the metrics in the runs' `eval` besides accuracy and loss.

    figures: of each run (figures_of); {} for a run that has none.
    """
    names = dict.fromkeys(name for run in figures for name in run.get("eval") or ())
    return [name for name in names if name not in ("accuracy", "loss", "examples")]
