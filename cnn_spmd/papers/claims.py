"""What the claims of AlexNet's paper and "deeper is better" are measured by; `python -m cnn_spmd.papers` prints the tables.

results/claims/*.json are each the summary.json of a run of experiments/claims_2012_cifar.py, deeper_cifar.py, owt_cifar.py or
owt_imagenet.py; a .jsonl of the same name beside it is that run's metrics.jsonl, which relu and tanh need. Some shared a GPU
with another run: their seconds say nothing. jax and matplotlib are imported only where needed.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

from cnn_spmd.report import page
from cnn_spmd.report.compare import mean
from cnn_spmd.training import runfiles

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
        if (
            count >= steps_per_epoch
            and 1 - sum(steps * accuracy for steps, accuracy in window) / count < error
        ):
            return row["step"]
    return None


def read(folder: pathlib.Path) -> list[dict]:
    """The summaries in a folder; with `epochs_to_error` (None: not reached) where there are metrics beside."""
    runs = []
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if path.with_suffix(".jsonl").exists():
            per_epoch = round(run["steps"] / run["epochs"])
            steps = steps_to_error(
                runfiles.read_metrics_rows(path.with_suffix(".jsonl")), TRAINING_ERROR, per_epoch
            )
            run["epochs_to_error"] = steps and steps / per_epoch
        runs.append(run)
    return runs


def depth_table(runs: Sequence[dict]) -> str:
    """A Markdown table, a row a network of experiments/deeper_cifar.py that was run, by its number of layers."""
    rows = []
    for name, layers, same in by_depth(runs):
        rows.append(
            [
                name,
                str(len(layers)),
                str(sum(layer.startswith("conv") for layer in layers)),
                f"{same[0]['param_count']:,}",
                str(len(same)),
                mean([100 * run["eval"]["accuracy"] for run in same], 2),
            ]
        )
    return page.markdown_table(
        ["network", "layers with weights", "convolutions", "parameters", "n", "test accuracy, %"],
        rows,
    )


def by_depth(runs: Sequence[dict]) -> list[tuple[str, list[str], list[dict]]]:
    """Name, layers with weights and runs of each network of experiments/deeper_cifar.py, the shallowest first."""
    import jax.numpy as jnp
    from flax import nnx

    from cnn_spmd import models

    networks: dict[str, list[dict]] = {}
    for run in runs:
        if run["experiment"].startswith("deeper_"):
            networks.setdefault(run["experiment"].removeprefix("deeper_"), []).append(run)
    found = []
    for name, same in networks.items():
        make = functools.partial(
            models.make, name, image_size=32, classes=10, width=4096, dropout=0.0, dtype=jnp.float32
        )
        layers = nnx.state(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))), nnx.Param)
        found.append((name, list(layers), same))
    return sorted(found, key=lambda network: (len(network[1]), network[0]))


def depth_plot(runs: Sequence[dict]) -> str:
    """depth_table's accuracies, and millions of parameters, as a picture; SVG."""
    from cnn_spmd.report import plots

    with plots.style():
        return plots.depth(
            [
                (
                    f"{name}\n{same[0]['param_count'] / 1e6:.1f} M",
                    len(layers),
                    [100 * run["eval"]["accuracy"] for run in same],
                )
                for name, layers, same in by_depth(runs)
            ]
        )


# Experiment, without or with its variable batch -> its data's name in the table.
BATCH_DATA = {"owt_cifar": "CIFAR-10", "owt_imagenette": "Imagenette"}


def batch_table(runs: Sequence[dict], published: dict[tuple[str, int], float]) -> str:
    """A Markdown table of test error, %, by batch size, from the runs of experiments/owt_cifar.py and owt_imagenet.py.

    published: the paper's top-1 errors on ImageNet by dense batch (as columns name it) and batch.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    for (dense, batch), error in published.items():
        found["ILSVRC-2012, published", f"k, {dense}", batch] = [error]
    for run in runs:
        if data := BATCH_DATA.get(run["experiment"].removesuffix("_variable")):
            dense = "128" if run["config"]["dense_microbatch"] else "as large"
            rate = {1.0: "k", 0.5: "sqrt(k)"}[run["config"]["optimizer"]["scaling"]]
            key = data, f"{rate}, {dense}", run["batch_size"]
            found.setdefault(key, []).append(100 * (1 - run["eval"]["accuracy"]))
    batches = sorted({batch for *_, batch in found})
    rows = [
        [
            data,
            setting,
            *(
                f"{mean(errors, 2)} (n = {len(errors)})"
                if (errors := found.get((data, setting, batch)))
                else ""
                for batch in batches
            ),
        ]
        for data, setting in dict.fromkeys((data, setting) for data, setting, _ in found)
    ]
    return page.markdown_table(
        ["data", "rate times, dense batch", *(f"batch {batch}" for batch in batches)], rows
    )


def weights_of_a_neuron(side: int) -> int:
    """How many weights connect a neuron to every pixel and colour of an image of `side` pixels: counted on such a layer."""
    import jax.numpy as jnp
    from flax import nnx

    from cnn_spmd.layers.dense import dense

    return nnx.eval_shape(
        lambda: dense("fc1", side * side * 3, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))
    ).kernel.size
