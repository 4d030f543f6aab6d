"""Set what runs measured beside what papers published."""

import pathlib
import shlex
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from cnn_spmd.config import complete, flat
from cnn_spmd.errors import UserError, did_you_mean
from cnn_spmd.papers import summaries
from cnn_spmd.papers.published import FIGURES, PublishedFigure
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare, settings
from cnn_spmd.report.text import mean_and_deviation

ALL = [figure for figures in FIGURES.values() for figure in figures]
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
    runs = summaries.load_results(folder)
    return {
        title: [row for figure in figures for row in measured_rows(figure, runs)]
        for title, figures in FIGURES.items()
    }


def tables_about(runs: Sequence[dict]) -> dict[str, list[MeasuredRow]]:
    """Return the rows of the figures that runs are about, by table."""
    found = {
        title: [
            row for figure in figures_about(figures, runs) for row in measured_rows(figure, runs)
        ]
        for title, figures in FIGURES.items()
    }
    return {title: rows for title, rows in found.items() if rows}


def figures_about(
    figures: Sequence[PublishedFigure], runs: Sequence[dict]
) -> list[PublishedFigure]:
    """Return the figures that a run is about, not only as a control."""
    return [figure for figure in figures if any(matches(figure.where, run) for run in runs)]


def measured_rows(figure: PublishedFigure, runs: Sequence[dict]) -> list[MeasuredRow]:
    """Return one row per group of runs that differ only in their seed, at least one."""
    groups: dict[tuple, list[tuple[dict, ...]]] = {}
    for run in runs:
        pair = with_control(figure, run, runs) if matches(figure.where, run) else ()
        field = MEASURES[figure.measure][1]
        if pair and all(field in member or summaries.diverged(member) for member in pair):
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
    experiments = {pairs[0][0]["config"].get("experiment") for pairs in groups.values()}
    for (machine, *_), pairs in sorted(groups.items()):
        name = figure.name
        if len(experiments) > 1:
            name += f" ({pairs[0][0]['config']['experiment']})"
        own_command = "; ".join(command_of(run) for run in pairs[0] if "command" in run) or command
        row = (name, published, *measured_cells(figure, pairs), machine, own_command)
        rows.append(MeasuredRow(*row, figure.source))
    return rows


def command_of(run: dict) -> str:
    """Return the command of a run, without where its machine had the data."""
    where = ("--config.data.dir=", "--config.data.fallback=")
    words = shlex.split(run["command"])
    return " ".join(word for word in words if not word.startswith(where))


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
    found = [
        tuple(None if summaries.diverged(run) else measure(run) for run in pair) for pair in pairs
    ]
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


def is_run_or_control(figure: PublishedFigure, run: dict) -> bool:
    """Return whether a run measures a figure, possibly as a control."""
    return matches(figure.where, run) or matches(figure.where | (figure.control or {}), run)


def is_beside_a_paper(run: dict) -> bool:
    """Return whether the papers' tables show a run, possibly as a control."""
    return any(is_run_or_control(figure, run) for figure in ALL)


def folders_beside_nothing(runs: Sequence[dict]) -> dict[str, list[pathlib.Path]]:
    """Return the folders of runs that measure no figure of tables_about, by reason."""
    shown = figures_about(ALL, runs)
    used = {
        folder
        for run in runs
        if any(is_run_or_control(figure, run) for figure in shown)
        for folder in run["folders"]
    }
    found: dict[str, list[pathlib.Path]] = {}
    for run in runs:
        if run["folders"][0] not in used and "speedup" not in run:
            found.setdefault(why_beside_nothing(run), []).extend(run["folders"])
    return found


def why_beside_nothing(run: dict) -> str:
    """Say why a run measures no published figure."""
    named = [figure.where for figure in ALL if "experiment" in figure.where]
    data_sets = dict.fromkeys(where["dataset"] for where in named)
    if run["dataset"] not in data_sets:
        return (
            f"the data set is {run['dataset']}, the published errors are of "
            f"{' and '.join(data_sets)}"
        )
    recipes = [where for where in named if where["experiment"] == run["experiment"]]
    if not recipes:
        controls = [figure.where | figure.control for figure in ALL if figure.control]
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
    return "; ".join([*min(differences, key=len), "--beside NAME shows it anyway"])


def published_errors(name: str) -> list[PublishedFigure]:
    """Return the published errors of this name.

    It may also be the variant of their experiment. Raises UserError for an unknown name.
    """
    named: dict[str, list[PublishedFigure]] = {}
    for figure in ALL:
        if "error" in figure.measure and not figure.control:
            named.setdefault(figure.name.partition(":")[0], []).append(figure)
    found = named.get(name) or [
        figure
        for figures in named.values()
        for figure in figures
        if figure.configs[0].endswith(f":{name}")
    ]
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
    """Return each run's network and epochs, and the settings that vary."""
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
