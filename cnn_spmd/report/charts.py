"""Make the charts of speed, bytes, memory and steps, with their captions."""

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cnn_spmd.papers import published
from cnn_spmd.report import batch_scaling, compare, plots, settings
from cnn_spmd.report.plots import Bars
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
MOST_NAMES = 6  # of runs in a caption
HELD_PARTS = {"parameters": ("#0072B2", ""), "optimizer": ("#E69F00", "////")}
SPLIT_CAPTIONS = {
    "profile": "Split as measured by a profile of {steps} steps, mean over the devices; the tick is"
    " the median step without the profiler.",
    "model": "Marked (model), not measured: communication is the ring bytes at the link's datasheet"
    " speed (NVLink, 450 GB/s each way), and the rest is what is left of the measured median step.",
    "": "Grey bars are not split: there is no profile, and no known speed of a link between the"
    " devices.",
}


def mesh_charts(sweep: dict) -> list[Chart]:
    """Return the charts of speed, bytes and memory by mesh and scheme.

    Speeds are compared where meshes or schemes vary. One device alone has no chart. Runs
    that differ in what they learn only share a point: the first of each seed stands for it.
    """
    runs, dropped = [], {}
    for run in sweep["runs"]:
        kept = {}
        for name, value in run["settings"].items():
            if settings.is_of_learning(name):
                dropped.setdefault(name, set()).add(str(value))
            else:
                kept[name] = value
        runs.append(run | dict(settings=kept))
    groups = compare.groups_of(runs)
    vary = len({(group["mesh"], group["parallelism"]) for group in groups}) > 1
    if not vary and all(group["devices"] == 1 for group in groups):
        return []
    drawn = []
    if vary:
        drawn.append(throughput_chart(sweep, groups))
    if vary and any(map(compare.group_speedups, groups)):
        drawn.append(speedup_chart(sweep, groups))
    drawn += [bar_chart(kind, sweep, groups) for kind in BAR_CHARTS]
    if vary and any(map(predicted_and_measured, groups)):
        drawn.append(prediction_chart(sweep, groups))
    drawn = [chart for chart in drawn if chart.pictures]
    if several := [name for name, values in dropped.items() if len(values) > 1]:
        text = f" Of runs that differ in {', '.join(several)} only, the first counts."
        drawn[0] = drawn[0]._replace(caption=drawn[0].caption + text)
    return drawn


def throughput_chart(sweep: dict, groups: list[dict]) -> Chart:
    """Return the chart of images/s by mesh."""
    caption = (
        "Images/s over the steady chunks; error bars reach from the 10th to the 90th percentile of "
        "the step time. Dashed: ideal, the fastest one-device run times the devices."
        f"{without_base(groups)} {timed_caption(sweep, groups)}"
    )
    return Chart("Throughput", list(map(plots.throughput, compare.panels_of(groups))), caption)


def speedup_chart(sweep: dict, groups: list[dict]) -> Chart:
    """Return the chart of speedups beside the published ones."""
    curves = comparable_curves(sweep, groups)
    panels = compare.panels_of(groups)
    scaled = [panel for panel in panels if any(map(compare.group_speedups, panel))]
    caption = (
        "Throughput relative to the one-device run with the same settings, both scales "
        "logarithmic; a line joins each scheme's fastest meshes."
        f"{without_base(groups)}{curves_caption(curves)} {timed_caption(sweep, groups)}"
    )
    return Chart("Speedup", [plots.speedup(panel, curves) for panel in scaled], caption)


def prediction_chart(sweep: dict, groups: list[dict]) -> Chart:
    """Return the chart of predicted steps beside measured ones."""
    pairs = [predicted_and_measured(group) for group in groups]
    errors = [abs(predicted / measured - 1) for predicted, measured in filter(None, pairs)]
    caption = (
        "Each point is a mesh and a scheme. On the line, the predicted step (docs/planning.md) is "
        f"the measured median. Median error {statistics.median(errors):.1%}, worst "
        f"{max(errors):.1%}. {timed_caption(sweep, groups)}"
    )
    return Chart("Predicted and measured steps", [plots.predictions(groups, pairs)], caption)


def predicted_and_measured(group: dict) -> tuple[float, float] | None:
    """Return a group's predicted and measured milliseconds per step, None without both."""
    predicted = compare.average(group, "predicted_milliseconds")
    measured = compare.average(group, "step_milliseconds", "median")
    return (predicted, measured) if predicted and measured else None


def steps_chart(sweep: dict, scaling: batch_scaling.Scaling) -> Chart:
    """Return the chart of steps to the target by batch size."""
    knee = scaling.knee if scaling.knee_is_measured else None
    _, noise = scaling.noise or (0, None)
    counts = {len(batch.runs) for batch in scaling.batches}
    none = [f"{batch.size:,}" for batch in scaling.batches if not batch.reached]
    left_out = f" Left out, without a run that reached it: {', '.join(none)}." if none else ""
    caption = (
        f"The fewest steps to a {scaling.goal}, both scales logarithmic. Perfect scaling: the "
        "smallest batch's steps, divided by how many times the batch is larger. "
        f"{compare.hardware_of(sweep)}; the best of n = {range_text(counts)} runs per point."
        f"{left_out}"
    )
    title = "Steps to the target by batch size"
    return Chart(title, [plots.steps_to_target(scaling.steps, knee, noise)], caption)


