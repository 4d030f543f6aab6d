"""Make the charts of speed by mesh and scheme: throughput, speedup, predicted steps."""

import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from cnn_spmd.papers import published
from cnn_spmd.report import bar_charts, captions, compare, plots, settings
from cnn_spmd.report.canvas import Axes, ticker
from cnn_spmd.report.compare import Group
from cnn_spmd.report.settings import Overview
from cnn_spmd.report.text import Chart


def mesh_charts(sweep: dict, overview: Overview) -> list[Chart]:
    """Return the charts of speed, bytes and memory by mesh and scheme.

    Speeds are compared where meshes or schemes vary. One device alone has no chart. Runs that
    differ only in what they learn share a point, and the first of each seed stands for it.
    """
    runs = []
    for run in sweep["runs"]:
        own = run["settings"].items()
        kept = {name: value for name, value in own if not settings.is_of_learning(name)}
        runs.append(run | dict(settings=kept))
    groups = compare.groups_of(runs)
    vary = len({(group.mesh, group.parallelism) for group in groups}) > 1
    if not vary and all(group.devices == 1 for group in groups):
        return []
    drawn = bar_charts.bar_charts(sweep, groups)
    if vary:
        drawn = [throughput_chart(sweep, groups), speedup_chart(sweep, groups), *drawn]
    if vary and any(map(predicted_and_measured, groups)):
        drawn.append(prediction_chart(sweep, groups))
    drawn = [chart for chart in drawn if chart.pictures]
    varied = [name for each in overview.settings for name in (each.name, *each.along)]
    if of_learning := list(filter(settings.is_of_learning, varied)):
        text = f" Where runs differ in {', '.join(of_learning)} only, the first counts."
        drawn[0] = drawn[0]._replace(caption=drawn[0].caption + text)
    return drawn


# ---- Throughput


def throughput_chart(sweep: dict, groups: list[Group]) -> Chart:
    """Return the chart of images/s by mesh."""
    caption = (
        "Images/s over the steady chunks; error bars reach from the 10th to the 90th percentile of "
        "the step time. Dashed: ideal, the fastest one-device run times the devices."
        f"{without_base(groups)} {captions.timed_caption(sweep, groups)}"
    )
    return Chart("Throughput", list(map(draw_throughput, compare.panels_of(groups))), caption)


def without_base(groups: Sequence[Group]) -> str:
    """Return which panels have no one-device run; "" for none."""
    alone = dict.fromkeys(group.panel for group in groups if group.base is None)
    if not alone:
        return ""
    return f" There is no one-device run, so no ideal and no speedup, with: {'; '.join(alone)}."


def draw_throughput(groups: list[Group]) -> str:
    """Return images/s by mesh, one marker per scheme."""
    title = plots.panel_title(groups[0].panel)
    axes = plots.new_axes(3.2, title=title, xlabel="mesh, data x model", ylabel="images/s")
    meshes = list(dict.fromkeys(group.mesh for group in groups))
    draw_ideal(axes, groups, meshes)
    schemes = plots.in_order(group.parallelism for group in groups)
    for number, scheme in enumerate(schemes):
        offset = (number - (len(schemes) - 1) / 2) * 0.7 / len(schemes)
        members = [group for group in groups if group.parallelism == scheme]
        timed = [group for group in members if group.values("images_per_second")]
        places = [meshes.index(group.mesh) + offset for group in timed]
        rates = [group.average("images_per_second") for group in timed]
        look = plots.look_of(scheme) | dict(linestyle="none", markersize=5, elinewidth=1, capsize=2)
        axes.errorbar(places, rates, yerr=error_bars(timed, rates), label=scheme, **look)
    axes.set_xticks(range(len(meshes)), list(map(compare.mesh_name, meshes)))
    axes.set_xlim(-0.5, len(meshes) - 0.5)
    axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,.0f}"))
    return plots.svg_with_legend(axes, "Throughput")


def draw_ideal(axes: Axes, groups: Sequence[Group], meshes: Sequence[tuple[int, ...]]) -> None:
    """Draw the fastest one-device run's rate times the devices, on each mesh."""
    one_device = [group for group in groups if group.devices == 1]
    fastest = max((group.average("images_per_second") or 0 for group in one_device), default=0)
    if fastest:
        ideal = [fastest * math.prod(mesh) for mesh in meshes]
        places = np.arange(len(meshes))
        axes.hlines(ideal, places - 0.42, places + 0.42, "#777777", "dashed", label="ideal")


def error_bars(groups: Sequence[Group], rates: Sequence[float]) -> list[list[float]]:
    """Return how far below and above `rates` the p90 and p10 step times lie."""
    below, above = [], []
    for group, rate in zip(groups, rates, strict=True):
        slow, fast = (group.average("step_milliseconds", name) for name in ("p90", "p10"))
        images = 1e3 * group.figures["batch_size"]
        below.append(max(0.0, rate - images / slow) if slow else 0.0)
        above.append(max(0.0, images / fast - rate) if fast else 0.0)
    return [below, above]


# ---- Speedup


