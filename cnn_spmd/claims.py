"""Claims of AlexNet's paper and "deeper is better", as published and as measured on CIFAR-10: `python -m cnn_spmd.claims`
prints both tables and draws results/claims/depth.svg.

results/claims/*.json are each the summary.json of a run of experiments/claims_2012_cifar.py or deeper_cifar.py; a .jsonl of the
same name beside it is that run's metrics.jsonl, which relu and tanh need.
"""

import functools
import json
import pathlib
import statistics
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from cnn_spmd import metrics, models, page, plots
from cnn_spmd.compare import mean
from cnn_spmd.models.layers import dense
from cnn_spmd.tables import RESULTS

# Variant, what it is held against, claim and place in the paper, published difference in points of top-1 error on ImageNet.
POINTS = [
    ("no_lrn", "base", "response norms help (3.3)", "1.4"),
    ("plain_pool", "base", "overlapping pools help (3.4)", "0.4"),
    ("no_dropout", "base", "without dropout the network overfits (4.2)", "substantially"),
    ("no_conv2", "base", "each middle layer is needed: conv2 (7)", "about 2"),
    ("no_conv3", "base", "... conv3", "about 2"),
    ("no_conv4", "base", "... conv4", "about 2"),
    ("one_tower", "base", "two towers against one of half the maps (3.2)", "1.7"),
]
TRAINING_ERROR = 0.25  # figure 1


def steps_to_error(rows: Sequence[dict], error: float, steps_per_epoch: int) -> int | None:
    """The first step at which the training error of the last epoch's steps, or of a few more, is below `error`; or None.

    rows: of metrics.jsonl; a train line has the mean accuracy of its `steps` steps, which end at `step`.
    """
    window = []
    for row in rows:
        if row["split"] != "train":
            continue
        window.append((row["steps"], row["accuracy"]))
        while sum(steps for steps, _ in window[1:]) >= steps_per_epoch:
            window.pop(0)
        count = sum(steps for steps, _ in window)
        if count >= steps_per_epoch and 1 - sum(steps * accuracy for steps, accuracy in window) / count < error:
            return row["step"]
    return None


def read(folder: pathlib.Path, prefix: str) -> dict[str, dict[int, dict]]:
    """The runs of the experiments `prefix`_<variant>, by variant and seed; where there are metrics, with `epochs_to_error`."""
    runs = {}
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if not run["experiment"].startswith(prefix + "_"):
            continue
        if path.with_suffix(".jsonl").exists():
            per_epoch = round(run["steps"] / run["epochs"])
            steps = steps_to_error(metrics.read(path.with_suffix(".jsonl")), TRAINING_ERROR, per_epoch)
            run["epochs_to_error"] = steps and steps / per_epoch
        runs.setdefault(run["experiment"].removeprefix(prefix + "_"), {})[run["seed"]] = run
    return runs


def claims_table(folder: pathlib.Path = RESULTS / "claims") -> str:
    """A Markdown table, a row a claim: published and measured, pair by pair of the same seed, ± one sample deviation."""
    runs, rows = read(folder, "claims_2012"), []
    pairs = [[run.get("epochs_to_error") for run in pair] for pair in seeds_of(runs, "tanh", "relu")]
    reached = [pair for pair in pairs if None not in pair]
    measured = [f"{mean([tanh / relu for tanh, relu in reached], 1)} times ({mean([relu for _, relu in reached], 1)} epochs, "
                f"not {mean([tanh for tanh, _ in reached], 1)})"] if reached else ["not reached" if pairs else ""]
    rows.append(["ReLU reaches 25% training error sooner than tanh (figure 1)", "6 times", *measured, str(len(reached))])
    for variant, control, claim, published in POINTS:
        errors = [[100 * (1 - run["eval"]["accuracy"]) for run in pair] for pair in seeds_of(runs, variant, control)]
        points = [error - other for error, other in errors]
        measured = f"{mean(points, 2)} ({statistics.mean(error for error, _ in errors):.2f}%, not " \
                   f"{statistics.mean(other for _, other in errors):.2f}%)" if errors else ""
        rows.append([claim, f"{published} (ImageNet)", measured, str(len(points))])
    return page.markdown_table(["claim", "published, points of test error", "measured on CIFAR-10", "n"], rows)


def seeds_of(runs: dict, variant: str, control: str) -> list[tuple[dict, dict]]:
    """The pairs of runs of the same seed."""
    return [(run, runs[control][seed]) for seed, run in sorted(runs.get(variant, {}).items()) if seed in runs.get(control, {})]


def depth_table(folder: pathlib.Path = RESULTS / "claims") -> str:
    """A Markdown table, a row a network of experiments/deeper_cifar.py that was run, by its number of layers."""
    rows = []
    for name, layers, runs in by_depth(folder):
        rows.append([name, str(len(layers)), str(sum(layer.startswith("conv") for layer in layers)),
                     f"{runs[0]['param_count']:,}", str(len(runs)), mean([100 * run["eval"]["accuracy"] for run in runs], 2),
                     mean([run["train_seconds"] for run in runs], 1)])
    return page.markdown_table(["network", "layers with weights", "convolutions", "parameters", "n", "test accuracy, %",
                                "train, s"], rows)


def by_depth(folder: pathlib.Path) -> list[tuple[str, list[str], list[dict]]]:
    """Name, layers with weights and runs of each network of experiments/deeper_cifar.py, the shallowest first."""
    found = []
    for name, by_seed in read(folder, "deeper").items():
        make = functools.partial(models.make, name, image_size=32, classes=10, width=4096, dropout=0.0, dtype=jnp.float32)
        layers = nnx.state(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))), nnx.Param)
        found.append((name, list(layers), list(by_seed.values())))
    return sorted(found, key=lambda network: (len(network[1]), network[0]))


def depth_plot(folder: pathlib.Path = RESULTS / "claims") -> str:
    """depth_table's accuracies as a picture; SVG."""
    with plots.style():
        return plots.depth([(name, len(layers), [100 * run["eval"]["accuracy"] for run in runs])
                            for name, layers, runs in by_depth(folder)])


def weights_of_a_neuron(side: int) -> int:
    """How many weights connect a neuron to every pixel and colour of an image of `side` pixels: counted on such a layer."""
    return nnx.eval_shape(lambda: dense("fc1", side * side * 3, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))).kernel.size


if __name__ == "__main__":
    print(claims_table(), depth_table(), sep="\n\n")
    print(f"\nA neuron that sees a whole image has {weights_of_a_neuron(32):,} weights at 32x32x3, "
          f"{weights_of_a_neuron(200):,} at 200x200x3.")
    if by_depth(RESULTS / "claims"):
        (RESULTS / "claims" / "depth.svg").write_text(depth_plot())
