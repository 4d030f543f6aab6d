"""Load the summaries of runs: those in results/data, and any others.

results/data/*.json and results/data/claims/*.json are each the summary.json of a run, copied there;
a .jsonl of the same name has lines of that run's metrics.jsonl, all or those that a table reads.
results/data/sweeps/*.json are each the sweep.json of a sweep. Some runs in claims/ shared their GPU
with another run, so their seconds say nothing.
"""

import pathlib
from collections.abc import Iterable, Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.report import compare, load
from cnn_spmd.training import runfiles

DATA = pathlib.Path(__file__).parents[2] / "results" / "data"
TRAINING_ERROR = 0.25  # figure 1 of AlexNet's paper
# Ends the experiment's name of a short run that was alone on its GPU and measures only the speed.
ALONE = "_alone"
# What the tables read of each run, besides what a figure measures.
NEEDED = ("experiment", "seed", "dataset", "device_kind", "devices", "mesh", "epochs", "host_cores")


def load_results(folder: pathlib.Path = DATA) -> list[dict]:
    """Return all runs in `folder`, its claims/ and, with their speedup, its sweeps/."""
    runs = load_single_runs(folder)
    for sweep in load_folder(folder / "sweeps"):
        runs += scaled_runs(sweep)
    return runs


def load_folder(folder: pathlib.Path) -> list[dict]:
    """Return the JSON files in a folder, in the order of their names."""
    return [runfiles.read_json(path) for path in sorted(folder.glob("*.json"))]


def load_single_runs(folder: pathlib.Path = DATA) -> list[dict]:
    """Return the summaries in `folder` and its claims/."""
    return load_summaries(folder) + load_summaries(folder / "claims")


def load_summaries(folder: pathlib.Path) -> list[dict]:
    """Return the summaries in a folder (load_summary)."""
    paths = sorted(folder.glob("*.json"))
    return [load_summary(path, path.with_suffix(".jsonl")) for path in paths]


def load_summary(path: pathlib.Path, metrics: pathlib.Path) -> dict:
    """Return a summary without the fields that are null.

    Where the file `metrics` exists, the summary gets its lines as `metrics`, and epochs_to_error:
    the number of epochs to TRAINING_ERROR, or None where it was not reached. `epochs` of a run that
    diverged are those that it should have trained, by which it is found.
    """
    run = {name: value for name, value in runfiles.read_json(path).items() if value is not None}
    if diverged(run):
        run["epochs"] = run["config"].get("epochs") or run["epochs"]
    if metrics.exists():
        run["metrics"] = runfiles.read_metrics_rows(metrics)
        run["epochs_to_error"] = None
        if run["epochs"] >= 1:  # within less, steps_to_error finds nothing
            per_epoch = round(run["steps"] / run["epochs"])
            steps = steps_to_error(run["metrics"], TRAINING_ERROR, per_epoch)
            run["epochs_to_error"] = steps and steps / per_epoch
    return run


def load_given(paths: Sequence[pathlib.Path]) -> tuple[list[dict], list[str]]:
    """Return the completed runs in `paths`, and a line on each other run.

    paths: folders of runs and of sweeps, and files named summary.json. Each run gets `folders`: its
    own, and with a speedup also those of the one-device runs. Raises UserError for other paths.
    """
    runs, unfinished, folders = [], [], []
    for given in distinct(path.parent if path.name == "summary.json" else path for path in paths):
        if (given / "sweep.json").exists():
            sweep = load.load_sweep(given, notes=[])
            folders += [given / run["name"] for run in sweep["runs"]]
            for run in scaled_runs(sweep):
                runs.append(run | dict(folders=[given / name for name in run["names"]]))
        elif (given / "summary.json").exists():
            folders.append(given)
        else:
            raise UserError(
                f"{given}: expected the folder of a run or of a sweep, or a summary.json; found "
                f"neither summary.json nor sweep.json{runfiles.instead_of(given)}"
            )
    for folder in distinct(folders):
        path = folder / "summary.json"
        if not path.exists():
            unfinished.append(f"{folder}: no summary.json")
            continue
        summary = runfiles.check_fields(path, runfiles.read_json(path))
        missing = [name for name in NEEDED if summary.get(name) is None]
        if summary["status"] != "completed":
            unfinished.append(f"{folder}: {summary['status']}")
        elif missing:
            raise UserError(f"{path}: lacks {', '.join(missing)}, which every run writes")
        else:
            runs.append(load_summary(path, folder / "metrics.jsonl") | dict(folders=[folder]))
    return runs, unfinished


def distinct(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Return the paths without those that lead to the same file; a run counts once."""
    return list({path.resolve(): path for path in paths}.values())


def steps_to_error(rows: Sequence[dict], error: float, steps_per_epoch: int) -> int | None:
    """Return the first step with a training error below `error`; None for never.

    The error is the mean over the newest lines that together have an epoch's steps. rows: lines
    of metrics.jsonl; a train line has the mean accuracy of its `steps` steps, which end at `step`.
    """
    window: list[tuple[int, float]] = []
    for row in rows:
        if row["split"] != "train":
            continue
        window.append((row["steps"], row["accuracy"]))
        while sum(steps for steps, _ in window[1:]) >= steps_per_epoch:
            window.pop(0)
        count = sum(steps for steps, _ in window)
        correct = sum(steps * accuracy for steps, accuracy in window)
        if count >= steps_per_epoch and 1 - correct / count < error:
            return row["step"]
    return None


def scaled_runs(sweep: dict) -> list[dict]:
    """Return the runs of a sweep that have a speedup (scaled_run)."""
    return [
        scaled_run(run, speedup, group, sweep)
        for group in compare.groups_of(sweep["runs"])
        # There is no speedup where the panel has no one-device run.
        for run, speedup in zip(group.runs, group.speedups(), strict=False)
    ]


def scaled_run(run: dict, speedup: float, group: compare.Group, sweep: dict) -> dict:
    """Return a sweep's run in the form of a summary, with its speedup and command.

    names: its own name, and those of the one-device runs that its speedup is relative to.
    """
    figures, devices = run["figures"], group.devices
    # Older sweeps say it only by the name of their experiment.
    variable = figures.get("dense_microbatch", "variable" in sweep["experiment"])
    return figures | dict(
        devices=devices,
        names=[member["name"] for member in (run, *group.base.runs)],
        host_cores=sweep["hardware"]["host_cores"],
        speedup=speedup,
        command=command_with_base(run["command"], figures["batch_size"], devices),
        config=dict(run["settings"], experiment=sweep["experiment"]),
        variable=bool(variable),
    )


def command_with_base(command: str, batch_size: int, devices: int) -> str:
    """Return the command of a sweep over a run and its one-device run."""
    command = command.replace("--mesh=", "--mesh=1x1,")
    per_device = f"--batch_per_device={batch_size // devices}"
    return command.replace(f"--config.batch_size={batch_size}", per_device)


def diverged(run: dict) -> bool:
    """Return whether a run ended because its loss or weights were not finite."""
    return run.get("status") == "non-finite"
