"""Draw the report's pictures as SVG, one per panel (compare.py).

They are light, and readable in black and white: each scheme has a marker and a line style, each
part of a bar a hatch. Colour-blind readers can distinguish the colours, which are those of Okabe
and Ito (2008). Draw within `style()`.
"""

import contextlib
import html
import io
import math
import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cnn_spmd.papers import published
from cnn_spmd.report import canvas, compare
from cnn_spmd.report.batch_scaling import Knee
from cnn_spmd.report.canvas import Axes, Figure, ticker

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cnn_spmd",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#e6e6e6",
    "hatch.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}
WIDTH = 4.6  # inches
# Scheme -> colour, marker, line style. Schemes that a config defines get the last.
SCHEMES = {
    "data": ("#0072B2", "o", "-"),
    "hybrid": ("#D55E00", "s", "--"),
    "hybrid_alternating": ("#009E73", "^", "-."),
    "model": ("#CC79A7", "D", ":"),
    "two_tower": ("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    "dense_2d": ("#56B4E9", "X", (0, (3, 1))),
    "spatial": ("#F0E442", "*", (0, (3, 1, 1, 1))),
    "sharded_update": ("#8C564B", "h", (0, (4, 2))),
    "fsdp": ("#7F7F7F", "d", (0, (1, 1))),
}
OTHER = ("#222222", "P", (0, (1, 3)))
LABEL = dict(textcoords="offset points", fontsize=8)


class Bars(NamedTuple):
    """Stacked bars, one per group.

    parts: name -> colour, hatch, and one length per group. marks: where a tick stands on each bar;
    None for no tick.
    """

    unit: str
    parts: dict[str, tuple[str, str, list[float]]]
    mark_name: str
    marks: list[float | None]


def style() -> contextlib.AbstractContextManager:
    """Return the context in which to draw."""
    return canvas.style(SETTINGS)


def svg(fig: Figure, label: str) -> str:
    """Return the picture as an <svg> element that scales, for use within a page."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    svg_text = buffer.getvalue()
    svg_text = svg_text[svg_text.index("<svg") :]
    svg_text = re.sub(r"<metadata>.*?</metadata>", "", svg_text, flags=re.DOTALL)
    # Nothing refers to these, and they would be the same in every picture of the page.
    svg_text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg_text)
    role = f'role="img" aria-label="{html.escape(label)}"'
    svg_text = re.sub(
        r'(<svg [^>]*?)width="[^"]*"', lambda found: found[1] + role, svg_text, count=1
    )
    return re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", svg_text, count=1)


def svg_with_legend(fig: Figure, axes: Axes, label: str) -> str:
    """Return the picture with the legend of `axes` below it."""
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        labels = [textwrap.shorten(label, 60, placeholder=" …") for label in labels]
        # A row has room for about 60 letters; the sample of each line takes the place of four.
        longest = sorted(map(len, labels), reverse=True)
        columns = next(n for n in (3, 2, 1) if sum(longest[:n]) <= 60 - 4 * n or n == 1)
        # The heights of the pictures leave room for three rows.
        more = max(0, -(-len(labels) // columns) - 3)
        fig.set_figheight(fig.get_figheight() + 0.18 * more)
        fig.legend(handles, labels, loc="outside lower center", ncols=columns)
    return svg(fig, label)


def panel_title(panel: str) -> str:
    """Return a panel's name in two lines at most; the tables have all of it."""
    return textwrap.fill(textwrap.shorten(panel, 100, placeholder=" …"), 56)


def schemes_of(groups: Sequence[dict]) -> list[str]:
    """Return the schemes of groups, those that a config defines last."""
    found = {group["parallelism"] for group in groups}
    return [scheme for scheme in SCHEMES if scheme in found] + sorted(found - SCHEMES.keys())


# ---- Throughput


def throughput(groups: list[dict]) -> str:
    """Return images/s by mesh, one marker per scheme."""
    fig = Figure(figsize=(WIDTH, 3.2))
    axes = fig.add_subplot(title=panel_title(groups[0]["panel"]), ylabel="images/s")
    meshes = list(dict.fromkeys(group["mesh"] for group in groups))
    draw_ideal(axes, groups, meshes)
    schemes = schemes_of(groups)
    for number, scheme in enumerate(schemes):
        offset = (number - (len(schemes) - 1) / 2) * 0.7 / len(schemes)
        members = [group for group in groups if group["parallelism"] == scheme]
        timed = [group for group in members if compare.values(group, "images_per_second")]
        rates = [compare.average(group, "images_per_second") for group in timed]
        colour, marker, _ = SCHEMES.get(scheme, OTHER)
        axes.errorbar(
            [meshes.index(group["mesh"]) + offset for group in timed],
            rates,
            yerr=error_bars(timed, rates),
            fmt=marker,
            color=colour,
            markersize=5,
            elinewidth=1,
            capsize=2,
            label=scheme,
        )
    axes.set_xticks(range(len(meshes)), list(map(compare.mesh_name, meshes)))
    axes.set_xlim(-0.5, len(meshes) - 0.5)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("mesh, data x model")
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    return svg_with_legend(fig, axes, "Throughput")


def draw_ideal(axes: Axes, groups: Sequence[dict], meshes: Sequence[tuple[int, ...]]) -> None:
    """Draw the fastest one-device run's rate times the devices, on each mesh."""
    one_device = [group for group in groups if group["devices"] == 1]
    rates = [compare.average(group, "images_per_second") for group in one_device]
    rates = [rate for rate in rates if rate]
    if rates:
        ideal = [max(rates) * math.prod(mesh) for mesh in meshes]
        left = [place - 0.42 for place in range(len(meshes))]
        right = [place + 0.42 for place in range(len(meshes))]
        axes.hlines(ideal, left, right, "#777777", "dashed", label="ideal")


def error_bars(groups: Sequence[dict], rates: Sequence[float]) -> list[list[float]]:
    """Return how far below and above `rates` the p90 and p10 step times lie."""
    below, above = [], []
    for group, rate in zip(groups, rates, strict=True):
        slow, fast = (compare.average(group, "step_milliseconds", name) for name in ("p90", "p10"))
        images = 1e3 * group["runs"][0]["figures"]["batch_size"]
        below.append(max(0.0, rate - images / slow) if slow else 0.0)
        above.append(max(0.0, images / fast - rate) if fast else 0.0)
    return [below, above]


# ---- Speedup


def speedup(groups: list[dict], curves: dict[str, dict]) -> str:
    """Return speedup by devices, one line per scheme; published curves behind."""
    fig = Figure(figsize=(WIDTH, 3.6))
    title = panel_title(groups[0]["panel"])
    axes = fig.add_subplot(title=title, xlabel="devices", ylabel="speedup")
    scaled = [group for group in groups if compare.group_speedups(group)]
    most = max(2, *(group["devices"] for group in scaled))
    ends = draw_published(axes, curves, most)
    axes.plot([1, most], [1, most], "--", color="#444444", linewidth=1, label="ideal")
    for scheme in schemes_of(scaled):
        draw_scheme(axes, scheme, [group for group in scaled if group["parallelism"] == scheme])
    for scale_axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("log", base=2)
        scale_axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set_xlim(0.93, most * (1.3 if curves else 1.08))
    write_letters(axes, ends)
    return svg_with_legend(fig, axes, "Speedup")


def draw_published(axes: Axes, curves: dict[str, dict], most: int) -> list[tuple]:
    """Draw the curves up to `most` GPUs; return GPUs, speedup, letter of their ends."""
    ends = []
    for letter, curve in curves.items():
        points = {
            gpus: gain for gpus, gain in published.curve_speedups(curve).items() if gpus <= most
        }
        axes.plot(list(points), list(points.values()), color="#aaaaaa", linewidth=0.8)
        ends.append((max(points), points[max(points)], letter))
    return ends


def draw_scheme(axes: Axes, scheme: str, groups: Sequence[dict]) -> None:
    """Draw a scheme's speedups, and a line through the best on each number of devices."""
    gains = []
    best: dict[int, float] = {}
    for group in groups:
        speedups = compare.group_speedups(group)
        devices, gain = group["devices"], sum(speedups) / len(speedups)
        gains.append((devices, gain))
        best[devices] = max(gain, best.get(devices, gain))
    colour, marker, line = SCHEMES.get(scheme, OTHER)
    axes.plot(*zip(*gains, strict=True), marker, color=colour, markersize=5)
    look = dict(marker=marker, color=colour, linestyle=line, markersize=5, label=scheme)
    axes.plot(*zip(*sorted(best.items()), strict=True), **look)


def write_letters(axes: Axes, ends: Sequence[tuple]) -> None:
    """Write the published curves' letters at their ends, without overlaps."""
    low, high = axes.get_ylim()
    gap = (high / low) ** (1 / 19)
    last = 0.0
    for gpus, gain, letter in sorted(ends, key=lambda end: end[:2]):
        last = max(gain, last * gap)
        axes.annotate(letter, (gpus, last), (7, 0), color="#555555", va="center", **LABEL)


# ---- Bars


def bars(groups: list[dict], shown: Bars) -> str:
    """Return horizontal stacked bars, one per group, with their sums at the ends."""
    fig = Figure(figsize=(WIDTH, 1.3 + 0.22 * len(groups)))
    axes = fig.add_subplot(title=panel_title(groups[0]["panel"]), xlabel=shown.unit)
    rows = list(range(len(groups)))
    ends = [0.0] * len(groups)
    edge = dict(edgecolor="#333333", linewidth=0.5)
    for name, (colour, hatch, widths) in shown.parts.items():
        if any(widths):
            axes.barh(rows, widths, 0.7, ends, label=name, color=colour, hatch=hatch, **edge)
            ends = [end + width for end, width in zip(ends, widths, strict=True)]
    draw_marks(axes, shown)
    longest = max([*ends, *(mark or 0 for mark in shown.marks)]) or 1
    for row, (end, mark) in enumerate(zip(ends, shown.marks, strict=True)):
        # A mark just behind the end would be written over.
        hidden = mark is not None and end < mark < end + 0.2 * longest
        place = (mark if hidden else end, row)
        digits = 1 if end >= 10 else 2
        axes.annotate(f"{end:,.{digits}f}", place, (4, 0), va="center", **LABEL)
    names = [f"{compare.mesh_name(group['mesh'])} {group['parallelism']}" for group in groups]
    axes.set_yticks(rows, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.2 * longest)
    return svg_with_legend(fig, axes, shown.unit)


def draw_marks(axes: Axes, shown: Bars) -> None:
    """Draw the ticks on the bars."""
    marked = [(mark, row) for row, mark in enumerate(shown.marks) if mark is not None]
    if marked:
        look = dict(color="black", markersize=11, markeredgewidth=1.6, label=shown.mark_name)
        axes.plot(*zip(*marked, strict=True), "|", **look)


# ---- Steps to a target


def steps_to_target(steps: dict[int, int], knee: Knee | None, noise: float | None) -> str:
    """Return steps by batch size, the fit with its knee, and the noise scale.

    steps: batch size -> steps, smallest batch first.
    """
    fig = Figure(figsize=(WIDTH, 3.6))
    axes = fig.add_subplot(xlabel="batch size", ylabel="steps to the target")
    sizes = list(steps)
    ideal = [steps[sizes[0]] * sizes[0] / size for size in sizes]
    axes.plot(sizes, ideal, "--", color="#444444", linewidth=1, label="perfect scaling")
    if knee:
        between = np.geomspace(sizes[0], sizes[-1])
        fitted = knee.fewest_steps * (1 + knee.batch / between)
        axes.plot(between, fitted, "-.", color="#D55E00", linewidth=1, label="fit")
        axes.axvline(knee.batch, color="#D55E00", linestyle=":", label=f"knee, {knee.batch:,.0f}")
    if noise:
        look = dict(color="#009E73", linestyle=(0, (5, 1, 1, 1)))
        axes.axvline(noise, label=f"noise scale, {noise:,.0f}", **look)
    look = dict(color="#0072B2", markersize=5, label="best run")
    axes.plot(sizes, list(steps.values()), "o" if knee else "o-", **look)
    for scale_axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("log", base=2)
        scale_axis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
    return svg_with_legend(fig, axes, "Steps to the target")


# ---- Predictions


def predictions(groups: Sequence[dict], pairs: Sequence[tuple[float, float] | None]) -> str:
    """Return predicted over measured milliseconds per step, with the line of equal ones.

    pairs: predicted and measured, for each group; None where there are not both.
    """
    fig = Figure(figsize=(WIDTH, 3.6))
    axes = fig.add_subplot(xlabel="measured step, ms", ylabel="predicted step, ms")
    for scheme in schemes_of(groups):
        own = [
            pair
            for group, pair in zip(groups, pairs, strict=True)
            if pair and group["parallelism"] == scheme
        ]
        if own:
            predicted, measured = zip(*own, strict=True)
            axes.plot(measured, predicted, "o", markersize=5, alpha=0.7, label=scheme)
    ends = [time for pair in pairs if pair for time in pair]
    ends = [0.9 * min(ends), 1.1 * max(ends)]
    axes.plot(ends, ends, "--", color="#444444", linewidth=1, label="equal")
    return svg_with_legend(fig, axes, "Predicted and measured steps")


# ---- Depth


def depth(networks: Sequence[tuple[str, int, list[float]]]) -> str:
    """Return test accuracy by depth, one dot per run.

    networks: label, layers with weights, accuracies in %.
    """
    fig = Figure(figsize=(WIDTH, 3.2))
    axes = fig.add_subplot(xlabel="layers with weights", ylabel="test accuracy, %")
    for name, layers, accuracies in networks:
        x = [layers] * len(accuracies)
        axes.plot(x, accuracies, "o", color="#0072B2", markersize=5, alpha=0.7)
        rivals = [max(other) for _, depth, other in networks if depth == layers]
        # Two networks may have one depth: the better one's label is above its dots.
        above = min(rivals) < max(accuracies)
        place = (layers, max(accuracies) if above else min(accuracies))
        align = dict(va="bottom" if above else "top")
        axes.annotate(name, place, xytext=(4, 4 if above else -4), **align, **LABEL)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.margins(x=0.2, y=0.2)
    return svg(fig, "Test accuracy by depth")
