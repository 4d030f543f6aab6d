"""Make results/depth.md: accuracy by depth."""

import collections
from collections.abc import Sequence

from cnn_spmd.papers import published, summaries
from cnn_spmd.papers.layout import HEAD, SEEDS, about_data, commands, joined
from cnn_spmd.papers.summaries import ALONE, DATA
from cnn_spmd.report import compare
from cnn_spmd.report.text import markdown_table, mean_and_deviation

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
    return joined(
        "# The deeper the better?",
        HEAD,
        """Networks of 2 to 16 layers with weights on CIFAR-10, all under the recipe of AlexNet
        (`experiments/deeper_cifar.py`), on one H200. From one_convolution on, all end in two
        hidden dense layers of 4096. [rates.md](rates.md) has the learning rates that were
        tried.""",
        depth_table(summaries.load_summaries(DATA / "claims")),
        f"{SEEDS} {about_data()}",
        "![Test accuracy by depth](depth.svg)",
        f"""Why convolutions: a neuron that sees a whole image has {32 * 32 * 3:,}
        weights at 32x32x3 and {200 * 200 * 3:,} at 200x200x3. A 3x3 filter has 27,
        at any size.""",
        commands(
            "One run per network, here vgg_16; --config.seed=N for the seeds.",
            "python launch.py --config experiments/deeper_cifar.py:vgg_16",
        ),
        *residual_section(summaries.load_single_runs()),
    )


def residual_section(runs: Sequence[dict]) -> list[str]:
    """Return the section on residual and plain networks; [] without such runs."""
    table = residual_table(runs)
    if not table:
        return []
    return [
        "## Residual and plain networks",
        """CIFAR-10 under the recipe of He et al. 2015 (`experiments/resnet_cifar.py`). Published
        are table 6's test errors and parameters; for 110 layers, the mean of five runs. For the
        plain networks the paper has a plot only, in which the error grows with depth. The training
        time is that of all steps at these images/s. Runs that shared a GPU have the images/s of a
        short run alone.""",
        table,
        commands(
            "One run per network; --config.seed=N for the seeds.",
            "python launch.py --config experiments/resnet_cifar.py:20",
            "python launch.py --config experiments/resnet_cifar.py:plain_20",
        ),
    ]


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
    rows = []
    for name, same in runs_by_depth(runs).items():
        layers, convolutions = DEEPER[name]
        size = f"{same[0]['param_count']:,}"
        accuracy = mean_and_deviation([100 * run["eval"]["accuracy"] for run in same], 2)
        rows.append([name, str(layers), str(convolutions), size, str(len(same)), accuracy])
    header = ["network", "layers with weights", "convolutions", "parameters", "n"]
    return markdown_table([*header, "test accuracy, %"], rows)


def residual_table(runs: Sequence[dict]) -> str:
    """Return error and speed of the residual and the plain networks; "" without runs.

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
        timed = [alone[name]] if (name := same[0]["experiment"] + ALONE) in alone else same
        rates = [run["images_per_second"] for run in timed]
        images = same[0]["steps"] * same[0]["batch_size"]
        if series == "resnet_cifar":
            error, millions = map(str, published.RESIDUAL_NETWORKS[layers])
        rows.append(
            [
                f"{SERIES[series]}-{layers}",
                f"{same[0]['param_count']:,}",
                millions,
                machine,
                str(len(same)),
                error,
                mean_and_deviation([100 * (1 - run["eval"]["accuracy"]) for run in same], 2),
                mean_and_deviation([images / rate for rate in rates], 0),
                mean_and_deviation(rates, 0),
            ]
        )
    header = ["network", "parameters", "published, M", "hardware", "n", "published error, %"]
    header += ["error, %", "train, s", "images/s"]
    return markdown_table(header, rows) if rows else ""
