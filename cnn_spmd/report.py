"""Reports from measured runs: `python -m cnn_spmd.report RUN_OR_SWEEP...` writes report.md, report.csv and report.html.

They lie in the folder given, or in the first of several. `--pictures RUN` first draws what the run learned (pictures.py).
Without arguments it prints the README's tables (tables.py).
Neither jax nor matplotlib is imported before a report is drawn: sweep.py imports this file.
"""

import argparse
import functools
import json
import pathlib
import sys
from collections.abc import Sequence

from cnn_spmd import compare, environment, page, tables
from cnn_spmd.config import flat
from cnn_spmd.errors import UserError

# ---- Runs

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
            raise UserError(f"{folder}: holds neither a sweep (sweep.json) nor a run (config.json, summary.json)")
    return sweeps + ([lone_runs(lone, notes)] if lone else [])


def read_sweep(folder: pathlib.Path, notes: list[str]) -> dict:
    """sweep.json, its unfinished runs looked up in their folders."""
    sweep = read_json(folder / "sweep.json")
    missing = {"experiment", "devices", "hardware", "runs"} - sweep.keys()
    if missing or not all(isinstance(run, dict) and {"name", "status"} <= run.keys() for run in sweep["runs"]):
        raise UserError(f"{folder / 'sweep.json'}: not a sweep; give the folders of its runs instead")
    empty = dict(mesh=None, settings={}, reason="", command="", seconds=None, figures={})
    runs = [empty | run for run in sweep["runs"]]
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
        run = dict(name=name if names.count(name) == 1 else str(folder), mesh=None, command="", seconds=None, figures={})
        finish(run, folder, notes)
        try:
            if run["figures"]:
                made_by.append(read_json(folder / "summary.json"))
            own = flat(made_by[-1]["config"] if run["figures"] else read_json(folder / "config.json"))
        except UserError as error:
            notes.append(str(error))
            own = {}
        mesh = run["figures"].get("mesh") or {axis: own.get(f"mesh.{axis}") for axis in ("data", "model")}
        if all(mesh.values()):
            run["mesh"] = f"{mesh['data']}x{mesh['model']}"
        unused = ("data.synthetic.",) * (run["figures"].get("dataset") != "synthetic")
        own = {field: value for field, value in own.items() if not field.startswith((*compare.NOT_COMPARED, *unused))}
        fields.append(own | ({"device_kind": run["figures"]["device_kind"]} if run["figures"] else {}))
        runs.append(run | dict(metrics=read_metrics(folder, notes), pictures=read_pictures(folder, notes)))
    for run, own in zip(runs, fields, strict=True):
        run["settings"] = {field: value for field, value in own.items()
                           if field in ("parallelism", "batch_size")
                           or any(field in other and value != other[field] for other in fields)}

    def joined(key: str) -> str:
        return ", ".join(dict.fromkeys(str(summary[key]) for summary in made_by))

    where = [{key: summary[key] for key in compare.HARDWARE} for summary in made_by]
    hardware = functools.reduce(compare.joined, where) if where else None
    return dict(title=", ".join(run["name"] for run in runs), experiment=joined("experiment") or "unfinished runs", runs=runs,
                devices=max((summary["devices"] for summary in made_by), default=0), started=joined("started"),
                hardware=hardware)


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
        run.update(status="unfinished", reason=str(error).removeprefix(f"{folder}/").removeprefix(f"{folder}: "), figures={})
        notes.append(f"{folder}: unfinished: {run['reason']}")


def read_metrics(folder: pathlib.Path, notes: list[str]) -> list[dict]:
    """The lines of a run's metrics.jsonl that are whole; a note for those that are not."""
    from cnn_spmd import metrics

    path = folder / "metrics.jsonl"
    rows = metrics.read(path)
    if cut := (len(path.read_text(errors="replace").splitlines()) if path.exists() else 0) - len(rows):
        notes.append(f"{path}: {cut} damaged line{'s' * (cut > 1)} left out, {len(rows)} read")
    return rows


def read_pictures(folder: pathlib.Path, notes: list[str]) -> list[tuple[str, bytes, str]]:
    """Title, PNG and caption of each picture of what a run learned, if there are any; a note for damaged ones."""
    if not (folder / "pictures.json").exists():
        return []
    try:
        rows = read_json(folder / "pictures.json")["pictures"]
        return [(row["title"], (folder / row["file"]).read_bytes(), row["caption"]) for row in rows]
    except (UserError, OSError, KeyError, TypeError) as error:
        notes.append(f"{folder}: pictures are left out, draw them again with --pictures ({error})")
        return []


# ---- Command line

def write(folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Writes report.md, report.csv and report.html on all `folders` into the first; returns their paths.

    Says on stderr what is unfinished or damaged. Raises UserError for bad input and for a folder that cannot be written.
    """
    notes: list[str] = []
    sweeps = load(folders, notes)
    for note in notes:
        print(f"warning: {note}", file=sys.stderr)
    blocks = page.document(sweeps, notes)
    texts = {"report.md": page.as_markdown(blocks), "report.csv": page.as_csv(sweeps), "report.html": page.as_html(blocks)}
    for name, text in texts.items():
        try:
            (folders[0] / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{folders[0] / name}: cannot be written: {error.strerror}") from error
    return [folders[0] / name for name in texts]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for bad input, 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m cnn_spmd.report", description=(
        "Writes report.md, report.csv and report.html (tables and charts, no network needed) on runs and sweeps into the "
        "folder given, or into the first of several. Without arguments: prints the README's tables from results/."))
    parser.add_argument("folders", nargs="*", type=pathlib.Path, metavar="RUN_OR_SWEEP", help="a --workdir of launch.py")
    parser.add_argument("--pictures", action="store_true", help="first draw what each RUN learned, from its newest checkpoint: "
                        "the first layer's filters, test images with their most probable classes, nearest neighbours")
    parser.add_argument("--data_dir", metavar="PATH", help="with --pictures: where the run's data.dir is now")
    arguments = parser.parse_args(argv)
    folders = arguments.folders
    if arguments.pictures and not folders:
        parser.error("--pictures: expected the folder of a run")
    if arguments.data_dir is not None and not arguments.pictures:
        parser.error("--data_dir: expected --pictures with it")
    if not folders:
        print(*(table() for table in tables.TABLES.values()), sep="\n\n")
        return 0
    try:
        if arguments.pictures:
            from cnn_spmd import pictures

            for folder in folders:
                pictures.draw(folder, arguments.data_dir)
        paths = write(folders)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if len(folders) > 1:
        print(f"One report on all {len(folders)} folders, in the first:")
    print(*paths, sep="\n")
    return 0


if __name__ == "__main__":
    environment.keep_talking()
    sys.exit(main())
