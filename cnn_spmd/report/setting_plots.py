"""Draw metrics against settings, and learning curves, as SVG.

Each combination of settings has a colour and a marker, each seed a line style. Draw within
plots.style().
"""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from cnn_spmd.report import plots, settings
from cnn_spmd.report.canvas import Axes, Figure, ticker

# Colours of Okabe and Ito (2008), as plots.SCHEMES.
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
TICKS = 8  # at most, to name each value at its place
# A value's place is named where the next is at least this share of the axis away.
TICK_GAP = 0.09
LONGEST = 24  # characters of a value at an axis
Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """A combination's metric against one setting; values: text of the setting -> per run."""

    label: str
    values: Mapping[str, list[float]]


class Curve(NamedTuple):
    """A run's curve: points of each part of the picture, colour, marker, and line style."""

    parts: list[Points]
    colour: str
    marker: str
    style: str


# ---- A metric against a setting


def against(setting: settings.Setting, lines: Sequence[Line], metric: str, summary: str) -> str:
    """Return a metric against the values of a setting, one line per combination.

    summary: what the last line shows where there are too many for a colour each; all others are
    grey then. "": each line has a colour.
    """
    numeric = all(map(settings.is_number, setting.values))
    height = 3.0 if numeric else 1.2 + 0.42 * len(setting.values)
    fig = Figure(figsize=(plots.WIDTH, height))
    axes = fig.add_subplot()
    for number, line in enumerate(lines):
        colour, marker = LOOKS[number % len(LOOKS)]
        if summary:
            colour, marker = LOOKS[0] if line is lines[-1] else (GREY, "")
        look = dict(color=colour, marker=marker, markersize=5)
        label = None if summary and line is not lines[0] and line is not lines[-1] else line.label
        if numeric:
            draw_line(axes, setting, line, look | dict(label=label))
        else:
            offset = 0 if summary else (number - (len(lines) - 1) / 2) * 0.6 / len(lines)
            draw_row(axes, setting, line, offset, look | dict(label=label))
    name = textwrap.shorten(" and ".join([setting.name, *setting.along]), 60, placeholder=" …")
    if numeric:
        axes.set(xlabel=name, ylabel=metric)
        set_scale(axes, setting.values)
        axes.margins(y=0.08)
    else:
        axes.set(xlabel=metric, title=name)
        axes.set_yticks(range(len(setting.values)), list(map(value_text, setting.values)))
        axes.set_ylim(len(setting.values) - 0.5, -0.5)
    return plots.svg_with_legend(fig, axes, f"{metric} against {setting.name}")


def draw_line(axes: Axes, setting: settings.Setting, line: Line, look: dict) -> None:
    """Draw the means as a line, the runs as dots, and their range as a band."""
    shown = [value for value in setting.values if line.values.get(str(value))]
    numbers = [line.values[str(value)] for value in shown]
    axes.plot(shown, list(map(statistics.mean, numbers)), **look)
    if look["color"] == GREY or max(map(len, numbers)) < 2:
        return
    colour = dict(color=look["color"], linewidth=0)
    axes.fill_between(shown, list(map(min, numbers)), list(map(max, numbers)), alpha=0.15, **colour)
    for value, own in zip(shown, numbers, strict=True):
        axes.plot([value] * len(own), own, ".", markersize=5, alpha=0.5, **colour)


def draw_row(axes: Axes, setting: settings.Setting, line: Line, offset: float, look: dict) -> None:
    """Draw the mean of each value in its row, and a line from the lowest to the highest run."""
    rows = [
        (number + offset, line.values[str(value)])
        for number, value in enumerate(setting.values)
        if line.values.get(str(value))
    ]
    means = [statistics.mean(own) for _, own in rows]
    look |= dict(marker=look["marker"] or "|", linestyle="")
    axes.plot(means, [row for row, _ in rows], **look)
    for row, own in rows:
        axes.hlines(row, min(own), max(own), look["color"], linewidth=1)


def set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the scale logarithmic where the values are, and name them where they have room."""
    places = np.array(values, float)
    if is_log_spaced(values):
        axes.set_xscale("log")
        places = np.log(places)
    gaps = np.diff(places) / (places[-1] - places[0])
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    if len(values) <= TICKS and gaps.min() >= TICK_GAP:
        axes.set_xticks(list(values), list(map(value_text, values)))
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


def value_text(value: Any) -> str:
    """Return a setting's value as it stands at an axis."""
    shown = f"{value:,}" if isinstance(value, int) and abs(value) >= 10_000 else str(value)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"


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
    axes = fig.add_subplot(title=metric, xlabel=across.name, ylabel=down.name)
    drawn = axes.pcolormesh(np.ma.masked_invalid(cells), cmap="cividis", edgecolors="none")
    axes.grid(visible=False)
    axes.set_ylim(len(down.values), 0)
    for (row, column), number in np.ndenumerate(cells):
        if np.isfinite(number):
            red, green, blue, _ = drawn.cmap(drawn.norm(number))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            axes.text(
                column + 0.5,
                row + 0.5,
                number_text(number, len(across.values)),
                color="#fefefe" if dark else "#111111",
                fontsize=8 if len(across.values) <= TICKS else 6,
                ha="center",
                va="center",
            )
    names = list(map(value_text, across.values))
    long = max(map(len, names)) * len(names) > 50  # characters in the width of the picture
    axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90 if long else 0)
    axes.set_yticks(np.arange(len(down.values)) + 0.5, list(map(value_text, down.values)))
    axes.tick_params(length=0)
    return plots.svg(fig, f"{metric} by {across.name} and {down.name}")


def number_text(number: float, columns: int) -> str:
    """Return a cell's number: as many digits as its column has room for."""
    if abs(number) >= 1000:
        return f"{number:,.0f}"
    return f"{number:.2f}" if columns <= TICKS else f"{number:.1f}"


# ---- Curves


def curves(
    titles: Sequence[str],
    drawn: Sequence[Curve],
    legend: Mapping[str, dict],
    xlabel: str,
    target: float | None = None,
) -> str:
    """Return one part per title, one above the other; `drawn` is in the order of drawing.

    legend: label -> look of its line. target: where a dashed line stands in the last part.
    """
    fig = Figure(figsize=(plots.WIDTH, 0.9 + 1.75 * len(titles)))
    column = fig.subplots(len(titles), sharex=True, squeeze=False)[:, 0]
    for number, (axes, title) in enumerate(zip(column, titles, strict=True)):
        axes.set_title(title)
        for curve in drawn:
            points = curve.parts[number]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=curve.colour,
                    linestyle=curve.style,
                    linewidth=1,
                    # Many marked points would hide the line.
                    marker=curve.marker if len(points) <= 30 else "",
                    markersize=3.5,
                )
    if target is not None:
        column[-1].axhline(target, color="#444444", linestyle="--", linewidth=1)
    column[-1].set_xlabel(xlabel)
    column[-1].xaxis.set_major_locator(ticker.MaxNLocator(6, integer=xlabel == "step"))
    for label, look in legend.items():
        column[0].plot([], [], label=label, linewidth=1, **look)
    return plots.svg_with_legend(fig, column[0], ", ".join(titles))
