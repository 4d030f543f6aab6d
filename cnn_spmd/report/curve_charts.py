"""Make the charts of what runs learned, by step and by time.

Each combination of settings has a colour and a marker, each seed a line style.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cnn_spmd.report import captions, compare, plots, settings
from cnn_spmd.report.canvas import Figure, ticker
from cnn_spmd.report.settings import Overview
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
    pictures, looks, clipped = [], looks_of(overview), False
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
            tops = {title: loss_bound(parts[title]) for title in parts if name == "loss"}
            clipped = clipped or any(tops.values())
            pictures.append(draw_curves(parts, looks, "step", tops))
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
    if settings.are_random(runs) or len(overview.combinations) < 2:
        return []
    curves = [
        [(seconds, 100 * share) for seconds, share in settings.timed_evaluations(run)]
        for run, _ in looks.drawn
    ]
    if not any(curves):
        return []
    title = compare.metric_label("accuracy", overview.split.capitalize())
    caption, goal = "Without compilation, evaluation and checkpoints.", None
    if overview.target is not None:
        goal = 100 * overview.target
        caption += f" Dashed: {goal:.4g} %; the tables have the seconds to it."
    picture = draw_curves({title: curves}, looks, "seconds of training", {}, goal)
    return [Chart("Time to an accuracy", [picture], caption)]


# ---- Looks


class Looks(NamedTuple):
    """How curves look.

    drawn: each run with its look; those of the best combination are last, so that they are on top.
    legend: label -> look, of the coloured combinations, the others, and the seeds.
    """

    drawn: list[tuple[dict, dict]]
    legend: dict[str, dict]


def looks_of(overview: Overview) -> Looks:
    """Choose the look of each run's curve: a colour per combination, a line style per seed.

    With more combinations than plots.LOOKS, the best have colours, and the others are grey.
    """
    best = settings.ranked(overview)
    order = [*best, *(each for each in overview.combinations if each not in best)]
    coloured = len(order) if len(order) <= len(plots.LOOKS) else len(plots.LOOKS) - 1
    others, grey = len(order) - coloured, dict(color=plots.GREY)
    looks = [*plots.LOOKS[:coloured], *[grey] * others]
    seeds = [str(seed) for each in overview.settings if each.name == "seed" for seed in each.values]
    # Where one combination is drawn, its seeds have colours; more seeds than looks are alike.
    of_seeds = plots.LOOKS if len(order) == 1 else [dict(linestyle=line) for line in SEED_LINES]
    of_seed = dict(zip(seeds, of_seeds, strict=False)) if len(seeds) <= len(of_seeds) else {}
    legend: dict[str, dict] = {}
    if len(order) > 1:
        if names := settings.legend_title(order[0].values):
            legend[f"{names}:"] = dict(linestyle="none")
        for combination, look in zip(order[:coloured], looks, strict=False):
            legend[settings.legend_text(combination.values)] = look
    if others:
        legend[f"{others} others"] = grey
    legend |= {f"seed {seed}": dict(color="#777777") | look for seed, look in of_seed.items()}
    drawn = [
        (run, look | of_seed.get(str(settings.value_of(run, "seed")), {}))
        for combination, look in reversed([*zip(order, looks, strict=True)])
        for run in combination.runs
    ]
    return Looks(drawn, legend)


def draw_curves(
    parts: Mapping[str, Sequence[Points]],
    looks: Looks,
    xlabel: str,
    tops: Mapping[str, float | None],
    target: float | None = None,
) -> str:
    """Return one part per title, one above the other.

    parts: title -> the points of each run in looks.drawn. tops: title -> where the vertical axis
    ends, if not above all points. target: where a dashed line stands in the last part.
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
        if tops.get(title) is not None:
            axes.set_ylim(0, tops[title])
    if target is not None:
        column[-1].axhline(target, color="#444444", linestyle="--", linewidth=1)
    column[-1].set_xlabel(xlabel)
    column[-1].xaxis.set_major_locator(ticker.MaxNLocator(6, integer=xlabel == "step"))
    for label, look in looks.legend.items():
        column[0].plot([], [], label=label, **CURVE | look)
    return plots.svg_with_legend(column[0], ", ".join(parts))
