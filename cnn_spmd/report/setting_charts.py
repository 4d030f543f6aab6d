"""Make the charts of what runs learned: by setting, by step and by time.

A chart is left out where it would say nothing: no two runs differ in the setting alone, or no run
was evaluated twice.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Sequence

from cnn_spmd.report import charts, compare, setting_plots, settings
from cnn_spmd.report.setting_plots import Curve, Line, Points
from cnn_spmd.report.settings import SPEED, Combination, Overview, Setting
from cnn_spmd.report.text import Chart
from cnn_spmd.training import runfiles

MAX_LINES = 8  # one of setting_plots.LOOKS each
MOST_POINTS = 200  # of a curve; more cannot be seen
# The images of a curve -> "split" of the lines in metrics.jsonl.
SPLITS = {"training": ("train",), "test": ("eval", "final")}


def metric_label(metric: str, split: str) -> str:
    """Return a metric's name at an axis, with its unit; split: as of compare.split_of."""
    return "images/s" if metric == SPEED else compare.metric_label(metric, split)


def factor_of(metric: str) -> float:
    """Return 100 for a metric that is shown in percent."""
    return 100 if metric in compare.SHARES else 1


# ---- Metrics against settings


def metric_charts(runs: Sequence[dict], overview: Overview) -> list[Chart]:
    """Return a chart of each metric: against each setting, and by each two of them.

    top5 has no chart, as it follows the accuracy.
    """
    names = [each.name for each in overview.settings]
    metrics, hidden = [overview.metric], {"seed"}
    if overview.metric != SPEED:
        registered = runfiles.registered_metrics(run["figures"] for run in runs)
        metrics += [name for name in registered if name not in compare.SHARES]
        hidden |= {name for name in names if name.startswith(settings.OF_SPEED)}
    elif {"mesh", "parallelism"} & set(names):
        return []  # meshes and schemes have charts of their own
    shown = [each for each in overview.settings if each.name not in hidden]
    made = [metric_chart(metric, shown, overview) for metric in metrics]
    return [chart for chart in made if chart.pictures]


def metric_chart(metric: str, shown: Sequence[Setting], overview: Overview) -> Chart:
    """Return the chart of one metric; without pictures where it would say nothing."""
    found, combos = overview.settings, overview.combinations
    label = metric_label(metric, overview.split)
    pictures = []
    summary = "the best mean" if higher_is_better(metric) else "the mean"
    many = False
    for setting in shown:
        lines = lines_against(setting, found, combos, metric)
        if len(lines) > MAX_LINES:
            many = True
            means = summaries([setting.name], combos, metric)
            lines = [line._replace(label="other settings") for line in lines]
            lines.append(Line(summary, {value: [mean] for (value,), mean in means.items()}))
        if lines:
            pictures.append(setting_plots.against(setting, lines, label, len(lines) > MAX_LINES))
    for across, down in itertools.combinations(shown, 2):
        means = summaries([across.name, down.name], combos, metric)
        # A map with more holes than cells compares nothing.
        if 2 * len(means) > len(across.values) * len(down.values):
            pictures.append(setting_plots.heat_map(across, down, means, label))
    caption = metric_caption(metric, combos)
    if many:
        caption += " Grey: each combination of the other settings."
    if len(shown) > 2:
        caption += f" A cell of two settings has {summary} over the others."
    title = f"{label[0].upper()}{label[1:]} by setting"
    return Chart(title, pictures, caption)


def metric_caption(metric: str, combos: Sequence[Combination]) -> str:
    """Return when a metric was measured, on how many runs, and what is left out."""
    caption = "Over the steady chunks." if metric == SPEED else "After the last step."
    counts = {len(numbers) for each in combos if (numbers := each.numbers(metric))}
    if counts and max(counts) > 1:
        caption += (
            f" n = {charts.range_text(counts)} runs (seeds) per point: the mean, and bars that "
            "reach from the lowest to the highest run."
        )
    if missing := sum(len(each.runs) - len(each.numbers(metric)) for each in combos):
        caption += f" Left out, not completed or not measured: {missing} of the runs."
    return caption


