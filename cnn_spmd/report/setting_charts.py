"""Make the charts of metrics against settings.

A chart is left out where it would say nothing: no two runs differ in the setting alone. Each
combination of settings has a colour and a marker.
"""

import itertools
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnn_spmd.report import captions, compare, plots, settings
from cnn_spmd.report.canvas import Axes, ticker
from cnn_spmd.report.compare import SPEED
from cnn_spmd.report.settings import Combination, Overview, Setting
from cnn_spmd.report.text import Chart
from cnn_spmd.training import runfiles

# The values are named at their places where these are at least this share of the axis apart.
TICK_GAP = 0.09
LONGEST = 24  # characters of a value at an axis
ACROSS = 50  # characters that an axis has room for
LEAST_HEIGHT = 5.0  # of an axis of percents that is cut


class Line(NamedTuple):
    """A combination's metric against one setting.

    values: text of the setting's value -> one number per run.
    """

    label: str
    values: Mapping[str, list[float]]


def metric_charts(runs: Sequence[dict], overview: Overview) -> list[Chart]:
    """Return a chart of each metric: against each setting, and by each two of them.

    top5 has no chart, as it follows the accuracy.
    """
    names = [each.name for each in overview.settings]
    metrics, hidden = [overview.metric], {"seed"}
    if overview.metric != SPEED:
        registered = runfiles.registered_metrics(run["figures"] for run in runs)
        metrics += [name for name in registered if name not in runfiles.SHARES]
        hidden |= {name for name in names if name.startswith(settings.OF_SPEED)}
    elif {"mesh", "parallelism"} & set(names):
        return []  # meshes and schemes have charts of their own
    shown = [each for each in overview.settings if each.name not in hidden]
    made = [metric_chart(metric, shown, overview) for metric in metrics]
    return [chart for chart in made if chart.pictures]


def metric_chart(metric: str, shown: Sequence[Setting], overview: Overview) -> Chart:
    """Return the chart of one metric; without pictures where it would say nothing."""
    combos = overview.combinations
    label = compare.metric_label(metric, overview.split)
    pictures, floor, any_grey = [], floor_of(combos, metric), False
    summary = "the best mean" if higher_is_better(metric) else "the mean"
    for setting in shown:
        lines = lines_against(setting, combos, metric)
        if grey := len(lines) > len(plots.LOOKS):
            any_grey = True
            means = summaries([setting], combos, metric)
            lines = [line._replace(label="other settings") for line in lines]
            lines.append(Line(summary, {value: [mean] for (value,), mean in means.items()}))
        if lines:
            pictures.append(draw_against(setting, lines, label, grey, floor))
    for across, down in itertools.combinations(shown, 2):
        means = summaries([across, down], combos, metric)
        # A map with more holes than cells compares nothing.
        if 2 * len(means) > len(across.values) * len(down.values):
            pictures.append(draw_heat_map(across, down, means, label))
    caption = metric_caption(metric, combos)
    if floor is not None:
        caption += f" The axis begins at {floor:.0f}: triangles at its edge stand for lower means."
    if any_grey:
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
            f" n = {captions.range_text(counts)} runs (seeds) per point: the mean, and bars that "
            "reach from the lowest to the highest run."
        )
    if missing := sum(len(each.runs) - len(each.numbers(metric)) for each in combos):
        reasons = "not completed, not measured, or a second run of a seed"
        caption += f" Left out ({reasons}): {missing} of the runs."
    return caption


