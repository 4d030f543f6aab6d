"""Make the charts of bars: step time, bytes moved and memory, by mesh and scheme."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cnn_spmd.papers import published
from cnn_spmd.report import captions, compare, plots
from cnn_spmd.report.canvas import Axes, Figure
from cnn_spmd.report.text import Chart

# Part of a step -> colour, hatch.
STEP_PARTS = {
    "computing": ("#56B4E9", ""),
    "computing + communicating": ("#0072B2", "////"),
    "communicating, exposed": ("#D55E00", "xxxx"),
    "idle": ("#ffffff", ""),
    "communicating (model)": ("#E69F00", "\\\\\\\\"),
    "rest of the step (model)": ("#cfe8f7", ""),
    "step, not split": ("#bbbbbb", ""),
}
OPERATIONS = {
    "all-reduce": ("#0072B2", ""),
    "all-gather": ("#E69F00", "////"),
    "reduce-scatter": ("#009E73", "xxxx"),
    "all-to-all": ("#CC79A7", "...."),
    "collective-permute": ("#56B4E9", "\\\\\\\\"),
}
HELD_PARTS = {"parameters": ("#0072B2", ""), "optimizer": ("#E69F00", "////")}
SPLIT_CAPTIONS = {
    "profile": "Split as measured by a profile of {steps} steps, mean over the devices; the tick is"
    " the median step without the profiler.",
    "model": "Marked (model), not measured: communication is the ring bytes at the link's datasheet"
    " speed (NVLink, 450 GB/s each way), and the rest is what is left of the measured median step.",
    "": "Grey bars are not split: there is no profile, and no known speed of a link between the"
    " devices.",
}
MOVED_CAPTION = (
    "What the collectives of a step send from each device if each runs as a ring, in MB of 1e6"
    " bytes; the tick is the closed form (Gholami et al. 2018)."
)
HELD_CAPTION = (
    "Parameters and optimizer state, in MB of 1e6 bytes; the tick is the peak of the compiled"
    " program as XLA gives it, with activations and data."
)


class Bars(NamedTuple):
    """Stacked bars, one per group.

    parts: name -> colour, hatch, and one length per group. marks: where a tick stands on each bar;
    None for no tick.
    """

    unit: str
    parts: dict[str, tuple[str, str, list[float]]]
    mark_name: str
    marks: list[float | None]


def bar_charts(sweep: dict, groups: list[dict]) -> list[Chart]:
    """Return the charts of step time, bytes moved and memory, without those of no group."""
    timed = [group for group in groups if compare.average(group, "images_per_second")]
    read = [group for group in groups if group["runs"][0]["figures"]["collectives"] is not None]
    unread = [run["name"] for group in groups if group not in read for run in group["runs"]]
    compiled = captions.compiled_caption(sweep, groups)
    moved_caption = f"{MOVED_CAPTION} {compiled}"
    if unread:
        moved_caption += f" Without a report on the program: {captions.names_text(unread)}."
    made = [
        Chart(
            "Step time",
            draw_panels(timed, step_bars),
            f"{split_caption(timed)} {captions.timed_caption(sweep, groups)}",
        ),
        Chart("Bytes moved by collectives", draw_panels(read, moved_bars), moved_caption),
        Chart("Memory per device", draw_panels(groups, held_bars), f"{HELD_CAPTION} {compiled}"),
    ]
    return [chart for chart in made if chart.pictures]


def draw_panels(groups: list[dict], bars_of: Callable[[list[dict]], Bars]) -> list[str]:
    """Return a picture per panel, with a bar per group."""
    return [draw_bars(panel, bars_of(panel)) for panel in compare.panels_of(groups)]


def draw_bars(groups: list[dict], shown: Bars) -> str:
    """Return horizontal stacked bars, one per group, with their sums at the ends."""
    fig = Figure(figsize=(plots.WIDTH, 1.3 + 0.22 * len(groups)))
    axes = fig.add_subplot(title=plots.panel_title(groups[0]["panel"]), xlabel=shown.unit)
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
        axes.annotate(f"{end:,.{digits}f}", place, (4, 0), va="center", **plots.LABEL)
    names = [f"{compare.mesh_name(group['mesh'])} {group['parallelism']}" for group in groups]
    axes.set_yticks(rows, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.2 * longest)
    return plots.svg_with_legend(fig, axes, shown.unit)


def draw_marks(axes: Axes, shown: Bars) -> None:
    """Draw the ticks on the bars."""
    marked = [(mark, row) for row, mark in enumerate(shown.marks) if mark is not None]
    if marked:
        look = dict(color="black", markersize=11, markeredgewidth=1.6, label=shown.mark_name)
        axes.plot(*zip(*marked, strict=True), "|", **look)


# ---- Step time


def step_split(group: dict) -> tuple[str, dict[str, float]]:
    """Return how a group's step was split, and its parts in ms.

    The first value is a key of SPLIT_CAPTIONS.
    """
    compute, communication, exposed, idle = (
        compare.average(group, "profile", f"{name}_milliseconds")
        for name in ("compute", "communication", "exposed", "idle")
    )
    if None not in (compute, communication, exposed, idle):
        hidden = communication - exposed
        parts = (compute - hidden, hidden, exposed, idle)
        return "profile", dict(zip(STEP_PARTS, parts, strict=False))
    figures = group["runs"][0]["figures"]
    step = compare.average(group, "step_milliseconds", "median")
    link = published.LINKS.get(figures["device_kind"])
    ring = compare.average(group, "ring_bytes")
    if link is None or ring is None or figures.get("processes", 1) > 1:
        return "", {"step, not split": step}
    communication = min(step, 1e3 * ring / link)
    return "model", {
        "communicating (model)": communication,
        "rest of the step (model)": step - communication,
    }


def split_caption(groups: Sequence[dict]) -> str:
    """Return the captions of the ways in which the groups' steps were split."""
    kinds = {step_split(group)[0] for group in groups}
    steps = sorted({int(n) for group in groups for n in compare.values(group, "profile", "steps")})
    said = [caption for kind, caption in SPLIT_CAPTIONS.items() if kind in kinds]
    return " ".join(said).format(steps=" or ".join(map(str, steps)))


