"""Load runs as flat dicts, for analysis."""

import contextlib
import os
import pathlib

from cnn_spmd.config import complete, flat
from cnn_spmd.errors import UserError
from cnn_spmd.training import runfiles


def load_runs(folder: str | os.PathLike) -> list[dict]:
    """Return one flat dict per run in `folder` or below, as pandas.DataFrame takes it.

    A run is a folder that holds a config.json or a summary.json. Runs come in the order of their
    paths. Nested fields have dotted names; a field that is null or lacking is not in the dict.

    Keys:
      folder: the run's folder, relative to `folder`; "." is `folder` itself.
      status: that of summary.json (docs/running.md); "unfinished" where summary.json is missing
        or damaged.
      reason: why a run is unfinished, or that one may not run any more; no other run has it.
      config.*: the config as it was resolved, such as config.optimizer.learning_rate.
      eval.*: the last evaluation: eval.accuracy (0 to 1), eval.loss (nats), eval.top5 (0 to 1),
        eval.examples, and every further metric of training.metrics.METRICS.
      peak_bytes, ring_bytes, closed_form_ring_bytes: from program.json; bytes per device, the
        latter two per step.
      best.accuracy, best.step: the best evaluation in metrics.jsonl, and its step.
      bytes_on_disk: of all files in the run's folder.
      hidden_share: from program.json; of the communication, the part that the schedule can hide.
      Each other number and text of summary.json, under its own name: experiment, seed, steps,
        mesh.data, images_per_second, step_milliseconds.median, train_seconds, versions.jax, ...

    Raises UserError where `folder` is no folder or there is no run in it.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: {'not a folder' if root.exists() else 'does not exist'}")
    names = ("config.json", "summary.json")
    found = sorted({path.parent for name in names for path in root.rglob(name)})
    if not found:
        raise UserError(f"{root}: holds no run (no config.json, no summary.json)")
    runs = []
    for path in found:
        fields = dict(folder=str(path.relative_to(root))) | load_run(path)
        runs.append({name: value for name, value in fields.items() if value is not None})
    return runs


def load_run(folder: pathlib.Path) -> dict:
    """Return the flat fields of one run, without its folder: a row of load_runs."""
    try:
        summary = runfiles.read_json(folder / "summary.json")
        fields = flat(summary | dict(config=complete(summary["config"])))
        for name in ("collectives", "startup", "parts"):  # lists of objects
            fields.pop(name, None)
        if fields.get("status") == "running":
            fields["reason"] = "unless a kill ended it, which its files do not show"
    except UserError as error:
        fields = dict(status="unfinished", reason=str(error))
        with contextlib.suppress(UserError):
            saved = runfiles.read_json(folder / "config.json")
            fields |= flat(dict(config=complete(saved)))
    with contextlib.suppress(UserError):
        path = folder / "program.json"
        program = runfiles.check_fields(path, runfiles.read_json(path))
        fields |= dict(
            peak_bytes=program["memory"].get("peak_bytes"),
            ring_bytes=program["totals"].get("ring_bytes"),
            closed_form_ring_bytes=program.get("closed_form_ring_bytes"),
            hidden_share=runfiles.hidden_share(program),
        )
    return fields | best_evaluation(folder) | dict(bytes_on_disk=bytes_on_disk(folder))


def best_evaluation(folder: pathlib.Path) -> dict:
    """Return the best test accuracy of a run with its step; {} if it was never evaluated."""
    rows = []
    with contextlib.suppress(UserError):
        rows = runfiles.read_metrics_rows(folder / "metrics.jsonl")
    evaluated = [row for row in rows if row["split"] in ("eval", "final") and "accuracy" in row]
    best = max(evaluated, key=lambda row: row["accuracy"], default=None)
    return {f"best.{name}": best[name] for name in ("accuracy", "step")} if best else {}


def bytes_on_disk(folder: pathlib.Path) -> int:
    """Return the bytes of all files in a folder and below."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # of a run that deletes old checkpoints meanwhile
            total += path.lstat().st_size
    return total
