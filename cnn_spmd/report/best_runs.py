"""Say what varied among runs, and which were best: of one sweep, and of all that were given."""

import collections
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from cnn_spmd.report import compare, load, run_tables, settings, text
from cnn_spmd.report.settings import Combination, Overview
from cnn_spmd.report.text import Block, Commands, Heading, Paragraph, Table

BEST = 5  # combinations of a sweep; of all sweeps given, twice as many


# ---- One sweep


def asked_blocks(runs: Sequence[dict], overview: Overview) -> list[Block]:
    """Return how the runs ended, the values of each setting that varies, and the best ones."""
    counts = collections.Counter(run["status"] for run in runs)
    ended = ", ".join(f"{count} {status}" for status, count in counts.items())
    said = f"{len(runs)} run{'s' * (len(runs) != 1)}: {ended}."
    if not overview.settings:
        return [Paragraph(said)]
    rows = [[setting_text(each), settings.values_text(each.values)] for each in overview.settings]
    blocks = [Paragraph(f"{said} What varies:"), Table(["setting", "values"], rows)]
    if best := answer(overview):
        blocks.append(Paragraph(f"{best}."))
    return blocks


def setting_text(setting: settings.Setting) -> str:
    """Return a setting's name, and the settings that change with it."""
    along = f" (with it: {settings.values_text(setting.along)})" if setting.along else ""
    return setting.name + along


def answer(overview: Overview) -> str:
    """Return "Best test accuracy: learning_rate=0.1, 96.11 ± 0.39 % (n = 2)"; "" for no answer.

    It also says which numbers are at the edge of what was tried.
    """
    best = settings.ranked(overview)[:1]
    if not best or not best[0].values:
        return ""
    where = ", ".join(f"{name}={value}" for name, value in overview.labelled(best[0]).items())
    numbers = best[0].numbers(overview.metric)
    if overview.metric == settings.SPEED:
        shown = text.throughput(numbers)
    else:
        shown = f"{run_tables.metric_text('accuracy', numbers)} %"
    edges = settings.at_edges(best[0], overview)
    said = f"Best {overview.metric_name}: {where}, {shown} (n = {len(numbers)})"
    return said + (f"; {edges}" if edges else "")


def best_blocks(overview: Overview) -> list[Block]:
    """Return the best combinations with their commands; [] where none has a metric."""
    best = settings.ranked(overview)[:BEST]
    if not best:
        return []
    title = f"Best runs, by {overview.metric_name}" if overview.settings else "The run"
    rows = [best_row(combination, overview) for combination in best]
    blocks = [Heading(3, title), text.table_of(rows)]
    commands = [best_run(combination, overview.metric)["command"] for combination in best]
    if any(commands):
        said = "The commands of these rows, in the same order"
        if any(len(combination.runs) > 1 for combination in best):
            said += ", each that of the best of the seeds"
        blocks += [Paragraph(f"{said}:"), Commands(list(filter(None, commands)))]
    return blocks


def best_run(combination: Combination, metric: str) -> dict:
    """Return the run of a combination that is best by a metric."""
    return max(combination.having(metric), key=lambda run: settings.metric_of(run, metric))


def best_row(combination: Combination, overview: Overview) -> dict[str, str]:
    """Return a combination's cells by column."""
    best = best_run(combination, overview.metric)
    row = overview.labelled(combination)
    row["n"] = str(len(combination.having(overview.metric)))
    if overview.metric != settings.SPEED:
        for name in ("accuracy", "loss"):
            label = compare.metric_label(name, overview.split)
            row[label] = run_tables.metric_text(name, combination.numbers(name))
    row |= run_tables.target_cell(combination.runs, overview.target)
    row["images/s"] = text.throughput(combination.numbers(settings.SPEED))
    # Older runs outside a sweep have no command.
    return row | dict(run="" if best["command"] else best["name"])


# ---- All sweeps


class Given(NamedTuple):
    """A combination and its sweep."""

    sweep: dict
    overview: Overview
    combination: Combination

    @property
    def run(self) -> dict:
        """Return a run that stands for the combination."""
        return self.combination.runs[0]

    @property
    def origin(self) -> str:
        """Return the name of the sweep, or those of lone runs."""
        if self.sweep.get("is_of_lone_runs"):
            return ", ".join(run["name"] for run in self.combination.runs)
        return self.sweep["title"]


def all_given_blocks(sweeps: Sequence[dict]) -> list[Block]:
    """Return a table of the best combinations for each data set that several sweeps share."""
    by_data: dict[str, list[Given]] = {}
    for sweep in sweeps:
        overview = settings.overview(sweep["runs"], None)
        for combination in overview.combinations:
            done = [run for run in combination.runs if run["status"] == "completed"]
            if done:
                given = Given(sweep, overview, combination)
                by_data.setdefault(done[0]["figures"]["dataset"], []).append(given)
    blocks: list[Block] = []
    for data, found in by_data.items():
        if len({id(given.sweep) for given in found}) > 1:
            blocks += [Heading(2, f"All given, on {data}"), all_given_table(found)]
    return blocks


def all_given_table(found: Sequence[Given]) -> Table:
    """Return the table of the best combinations of several sweeps, best first.

    They are ranked by accuracy, or by images/s where the images are random or no run has an
    accuracy. Settings are the fields that were swept or set by flags, where they differ.
    """
    runs = [run for given in found for run in given.combination.runs]
    metric = settings.main_metric(runs, [])
    accuracy = compare.metric_label("accuracy", compare.split_of(run["config"] for run in runs))
    ranked = [given for given in found if given.combination.numbers(metric)]
    ranked.sort(key=lambda given: -statistics.mean(given.combination.numbers(metric)))
    shown = ranked[: 2 * BEST]
    names = names_that_differ(shown)
    rows = []
    for given in shown:
        values = {name: settings.value_of(given.run, name) for name in names}
        known = [
            f"{name}={compare.value_text(value)}"
            for name, value in values.items()
            if value is not None
        ]
        accuracies = [] if metric == settings.SPEED else given.combination.numbers("accuracy")
        rows.append(
            {
                "from": given.origin,
                "experiment": given.run["config"].get("experiment", ""),
                "settings": ", ".join(known),
                "n": str(len(given.combination.having(metric))),
                accuracy: run_tables.metric_text("accuracy", accuracies),
                "images/s": text.throughput(given.combination.numbers(settings.SPEED)),
            }
        )
    return text.table_of(rows)


def names_that_differ(found: Sequence[Given]) -> list[str]:
    """Return the fields that were swept or set by flags, where they differ."""
    names: dict[str, None] = {}
    for given in found:
        names |= dict.fromkeys(setting.name for setting in given.overview.settings)
        names |= dict.fromkeys(load.set_by_hand(given.run["command"]))
    hidden = ("seed", "experiment", *compare.NOT_COMPARED)
    return [
        name
        for name in names
        if not name.startswith(hidden)
        and len({str(settings.value_of(given.run, name)) for given in found}) > 1
    ]