def step_bars(groups: list[dict]) -> Bars:
    """Return the step time, split; ticks: the step time without the profiler."""
    splits = [step_split(group) for group in groups]
    parts = {
        part: (*look, [max(0.0, split.get(part, 0.0)) for _, split in splits])
        for part, look in STEP_PARTS.items()
    }
    medians = [
        compare.average(group, "step_milliseconds", "median") if kind == "profile" else None
        for group, (kind, _) in zip(groups, splits, strict=True)
    ]
    return Bars("ms per step", parts, "without profiler", medians)


# ---- Bytes and memory


def moved_bars(groups: list[dict]) -> Bars:
    """Return the ring bytes by operation; ticks: the closed form."""
    programs = [group["runs"][0]["figures"]["collectives"] for group in groups]
    found = {row["operation"] for collectives in programs for row in collectives}
    looks = OPERATIONS | dict.fromkeys(sorted(found - OPERATIONS.keys()), ("#ffffff", "++++"))
    parts = {}
    for name, look in looks.items():
        sizes = [
            sum(row["ring_bytes"] for row in collectives if row["operation"] == name) / 1e6
            for collectives in programs
        ]
        parts[name] = (*look, sizes)
    theory = megabytes(groups, "closed_form_ring_bytes")
    return Bars("MB sent per device and step", parts, "closed form", theory)


def held_bars(groups: list[dict]) -> Bars:
    """Return the bytes of parameters and optimizer; ticks: the program's peak."""
    parts = {
        name: (*look, [size or 0.0 for size in megabytes(groups, "bytes_per_device", name)])
        for name, look in HELD_PARTS.items()
    }
    return Bars("MB per device", parts, "peak", megabytes(groups, "peak_bytes"))


def megabytes(groups: Sequence[dict], *path: str) -> list[float | None]:
    """Return the mean of a figure of each group in MB; None where it is not known."""
    sizes = [compare.average(group, *path) for group in groups]
    return [None if size is None else size / 1e6 for size in sizes]
