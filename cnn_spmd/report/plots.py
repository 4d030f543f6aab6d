"""Pictures for the report: SVG, one a panel (groups of runs that differ in mesh and parallelism only: report/compare.py).

Light, and readable in black and white: a marker and a line style a scheme, a hatch a part of a bar. The colours are those of
Okabe and Ito (2008), which the colour-blind tell apart. Draw within `style()`.
"""

import contextlib
import io
import re
import textwrap

from cnn_spmd.papers import published as papers
from cnn_spmd.report import canvas
from cnn_spmd.report.canvas import Axes, Figure, ticker
from cnn_spmd.report.compare import average, panel_of, speedups, values

RC = {
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
# Scheme -> colour, marker, line style. Rows of one's own get the last.
SCHEMES = {
    "data": ("#0072B2", "o", "-"),
    "hybrid": ("#D55E00", "s", "--"),
    "hybrid_alternating": ("#009E73", "^", "-."),
    "model": ("#CC79A7", "D", ":"),
    "two_tower": ("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
}
OTHER = ("#222222", "P", (0, (1, 3)))


def style() -> contextlib.AbstractContextManager:
    return canvas.style(RC)


def svg(fig: Figure, label: str) -> str:
    """The figure as an <svg> element that scales, without what only a file of its own needs."""
    buffer = io.StringIO()
    fig.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(
        r' id="[A-Za-z0-9.]+_\d+"', "", text
    )  # the same in every picture, and nothing refers to them
    text = re.sub(
        r'(<svg [^>]*?)width="[^"]*"', rf'\1role="img" aria-label="{label}"', text, count=1
    )
    return re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", text, count=1)


def title_of(panel: str) -> str:
    """A panel's name in two lines at most; the tables have all of it."""
    return textwrap.fill(textwrap.shorten(panel, 100, placeholder=" …"), 56)


def throughput(groups: list[dict]) -> str:
    """Images/s by mesh, a marker a scheme."""
    fig = Figure(figsize=(WIDTH, 3.2))
    axes = fig.add_subplot(title=title_of(groups[0]["panel"]), ylabel="images/s")
    meshes = list(dict.fromkeys(group["mesh"] for group in groups))
    bases = [average(group, "images_per_second") for group in groups if group["devices"] == 1]
    if rates := [rate for rate in bases if rate]:
        ideal = [max(rates) * rows * columns for rows, columns in meshes]
        axes.hlines(
            ideal,
            [i - 0.42 for i in range(len(meshes))],
            [i + 0.42 for i in range(len(meshes))],
            "#777777",
            "dashed",
            label="ideal",
        )
    schemes = schemes_of(groups)
    for number, scheme in enumerate(schemes):
        some = [
            group
            for group in groups
            if group["parallelism"] == scheme and values(group, "images_per_second")
        ]
        x = [
            meshes.index(group["mesh"]) + (number - (len(schemes) - 1) / 2) * 0.7 / len(schemes)
            for group in some
        ]
        y = [average(group, "images_per_second") for group in some]
        colour, marker, _ = SCHEMES.get(scheme, OTHER)
        axes.errorbar(
            x,
            y,
            yerr=spread(some, y),
            fmt=marker,
            color=colour,
            markersize=5,
            elinewidth=1,
            capsize=2,
            label=scheme,
        )
    axes.set_xticks(range(len(meshes)), [f"{rows}x{columns}" for rows, columns in meshes])
    axes.set_xlim(-0.5, len(meshes) - 0.5)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.set_xlabel("mesh, data x model")
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    return finish(fig, axes, "Throughput")


def spread(groups: list[dict], rates: list[float]) -> list[list[float]]:
    """How far below and above `rates` the 90th and 10th percentile of the step time lie, in images/s."""
    below, above = [], []
    for group, rate in zip(groups, rates, strict=True):
        slow, fast = (average(group, "step_milliseconds", name) for name in ("p90", "p10"))
        images = 1e3 * group["runs"][0]["figures"]["batch_size"]
        below.append(max(0.0, rate - images / slow) if slow else 0.0)
        above.append(max(0.0, images / fast - rate) if fast else 0.0)
    return [below, above]


def speedup(groups: list[dict], published: dict[str, dict]) -> str:
    """Speedup by devices, a line a scheme, the ideal line, and published curves behind."""
    fig = Figure(figsize=(WIDTH, 3.6))
    axes = fig.add_subplot(title=title_of(groups[0]["panel"]), xlabel="devices", ylabel="speedup")
    most = max(2, *(group["devices"] for group in groups if speedups(group)))
    ends = []
    for letter, curve in published.items():
        points = {gpus: gain for gpus, gain in papers.speedups(curve).items() if gpus <= most}
        axes.plot(list(points), list(points.values()), color="#aaaaaa", linewidth=0.8)
        ends.append([max(points), points[max(points)], letter])
    axes.plot([1, most], [1, most], "--", color="#444444", linewidth=1, label="ideal")
    for scheme in schemes_of(groups):
        gains = [
            (group["devices"], sum(found) / len(found))
            for group in groups
            if group["parallelism"] == scheme and (found := speedups(group))
        ]
        colour, marker, style = SCHEMES.get(scheme, OTHER)
        best = sorted(
            {
                devices: max(gain for other, gain in gains if other == devices)
                for devices, _ in gains
            }.items()
        )
        axes.plot(*zip(*gains, strict=True), marker, color=colour, markersize=5)
        axes.plot(
            *zip(*best, strict=True),
            marker=marker,
            color=colour,
            linestyle=style,
            markersize=5,
            label=scheme,
        )
    for scale_axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        set_scale("log", base=2)
        scale_axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.set_xlim(0.93, most * (1.3 if published else 1.08))
    low, high = axes.get_ylim()
    gap, last = (high / low) ** (1 / 19), 0.0
    for gpus, gain, letter in sorted(
        ends, key=lambda end: end[:2]
    ):  # letters at the curves' ends, moved apart
        last = max(gain, last * gap)
        axes.annotate(
            letter,
            (gpus, last),
            (7, 0),
            textcoords="offset points",
            color="#555555",
            fontsize=8,
            va="center",
        )
    return finish(fig, axes, "Speedup")


def bars(
    groups: list[dict],
    unit: str,
    parts: dict[str, tuple[str, str, list[float]]],
    ticks: tuple[str, list[float | None]],
) -> str:
    """Lying stacked bars, one a group, with their sum at the end.

    parts: name -> colour, hatch, and a length for each group; ticks: a name, and a place on each bar (None: no tick).
    """
    fig = Figure(figsize=(WIDTH, 1.3 + 0.22 * len(groups)))
    axes = fig.add_subplot(title=title_of(groups[0]["panel"]), xlabel=unit)
    left, rows = [0.0] * len(groups), list(range(len(groups)))
    for name, (colour, hatch, widths) in parts.items():
        if any(widths):
            axes.barh(
                rows,
                widths,
                0.7,
                left,
                label=name,
                color=colour,
                hatch=hatch,
                edgecolor="#333333",
                linewidth=0.5,
            )
            left = [a + b for a, b in zip(left, widths, strict=True)]
    name, marks = ticks
    if marked := [(mark, row) for row, mark in zip(rows, marks, strict=True) if mark is not None]:
        axes.plot(
            *zip(*marked, strict=True),
            "|",
            color="black",
            markersize=11,
            markeredgewidth=1.6,
            label=name,
        )
    longest = max([*left, *(mark or 0 for mark in marks)]) or 1
    for row, (total, mark) in enumerate(zip(left, marks, strict=True)):
        behind = (
            mark if mark is not None and total < mark < total + 0.2 * longest else total
        )  # do not write over the tick
        axes.annotate(
            f"{total:,.{1 if total >= 10 else 2}f}",
            (behind, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(
        rows, [f"{group['mesh'][0]}x{group['mesh'][1]} {group['parallelism']}" for group in groups]
    )
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.2 * longest)
    return finish(fig, axes, unit)


def curves(runs: list[dict]) -> list[str]:
    """Loss and accuracy by step, one picture a panel: training as lines, test as markers, a colour a scheme."""
    panels = {}
    for run in runs:
        if run["metrics"]:
            panels.setdefault(panel_of(run), []).append(run)
    pictures = []
    for panel, members in panels.items():
        fig, seen = Figure(figsize=(WIDTH, 4.4)), set()
        pair = fig.subplots(2, sharex=True)
        for run in members:
            scheme = (
                run["figures"].get("parallelism")
                or run["settings"].get("parallelism")
                or run["status"]
            )
            colour, marker, style = SCHEMES.get(scheme, OTHER)
            for axes, name, factor in zip(pair, ("loss", "accuracy"), (1, 100), strict=True):
                train, test = (
                    [
                        (row["step"], factor * row[name])
                        for row in run["metrics"]
                        if name in row and (row["split"] == "train") == training
                    ]
                    for training in (True, False)
                )
                if train:
                    axes.plot(
                        *zip(*train, strict=True),
                        color=colour,
                        linestyle=style,
                        linewidth=1,
                        alpha=0.7,
                    )
                if test:
                    axes.plot(
                        *zip(*test, strict=True), marker, color=colour, markersize=5, alpha=0.7
                    )
            if scheme not in seen:
                seen.add(scheme)
                pair[0].plot([], [], marker=marker, color=colour, linestyle=style, label=scheme)
        pair[0].set(title=title_of(panel), ylabel="loss, nats")
        pair[1].set(xlabel="step", ylabel="accuracy, %")
        pictures.append(finish(fig, pair[0], "Loss and accuracy"))
    return pictures


def depth(networks: list[tuple[str, int, list[float]]]) -> str:
    """Test accuracy, %, by the number of layers with weights: a dot a run of each (label, layers, accuracies)."""
    fig = Figure(figsize=(WIDTH, 3.2))
    axes = fig.add_subplot(xlabel="layers with weights", ylabel="test accuracy, %")
    for name, layers, accuracies in networks:
        axes.plot(
            [layers] * len(accuracies), accuracies, "o", color="#0072B2", markersize=5, alpha=0.7
        )
        # Of two with as many layers, which may be close to each other, the better one's label is above it.
        above = any(
            other == layers and max(worse) < max(accuracies) for _, other, worse in networks
        )
        axes.annotate(
            name,
            (layers, max(accuracies) if above else min(accuracies)),
            xytext=(4, 4 if above else -4),
            textcoords="offset points",
            fontsize=8,
            va="bottom" if above else "top",
        )
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    axes.margins(x=0.2, y=0.2)
    return svg(fig, "Test accuracy by depth")


def schemes_of(groups: list[dict]) -> list[str]:
    """The schemes of some groups, in the table's order; rows of one's own last."""
    found = {group["parallelism"] for group in groups}
    return [scheme for scheme in SCHEMES if scheme in found] + sorted(found - SCHEMES.keys())


def finish(fig: Figure, axes: Axes, label: str) -> str:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        fig.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=2 if max(map(len, labels)) > 18 else 3,
        )
    return svg(fig, label)
