"""Load runs and sweeps from their folders for a report."""

import functools
import pathlib
from collections.abc import Sequence

from cnn_spmd.config import flat
from cnn_spmd.errors import UserError
from cnn_spmd.report import compare
from cnn_spmd.training import runfiles
from cnn_spmd.training.runfiles import figures_of, read_json

# ---- Runs


def load(folders: Sequence[pathlib.Path], notes: list[str]) -> list[dict]:
    """The sweeps in `folders`, as in sweep.json, and one more of all lone runs; each run with its metrics (lines)
    and pictures.

    notes gets a line for each run that is unfinished and each damaged line. Raises UserError for what is no such folder.
    """
    sweeps, lone = [], []
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: {'not a folder' if folder.exists() else 'does not exist'}")
        if (folder / "sweep.json").exists():
            sweeps.append(read_sweep(folder, notes))
        elif (folder / "config.json").exists() or (folder / "summary.json").exists():
            lone.append(folder)
        else:
            raise UserError(
                f"{folder}: holds neither a sweep (sweep.json) nor a run (config.json, summary.json)"
            )
    return sweeps + ([lone_runs(lone, notes)] if lone else [])


def read_sweep(folder: pathlib.Path, notes: list[str]) -> dict:
    """sweep.json, its unfinished runs looked up in their folders."""
    sweep = read_json(folder / "sweep.json")
    missing = {"experiment", "devices", "hardware", "runs"} - sweep.keys()
    if missing:
        raise UserError(
            f"{folder / 'sweep.json'}: not a sweep; give the folders of its runs instead"
        )
    runfiles.check_fields(folder / "sweep.json", sweep)
    empty = dict(mesh=None, settings={}, reason="", command="", seconds=None, figures={})
    runs = [
        empty | {name: value for name, value in run.items() if value is not None}
        for run in sweep["runs"]
    ]
    for run in runs:
        if run["status"] in ("running", "completed") and not run["figures"]:
            finish(run, folder / run["name"], notes)
        run["metrics"] = read_metrics(folder / run["name"], notes)
        run["pictures"] = read_pictures(folder / run["name"], notes)
    return sweep | dict(title=folder.resolve().name, runs=runs)


def lone_runs(folders: Sequence[pathlib.Path], notes: list[str]) -> dict:
    """Run folders as one sweep; swept is every field that differs (but compare.NOT_COMPARED), and another device."""
    names = [folder.resolve().name for folder in folders]
    runs, fields, made_by = [], [], []
    for folder, name in zip(folders, names, strict=True):
        run = dict(
            name=name if names.count(name) == 1 else str(folder),
            mesh=None,
            command="",
            seconds=None,
            figures={},
        )
        finish(run, folder, notes)
        try:
            if run["figures"]:
                made_by.append(read_json(folder / "summary.json"))
            own = flat(
                made_by[-1]["config"] if run["figures"] else read_json(folder / "config.json")
            )
        except UserError as error:
            notes.append(str(error))
            own = {}
        mesh = run["figures"].get("mesh") or {
            axis: own.get(f"mesh.{axis}") for axis in ("data", "model")
        }
        if all(mesh.values()):
            run["mesh"] = f"{mesh['data']}x{mesh['model']}"
        unused = ("data.synthetic.",) * (run["figures"].get("dataset") != "synthetic")
        own = {
            field: value
            for field, value in own.items()
            if not field.startswith((*compare.NOT_COMPARED, *unused))
        }
        said = made_by[-1] if run["figures"] else {}
        fields.append(
            own | {key: said[key] for key in ("device_kind", "data_digest") if said.get(key)}
        )
        runs.append(
            run | dict(metrics=read_metrics(folder, notes), pictures=read_pictures(folder, notes))
        )
    for run, own in zip(runs, fields, strict=True):
        run["settings"] = {
            field: value
            for field, value in own.items()
            if field in ("parallelism", "batch_size")
            or any(field in other and value != other[field] for other in fields)
        }

    def joined(key: str) -> str:
        return ", ".join(dict.fromkeys(str(summary[key]) for summary in made_by))

    where = [{key: summary.get(key) for key in runfiles.HARDWARE} for summary in made_by]
    hardware = functools.reduce(runfiles.merge_facts, where) if where else None
    return dict(
        title=", ".join(run["name"] for run in runs),
        experiment=joined("experiment") or "unfinished runs",
        runs=runs,
        devices=max((summary["devices"] for summary in made_by), default=0),
        started=joined("started"),
        hardware=hardware,
    )


def finish(run: dict, folder: pathlib.Path, notes: list[str]) -> None:
    """Fills in a run's status, reason and figures from its folder; where they are not whole, it is unfinished."""
    try:
        summary = read_json(folder / "summary.json")
        if summary.get("status") == "running":
            raise UserError(f"{folder}: summary.json says running")
        run.update(figures=figures_of(folder), status=summary["status"], reason="")
        if run["status"] != "completed":
            run["reason"] = f"stopped after step {summary['steps']}"
    except UserError as error:
        run.update(
            status="unfinished",
            reason=str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: "),
            figures={},
        )
        notes.append(f"{folder}: unfinished: {run['reason']}")


def read_metrics(folder: pathlib.Path, notes: list[str]) -> list[dict]:
    """The lines of a run's metrics.jsonl that are whole; a note for those that are not."""

    path = folder / "metrics.jsonl"
    try:
        rows = runfiles.read_metrics_rows(path)
        lines = (
            runfiles.read_bytes(path).decode(errors="replace").splitlines() if path.exists() else []
        )
    except UserError as error:
        notes.append(str(error))
        return []
    if cut := len(lines) - len(rows):
        notes.append(f"{path}: {cut} damaged line{'s' * (cut > 1)} left out, {len(rows)} read")
    return rows


def read_pictures(folder: pathlib.Path, notes: list[str]) -> list[tuple[str, bytes, str]]:
    """Title, PNG and caption of each picture of what a run learned, if there are any; a note for damaged ones."""
    path = folder / "pictures.json"
    if not path.exists():
        return []
    try:
        rows = runfiles.check_fields(path, read_json(path))["pictures"]
        for row in rows:
            if row["file"] != pathlib.Path(row["file"]).name:
                raise UserError(f"{path}: file={row['file']}: expected a name without a folder")
        return [
            (row["title"], runfiles.read_bytes(folder / row["file"]), row["caption"])
            for row in rows
        ]
    except ValueError as error:  # also a name that no file can have
        notes.append(f"{folder}: pictures are left out, draw them again with --pictures ({error})")
        return []


# ---- Command line
