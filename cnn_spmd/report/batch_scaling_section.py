"""Make the section of the report on the steps to a target against batch size."""

import numpy as np

from cnn_spmd.report import batch_scaling, captions, compare, plots, settings
from cnn_spmd.report.batch_scaling import LEAST, Batch, Knee, Scaling, noise_scale
from cnn_spmd.report.text import Block, Chart, Heading, Paragraph, Table

HEADER = [
    "batch",
    "steps to the target",
    "evaluation before, step",
    "images to the target",
    "speedup in steps",
    "ideal",
    "setting",
    "runs that reached it",
    "noise scale, images",
]
LEGEND = (
    "For each batch size, the run that reached the target in the fewest steps counts (Shallue et "
    "al. 2019); its setting is named. A run reaches the target somewhere between two evaluations; "
    "the later one counts. Speedup is relative to the smallest batch that reached the target; ideal"
    " is the ratio of the batches. A learning rate that decays until the run's end ties the steps "
    "to the length of the run."
)


def section(sweep: dict, target_error: float | None) -> list[Block]:
    """Return the section of a sweep; [] where it has none (batch_scaling.measure).

    A sweep of too few batch sizes has a sentence instead.
    """
    scaling = batch_scaling.measure(sweep, target_error)
    if scaling is None:
        evaluated = filter(settings.is_evaluated, sweep["runs"])
        sizes = {run["settings"].get("batch_size") for run in evaluated} - {None}
        few = f"The steps to a target need {LEAST} batch sizes; this sweep has {len(sizes)}."
        return [Paragraph(few)] if 1 < len(sizes) < LEAST else []
    split = compare.split_of(run["config"] for run in sweep["runs"])
    goal = f"{split} error of {100 * (1 - scaling.target):.4g} %"
    texts = [f"Target: a {goal}, {scaling.reason}.", knee_text(scaling), noise_text(scaling)]
    hit = [batch for batch in scaling.batches if batch.reached]
    early = [f"{batch.size:,}" for batch in hit if not batch.reached[0].before]
    if early:
        texts.append(f"The first evaluation already reached it, at batch {', '.join(early)}.")
    return [
        *([steps_chart(sweep, scaling, goal)] if scaling.steps else []),
        Heading(3, "Steps to a target against batch size"),
        Table(HEADER, [row_of(scaling, batch) for batch in scaling.batches]),
        *map(Paragraph, [*texts, LEGEND]),
    ]


def steps_chart(sweep: dict, scaling: Scaling, goal: str) -> Chart:
    """Return the chart of steps to the target by batch size; goal: "test error of 9 %"."""
    knee = scaling.knee if scaling.knee_is_measured else None
    _, noise = scaling.noise or (0, None)
    counts = {len(batch.runs) for batch in scaling.batches}
    missed = [f"{batch.size:,}" for batch in scaling.batches if not batch.reached]
    left_out = f" Left out, without a run that reached it: {', '.join(missed)}." if missed else ""
    caption = (
        f"The fewest steps to a {goal}, both scales logarithmic. Perfect scaling: the "
        "smallest batch's steps, divided by how many times the batch is larger. "
        f"{compare.hardware_of(sweep)}; the best of n = {captions.range_text(counts)} runs per "
        f"point.{left_out}"
    )
    title = "Steps to the target by batch size"
    return Chart(title, [draw_steps(scaling.steps, knee, noise)], caption)


def draw_steps(steps: dict[int, int], knee: Knee | None, noise: float | None) -> str:
    """Return steps by batch size, the fit with its knee, and the noise scale.

    steps: batch size -> steps, smallest batch first.
    """
    axes = plots.new_axes(3.6, xlabel="batch size", ylabel="steps to the target")
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
    plots.set_log2_scales(axes)
    return plots.svg_with_legend(axes, "Steps to the target")


def row_of(scaling: Scaling, batch: Batch) -> list[str]:
    """Return a batch size's cells under HEADER."""
    counted = f"{len(batch.reached)} of {len(batch.runs)}"
    if not batch.reached:
        return [f"{batch.size:,}", *[""] * 6, counted, ""]
    smallest, most_steps = next(iter(scaling.steps.items()))
    step, before, run = batch.reached[0]
    others = (item for item in run["settings"].items() if item[0] != "batch_size")
    scale = noise_scale(batch)
    return [
        f"{batch.size:,}",
        f"{step:,}",
        f"{before:,}" if before else "none",
        f"{step * batch.size:,}",
        f"{most_steps / step:.2f}",
        f"{batch.size / smallest:.2f}",
        ", ".join(f"{name}={value}" for name, value in others),
        counted,
        "" if scale is None else f"{scale:,.0f}",
    ]


def knee_text(scaling: Scaling) -> str:
    """Say where the knee is, or why it cannot be determined."""
    steps, knee = scaling.steps, scaling.knee
    if knee is None:
        return f"No knee: it takes {LEAST} batch sizes that reach the target, here {len(steps)} do."
    miss = f"The fit misses the steps by {100 * knee.miss:.1f} % (root mean square)."
    if knee.batch > max(steps):
        return (
            f"The knee cannot be determined. By the fit it lies above batch {max(steps):,}, the "
            f"largest: the steps still fall nearly in proportion to the batch. {miss}"
        )
    if knee.batch < min(steps):
        return (
            f"The knee cannot be determined. By the fit it lies below batch {min(steps):,}, the "
            f"smallest: no batch here scales perfectly. {miss}"
        )
    return (
        f"The knee is at batch {knee.batch:,.0f}: B_crit of S = S_min (1 + B_crit / B) (McCandlish "
        "et al. 2018). There a run needs twice the fewest possible steps, "
        f"S_min = {knee.fewest_steps:,.0f}, and twice the fewest possible images. {miss}"
    )


def noise_text(scaling: Scaling) -> str:
    """Say what the simple noise scale is, and of which batch size."""
    if scaling.noise is None:
        return (
            "There is no noise scale at the target: the runs did not measure it (--noise_scale), "
            "or noise hid the gradient."
        )
    size, scale = scaling.noise
    return (
        f"The simple noise scale tr(S) / |G|^2 is {scale:,.0f} images (McCandlish et al. 2018), "
        f"measured in the runs of batch {size:,} at the evaluation nearest to the target. It "
        "predicts the knee's order of magnitude."
    )