# ---- Captions


def timed_caption(sweep: dict, groups: list[dict]) -> str:
    """Return hardware, number of runs and what is left out, for a chart of times."""
    left_out = left_out_text(sweep["runs"])
    return (
        f"{compare.hardware_of(sweep)}; {count_text(groups)}. Left out: first chunks (warm-up), "
        f"compilation, evaluation, checkpoints{left_out}."
    )


def compiled_caption(sweep: dict, groups: list[dict]) -> str:
    """Return the same for a chart of what the compiled program says."""
    count = count_text(groups, chunks=False)
    left_out = left_out_text(sweep["runs"])
    return (
        f"From the step as compiled for {compare.hardware_of(sweep)}; {count}. "
        f"Left out: evaluation{left_out}."
    )


def count_text(groups: Sequence[dict], chunks: bool = True) -> str:
    """Return how many runs, and steady chunks of each, a point stands for."""
    sizes = {len(group["runs"]) for group in groups}
    if not sizes:
        return "n = 0"
    counted = f"n = {range_text(sizes)} run{'s' * (sizes != {1})} (seeds) per point"
    counted += ", averaged" * (max(sizes) > 1)
    steady = {n for group in groups for n in compare.values(group, "steady_calls")}
    if chunks and steady:
        counted += f", each over {range_text(steady)} steady chunk{'s' * (steady != {1})}"
    return counted


def range_text(numbers: set[int]) -> str:
    """Return "3" for {3}, "1 to 3" for {1, 3}."""
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def left_out_text(runs: Sequence[dict]) -> str:
    """Return the runs that did not complete or have no speed, by reason; "" for none."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run["status"] != "completed":
            names.setdefault(run["status"], []).append(run["name"])
        elif not run["figures"].get("images_per_second"):
            names.setdefault("that had no step left to time", []).append(run["name"])
    return "".join(f"; runs {status}: {names_text(some)}" for status, some in names.items())


def names_text(names: Sequence[str]) -> str:
    """Return names joined by commas; of many, only the first."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more


def without_base(groups: Sequence[dict]) -> str:
    """Return which panels have no one-device run; "" for none."""
    alone = [
        panel[0]["panel"]
        for panel in compare.panels_of(groups)
        if not any(map(compare.group_speedups, panel))
    ]
    if not alone:
        return ""
    return f" There is no one-device run, so no ideal and no speedup, with: {'; '.join(alone)}."


def comparable_curves(sweep: dict, groups: Sequence[dict]) -> dict[str, dict]:
    """Return letter -> published curve; {} unless this is AlexNet on real devices."""
    models = {model for group in groups for model in compare.values(group, "model")}
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


# ---- Charts of bars


class BarChart(NamedTuple):
    """One kind of bar chart; caption "": says how the step was split."""

    title: str
    bars_of: Callable[[list[dict]], Bars]
    shows: Callable[[dict], bool]
    caption: str


def bar_chart(kind: BarChart, sweep: dict, groups: list[dict]) -> Chart:
    """Return one bar chart: a picture per panel, a bar per group that has the figures."""
    shown = [group for group in groups if kind.shows(group)]
    pictures = [plots.bars(panel, kind.bars_of(panel)) for panel in compare.panels_of(shown)]
    if not kind.caption:
        caption = f"{split_caption(shown)} {timed_caption(sweep, groups)}"
        return Chart(kind.title, pictures, caption)
    caption = f"{kind.caption} {compiled_caption(sweep, groups)}"
    silent = [run["name"] for group in groups if group not in shown for run in group["runs"]]
    if silent:
        caption += f" Without a report on the program: {names_text(silent)}."
    return Chart(kind.title, pictures, caption)


def has_speed(group: dict) -> bool:
    """Return whether a group was timed."""
    return bool(compare.average(group, "images_per_second"))


def has_collectives(group: dict) -> bool:
    """Return whether the collectives of a group's program are known."""
    return group["runs"][0]["figures"]["collectives"] is not None


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
    captions = [caption for kind, caption in SPLIT_CAPTIONS.items() if kind in kinds]
    return " ".join(captions).format(steps=" or ".join(map(str, steps)))


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


BAR_CHARTS = (
    BarChart("Step time", step_bars, has_speed, ""),
    BarChart(
        "Bytes moved by collectives",
        moved_bars,
        has_collectives,
        "What the collectives of a step send from each device if each runs as a ring, in MB of 1e6"
        " bytes; the tick is the closed form (Gholami et al. 2018).",
    ),
    BarChart(
        "Memory per device",
        held_bars,
        lambda group: True,
        "Parameters and optimizer state, in MB of 1e6 bytes; the tick is the peak of the compiled"
        " program as XLA gives it, with activations and data.",
    ),
)
