"""Say what varied among runs, and which were best: of one sweep, and of all that were given."""

import collections
import re
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from cnn_spmd import plain_table
from cnn_spmd.report import captions, compare, facts, load, run_tables, settings, text
from cnn_spmd.report.compare import SPEED
from cnn_spmd.report.settings import Combination, Overview
from cnn_spmd.report.text import Block, Commands, Heading, Paragraph, Table

BEST = 5  # combinations of a sweep; of all sweeps given, twice as many
SIGNIFICANT = 0.05  # two combinations are distinguishable where p is below this usual level
ON_TEST = (
    "The runs have no validation images (data.validation): the best setting is chosen on the test "
    "split, so its accuracy there is partly luck."
)
DEVIATION = (
    "± is one sample standard deviation over n runs of different seeds; of several with one seed, "
    "the first counts."
)


# ---- One sweep


def asked_blocks(runs: Sequence[dict], overview: Overview) -> list[Block]:
    """Return how the runs ended, what varies, and the best ones."""
    counts = collections.Counter(run["status"] for run in runs)
    ended = ", ".join(f"{count} {status}" for status, count in counts.items())
    said = f"{len(runs)} run{'s' * (len(runs) != 1)}: {ended}."
    if not overview.settings:
        return [Paragraph(said)]
    if overview.is_of_lone_runs:
        blocks = [Paragraph(f"{said} They differ in:"), differences(runs, overview)]
    else:
        rows = []
        for each in overview.settings:
            along = f" (with it: {settings.list_text(each.along)})" if each.along else ""
            rows.append([each.name + along, settings.list_text(each.values)])
        blocks = [Paragraph(f"{said} What varies:"), Table(["setting", "values"], rows)]
    if best := answer(overview):
        blocks.append(Paragraph(f"{best}."))
    return blocks


def differences(runs: Sequence[dict], overview: Overview) -> Table:
    """Return a table with a row per run, and a column per field in which runs differ."""
    names = ["experiment", "model.name", *facts.RECIPE.values(), "param_count"]
    names += [name for each in overview.settings for name in (each.name, *each.along)]
    values = {name: [settings.value_of(run, name) for run in runs] for name in dict.fromkeys(names)}
    differ = {name: own for name, own in values.items() if len({*map(str, own)} - {"None"}) > 1}
    labels = plain_table.short_names(differ) | {"model.name": "network", "data.name": "data"}
    labels |= {"param_count": "parameters"}
    cells = {
        labels[name]: ["" if value is None else compare.value_text(value) for value in own]
        for name, own in differ.items()
    }
    header = ["run", *cells]
    rows = zip([run["name"] for run in runs], *cells.values(), strict=True)
    return Table(header, list(map(list, rows)))


def answer(overview: Overview) -> str:
    """Return "Best test accuracy: learning_rate=0.1, 96.11 ± 0.39 % (n = 2)"; "" for no answer.

    It also says which numbers are at the edge of what a sweep tried, how far the next combination
    is below, and what is not completed.
    """
    ranked = settings.ranked(overview)
    if not ranked:
        return ""
    best, named = overview.metric_name, [(overview.name_of(each), each) for each in ranked]
    shown = result_text(overview.metric, ranked[0])
    if ranked[0].values:
        parts = [f"Best {best}: {overview.name_of(ranked[0])}, {shown}"]
    else:
        parts = [f"{best[0].upper()}{best[1:]}: {shown}"]
    if not overview.is_of_lone_runs:
        parts.append(settings.at_edges(ranked[0], overview))
    others = named
    if overview.metric != SPEED:
        same = settings.training_of(ranked[0], overview)
        others = [
            (name, each)
            for name, each in named
            if each is ranked[0] or settings.training_of(each, overview) != same
        ]
    parts.append(beside_others(others, overview.metric))
    if len(others) < len(named):
        parts.append("rows that differ in nothing but mesh or scheme train alike, up to rounding")
    if overview.metric == SPEED and any(is_simulated(run) for each in ranked for run in each.runs):
        parts.append("the speed of simulated devices is not that of real ones")
    unfinished = []
    for each in overview.combinations:
        missing = sum(run["status"] not in ("completed", "refused") for run in each.runs)
        if missing:
            counted = f"{missing} of {len(each.runs)} runs"
            name = overview.name_of(each)
            several = len(each.runs) > 1
            unfinished.append(f"{name} ({counted})" if name and several else name or counted)
    if unfinished:
        parts.append(f"not completed: {captions.names_text(unfinished, ' and ')}")
    return "; ".join(filter(None, parts))


