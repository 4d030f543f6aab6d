"""Draw metrics against settings, and learning curves, as SVG.

Each combination of settings has a colour and a marker, each seed a line style. Draw within
plots.style().
"""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnn_spmd.report import compare, plots, settings
from cnn_spmd.report.canvas import Axes, Figure, ticker

# Colour and marker of a combination; the colours are those of plots.SCHEMES.
LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "X"),
    ("#8C564B", "h"),
    ("#7F7F7F", "d"),
)
GREY = "#aaaaaa"
SEED_LINES = ("-", "--", ":", "-.")
# The values are named at their places where these are at least this share of the axis apart.
TICK_GAP = 0.09
LONGEST = 24  # characters of a value at an axis
ACROSS = 50  # characters that an axis has room for
MOST_MARKED = 30  # points of a curve that has markers
CURVE = dict(linewidth=1, markersize=3.5)
Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """A combination's metric against one setting.

    values: text of the setting's value -> one number per run.
    """

    label: str
    values: Mapping[str, list[float]]


class Curve(NamedTuple):
    """A run's curve: the points of each part of the picture, and its look."""

    parts: list[Points]
    look: dict


# ---- A metric against a setting


def against(setting: settings.Setting, lines: Sequence[Line], metric: str, summary: bool) -> str:
    """Return a metric against the values of a setting, one line per combination.

    summary: the last line stands for all others, which are grey; otherwise each has a colour.
    """
    fig = Figure(figsize=(plots.WIDTH, 3.0))
    axes = fig.add_subplot()
    numeric = all(map(settings.is_number, setting.values))
    for number, line in enumerate(lines):
        colour, marker = LOOKS[number % len(LOOKS)]
        if summary:
            colour, marker = LOOKS[0] if line is lines[-1] else (GREY, "" if numeric else ".")
        label = line.label if not summary or line in (lines[0], lines[-1]) else None
        # Names have no order that a line could join, but room for markers side by side.
        offset = 0 if numeric or summary else (number - (len(lines) - 1) / 2) * 0.6 / len(lines)
        places = setting.values if numeric else [n + offset for n in range(len(setting.values))]
        look = dict(color=colour, marker=marker, markersize=5, linestyle="-" if numeric else "")
        draw_line(axes, dict(zip(map(str, setting.values), places, strict=True)), line, look, label)
    name = textwrap.shorten(" and ".join([setting.name, *setting.along]), 50, placeholder=" …")
    axes.set(xlabel=name, ylabel=metric)
    if numeric:
        set_scale(axes, setting.values)
    else:
        name_places(axes, range(len(setting.values)), setting.values)
        axes.set_xlim(-0.5, len(setting.values) - 0.5)
    return plots.svg_with_legend(fig, axes, f"{metric} against {setting.name}")


def draw_line(
    axes: Axes, places: Mapping[str, float], line: Line, look: dict, label: str | None
) -> None:
    """Draw the means of a line, and bars from the lowest to the highest run.

    places: text of a value -> where it stands.
    """
    shown = [(places[value], line.values[value]) for value in places if value in line.values]
    x, numbers = zip(*shown, strict=True)
    means = list(map(statistics.mean, numbers))
    below = [mean - min(own) for mean, own in zip(means, numbers, strict=True)]
    above = [max(own) - mean for mean, own in zip(means, numbers, strict=True)]
    spread = None if look["color"] == GREY else [below, above]
    axes.errorbar(x, means, yerr=spread, elinewidth=1, capsize=2, label=label, **look)


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


def name_places(axes: Axes, places: Sequence[float], values: Sequence) -> None:
    """Name the values of a setting at their places, turned where they are too long."""
    names = list(map(value_text, values))
    longest = max(map(len, names))
    turned = len(names) * longest > ACROSS
    if turned:
        axes.figure.set_figheight(axes.figure.get_figheight() + 0.075 * longest)
    axes.set_xticks(list(places), names, rotation=90 if turned else 0)


def is_log_spaced(values: Sequence[float]) -> bool:
    """Return whether increasing values are more evenly spaced on a logarithmic scale."""
    if values[0] <= 0:
        return False
    if len(values) < 3:
        return values[-1] >= 10 * values[0]
    places = np.array(values, float)
    spreads = [np.std(gaps) / np.mean(gaps) for gaps in (np.diff(np.log(places)), np.diff(places))]
    return bool(spreads[0] < spreads[1])


def value_text(value: Any) -> str:
    """Return a setting's value as it stands at an axis."""
    shown = compare.value_text(value)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 9]}…{shown[-8:]}"


# ---- Two settings


def heat_map(
    across: settings.Setting,
    down: settings.Setting,
    means: Mapping[tuple[str, str], float],
    metric: str,
) -> str:
    """Return a metric by two settings, as coloured and numbered cells.

    means: texts of the values of both -> metric. A combination without one has an empty cell.
    """
    cells = np.array(
        [[means.get((str(x), str(y)), np.nan) for x in across.values] for y in down.values]
    )
    fig = Figure(figsize=(plots.WIDTH, 1.1 + 0.36 * len(down.values)))
    axes = fig.add_subplot(title=metric, xlabel=across.label, ylabel=down.label)
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
    return plots.svg(fig, f"{metric} by {across.name} and {down.name}")


# ---- Curves


def curves(
    titles: Sequence[str],
    drawn: Sequence[Curve],
    legend: Mapping[str, dict],
    xlabel: str,
    target: float | None = None,
    tops: Sequence[float | None] = (),
) -> str:
    """Return one part per title, one above the other.

    drawn: the first is at the back. legend: label -> look of its line. target: where a dashed line
    stands in the last part. tops: where the vertical axis of each part ends; None: above all.
    """
    fig = Figure(figsize=(plots.WIDTH, 0.9 + 1.75 * len(titles)))
    column = fig.subplots(len(titles), sharex=True, squeeze=False)[:, 0]
    for number, (axes, title) in enumerate(zip(column, titles, strict=True)):
        axes.set_title(title)
        for curve in drawn:
            points = curve.parts[number]
            if points:
                # Many markers would hide the line.
                marked = {} if len(points) <= MOST_MARKED else dict(marker="")
                axes.plot(*zip(*points, strict=True), **CURVE | curve.look | marked)
    for axes, top in zip(column, tops, strict=False):
        if top is not None:
            axes.set_ylim(0, top)
    if target is not None:
        column[-1].axhline(target, color="#444444", linestyle="--", linewidth=1)
    column[-1].set_xlabel(xlabel)
    column[-1].xaxis.set_major_locator(ticker.MaxNLocator(6, integer=xlabel == "step"))
    for label, look in legend.items():
        column[0].plot([], [], label=label, **CURVE | look)
    return plots.svg_with_legend(fig, column[0], ", ".join(titles))
