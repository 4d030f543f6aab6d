"""Make the charts of what runs learned, by step and by time.

Each combination of settings has a colour and a marker, each seed a line style.
"""

import statistics
from collections.abc import Mapping, Sequence

from cnn_spmd.report import captions, compare, plots, settings
from cnn_spmd.report.canvas import Figure, ticker
from cnn_spmd.report.settings import Combination, Overview, Setting
from cnn_spmd.report.text import Chart
from cnn_spmd.training import runfiles

MOST_POINTS = 200  # of a curve; more cannot be seen
# The images of a curve -> "split" of the lines in metrics.jsonl.
SPLITS = {"training": ("train",), "test": ("eval", "final")}
SEED_LINES = ("-", "--", ":", "-.")  # line styles, one for each seed
MOST_MARKED = 30  # points of a curve that has markers
CURVE = dict(linewidth=1, markersize=3.5)
Points = Sequence[tuple[float, float]]


def curve_charts(runs: Sequence[dict], overview: Overview) -> list[Chart]:
    """Return the chart of the metrics by step, and that of the accuracy by time.

    top5 has no curve, as it follows the accuracy.
    """
    names, splits = ["loss"], ["training"]
    if not settings.are_random(runs):  # of which nothing is learned that a test could show
        registered = runfiles.registered_metrics(run["figures"] for run in runs)
        names += ["accuracy", *(name for name in registered if name not in runfiles.SHARES)]
        splits = list(SPLITS)
    pictures, looks, clipped = [], Looks(overview), False
    for name in names:
        parts = {
            curve_title(runs, name, split, overview.split): [
                points(run, name, split) for run, _ in looks.drawn
            ]
            for split in splits
        }
        # One point is no curve.
        parts = {title: curves for title, curves in parts.items() if max(map(len, curves)) > 1}
        if parts:
            tops = [loss_bound(curves) for curves in parts.values()] if name == "loss" else []
            clipped = clipped or any(tops)
            pictures.append(draw_curves(parts, looks, "step", tops=tops))
    if not pictures:
        return []
    caption = "One line per run, finished or not."
    if clipped:
        caption += (
            " The axis of the loss ends at twice the highest loss of the calmest quarter of the "
            "runs. Higher losses are cut off."
        )
    if any(len(run["metrics"]) > MOST_POINTS for run in runs):
        caption += f" Neighbours are averaged where a run has more than {MOST_POINTS} points."
    if none := [run["name"] for run in runs if not run["metrics"]]:
        caption += f" Left out, without metrics: {captions.names_text(none)}."
    return [Chart("Learning curves", pictures, caption), *time_charts(runs, looks, overview)]