def lines_against(
    setting: Setting, found: Sequence[Setting], combos: Sequence[Combination], metric: str
) -> list[Line]:
    """Return a line per combination of the other settings, if it has two points."""
    lines: dict[tuple, Line] = {}
    for combination in combos:
        numbers = [factor_of(metric) * number for number in combination.numbers(metric)]
        if numbers and combination.values[setting.name] is not None:
            others = {
                name: value for name, value in combination.values.items() if name != setting.name
            }
            label = settings.label_of(others, found)
            line = lines.setdefault(tuple(map(str, others.values())), Line(label, {}))
            line.values[str(combination.values[setting.name])] = numbers
    return [line for line in lines.values() if len(line.values) > 1]


def summaries(
    names: Sequence[str], combos: Sequence[Combination], metric: str
) -> dict[tuple[str, ...], float]:
    """Return one number for all combinations with the same values of these settings.

    Keys are the values' texts. The number is the best mean over the seeds. It is the mean of these
    means where a lower metric may be the better one.
    """
    found: dict[tuple[str, ...], list[float]] = {}
    for combination in combos:
        if numbers := combination.numbers(metric):
            key = tuple(str(combination.values[name]) for name in names)
            found.setdefault(key, []).append(factor_of(metric) * statistics.mean(numbers))
    choose = max if higher_is_better(metric) else statistics.mean
    return {key: choose(means) for key, means in found.items()}


def higher_is_better(metric: str) -> bool:
    """Return whether a metric is known to be better where it is higher."""
    return metric == SPEED or metric in compare.SHARES


# ---- Curves


class Looks:
    """Choose the look of each run's curve, and name the looks in a legend.

    Of more than MAX_LINES combinations, the best have colours, and the others are grey.
    """

    def __init__(self, overview: Overview):
        found, best = overview.settings, settings.ranked(overview)
        self.order = [*best, *(each for each in overview.combinations if each not in best)]
        several = len(self.order) > MAX_LINES
        self.coloured = self.order[: MAX_LINES - 1] if several else self.order
        seeds = [str(seed) for each in found if each.name == "seed" for seed in each.values]
        # Of one combination, seeds have colours. More seeds than looks are drawn alike.
        looks = [dict(linestyle=style) for style in setting_plots.SEED_LINES]
        if len(self.order) == 1:
            looks = [dict(color=colour, marker=mark) for colour, mark in setting_plots.LOOKS]
        self.seeds = dict(zip(seeds, looks, strict=False)) if len(seeds) <= len(looks) else {}
        self.legend = self.legend_of(found)

    def legend_of(self, found: Sequence[Setting]) -> dict[str, dict]:
        """Return label -> look, for the coloured combinations, the others, and the seeds."""
        legend: dict[str, dict] = {}
        if len(self.order) > 1:
            if names := settings.names_of_label(self.order[0].values, found):
                legend[f"{names}:"] = dict(linestyle="none")
            for combination in self.coloured:
                legend[settings.label_of(combination.values, found)] = self.look(combination)
        if others := len(self.order) - len(self.coloured):
            legend[f"{others} others"] = dict(color=setting_plots.GREY)
        for seed, look in self.seeds.items():
            legend[f"seed {seed}"] = dict(color="#777777") | look
        return legend

    def look(self, combination: Combination, run: dict | None = None) -> dict:
        """Return the look of a combination, or of one of its runs."""
        seed = str(settings.value_of(run, "seed")) if run else None
        for known, (colour, marker) in zip(self.coloured, setting_plots.LOOKS, strict=False):
            if known is combination:
                return dict(color=colour, marker=marker) | self.seeds.get(seed, {})
        return dict(color=setting_plots.GREY) | self.seeds.get(seed, {})

    def curves(self, parts: Sequence[Callable[[dict], Points]]) -> list[Curve]:
        """Return the curves of all runs, those of the best last, which is on top.

        parts: for each part of the picture, the points of a run.
        """
        return [
            Curve([points_of(run) for points_of in parts], self.look(combination, run))
            for combination in reversed(self.order)
            for run in combination.runs
        ]


