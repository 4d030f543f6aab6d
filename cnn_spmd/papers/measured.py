"""Set what was measured here beside what papers published.

results/data/*.json and results/data/claims/*.json are each the summary.json of a run, copied there;
a .jsonl of the same name is that run's metrics.jsonl. results/data/sweeps/*.json are each the
sweep.json of a sweep. Some runs in claims/ shared their GPU with another run, so their seconds say
nothing.
"""

import itertools
import pathlib
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cnn_spmd.config import complete, flat
from cnn_spmd.errors import UserError, did_you_mean
from cnn_spmd.papers.published import FIGURES, PublishedFigure
from cnn_spmd.report import compare, load, settings
from cnn_spmd.report.text import mean_and_deviation
from cnn_spmd.training import runfiles

DATA = pathlib.Path(__file__).parents[2] / "results" / "data"
TRAINING_ERROR = 0.25  # figure 1 of AlexNet's paper
# Ends the experiment's name of a short run that was alone on its GPU and measures only the speed.
ALONE = "_alone"

# What the tables read of each run, besides what a figure measures.
NEEDED = ("experiment", "seed", "dataset", "device_kind", "devices", "mesh", "epochs", "host_cores")
# Measure -> decimals, the field of a run that it is made from, and its value in a run. A run and
# its control: the ratio of epochs, the difference of all other measures.
MEASURES = {
    "error": (2, "eval", lambda run: 100 * (1 - run["eval"]["accuracy"])),
    "top-5 error": (2, "eval", lambda run: 100 * (1 - run["eval"]["top5"])),
    "seconds": (1, "train_seconds", lambda run: run["train_seconds"]),
    "hours": (2, "train_seconds", lambda run: run["train_seconds"] / 3600),
    "speedup": (2, "speedup", lambda run: run["speedup"]),
    "epochs": (1, "epochs_to_error", lambda run: run["epochs_to_error"]),
}


# ---- Runs


def load_results(folder: pathlib.Path = DATA) -> list[dict]:
    """Return all runs in `folder`, its claims/ and, with their speedup, its sweeps/."""
    runs = load_single_runs(folder)
    for path in sorted((folder / "sweeps").glob("*.json")):
        runs += scaled_runs(runfiles.read_json(path))
    return runs


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
    the number of epochs to TRAINING_ERROR, or None where it was not reached.
    """
    run = {name: value for name, value in runfiles.read_json(path).items() if value is not None}
    if metrics.exists():
        run["metrics"] = runfiles.read_metrics_rows(metrics)
        run["epochs_to_error"] = None
        if run["epochs"] >= 1:  # within less, steps_to_error finds nothing
            per_epoch = round(run["steps"] / run["epochs"])
            steps = steps_to_error(run["metrics"], TRAINING_ERROR, per_epoch)
            run["epochs_to_error"] = steps and steps / per_epoch
    return run


def load_given(paths: Sequence[pathlib.Path]) -> tuple[list[dict], list[str]]:
    """Return the completed runs in `paths`, and a line on each run that is not completed.

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
        for run, speedup in zip(group["runs"], compare.group_speedups(group), strict=False)
    ]


