"""Predict AlexNet's steps: those of the stored sweeps, and steps on GPUs that are not here.

  python benchmarks/predictions.py

Needs no GPU, and compiles nothing. Writes these files to results/data/predictions/, of which
`python -m cnn_spmd.papers --write` makes sections of results/predictions.md:

  SWEEP.json      each run on several GPUs of results/data/sweeps/alexnet-224-*.json, predicted and
                  measured. The step of one GPU at each batch is the sweep's own (mesh 1x1, the
                  median over its schemes); all else comes from the card. Also what the card
                  predicts with its own step of one GPU.
  variable.json   the runs of a variable batch on several GPUs, predicted by the card alone, and
                  measured
  devices.json    1 to 512 H100s, each scheme at its best mesh. Hosts have 8 GPUs. The batch per GPU
                  is 128, or the global batch is 1,024.
  by-four.json    one of these sweeps, by collectives that were measured between four H200s
  unmeasured.json every scheme on every mesh of 4 H200s; not all are measured
"""

import dataclasses
import math
import pathlib
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

import cnn_spmd
from cnn_spmd import plan
from cnn_spmd.analysis import cost
from cnn_spmd.analysis.cost import Card
from cnn_spmd.data.dataset import Dataset, blank_arrays
from cnn_spmd.papers import predictions
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.training import runfiles
from cnn_spmd.training.prediction import Prediction, predict
from cnn_spmd.training.provenance import provenance
from cnn_spmd.training.setup import Setup
from experiments.alexnet_cifar import get_config

GPUS_PER_HOST = 8
DEVICES = [2**power for power in range(10)]
# Batches by name: the global batch for a number of devices.
BATCHES = {"128 per GPU": lambda devices: 128 * devices, "1,024 in all": lambda devices: 1024}
CLASSES, SIDE = 1000, 224


def main() -> None:
    """Write all files, and print the errors of the sweeps' predictions."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES[-1])
    h100, h200 = cost.load("h100"), cost.load("h200")
    sweeps = *predictions.OLDER.values(), *predictions.ALL_SCHEMES.values(), predictions.MORE
    for name in sweeps:
        runs = runfiles.read_json(DATA / "sweeps" / f"{name}.json")["runs"]
        card = with_steps(h200, runs)
        rows = [beside(run, card, h200) for run in runs if run["mesh"] != "1x1"]
        write(name, card, rows, sweep=name)
        print(f"{name}: median error {predictions.errors_text(rows)}")
    write("variable", h200, list(of_the_variable_batch(h200)))
    arrays = blank_arrays(dict(train=128 * DEVICES[-1], test=64), SIDE)
    data = Dataset(name="synthetic", class_names=tuple(map(str, range(CLASSES))), **arrays)
    write("devices", h100, list(best_of_each_scheme(data, h100)))
    write_by_four(h200)
    rows = [
        dict(devices=4, batch_per_device=batch) | found.as_json()
        for batch in (32, 128, 512)
        for found in planned(data, h200, 4, batch * 4)
    ]
    write("unmeasured", h200, rows)


def write_by_four(h200: Card) -> None:
    """Predict a sweep of four GPUs by times of collectives that were measured between four."""
    name = predictions.ALL_SCHEMES[4]
    runs = runfiles.read_json(DATA / "sweeps" / f"{name}.json")["runs"]
    spans = cost.load(str(DATA / "predictions" / "calibrated-4xh200.json")).spans
    card = dataclasses.replace(with_steps(h200, runs), spans=spans)
    rows = [beside(run, card, h200) for run in runs if run["mesh"] != "1x1"]
    write(predictions.BY_FOUR, card, rows, sweep=name)


def write(name: str, card: Card, rows: list[dict], **fields: str) -> None:
    """Write a file of predictions, with what made them."""
    results = fields | dict(card=dataclasses.asdict(card), predictions=rows, **provenance())
    runfiles.write_json(DATA / "predictions" / f"{name}.json", results)


# ---- The stored sweeps


def with_steps(card: Card, runs: list[dict]) -> Card:
    """Return the card with the sweep's steps of one GPU in place of its own."""
    measured = defaultdict(list)
    for run in runs:
        if run["mesh"] == "1x1":
            seconds = run["figures"]["step_milliseconds"]["median"] / 1e3
            measured[run["settings"]["batch_per_device"]].append(seconds)
    points = [(batch, statistics.median(times)) for batch, times in sorted(measured.items())]
    (own,) = (
        step for step in card.steps if (step["model"], step["image_size"]) == ("alexnet", SIDE)
    )
    return dataclasses.replace(card, steps=[own | dict(points=points)])