def curve_charts(runs: Sequence[dict], overview: Overview) -> list[Chart]:
    """Return the chart of the metrics by step, and that of the accuracy by time.

    top5 has no curve, as it follows the accuracy.
    """
    pictures, looks, clipped = [], Looks(overview), False
    random = settings.are_random(runs)
    registered = runfiles.registered_metrics(run["figures"] for run in runs)
    # Of random images, nothing is learned that a test could show.
    learned = ["accuracy", *(name for name in registered if name not in compare.SHARES)]
    for name in ["loss", *([] if random else learned)]:
        parts = {
            curve_title(runs, name, split, overview.split): functools.partial(
                points, name=name, split=split
            )
            for split in (["training"] if random else SPLITS)
        }
        # One point is no curve.
        parts = {title: of for title, of in parts.items() if any(len(of(run)) > 1 for run in runs)}
        if parts:
            drawn = looks.curves(list(parts.values()))
            tops = [
                loss_bound(part) for part in zip(*(curve.parts for curve in drawn), strict=True)
            ]
            if name != "loss":
                tops = []
            clipped = clipped or any(tops)
            pictures.append(
                setting_plots.curves(list(parts), drawn, looks.legend, "step", tops=tops)
            )
    if not pictures:
        return []
    caption = "One line per run, finished or not."
    if clipped:
        caption += (
            " The axis of the loss ends at twice the highest loss of the calmest quarter of the "
            "runs. Higher losses are cut off."
        )
    if any(len(run["metrics"]) > MOST_POINTS for run in runs):
        caption += f" Of more than {MOST_POINTS} points, neighbours are averaged."
    if none := [run["name"] for run in runs if not run["metrics"]]:
        caption += f" Left out, without metrics: {charts.names_text(none)}."
    return [Chart("Learning curves", pictures, caption), *time_charts(runs, looks, overview)]


def loss_bound(curves: Sequence[Points]) -> float | None:
    """Return where the axis of a loss ends, so that a diverged run hides no other.

    It is twice the highest loss of the calmest quarter of the runs. None: no loss is higher.
    """
    highest = sorted(max(value for _, value in points) for points in curves if points)
    bound = 2 * highest[(len(highest) - 1) // 4]
    return bound if highest[-1] > bound else None


def points(run: dict, name: str, split: str) -> Points:
    """Return step and value of a metric in a run's metrics.jsonl, at most MOST_POINTS."""
    found = {
        row["step"]: factor_of(name) * row[name]
        for row in run["metrics"]
        if row["split"] in SPLITS[split] and settings.is_number(row.get(name))
    }
    at, size = list(found.items()), -(-len(found) // MOST_POINTS)
    parts = [at[begin : begin + size] for begin in range(0, len(at), max(1, size))]
    return [(part[-1][0], statistics.mean(value for _, value in part)) for part in parts]


def curve_title(runs: Sequence[dict], name: str, split: str, evaluated: str) -> str:
    """Return what a part of the curves shows; of a loss, whether labels are smoothed.

    split: a key of SPLITS. evaluated: on which images "test" was measured (compare.split_of).
    """
    shown = evaluated if split == "test" else split
    if name != "loss":
        return compare.metric_label(name, shown.capitalize())
    shares = sorted({run["config"].get("label_smoothing") or 0 for run in runs})
    if shares == [0]:
        return f"{shown.capitalize()} loss, nats"
    if split == "test":
        return f"{shown.capitalize()} loss, nats, without label smoothing"
    return f"Training loss, nats, with label smoothing {' or '.join(map(str, shares))}"


def time_charts(runs: Sequence[dict], looks: Looks, overview: Overview) -> list[Chart]:
    """Return the chart of the accuracy by seconds; [] for one combination alone."""
    if settings.are_random(runs) or len(looks.order) < 2:
        return []
    if not any(len(accuracy_by_time(run)) > 1 for run in runs):
        return []
    drawn = looks.curves([accuracy_by_time])
    target = overview.target
    goal = None if target is None else 100 * target
    title = compare.metric_label("accuracy", overview.split.capitalize())
    picture = setting_plots.curves([title], drawn, looks.legend, "seconds of training", goal)
    caption = "Without compilation, evaluation and checkpoints."
    if target is not None:
        caption += f" Dashed: {goal:.4g} %; the tables have the seconds to it."
    return [Chart("Time to an accuracy", [picture], caption)]


def accuracy_by_time(run: dict) -> Points:
    """Return seconds of training and accuracy in % of each evaluation."""
    return [(seconds, 100 * share) for seconds, share in settings.timed_evaluations(run)]