def scaled_run(run: dict, speedup: float, group: dict, sweep: dict) -> dict:
    """Return a sweep's run in the form of a summary, with its speedup and command.

    names: its own name, and those of the one-device runs that its speedup is relative to.
    """
    figures, devices = run["figures"], group["devices"]
    # Older sweeps say it only by the name of their experiment.
    variable = figures.get("dense_microbatch", "variable" in sweep["experiment"])
    return figures | dict(
        devices=devices,
        names=[member["name"] for member in (run, *group["base"]["runs"])],
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


def tables_about(runs: Sequence[dict]) -> dict[str, list[MeasuredRow]]:
    """Return the rows of the figures that runs are about by table; no table without rows."""
    found = {
        title: [row for figure in about(figures, runs) for row in measured_rows(figure, runs)]
        for title, figures in FIGURES.items()
    }
    return {title: rows for title, rows in found.items() if rows}


def about(figures: Sequence[PublishedFigure], runs: Sequence[dict]) -> list[PublishedFigure]:
    """Return the figures that at least one of the runs is about, not only as a control."""
    return [figure for figure in figures if any(matches(figure.where, run) for run in runs)]


def measured_rows(figure: PublishedFigure, runs: Sequence[dict]) -> list[MeasuredRow]:
    """Return one row per group of runs that differ only in their seed, at least one."""
    groups: dict[tuple, list[tuple[dict, ...]]] = {}
    for run in runs:
        pair = with_control(figure, run, runs) if matches(figure.where, run) else ()
        field = MEASURES[figure.measure][1]
        if pair and all(field in member or diverged(member) for member in pair):
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


def diverged(run: dict) -> bool:
    """Return whether a run ended because its loss or its weights became infinite or NaN."""
    return run.get("status") == "non-finite"


def matches(where: dict, run: dict) -> bool:
    """Return whether the run's fields have these values."""
    return all(run.get(name) == value for name, value in where.items())


def with_control(figure: PublishedFigure, run: dict, runs: Sequence[dict]) -> tuple[dict, ...]:
    """Return (run,) or (run, its control); () where a control is missing."""
    if not figure.control:
        return (run,)
    shared = ("seed", "dataset", "epochs", "devices", "device_kind")
    where = figure.where | {name: run[name] for name in shared} | figure.control
    controls = [other for other in runs if matches(where, other)]
    if not controls:
        return ()

    def fields(run: dict) -> set[str]:
        return set(map(str, flat(run["config"]).items()))

    # A sweep over other fields has several; the control is the one with the most equal fields.
    return (run, max(controls, key=lambda other: len(fields(other) & fields(run))))


def measured_cells(figure: PublishedFigure, pairs: Sequence[tuple[dict, ...]]) -> list[str]:
    """Return measured, n, and measured minus published, of with_control's tuples."""
    digits, _, measure = MEASURES[figure.measure]
    found = [tuple(None if diverged(run) else measure(run) for run in pair) for pair in pairs]
    values = [value for value in found if None not in value]
    missing = "not reached" if figure.measure == "epochs" else "diverged"
    if not values:
        return [missing, "0", ""]
    numbers, means = [first for first, *_ in values], ""
    if figure.control:
        ratio = figure.measure == "epochs"
        numbers = [first / second if ratio else first - second for first, second in values]
        first, second = map(statistics.mean, zip(*values, strict=True))
        means = f" ({first:.{digits}f} {'/' if ratio else '-'} {second:.{digits}f})"
    missed = len(pairs) - len(values)
    measured = mean_and_deviation(numbers, digits) + means
    measured += f"; {missed} {missing}" if missed else ""
    difference = ""
    if not isinstance(figure.published, str):
        difference = f"{statistics.mean(numbers) - figure.published:+,.{digits}f}"
    return [measured, str(len(numbers)), difference]


def is_beside_a_paper(run: dict) -> bool:
    """Return whether the papers' tables show a run, possibly as a control."""
    return any(is_about(figure, run) for figures in FIGURES.values() for figure in figures)


def folders_beside_nothing(runs: Sequence[dict]) -> dict[str, list[pathlib.Path]]:
    """Return the folders of runs that measure no figure of tables_about, by reason."""
    shown = [figure for figures in FIGURES.values() for figure in about(figures, runs)]
    used = {
        folder
        for run in runs
        if any(is_about(figure, run) for figure in shown)
        for folder in run["folders"]
    }
    found: dict[str, list[pathlib.Path]] = {}
    for run in runs:
        if run["folders"][0] not in used and "speedup" not in run:
            found.setdefault(why_beside_nothing(run), []).extend(run["folders"])
    return found


def why_beside_nothing(run: dict) -> str:
    """Say why a run measures no published figure."""
    figures = [figure for figures in FIGURES.values() for figure in figures]
    named = [figure.where for figure in figures if "experiment" in figure.where]
    data_sets = dict.fromkeys(where["dataset"] for where in named)
    if run["dataset"] not in data_sets:
        return (
            f"the data set is {run['dataset']}, the published errors are of "
            f"{' and '.join(data_sets)}"
        )
    recipes = [where for where in named if where["experiment"] == run["experiment"]]
    if not recipes:
        controls = [figure.where | figure.control for figure in figures if figure.control]
        if any(matches(where, run) for where in controls):
            return "a figure compares another run with it, which is not given"
        return f"no figure is of the experiment {run['experiment']}; --beside NAME chooses one"
    differences = [
        [
            f"{name}={run.get(name)}, published {value}"
            for name, value in where.items()
            if run.get(name) != value
        ]
        for where in recipes
    ]
    return "; ".join(min(differences, key=len))


def published_errors(name: str) -> list[PublishedFigure]:
    """Return the published errors of this name, which may also be their experiment's variant.

    Raises UserError for an unknown name.
    """
    named: dict[str, list[PublishedFigure]] = {}
    for figure in itertools.chain(*FIGURES.values()):
        if "error" in figure.measure and not figure.control:
            named.setdefault(figure.name.partition(":")[0], []).append(figure)
    everything = itertools.chain(*named.values())
    found = named.get(name) or [f for f in everything if f.configs[0].endswith(f":{name}")]
    if not found:
        raise UserError(
            f"--beside={name}: no such figure, expected one of {'; '.join(named)}"
            f"{did_you_mean(name, named)}"
        )
    return found


def rows_beside(name: str, runs: Sequence[dict]) -> list[MeasuredRow]:
    """Return the test errors of load_given's runs beside a published one.

    name: as for published_errors. The runs may be of any network and recipe.
    Raises UserError as published_errors, and for a run on another data set.
    """
    figures = published_errors(name)
    data_set = figures[0].where["dataset"]
    own = [run for run in runs if "speedup" not in run]  # those also stand without their speedup
    for run in own:
        if run["dataset"] != data_set:
            raise UserError(
                f"--beside={name}: is an error on {data_set}, but {run['folders'][0]} is on "
                f"{run['dataset']}, expected runs on {data_set}"
            )
    groups: dict[str, list[dict]] = {}
    for run, label in zip(own, labels_of(own), strict=True):
        groups.setdefault(label, []).append(run)
    return [
        row
        for figure in figures
        for label, members in groups.items()
        for row in measured_rows(
            figure._replace(name=f"{figure.name}; measured of {label}", where={}), members
        )
    ]


def labels_of(runs: Sequence[dict]) -> list[str]:
    """Return each run's network, epochs, and the settings of the recipe and mesh that vary."""
    entries = []
    for run in runs:
        fields = flat(complete(run["config"])).items()
        recipe = {name: own for name, own in fields if not name.startswith(compare.NOT_THE_RECIPE)}
        entries.append(dict(settings=recipe, figures=run, config={}))
    in_every_label = ("model.name", "epochs", "steps")
    varied = [each for each in settings.varied(entries) if each.name not in in_every_label]
    labels = []
    for run, entry in zip(runs, entries, strict=True):
        label = f"{run['model']}, {run['epochs']:.4g} epochs"
        for each in varied:
            label += f", {each.label} {compare.value_text(settings.value_of(entry, each.name))}"
        labels.append(label)
    return labels


def is_about(figure: PublishedFigure, run: dict) -> bool:
    """Return whether a run measures a figure, possibly as a control."""
    return matches(figure.where, run) or matches(figure.where | (figure.control or {}), run)
