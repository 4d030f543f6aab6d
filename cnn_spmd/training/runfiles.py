"""Read and write a run's files; imports neither jax nor TFDS, so that reports can use it."""

import itertools
import json
import os
import pathlib
from typing import Any

from absl import logging

from cnn_spmd.errors import UserError


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes JSON whole or not at all: a kill in between leaves the old file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read(path: pathlib.Path) -> list[dict]:
    """The lines of a metrics.jsonl. A last line that was cut by a kill is left out; a damaged one elsewhere, with a warning."""
    rows, lines = [], path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not (isinstance(row["step"], int) and isinstance(row["split"], str)):
                raise TypeError("no step of a split")
            rows.append(row)
        except (ValueError, KeyError, TypeError):
            if number < len(lines):
                logging.warning("%s: line %d is damaged and left out.", path, number)
    return rows


def aside(path: pathlib.Path) -> pathlib.Path:
    """The first free name for the old metrics: metrics.jsonl.old, metrics.jsonl.old-2, ..."""
    names = itertools.chain([f"{path.name}.old"], (f"{path.name}.old-{n}" for n in itertools.count(2)))
    return next(kept for name in names if not (kept := path.with_name(name)).exists())


def figures_of(folder: pathlib.Path) -> dict:
    """The figures of the run in `folder`, as sweep.json holds them: from summary.json, program.json and profile.json if any.

    Raises UserError for a file that is missing or damaged.
    """
    summary, program = (read_json(folder / name) for name in ("summary.json", "program.json"))
    profile = read_json(folder / "profile.json") if (folder / "profile.json").exists() else None
    try:
        same = ("model", "mesh", "parallelism", "batch_size", "dataset", "fallback", "seed", "dtype", "steps",
                "images_per_second", "step_milliseconds", "train_seconds", "compile_seconds", "param_count",
                "bytes_per_device", "collectives", "device_kind", "processes")
        evaluation = summary["eval"] or dict(accuracy=None, loss=None)
        return {name: summary[name] for name in same} | dict(
            steady_calls=summary.get("steady_calls"), accuracy=evaluation["accuracy"], loss=evaluation["loss"],
            peak_bytes=program["memory"]["peak_bytes"], ring_bytes=program["totals"]["ring_bytes"],
            closed_form_ring_bytes=program["closed_form_ring_bytes"],
            dense_microbatch=summary["config"].get("dense_microbatch", 0), profile=profile)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: summary.json or program.json lacks {error}") from error


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. Raises UserError, in one line, where there is none."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: damaged JSON (not an object)")
    return value

HARDWARE = ("device_kind", "host_cores", "versions", "commit")  # what a summary.json says of where and by what code it ran


def joined(old: Any, new: Any) -> Any:
    """What two runs say of one thing, such as their commit: both, where they differ."""
    if isinstance(new, dict):
        return {key: joined(old.get(key, value), value) for key, value in new.items()}
    return new if old == new else ", ".join(dict.fromkeys([*str(old).split(", "), str(new)]))