def beside(run: dict, card: Card, shipped: Card) -> dict:
    """Return the prediction of a run of a sweep, and what was measured.

    `card` has the sweep's steps of one GPU, `shipped` those of the card that ships.
    """
    images = {"data.synthetic.image_size": 224, "data.synthetic.classes": 1000}
    setup = setup_of(run, "experiments/alexnet_cifar.py", **images)
    return measured(run) | dict(
        by_shipped_card_milliseconds=round(
            1e3 * predict(setup, shipped, GPUS_PER_HOST).terms.step, 4
        ),
        **predict(setup, card, GPUS_PER_HOST).as_json(),
    )


def of_the_variable_batch(card: Card) -> Iterator[dict]:
    """Yield the prediction of each program on several GPUs, and what was measured."""
    for name in predictions.VARIABLE.values():
        seeds = defaultdict(list)
        for run in runfiles.read_json(DATA / "sweeps" / f"{name}.json")["runs"]:
            seeds[run["mesh"], run["figures"]["parallelism"]].append(run)
        for (mesh, _), runs in seeds.items():
            if mesh != "1x1":
                setup = setup_of(runs[0], "experiments/owt_imagenet.py:variable")
                yield measured(*runs) | predict(setup, card, GPUS_PER_HOST).as_json()


def setup_of(run: dict, experiment: str, **fields: int) -> Setup:
    """Return what a run of a sweep trained, on random images."""
    figures = run["figures"]
    own = {name: figures[name] for name in ("dtype", "parallelism", "batch_size")}
    mesh = {f"mesh.{axis}": size for axis, size in figures["mesh"].items()}
    synthetic = {"data.name": "synthetic", "data.fallback": ""}
    config = cnn_spmd.load_config(experiment, synthetic | own | mesh | fields)
    devices = math.prod(figures["mesh"].values())
    return cnn_spmd.prepare(config, devices=jax.devices()[:devices])


def measured(*runs: dict) -> dict:
    """Return what was measured of runs of a sweep that differ in their seed."""
    figures = runs[0]["figures"]
    devices = math.prod(figures["mesh"].values())
    return dict(
        devices=devices,
        batch_per_device=figures["batch_size"] // devices,
        measured_milliseconds=statistics.median(
            run["figures"]["step_milliseconds"]["median"] for run in runs
        ),
    )


# ---- GPUs that are not here


def planned(data: Dataset, card: Card, devices: int, batch_size: int) -> list[Prediction]:
    """Return the predictions of every scheme on every mesh, the fastest first."""
    jax.devices = lambda: jax.local_devices()[:devices]
    config = get_config()
    config.batch_size, config.dtype, config.parallelism = batch_size, "bfloat16", "auto"
    return plan.plan(config, data, card, GPUS_PER_HOST).predictions


def best_of_each_scheme(data: Dataset, card: Card) -> Iterator[dict]:
    """Yield each scheme at its best mesh, for each of DEVICES and of BATCHES."""
    for devices in DEVICES:
        for batches, batch_of in BATCHES.items():
            best = {}
            for found in planned(data, card, devices, batch_of(devices)):
                best.setdefault(found.parallelism, found)
            for found in best.values():
                yield dict(devices=devices, batches=batches) | found.as_json()
            print(devices, batches, next(iter(best)), flush=True)


if __name__ == "__main__":
    main()
