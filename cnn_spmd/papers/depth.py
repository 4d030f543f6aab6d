"""Make results/depth.md: accuracy by depth."""

import collections
from collections.abc import Sequence

from cnn_spmd.papers import published, summaries
from cnn_spmd.papers.layout import filled_in, table
from cnn_spmd.papers.summaries import ALONE, DATA
from cnn_spmd.report import compare
from cnn_spmd.report.text import mean_and_deviation

# Network of experiments/deeper_cifar.py -> layers with weights, how many are convolutions.
DEEPER = {
    "fully_connected": (2, 0),
    "simple_cnn": (2, 1),
    "one_convolution": (4, 1),
    "alexnet": (8, 5),
    "vgg_8": (8, 5),
    "vgg_11": (11, 8),
    "vgg_16": (16, 13),
}
# Experiment of experiments/resnet_cifar.py without its depth -> the name of the series.
SERIES = {"resnet_cifar": "ResNet", "resnet_cifar_plain": "plain"}


def page() -> str:
    """Return the page on accuracy by depth."""
    return filled_in(
        "depth.md",
        depths=depth_table(summaries.load_summaries(DATA / "claims")),
        residual=residual_table(summaries.load_single_runs()),
    )


def runs_by_depth(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the runs of each network of DEEPER that was run, in its order."""
    found = {}
    for name in DEEPER:
        same = [run for run in runs if run["experiment"] == f"deeper_{name}"]
        if same:
            found[name] = same
    return found


def depth_table(runs: Sequence[dict]) -> str:
    """Return accuracy by depth, a row for each network of experiments/deeper_cifar.py."""
    return table(
        [
            {
                "network": name,
                "layers with weights": str(DEEPER[name][0]),
                "convolutions": str(DEEPER[name][1]),
                "parameters": f"{same[0]['param_count']:,}",
                "n": str(len(same)),
                "test accuracy, %": mean_and_deviation(
                    [100 * run["eval"]["accuracy"] for run in same], 2
                ),
            }
            for name, same in runs_by_depth(runs).items()
        ]
    )


def residual_table(runs: Sequence[dict]) -> str:
    """Return error and speed of the residual and the plain networks.

    Runs that shared a GPU say nothing of its speed: then a short run alone does, of an experiment
    whose name ends in ALONE.
    """
    alone = {run["experiment"]: run for run in runs if run["experiment"].endswith(ALONE)}
    groups = collections.defaultdict(list)
    for run in runs:
        series, _, layers = run["experiment"].rpartition("_")
        if series in SERIES:
            key = (series, int(layers), compare.machine(run), compare.recipe(run))
            groups[key].append(run)
    rows = []
    for (series, layers, machine, _), same in sorted(groups.items()):
        error, millions = "", ""
        if series == "resnet_cifar":
            error, millions = map(str, published.RESIDUAL_NETWORKS[layers])
        timed = [alone[name]] if (name := same[0]["experiment"] + ALONE) in alone else same
        rates = [run["images_per_second"] for run in timed]
        images = same[0]["steps"] * same[0]["batch_size"]
        errors = [100 * (1 - run["eval"]["accuracy"]) for run in same]
        rows.append(
            {
                "network": f"{SERIES[series]}-{layers}",
                "parameters": f"{same[0]['param_count']:,}",
                "published, M": millions,
                "hardware": machine,
                "n": str(len(same)),
                "published error, %": error,
                "error, %": mean_and_deviation(errors, 2),
                "train, s": mean_and_deviation([images / rate for rate in rates], 0),
                "images/s": mean_and_deviation(rates, 0),
            }
        )
    return table(rows)
