"""Predict the steps of the stored sweeps, and write predictions beside measurements.

  python benchmarks/predictions.py

It reads results/data/sweeps/alexnet-224-*.json and writes results/data/predictions/NAME.json. The
step of one GPU at each batch is the sweep's own (mesh 1x1, the median over its schemes); all else
comes from the card. Nothing is compiled, and no GPU is needed.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections import defaultdict

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

import cnn_spmd
from cnn_spmd.analysis import cost
from cnn_spmd.analysis.cost import Card
from cnn_spmd.training.prediction import predict
from cnn_spmd.training.provenance import provenance

DATA = pathlib.Path(__file__).resolve().parent.parent / "results" / "data"
SWEEPS = {"alexnet-224-2xh200": "h200", "alexnet-224-4xh200": "h200"}
GPUS_PER_HOST = 8


def main() -> None:
    """Write one file per sweep, and print its errors."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", GPUS_PER_HOST)
    folder = DATA / "predictions"
    folder.mkdir(exist_ok=True)
    for name, card_name in SWEEPS.items():
        runs = json.loads((DATA / "sweeps" / f"{name}.json").read_text())["runs"]
        card = with_steps(cost.load(card_name), runs)
        found = [beside(run, card) for run in runs if run["mesh"] != "1x1"]
        results = dict(sweep=name, card=dataclasses.asdict(card), predictions=found, **provenance())
        (folder / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        errors = [
            abs(row["predicted_milliseconds"] / row["measured_milliseconds"] - 1) for row in found
        ]
        print(f"{name}: median error {statistics.median(errors):.2%}, worst {max(errors):.2%}")


def with_steps(card: Card, runs: list[dict]) -> Card:
    """Return the card with the sweep's steps of one GPU in place of its own."""
    measured = defaultdict(list)
    for run in runs:
        if run["mesh"] == "1x1":
            seconds = run["figures"]["step_milliseconds"]["median"] / 1e3
            measured[run["settings"]["batch_per_device"]].append(seconds)
    points = [(batch, statistics.median(times)) for batch, times in sorted(measured.items())]
    return dataclasses.replace(card, steps=[card.steps[0] | dict(points=points)])


def beside(run: dict, card: Card) -> dict:
    """Return the prediction of a run of a sweep, and what was measured."""
    figures = run["figures"]
    config = cnn_spmd.load_config(
        "experiments/alexnet_cifar.py",
        {
            "data.name": "synthetic",
            "data.fallback": "",
            "data.synthetic.image_size": 224,
            "data.synthetic.classes": 1000,
            "dtype": figures["dtype"],
            "parallelism": figures["parallelism"],
            "batch_size": figures["batch_size"],
            **{f"mesh.{axis}": size for axis, size in figures["mesh"].items()},
        },
    )
    devices = figures["mesh"]["data"] * figures["mesh"]["model"]
    setup = cnn_spmd.prepare(config, devices=jax.devices()[:devices])
    return dict(
        devices=devices,
        batch_per_device=run["settings"]["batch_per_device"],
        measured_milliseconds=figures["step_milliseconds"]["median"],
        **predict(setup, card, GPUS_PER_HOST).as_json(),
    )


if __name__ == "__main__":
    main()