def loss_bound(curves: Sequence[Points]) -> float | None:
    """Return where the axis of a loss ends, so that a diverged run hides no other.

    It is twice the highest loss of the calmest quarter of the runs. None: no loss is higher.
    """
    highest = sorted(max(value for _, value in curve) for curve in curves if curve)
    bound = 2 * highest[(len(highest) - 1) // 4]
    return bound if highest[-1] > bound else None


def points(run: dict, name: str, split: str) -> Points:
    """Return step and value of a metric in a run's metrics.jsonl, at most MOST_POINTS.

    split: a key of SPLITS.
    """
    found = {
        row["step"]: compare.factor_of(name) * row[name]
        for row in run["metrics"]
        if row["split"] in SPLITS[split] and settings.is_number(row.get(name))
    }
    whole, size = list(found.items()), max(1, -(-len(found) // MOST_POINTS))
    parts = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
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


def time_charts(runs: Sequence[dict], looks: "Looks", overview: Overview) -> list[Chart]:
    """Return the chart of the accuracy by seconds; [] for one combination alone."""
    if settings.are_random(runs) or len(looks.order) < 2:
        return []
    curves = [accuracy_by_time(run) for run, _ in looks.drawn]
    if max(map(len, curves)) < 2:
        return []
    title = compare.metric_label("accuracy", overview.split.capitalize())
    caption, goal = "Without compilation, evaluation and checkpoints.", None
    if overview.target is not None:
        goal = 100 * overview.target
        caption += f" Dashed: {goal:.4g} %; the tables have the seconds to it."
    picture = draw_curves({title: curves}, looks, "seconds of training", goal)
    return [Chart("Time to an accuracy", [picture], caption)]


def accuracy_by_time(run: dict) -> Points:
    """Return seconds of training and accuracy in % of each evaluation."""
    return [(seconds, 100 * share) for seconds, share in settings.timed_evaluations(run)]


# ---- Looks


class Looks:
    """Choose the look of each run's curve, and name the looks in a legend.

    With more combinations than plots.LOOKS, the best have colours, and the others are grey. `drawn`
    has each run with its look; those of the best combination are last, so that they are on top.
    """

    def __init__(self, overview: Overview):
        found, best = overview.settings, settings.ranked(overview)
        self.order = [*best, *(each for each in overview.combinations if each not in best)]
        several = len(self.order) > len(plots.LOOKS)
        self.coloured = self.order[: len(plots.LOOKS) - 1] if several else self.order
        seeds = [str(seed) for each in found if each.name == "seed" for seed in each.values]
        # Where one combination is drawn, its seeds have colours; more seeds than looks are alike.
        looks = [dict(linestyle=style) for style in SEED_LINES]
        if len(self.order) == 1:
            looks = [dict(color=colour, marker=mark) for colour, mark in plots.LOOKS]
        self.seeds = dict(zip(seeds, looks, strict=False)) if len(seeds) <= len(looks) else {}
        self.legend = self.legend_of(found)
        self.drawn = [
            (run, self.look(combination, run))
            for combination in reversed(self.order)
            for run in combination.runs
        ]

    def legend_of(self, found: Sequence[Setting]) -> dict[str, dict]:
        """Return label -> look, for the coloured combinations, the others, and the seeds."""
        legend: dict[str, dict] = {}
        if len(self.order) > 1:
            if names := settings.names_of_label(self.order[0].values, found):
                legend[f"{names}:"] = dict(linestyle="none")
            for combination in self.coloured:
                legend[settings.label_of(combination.values, found)] = self.look(combination)
        if others := len(self.order) - len(self.coloured):
            legend[f"{others} others"] = dict(color=plots.GREY)
        for seed, look in self.seeds.items():
            legend[f"seed {seed}"] = dict(color="#777777") | look
        return legend

    def look(self, combination: Combination, run: dict | None = None) -> dict:
        """Return the look of a combination, or of one of its runs."""
        seed = str(settings.value_of(run, "seed")) if run else None
        for known, (colour, marker) in zip(self.coloured, plots.LOOKS, strict=False):
            if known is combination:
                return dict(color=colour, marker=marker) | self.seeds.get(seed, {})
        return dict(color=plots.GREY) | self.seeds.get(seed, {})


def draw_curves(
    parts: Mapping[str, Sequence[Points]],
    looks: Looks,
    xlabel: str,
    target: float | None = None,
    tops: Sequence[float | None] = (),
) -> str:
    """Return one part per title, one above the other.

    parts: title -> the points of each run in looks.drawn. target: where a dashed line stands in the
    last part. tops: where the vertical axis of each part ends; None: above all.
    """
    fig = Figure(figsize=(plots.WIDTH, 0.9 + 1.75 * len(parts)))
    column = fig.subplots(len(parts), sharex=True, squeeze=False)[:, 0]
    for axes, (title, curves) in zip(column, parts.items(), strict=True):
        axes.set_title(title)
        for curve, (_, look) in zip(curves, looks.drawn, strict=True):
            if curve:
                # Many markers would hide the line.
                marked = {} if len(curve) <= MOST_MARKED else dict(marker="")
                axes.plot(*zip(*curve, strict=True), **CURVE | look | marked)
    for axes, top in zip(column, tops, strict=False):
        if top is not None:
            axes.set_ylim(0, top)
    if target is not None:
        column[-1].axhline(target, color="#444444", linestyle="--", linewidth=1)
    column[-1].set_xlabel(xlabel)
    column[-1].xaxis.set_major_locator(ticker.MaxNLocator(6, integer=xlabel == "step"))
    for label, look in looks.legend.items():
        column[0].plot([], [], label=label, **CURVE | look)
    return plots.svg_with_legend(fig, column[0], ", ".join(parts))
