"""Draw the pictures of results/ as SVG.

This module loads matplotlib, which the tables do not need.
"""

import functools
import math
import statistics
from collections.abc import Callable, Collection, Sequence

from cnn_spmd.papers import depth, large_batches
from cnn_spmd.report import plots
from cnn_spmd.report.canvas import Axes, Figure, ticker

# Rule of large_batches.RULE_NAMES -> colour and marker. Networks have line styles.
RULES = {"SGD": ("#0072B2", "o"), "LARS": ("#D55E00", "s"), "LARC": ("#009E73", "^")}
NETWORKS = {"AlexNet": "-", "AlexNet-BN": "--"}


def accuracy_by_depth(runs: Sequence[dict]) -> str:
    """Return the accuracies of depth.depth_table as a picture, one dot per run."""
    by_network = depth.runs_by_depth(runs)
    accuracies = {
        name: [100 * run["eval"]["accuracy"] for run in same] for name, same in by_network.items()
    }
    with plots.style():
        axes = plots.new_axes(3.2, xlabel="layers with weights", ylabel="test accuracy, %")
        for name, own in accuracies.items():
            layers, *_ = depth.DEEPER[name]
            axes.plot([layers] * len(own), own, "o", color="#0072B2", markersize=5, alpha=0.7)
            rivals = [max(accuracies[n]) for n in accuracies if depth.DEEPER[n][0] == layers]
            # Two networks may have one depth: the better one's label is above its dots.
            above = min(rivals) < max(own)
            axes.annotate(
                f"{name}\n{by_network[name][0]['param_count'] / 1e6:.1f} M",
                (layers, max(own) if above else min(own)),
                xytext=(4, 4 if above else -4),
                va="bottom" if above else "top",
                **plots.LABEL,
            )
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.margins(x=0.2, y=0.2)
        return plots.svg(axes.figure, "Test accuracy by depth")


def error_by_batch(runs: Sequence[dict]) -> str:
    """Return the errors of large_batches.errors_table, one part per data set."""
    errors = large_batches.errors_of(runs)
    parts = dict.fromkeys(data for data, *_ in errors)
    return stacked(parts, functools.partial(draw_errors, errors), "Test error by batch size")


def speed_by_devices(predictions: Sequence[dict]) -> str:
    """Return images/s per GPU, relative to one GPU; one part per batch."""
    parts = dict.fromkeys(row["batches"] for row in predictions)
    draw = functools.partial(draw_speeds, predictions)
    return stacked(parts, draw, "Predicted images/s per GPU")


def stacked(names: Collection[str], draw: Callable[[Axes, str], None], label: str) -> str:
    """Return a picture of parts below each other; `draw` draws the part of a name."""
    with plots.style():
        fig = Figure(figsize=(plots.WIDTH, 0.6 + 2.6 * len(names)))
        column = fig.subplots(len(names), squeeze=False)[:, 0]
        for name, axes in zip(names, column, strict=True):
            axes.set_title(name)
            axes.set_xscale("log", base=2)
            draw(axes, name)
            axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:,g}"))
        return plots.svg_with_legend(column[0], label)


def draw_errors(errors: large_batches.Errors, axes: Axes, data: str) -> None:
    """Draw the errors on a data set.

    A line goes through each setting's means; a dot is a run. Settings without runs on this data set
    get an empty line, for the legend. A batch at which a run diverged has no mean.
    """
    for setting in dict.fromkeys(setting for _, setting, _ in errors):
        network, rule = setting.split(", ")
        colour, marker = RULES[rule]
        look = dict(color=colour, marker=marker, markersize=4)
        own = {key[2]: row for key, row in errors.items() if key[:2] == (data, setting)}
        means = [math.nan if None in row else statistics.mean(row) for row in own.values()]
        axes.plot(list(own), means, linestyle=NETWORKS[network], label=setting, **look)
        for batch, row in own.items():
            finite = [error for error in row if error is not None]
            axes.plot([batch] * len(finite), finite, linestyle="", alpha=0.4, **look)
    axes.set_ylabel("test error, %")
    axes.set_xlabel("batch")
    axes.set_xticks(sorted({batch for name, _, batch in errors if name == data}))


def draw_speeds(predictions: Sequence[dict], axes: Axes, batches: str) -> None:
    """Draw images/s per GPU, relative to the fastest scheme on one GPU."""
    own = [row for row in predictions if row["batches"] == batches]
    alone = max(per_device(row) for row in own if row["devices"] == 1)
    for scheme in plots.in_order(row["parallelism"] for row in own):
        same = [row for row in own if row["parallelism"] == scheme]
        speeds = [per_device(row) / alone for row in same]
        look = dict(markersize=4, **plots.look_of(scheme))
        axes.plot([row["devices"] for row in same], speeds, label=scheme, **look)
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images/s per GPU, relative")
    axes.set_ylim(0)


def per_device(row: dict) -> float:
    """Return the images per millisecond and device of a prediction."""
    return row["batch_size"] / row["predicted_milliseconds"] / row["devices"]
