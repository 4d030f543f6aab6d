"""Estimate steps of one GPU from its card's rates, beside what was measured.

  python benchmarks/estimates.py

Needs no GPU. It traces each network's step (cnn_spmd/analysis/roofline.py) and writes
results/data/predictions/estimates.json, of which `python -m cnn_spmd.papers --write` makes a
section of results/predictions.md. It also prints the three numbers that fit the rows of FITTED
best: those of roofline.EFFICIENCY.

The form of the model was settled with all rows in view, and its numbers on FITTED alone. Left out
are measured steps of programs that have changed much since, and of runs that shared their GPU.
"""

import dataclasses
import pathlib
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import numpy as np
from scipy import optimize

import cnn_spmd
from cnn_spmd.analysis import cost, roofline
from cnn_spmd.papers import predictions
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.training import prediction, runfiles
from cnn_spmd.training.provenance import provenance


class Row(NamedTuple):
    """A measured step: of which network, and in which file of results/data."""

    experiment: str
    batch: int
    card: str
    file: str
    image_size: int = 32
    classes: int = 10


SWEEP, SPEED, ALONE, CALIBRATED, RUNS = (
    "sweeps/alexnet-224-2xh200.json",
    "speed/h100-x1.json",
    "predictions/alone.json",
    "predictions/calibrated.json",
    "predictions/runs.json",  # the steps of runs whose accuracy was measured again since
)
PHOTOGRAPHS = dict(image_size=224, classes=1000)
FITTED = [
    Row("owt_imagenet", 32, "h200", SWEEP, **PHOTOGRAPHS),
    Row("owt_imagenet", 512, "h200", SWEEP, **PHOTOGRAPHS),
    Row("alexnet_cifar", 32, "h200", ALONE),
    Row("alexnet_cifar", 512, "h200", ALONE),
    Row("resnet_cifar:20", 128, "h200", ALONE),
    Row("deeper_cifar:vgg_8", 512, "h200", RUNS),
    Row("claims_2012_cifar:relu", 128, "h100", RUNS),
    Row("claims_2012_cifar:base", 512, "h100", RUNS),
    Row("cuda_convnet_cifar:11pct", 128, "h100", "cuda_convnet_11pct-h100-seed1.json"),  # float32
]
HELD_OUT = [
    Row("owt_imagenet", 128, "h200", SWEEP, **PHOTOGRAPHS),
    Row("alexnet_2012_imagenet", 128, "h200", "alexnet_2012_imagenette-h200-seed0.json", 256),
    Row("deeper_cifar:vgg_16", 512, "h200", RUNS),
    Row(
        "cuda_convnet_cifar:11pct_no_lrn", 128, "h200", "cuda_convnet_11pct_no_lrn-h200-seed2.json"
    ),
    Row(
        "cuda_convnet_cifar:11pct_no_lrn", 128, "h100", "cuda_convnet_11pct_no_lrn-h100-seed1.json"
    ),
    Row("alexnet_cifar", 128, "h200", ALONE),
    *(Row(f"resnet_cifar:{name}", 128, "h200", ALONE) for name in ("32", "44", "56", "110")),
    *(Row(f"resnet_cifar:plain_{depth}", 128, "h200", ALONE) for depth in ("20", "56")),
    *(
        Row(f"deeper_cifar:{name}", 512, "h200", RUNS)
        for name in ("vgg_11", "one_convolution", "fully_connected", "simple_cnn")
    ),
    *(Row("owt_imagenet", batch, "h100", SPEED, **PHOTOGRAPHS) for batch in (32, 128, 512)),
    Row("alexnet_cifar", 512, "h100", RUNS),
    Row("claims_2012_cifar:tanh", 128, "h100", RUNS),
    *(
        Row(f"claims_2012_cifar:{name}", 512, "h100", RUNS)
        for name in ("no_lrn", "no_conv2", "no_conv3", "no_conv4", "one_tower")
    ),
    *(
        Row(experiment, batch, "h200", CALIBRATED, image_size, classes)
        for experiment, image_size, classes in (
            ("alexnet_2012_imagenet", 256, 1000),
            ("deeper_cifar:vgg_16", 32, 10),
            ("cuda_convnet_cifar:11pct", 32, 10),
        )
        for batch in (32, 128, 512)
    ),
]