def floor_of(combos: Sequence[Combination], metric: str) -> float | None:
    """Return where the axis of a share begins, so that a diverged run hides no difference.

    The axis has four times the height from the median to the best mean, and at least LEAST_HEIGHT.
    None: the metric is no share, no mean is lower, or fewer than three are higher.
    """
    if metric not in runfiles.SHARES:
        return None
    numbers = [found for each in combos if (found := each.numbers(metric))]
    means = sorted((100 * statistics.mean(own) for own in numbers), reverse=True)
    if len(means) < 3:
        return None
    floor = means[0] - max(4 * (means[0] - means[(len(means) - 1) // 2]), LEAST_HEIGHT)
    return floor if means[-1] < floor <= means[2] else None


# ---- Against one setting


def lines_against(setting: Setting, combos: Sequence[Combination], metric: str) -> list[Line]:
    """Return a line per combination of the other settings, if it has two points."""
    lines: dict[tuple, Line] = {}
    for combination in combos:
        numbers = [compare.factor_of(metric) * number for number in combination.numbers(metric)]
        others = dict(combination.values)
        value = others.pop(setting.label)
        if numbers and value is not None:
            new = Line(settings.legend_text(others), {})
            line = lines.setdefault(tuple(map(str, others.values())), new)
            line.values[str(value)] = numbers
    return [line for line in lines.values() if len(line.values) > 1]


def draw_against(
    setting: Setting, lines: Sequence[Line], metric: str, grey: bool, floor: float | None
) -> str:
    """Return a metric against the values of a setting, one line per combination.

    grey: all lines are grey except the last, which stands for all; otherwise each has a colour.
    floor: as of floor_of.
    """
    name = textwrap.shorten(" and ".join([setting.name, *setting.along]), 50, placeholder=" …")
    axes = plots.new_axes(3.0, xlabel=name, ylabel=metric)
    numeric = all(map(settings.is_number, setting.values))
    at = setting.values if numeric else range(len(setting.values))
    places = dict(zip(map(str, setting.values), at, strict=True))
    looks = plots.LOOKS
    if grey:
        others = dict(color=plots.GREY, marker="" if numeric else ".")
        looks = [others] * (len(lines) - 1) + [plots.LOOKS[0]]
    for number, (line, look) in enumerate(zip(lines, looks, strict=False)):
        # Names have no order that a line could join, but room for markers side by side.
        offset = 0 if numeric or grey else (number - (len(lines) - 1) / 2) * 0.6 / len(lines)
        look = look | dict(markersize=5, linestyle="-" if numeric else "")
        if not grey or line in (lines[0], lines[-1]):
            look["label"] = line.label
        draw_line(axes, {value: place + offset for value, place in places.items()}, line, look)
    if numeric:
        set_scale(axes, setting.values)
    else:
        name_places(axes, at, setting.values)
        axes.set_xlim(-0.5, len(at) - 0.5)
    if floor is not None:
        mark_below(axes, floor, places, lines)
    return plots.svg_with_legend(axes, f"{metric} against {setting.name}")


def draw_line(axes: Axes, places: Mapping[str, float], line: Line, look: dict) -> None:
    """Draw the means of a line, and bars from the lowest to the highest run.

    places: text of a value -> where it stands.
    """
    shown = [(places[value], line.values[value]) for value in places if value in line.values]
    x, numbers = zip(*shown, strict=True)
    means = list(map(statistics.mean, numbers))
    below = [mean - min(own) for mean, own in zip(means, numbers, strict=True)]
    above = [max(own) - mean for mean, own in zip(means, numbers, strict=True)]
    spread = None if look["color"] == plots.GREY else [below, above]
    axes.errorbar(x, means, yerr=spread, elinewidth=1, capsize=2, **look)


def mark_below(
    axes: Axes, floor: float, places: Mapping[str, float], lines: Sequence[Line]
) -> None:
    """End the axis at `floor`, and write the means below it at its edge; places: as draw_line."""
    highest = max(max(own) for line in lines for own in line.values.values())
    axes.set_ylim(floor, highest + 0.05 * (highest - floor))
    for value, place in places.items():
        means = [statistics.mean(line.values[value]) for line in lines if value in line.values]
        if below := [mean for mean in means if mean < floor]:
            axes.plot(place, floor, marker="v", color="#444444", clip_on=False)
            ends = dict.fromkeys(f"{mean:.1f}" for mean in (min(below), max(below)))
            said = f"{' to '.join(ends)} (below)"
            axes.annotate(
                said, (place, floor), xytext=(0, 6), rotation=90, ha="center", **plots.LABEL
            )


def set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the scale logarithmic where the values are; name them where there is room."""
    places = np.array(values, float)
    if is_log_spaced(values):
        axes.set_xscale("log")
        places = np.log(places)
    gaps = np.diff(places) / (places[-1] - places[0])
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    if gaps.min() >= TICK_GAP:
        name_places(axes, values, values)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    elif axes.get_xscale() == "log":
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))


def is_log_spaced(values: Sequence[float]) -> bool:
    """Return whether increasing values are more evenly spaced on a logarithmic scale."""
    if values[0] <= 0:
        return False
    if len(values) < 3:
        return values[-1] >= 10 * values[0]
    places = np.array(values, float)
    spreads = [np.std(gaps) / np.mean(gaps) for gaps in (np.diff(np.log(places)), np.diff(places))]
    return bool(spreads[0] < spreads[1])


def name_places(axes: Axes, places: Sequence[float], values: Sequence) -> None:
    """Name the values of a setting at their places, turned where they are too long."""
    names = list(map(value_text, values))
    longest = max(map(len, names))
    turned = len(names) * longest > ACROSS
    if turned:
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.075 * longest)
    axes.set_xticks(list(places), names, rotation=90 if turned else 0)


def value_text(value: Any) -> str:
    """Return a setting's value as it stands at an axis."""
    shown = compare.value_text(value)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 9]}…{shown[-8:]}"


# ---- By two settings


def summaries(
    shown: Sequence[Setting], combos: Sequence[Combination], metric: str
) -> dict[tuple[str, ...], float]:
    """Return one number for all combinations with the same values of these settings.

    Keys are the values' texts. The number is the best mean over the seeds. It is the mean of these
    means where a lower metric may be the better one.
    """
    found: dict[tuple[str, ...], list[float]] = {}
    for combination in combos:
        if numbers := combination.numbers(metric):
            key = tuple(str(combination.values[each.label]) for each in shown)
            found.setdefault(key, []).append(compare.factor_of(metric) * statistics.mean(numbers))
    choose = max if higher_is_better(metric) else statistics.mean
    return {key: choose(means) for key, means in found.items()}


def higher_is_better(metric: str) -> bool:
    """Return whether a metric is known to be better where it is higher."""
    return metric == SPEED or metric in runfiles.SHARES


def draw_heat_map(
    across: Setting,
    down: Setting,
    means: Mapping[tuple[str, str], float],
    metric: str,
) -> str:
    """Return a metric by two settings, as coloured and numbered cells.

    means: texts of the values of both -> metric. A combination without one has an empty cell.
    """
    cells = np.array(
        [[means.get((str(x), str(y)), np.nan) for x in across.values] for y in down.values]
    )
    height = 1.1 + 0.36 * len(down.values)
    axes = plots.new_axes(height, title=metric, xlabel=across.label, ylabel=down.label)
    drawn = axes.pcolormesh(np.ma.masked_invalid(cells), cmap="cividis", edgecolors="none")
    axes.grid(visible=False)
    axes.set_ylim(len(down.values), 0)
    digits = 2 if len(across.values) <= 8 else 1  # what a cell has room for
    for (row, column), number in np.ndenumerate(cells):
        if np.isfinite(number):
            red, green, blue, _ = drawn.cmap(drawn.norm(number))
            # Luma (ITU-R BT.601): light letters on a dark cell.
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{number:,.0f}" if number >= 1000 else f"{number:.{digits}f}",
                color="#fefefe" if dark else "#111111",
                fontsize=8 if digits == 2 else 6,
                ha="center",
                va="center",
            )
    name_places(axes, np.arange(len(across.values)) + 0.5, across.values)
    axes.set_yticks(np.arange(len(down.values)) + 0.5, list(map(value_text, down.values)))
    axes.tick_params(length=0)
    return plots.svg(axes.figure, f"{metric} by {across.name} and {down.name}")