def speedup_chart(sweep: dict, groups: list[Group]) -> Chart:
    """Return the chart of speedups beside the published ones."""
    curves = comparable_curves(sweep, groups)
    panels = compare.panels_of([group for group in groups if group.speedups()])
    caption = (
        "Throughput relative to the one-device run with the same settings, both scales "
        "logarithmic; a line joins each scheme's fastest meshes."
        f"{without_base(groups)}{curves_caption(curves)} {captions.timed_caption(sweep, groups)}"
    )
    return Chart("Speedup", [draw_speedup(panel, curves) for panel in panels], caption)


def comparable_curves(sweep: dict, groups: Sequence[Group]) -> dict[str, dict]:
    """Return letter -> published curve; {} unless this is AlexNet on real devices."""
    models = {model for group in groups for model in group.values("model")}
    simulated = (sweep["hardware"] or {}).get("device_kind") == "cpu"
    if simulated or not all(model.startswith("alexnet") for model in models):
        return {}
    return dict(zip("abcdefghij", published.CURVES, strict=False))


def curves_caption(curves: dict[str, dict]) -> str:
    """Return the sources of the published curves; "" for none."""
    if not curves:
        return ""
    sources: dict[tuple, list[str]] = {}
    for letter, curve in curves.items():
        source = (curve["paper"], curve["hardware"], f"batch {curve['batch']}")
        sources.setdefault(source, []).append(f"{letter} {curve['scheme']}")
    texts = [f"{', '.join(letters)} ({', '.join(source)})" for source, letters in sources.items()]
    return (
        " Grey: published, each relative to one GPU of its own, on 224x224 images, the batch "
        f"growing with the GPUs: {'; '.join(texts)}."
    )


def draw_speedup(groups: list[Group], curves: dict[str, dict]) -> str:
    """Return speedup by devices, one line per scheme; published curves behind."""
    title = plots.panel_title(groups[0].panel)
    axes = plots.new_axes(3.6, title=title, xlabel="devices", ylabel="speedup")
    most = max(2, *(group.devices for group in groups))
    ends = draw_published(axes, curves, most)
    axes.plot([1, most], [1, most], "--", color="#444444", linewidth=1, label="ideal")
    for scheme in plots.in_order(group.parallelism for group in groups):
        same = [group for group in groups if group.parallelism == scheme]
        gains = sorted((group.devices, statistics.mean(group.speedups())) for group in same)
        best = dict(gains)  # of each number of devices, the last is the best
        look = dict(markersize=5, **plots.look_of(scheme))
        axes.plot(*zip(*gains, strict=True), **look | dict(linestyle="none"))
        axes.plot(list(best), list(best.values()), label=scheme, **look)
    plots.set_log2_scales(axes)
    axes.set_xlim(0.93, most * (1.3 if curves else 1.08))
    write_letters(axes, ends)
    return plots.svg_with_legend(axes, "Speedup")


def draw_published(axes: Axes, curves: dict[str, dict], most: int) -> list[tuple]:
    """Draw the curves up to `most` GPUs; return GPUs, speedup, letter of their ends."""
    ends = []
    for letter, curve in curves.items():
        points = [point for point in published.curve_speedups(curve).items() if point[0] <= most]
        axes.plot(*zip(*points, strict=True), color="#aaaaaa", linewidth=0.8)
        ends.append((*points[-1], letter))
    return ends


def write_letters(axes: Axes, ends: Sequence[tuple]) -> None:
    """Write the published curves' letters at their ends, without overlaps."""
    low, high = axes.get_ylim()
    gap = (high / low) ** (1 / 19)
    last = 0.0
    for gpus, gain, letter in sorted(ends, key=lambda end: end[:2]):
        last = max(gain, last * gap)
        axes.annotate(letter, (gpus, last), (7, 0), color="#555555", va="center", **plots.LABEL)


# ---- Predictions


def prediction_chart(sweep: dict, groups: list[Group]) -> Chart:
    """Return the chart of predicted steps beside measured ones."""
    found: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        if pair := predicted_and_measured(group):
            found.setdefault(group.parallelism, []).append(pair)
    errors = [
        abs(predicted / measured - 1) for own in found.values() for predicted, measured in own
    ]
    caption = (
        "Each point is a mesh and a scheme. On the line, the predicted step (docs/planning.md) is "
        f"the measured median. Median error {statistics.median(errors):.1%}, worst "
        f"{max(errors):.1%}. {captions.timed_caption(sweep, groups)}"
    )
    return Chart("Predicted and measured steps", [draw_predictions(found)], caption)


def predicted_and_measured(group: Group) -> tuple[float, float] | None:
    """Return a group's predicted and measured milliseconds per step, None without both."""
    predicted = group.average("predicted_milliseconds")
    measured = group.average("step_milliseconds", "median")
    return (predicted, measured) if predicted and measured else None


def draw_predictions(found: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Return predicted over measured milliseconds per step, with the line of equal ones.

    found: scheme -> predicted and measured, for each mesh.
    """
    axes = plots.new_axes(3.6, xlabel="measured step, ms", ylabel="predicted step, ms")
    for scheme, pairs in found.items():
        predicted, measured = zip(*pairs, strict=True)
        look = plots.look_of(scheme) | dict(linestyle="none", markersize=5, alpha=0.7)
        axes.plot(measured, predicted, label=scheme, **look)
    times = np.concatenate([*found.values()])
    ends = [0.9 * times.min(), 1.1 * times.max()]
    axes.plot(ends, ends, "--", color="#444444", linewidth=1, label="equal")
    return plots.svg_with_legend(axes, "Predicted and measured steps")