def main() -> None:
    """Write the file, and print the fit and the errors."""
    jax.config.update("jax_platforms", "cpu")
    code = provenance()  # asked first: the file makes the checkout differ from its commit
    kernels = {row: roofline.kernels_of(program_of(row)) for row in FITTED + HELD_OUT}
    print(fit({row: kernels[row] for row in FITTED}))
    found = []
    for row, each in kernels.items():
        seconds = roofline.seconds(each, cost.load(row.card))
        found.append(
            dict(
                experiment=row.experiment,
                image_size=row.image_size,
                card=row.card,
                batch_per_device=row.batch,
                fitted=row in FITTED,
                measured_file=row.file,
                measured_milliseconds=measured(row),
                predicted_milliseconds=round(1e3 * seconds, 4),
            )
        )
    print(predictions.estimates_table(found))
    cards = {name: dataclasses.asdict(cost.load(name)) for name in ("h100", "h200")}
    results = dict(predictions=found, cards=cards, **code)
    runfiles.write_json(DATA / "predictions" / "estimates.json", results)


def program_of(row: Row) -> object:
    """Return the traced step of one device, in the dtype of a GPU's run."""
    name, _, variant = row.experiment.partition(":")
    experiment = f"experiments/{name}.py" + (f":{variant}" if variant else "")
    fields = {
        "data.name": "synthetic",
        "data.fallback": "",
        "data.held_out": 0,
        "data.held_out_steps": 0,
        "data.validation": 0,
        "data.synthetic.image_size": row.image_size,
        "data.synthetic.classes": row.classes,
        "parallelism": "data",
        "mesh.data": 1,
        "mesh.model": 1,
        "batch_size": row.batch,
    }
    if name == "owt_imagenet":
        fields |= {"data.crop": 0}  # as in the sweeps: its images are not cropped
    config = cnn_spmd.load_config(experiment, fields)
    if config.dtype == "auto":
        config.dtype = "bfloat16"
    setup = cnn_spmd.prepare(config, devices=jax.devices()[:1])
    return prediction.trace_step(setup, row.batch)


def measured(row: Row) -> float:
    """Return the milliseconds of the row's file."""
    found = runfiles.read_json(DATA / row.file)
    if row.file == SWEEP:
        times = [
            run["figures"]["step_milliseconds"]["median"]
            for run in found["runs"]
            if run["mesh"] == "1x1" and run["settings"]["batch_per_device"] == row.batch
        ]
        return float(np.median(times))
    if row.file == SPEED:
        (batch,) = [each for each in found["batches"] if each["batch_per_gpu"] == row.batch]
        return batch["ours"][0]["median_step_milliseconds"]
    if row.file in (ALONE, CALIBRATED, RUNS):
        (step,) = [
            step
            for step in found["steps"]
            if (step["experiment"], step["batch"]) == (row.experiment, row.batch)
        ]
        return step["milliseconds"]
    return found["step_milliseconds"]["median"]


def fit(kernels: dict[Row, list[roofline.Kernel]]) -> str:
    """Return the efficiency with the least squares of relative errors, as text."""

    def errors(numbers: np.ndarray) -> list[float]:
        efficiency = roofline.Efficiency(*numbers)
        return [
            1e3 * roofline.seconds(each, cost.load(row.card), efficiency) / measured(row) - 1
            for row, each in kernels.items()
        ]

    best = optimize.least_squares(errors, roofline.EFFICIENCY)
    numbers = ", ".join(
        f"{name}={number:.3g}"
        for name, number in zip(roofline.Efficiency._fields, best.x, strict=True)
    )
    return (
        f"Fit to {len(kernels)} rows: {numbers}; "
        f"root mean square error {np.sqrt(2 * best.cost / len(kernels)):.1%}"
    )


if __name__ == "__main__":
    main()