def is_simulated(run: dict) -> bool:
    """Return whether a run has several devices that are simulated on a CPU."""
    return (run["figures"] or {}).get("device_kind") == "cpu" and run["mesh"] != "1x1"


def result_text(metric: str, combination: Combination) -> str:
    """Return "96.11 ± 0.39 % (n = 2)" for a combination, or images/s without a unit."""
    numbers = combination.numbers(metric)
    unit = "" if metric == SPEED else " %"
    return f"{run_tables.metric_text(metric, numbers)}{unit} (n = {len(numbers)})"


def beside_others(
    ranked: Sequence[tuple[str, Combination]], metric: str, following: str = "the next"
) -> str:
    """Say how far the best is above the next, and whether that is significant.

    Names the others that are not distinguishable from the best, too. ranked: name and combination,
    the best first. following: what to call the second. Returns "" where there is no other.
    """
    if len(ranked) < 2:
        return ""
    best, second, *further = [each.numbers(metric) for _, each in ranked]
    gap = statistics.mean(best) - statistics.mean(second)
    unit = "images/s" if metric == SPEED else "points"
    above = f"{run_tables.metric_text(metric, [gap])} {unit}"
    name, combination = ranked[1]
    said = (
        f"{above} above {following}, {name}, {result_text(metric, combination)}: "
        f"{verdict(best, second)}"
    )
    chances = [p_value(best, numbers) for numbers in further]
    near = [
        name for (name, _), p in zip(ranked[2:], chances, strict=True) if (p or 0) >= SIGNIFICANT
    ]
    if near:
        said += f"; also not distinguishable from the best: {captions.names_text(near, ' or ')}"
    return said


def verdict(best: Sequence[float], other: Sequence[float]) -> str:
    """Say whether the numbers of two combinations are distinguishable."""
    if min(len(best), len(other)) == 1:
        return "a single run tells nothing about significance"
    p = p_value(best, other)
    if p is None:
        return "the runs of each are alike, so no test of significance applies"
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
    said = "distinguishable" if p < SIGNIFICANT else "not distinguishable"
    return f"{said} ({shown} by Welch's t-test)"


