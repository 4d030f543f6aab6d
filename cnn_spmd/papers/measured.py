"""Set what was measured here beside what papers published.

results/data/*.json and results/data/claims/*.json are each the summary.json of a run, copied there;
a .jsonl of the same name is that run's metrics.jsonl. results/data/sweeps/*.json are each the
sweep.json of a sweep. Some runs in claims/ shared their GPU with another run, so their seconds say
nothing.
"""

import pathlib
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from cnn_spmd.papers.published import FIGURES, PublishedFigure
from cnn_spmd.report import compare
from cnn_spmd.report.text import mean_and_deviation
from cnn_spmd.training import runfiles

DATA = pathlib.Path(__file__).parents[2] / "results" / "data"
TRAINING_ERROR = 0.25  # figure 1 of AlexNet's paper

# Measure -> decimals, and its value in a run. A run and its control: the ratio of epochs, the
# difference of all other measures.
MEASURES = {
    "error": (2, lambda run: 100 * (1 - run["eval"]["accuracy"])),
    "top-5 error": (2, lambda run: 100 * (1 - run["eval"]["top5"])),
    "seconds": (1, lambda run: run["train_seconds"]),
    "hours": (2, lambda run: run["train_seconds"] / 3600),
    "speedup": (2, lambda run: run["speedup"]),
    "epochs": (1, lambda run: run["epochs_to_error"]),
}


# ---- Runs


def load_results(folder: pathlib.Path = DATA) -> list[dict]:
    """Return all runs in `folder`, its claims/ and, with their speedup, its sweeps/."""
    runs = load_summaries(folder) + load_summaries(folder / "claims")
    for path in sorted((folder / "sweeps").glob("*.json")):
        sweep = runfiles.read_json(path)
        for group in compare.groups_of(sweep["runs"]):
            speedups = compare.group_speedups(group)
            # There is no speedup where the panel has no one-device run.
            for run, speedup in zip(group["runs"], speedups, strict=False):
                runs.append(scaled_run(run, speedup, group["devices"], sweep))
    return runs


def load_summaries(folder: pathlib.Path) -> list[dict]:
    """Return the summaries in a folder.

    Those with metrics beside them get epochs_to_error: the number of epochs to TRAINING_ERROR, or
    None where it was not reached.
    """
    runs = []
    for path in sorted(folder.glob("*.json")):
        run = runfiles.read_json(path)
        metrics = path.with_suffix(".jsonl")
        if metrics.exists():
            per_epoch = round(run["steps"] / run["epochs"])
            steps = steps_to_error(runfiles.read_metrics_rows(metrics), TRAINING_ERROR, per_epoch)
            run["epochs_to_error"] = steps and steps / per_epoch
        runs.append(run)
    return runs


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


def scaled_run(run: dict, speedup: float, devices: int, sweep: dict) -> dict:
    """Return a sweep's run in the form of a summary, with its speedup and command."""
    figures = run["figures"]
    # Older sweeps say it only by the name of their experiment.
    variable = figures.get("dense_microbatch", "variable" in sweep["experiment"])
    return figures | dict(
        devices=devices,
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


# ---- Figures


class MeasuredRow(NamedTuple):
    """A published figure and what was measured, as text.

    measured is "not measured" where there are no runs.
    """

    name: str
    published: str
    measured: str
    n: str
    difference: str
    hardware: str
    command: str
    source: str


def measured_tables(folder: pathlib.Path = DATA) -> dict[str, list[MeasuredRow]]:
    """Return the rows of each table of FIGURES by its title."""
    runs = load_results(folder)
    return {
        title: [row for figure in figures for row in measured_rows(figure, runs)]
        for title, figures in FIGURES.items()
    }


def measured_rows(figure: PublishedFigure, runs: Sequence[dict]) -> list[MeasuredRow]:
    """Return one row per group of runs that differ only in their seed, at least one."""
    groups: dict[tuple, list[tuple[dict, ...]]] = {}
    for run in runs:
        pair = with_control(figure, run, runs) if matches(figure.where, run) else None
        if pair:
            key = (compare.machine(run), str(run["mesh"]), compare.recipe(run))
            groups.setdefault(key, []).append(pair)
    published = figure.published
    if not isinstance(published, str):
        published = f"{published:,.10g}"
    command = "; ".join(
        f"python launch.py --config experiments/{config}" for config in figure.configs
    )
    if not groups:
        row = (figure.name, published, "not measured", "0", "", "", command, figure.source)
        return [MeasuredRow(*row)]
    rows = []
    for (machine, *_), pairs in sorted(groups.items()):
        own_command = pairs[0][0].get("command", command)
        row = (figure.name, published, *measured_cells(figure, pairs), machine, own_command)
        rows.append(MeasuredRow(*row, figure.source))
    return rows


def matches(where: dict, run: dict) -> bool:
    """Return whether the run's fields have these values."""
    return all(run.get(name) == value for name, value in where.items())


def with_control(
    figure: PublishedFigure, run: dict, runs: Sequence[dict]
) -> tuple[dict, ...] | None:
    """Return (run,) or (run, its control); None where a control is missing."""
    if figure.control is None:
        return (run,)
    shared = ("seed", "dataset", "epochs", "devices", "device_kind")
    where = {name: run[name] for name in shared} | dict(experiment=figure.control)
    control = next((other for other in runs if matches(where, other)), None)
    return None if control is None else (run, control)


def measured_cells(figure: PublishedFigure, pairs: Sequence[tuple[dict, ...]]) -> list[str]:
    """Return measured, n, and measured minus published, of with_control's tuples."""
    digits, measure = MEASURES[figure.measure]
    values = [value for value in (tuple(map(measure, pair)) for pair in pairs) if None not in value]
    if not values:
        return ["not reached", "0", ""]
    numbers, means = [first for first, *_ in values], ""
    if figure.control is not None:
        ratio = figure.measure == "epochs"
        numbers = [first / second if ratio else first - second for first, second in values]
        first, second = map(statistics.mean, zip(*values, strict=True))
        means = f" ({first:.{digits}f} {'/' if ratio else '-'} {second:.{digits}f})"
    missed = len(pairs) - len(values)
    measured = mean_and_deviation(numbers, digits) + means
    measured += f"; {missed} not reached" if missed else ""
    difference = ""
    if not isinstance(figure.published, str):
        difference = f"{statistics.mean(numbers) - figure.published:+,.{digits}f}"
    return [measured, str(len(numbers)), difference]


def is_beside_a_paper(run: dict) -> bool:
    """Return whether the papers' tables show a run, possibly as a control."""
    for figure in (figure for figures in FIGURES.values() for figure in figures):
        if matches(figure.where, run) or matches(
            figure.where | dict(experiment=figure.control), run
        ):
            return True
    return False
