"""Make the charts of bars: step time, bytes moved and memory, by mesh and scheme."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from cnn_spmd.report import captions, compare, plots
from cnn_spmd.report.compare import Group
from cnn_spmd.report.text import Chart

UNSPLIT = "step, not split"
# Part of a bar -> colour, hatch. The parts of a bar are stacked in this order.
LOOKS = {
    "computing": ("#56B4E9", ""),
    "computing + communicating": ("#0072B2", "////"),
    "communicating, exposed": ("#D55E00", "xxxx"),
    "idle": ("#ffffff", ""),
    UNSPLIT: ("#bbbbbb", ""),
    "all-reduce": ("#0072B2", ""),
    "all-gather": ("#E69F00", "////"),
    "reduce-scatter": ("#009E73", "xxxx"),
    "all-to-all": ("#CC79A7", "...."),
    "collective-permute": ("#56B4E9", "\\\\\\\\"),
    "parameters": ("#0072B2", ""),
    "optimizer": ("#E69F00", "////"),
}
OTHER = ("#ffffff", "++++")
PROFILED = (
    "Split as measured by a profile of {} steps, mean over the devices; the tick is the median step"
    " without the profiler."
)
NOT_SPLIT = "Grey bars are not split: there is no profile."
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

    parts: one dict per bar, name (a key of LOOKS) -> length. marks: where a tick stands on each
    bar; None for no tick.
    """

    unit: str
    parts: list[dict[str, float]]
    mark_name: str
    marks: list[float | None]


def bar_charts(sweep: dict, groups: list[Group]) -> list[Chart]:
    """Return the charts of step time, bytes moved and memory, of the groups that have them."""
    timed = [group for group in groups if group.average("images_per_second")]
    read = [group for group in groups if group.figures["collectives"] is not None]
    unread = [run["name"] for group in groups if group not in read for run in group.runs]
    compiled = captions.compiled_caption(sweep, groups)
    moved_caption = f"{MOVED_CAPTION} {compiled}"
    if unread:
        moved_caption += f" Without a report on the program: {captions.names_text(unread)}."
    return [
        Chart(
            "Step time",
            draw_panels(timed, step_bars),
            f"{split_caption(timed)} {captions.timed_caption(sweep, groups)}",
        ),
        Chart("Bytes moved by collectives", draw_panels(read, moved_bars), moved_caption),
        Chart("Memory per device", draw_panels(groups, held_bars), f"{HELD_CAPTION} {compiled}"),
    ]


def draw_panels(groups: list[Group], bars_of: Callable[[list[Group]], Bars]) -> list[str]:
    """Return a picture per panel, with a bar per group."""
    return [draw_bars(panel, bars_of(panel)) for panel in compare.panels_of(groups)]


def draw_bars(groups: list[Group], shown: Bars) -> str:
    """Return horizontal stacked bars, one per group, with their sums at the ends."""
    title = plots.panel_title(groups[0].panel)
    axes = plots.new_axes(1.3 + 0.22 * len(groups), title=title, xlabel=shown.unit)
    rows = list(range(len(groups)))
    ends = [0.0] * len(groups)
    found = {name for parts in shown.parts for name, length in parts.items() if length}
    for name in [*filter(found.__contains__, LOOKS), *sorted(found - LOOKS.keys())]:
        colour, hatch = LOOKS.get(name, OTHER)
        lengths = [parts.get(name, 0.0) for parts in shown.parts]
        look = dict(color=colour, hatch=hatch, edgecolor="#333333", linewidth=0.5)
        axes.barh(rows, lengths, 0.7, ends, label=name, **look)
        ends = [end + length for end, length in zip(ends, lengths, strict=True)]
    if set(shown.marks) != {None}:
        look = dict(color="black", markersize=11, markeredgewidth=1.6)
        axes.plot(shown.marks, rows, "|", label=shown.mark_name, **look)
    longest = max([*ends, *(mark or 0 for mark in shown.marks)]) or 1
    for row, (end, mark) in enumerate(zip(ends, shown.marks, strict=True)):
        # A mark just behind the end would be written over.
        hidden = mark is not None and end < mark < end + 0.2 * longest
        place = (mark if hidden else end, row)
        digits = 1 if end >= 10 else 2
        axes.annotate(f"{end:,.{digits}f}", place, (4, 0), va="center", **plots.LABEL)
    names = [f"{compare.mesh_name(group.mesh)} {group.parallelism}" for group in groups]
    axes.set_yticks(rows, names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.2 * longest)
    return plots.svg_with_legend(axes, shown.unit)


# ---- Step time


def step_parts(group: Group) -> dict[str, float]:
    """Return the parts of a group's step in ms, as profiled; without a profile it is one part."""
    compute, communication, exposed, idle = (
        group.average("profile", f"{name}_milliseconds")
        for name in ("compute", "communication", "exposed", "idle")
    )
    if None in (compute, communication, exposed, idle):
        return {UNSPLIT: group.average("step_milliseconds", "median")}
    hidden = communication - exposed
    return {
        "computing": max(0.0, compute - hidden),
        "computing + communicating": max(0.0, hidden),
        "communicating, exposed": exposed,
        "idle": idle,
    }


def split_caption(groups: Sequence[Group]) -> str:
    """Return how the groups' steps were split."""
    steps = sorted({int(n) for group in groups for n in group.values("profile", "steps")})
    said = [PROFILED.format(" or ".join(map(str, steps)))] if steps else []
    if any(UNSPLIT in step_parts(group) for group in groups):
        said.append(NOT_SPLIT)
    return " ".join(said)


def step_bars(groups: list[Group]) -> Bars:
    """Return the step time, split; ticks: the step time without the profiler."""
    parts = list(map(step_parts, groups))
    medians = [
        None if UNSPLIT in split else group.average("step_milliseconds", "median")
        for group, split in zip(groups, parts, strict=True)
    ]
    return Bars("ms per step", parts, "without profiler", medians)


# ---- Bytes and memory


def moved_bars(groups: list[Group]) -> Bars:
    """Return the ring bytes by operation; ticks: the closed form."""
    parts = []
    for group in groups:
        sizes: dict[str, float] = {}
        for row in group.figures["collectives"]:
            sizes[row["operation"]] = sizes.get(row["operation"], 0.0) + row["ring_bytes"] / 1e6
        parts.append(sizes)
    theory = megabytes(groups, "closed_form_ring_bytes")
    return Bars("MB sent per device and step", parts, "closed form", theory)


def held_bars(groups: list[Group]) -> Bars:
    """Return the bytes of parameters and optimizer; ticks: the program's peak."""
    sizes = [group.figures["bytes_per_device"] for group in groups]
    parts = [{name: (size or 0.0) / 1e6 for name, size in own.items()} for own in sizes]
    return Bars("MB per device", parts, "peak", megabytes(groups, "peak_bytes"))


def megabytes(groups: Sequence[Group], name: str) -> list[float | None]:
    """Return the mean of a figure of each group in MB; None where it is not known."""
    sizes = [group.average(name) for group in groups]
    return [None if size is None else size / 1e6 for size in sizes]