def p_value(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return p of Welch's two-sided t-test; None for a single run or no spread."""
    if min(len(one), len(other)) < 2 or len({*one}) == len({*other}) == 1:
        return None
    from scipy import stats  # takes half a second, and launch.py imports this module

    first, second = ((statistics.mean(n), statistics.stdev(n), len(n)) for n in (one, other))
    return float(stats.ttest_ind_from_stats(*first, *second, equal_var=False).pvalue)


def best_blocks(overview: Overview) -> list[Block]:
    """Return the best combinations with their commands; [] where none has a metric."""
    ranked = settings.ranked(overview)
    best = ranked[:BEST]
    if not best:
        return []
    title = f"Best runs, by {overview.metric_name}" if overview.settings else "The run"
    if len(ranked) > BEST:
        title += f" ({BEST} of {len(ranked)} shown)"
    blocks = [Heading(3, title), text.table_of([best_row(each, overview) for each in best])]
    if len(ranked) > 1 and overview.metric_name == "test accuracy":
        blocks.append(Paragraph(ON_TEST))
    runs = [
        max(each.having(overview.metric), key=lambda run: compare.numbers([run], overview.metric))
        for each in best
    ]
    if any(run["command"] for run in runs):
        said = "The commands of these rows, in the same order"
        if any(len(combination.having(overview.metric)) > 1 for combination in best):
            said += ", each that of the best of the seeds"
        # A sweep adds this flag to each run; a single run does not need it.
        short = [re.sub(r" --config\.data\.fallback=(?=\s|$)", "", run["command"]) for run in runs]
        blocks += [Paragraph(f"{said}:"), Commands(list(filter(None, short)))]
    return blocks


def best_row(combination: Combination, overview: Overview) -> dict[str, str]:
    """Return a combination's cells by column; lone runs have a table of their settings."""
    runs = combination.having(overview.metric)
    metrics = [] if overview.metric == SPEED else ["accuracy", "loss"]
    alone, values = overview.is_of_lone_runs, combination.values.items()
    return {
        **({} if alone else {label: compare.value_text(value) for label, value in values}),
        "n": str(len(runs)),
        **run_tables.result_cells(runs, metrics, overview.split, overview.target),
        "run": overview.name_of(combination) if alone else "",
    }


# ---- All sweeps


class Given(NamedTuple):
    """A combination of a sweep with this title."""

    title: str
    overview: Overview
    combination: Combination

    @property
    def run(self) -> dict:
        """Return the completed run that stands for the combination."""
        return self.combination.completed[0]

    @property
    def origin(self) -> str:
        """Return the name of the sweep, or those of lone runs."""
        if self.overview.is_of_lone_runs:
            return ", ".join(run["name"] for run in self.combination.runs)
        return self.title

    @property
    def name(self) -> str:
        """Return the origin; of a sweep, the settings follow."""
        if self.overview.is_of_lone_runs or not self.combination.values:
            return self.origin
        return f"{self.origin}, {self.overview.name_of(self.combination)}"


def given_by_data(sweeps: Sequence[dict]) -> dict[str, list[Given]]:
    """Return the combinations by data set (compare.by_data) that several sweeps share, best first.

    They are ranked by main_metric_of. Those without it are left out.
    """
    given: dict[int, Given] = {}
    completed = []
    for sweep in sweeps:
        overview = settings.overview(sweep, None)
        for combination in overview.combinations:
            for run in combination.completed[:1]:
                given[id(run)] = Given(sweep["title"], overview, combination)
                completed.append(run)
    shared = {}
    for data, runs in compare.by_data(completed).items():
        found = [given[id(run)] for run in runs]
        if len({id(each.overview) for each in found}) > 1:
            metric = main_metric_of(found)
            ranked = [each for each in found if each.combination.numbers(metric)]
            ranked.sort(key=lambda each: -statistics.mean(each.combination.numbers(metric)))
            shared[data] = ranked
    return shared


def main_metric_of(found: Sequence[Given]) -> str:
    """Return accuracy, or images/s where the images are random or no run has an accuracy."""
    return settings.main_metric([run for each in found for run in each.combination.runs], [])


def best_given(data: str, ranked: Sequence[Given]) -> str:
    """Return "Best of all on digits: a, 99.17 % (n = 1)", and what beside_others says of it.

    Further settings of the best one's own sweep are left out: the sweep's own answer names them.
    """
    metric, best = main_metric_of(ranked), ranked[0]
    others = [
        each
        for each in ranked[1:]
        if each.overview is not best.overview or best.overview.is_of_lone_runs
    ]
    named = [(each.name, each.combination) for each in (best, *others)]
    parts = [
        f"Best of all on {data}: {best.name}, {result_text(metric, best.combination)}",
        beside_others(named, metric, "the best of the others"),
    ]
    return "; ".join(filter(None, parts))


def all_given_blocks(sweeps: Sequence[dict]) -> list[Block]:
    """Return a table of the best combinations for each data set that several sweeps share."""
    blocks: list[Block] = []
    for data, ranked in given_by_data(sweeps).items():
        shown, left_out = ranked[: 2 * BEST], ranked[2 * BEST :]
        title = f"All given, on {data}"
        if left_out:
            title += f" ({len(shown)} of {len(ranked)} shown)"
        blocks += [Heading(2, title), Paragraph(f"{best_given(data, ranked)}.")]
        blocks.append(all_given_table(shown))
        absent = dict.fromkeys(each.origin for each in left_out)
        absent = [name for name in absent if name not in {each.origin for each in shown}]
        if absent:
            blocks.append(Paragraph(f"Given, but not shown: {', '.join(absent)}."))
    return blocks


def all_given_table(shown: Sequence[Given]) -> Table:
    """Return the table of combinations of several sweeps.

    Settings are the fields that were swept or set by flags, where they differ.
    """
    metric = main_metric_of(shown)
    metrics = [] if metric == SPEED else ["accuracy"]
    split = " or ".join(sorted({each.overview.split for each in shown}))
    names = names_that_differ(shown)
    rows = []
    for given in shown:
        runs = given.combination.having(metric)
        values = {name: settings.value_of(given.run, name) for name in names}
        known = [
            f"{name}={compare.value_text(value)}"
            for name, value in values.items()
            if value not in (None, "")
        ]
        rows.append(
            {
                "from": given.origin,
                "experiment": given.run["config"].get("experiment", ""),
                "settings": ", ".join(known),
                "n": str(len(runs)),
                **run_tables.result_cells(runs, metrics, split),
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
