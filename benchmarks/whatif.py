"""Predict AlexNet's step on GPUs that are not here.

  python benchmarks/whatif.py

Needs no GPU. Writes two files to results/data/predictions/, of which `python -m cnn_spmd.papers
--write` makes sections of results/predictions.md:

  devices.json    1 to 512 H100s, each scheme at its best mesh. Hosts have 8 GPUs. The batch per GPU
                  is 128, or the global batch is 1,024.
  unmeasured.json every scheme on every mesh of 2 and of 4 H200s, before they are measured
"""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax

from cnn_spmd import plan
from cnn_spmd.analysis import cost
from cnn_spmd.data.dataset import Dataset, blank_arrays
from cnn_spmd.training.provenance import provenance
from experiments.alexnet_cifar import get_config

FOLDER = pathlib.Path(__file__).parent.parent / "results" / "data" / "predictions"
DEVICES = [2**power for power in range(10)]
GPUS_PER_HOST = 8
# Batches by name: the global batch for a number of devices.
BATCHES = {"128 per GPU": lambda devices: 128 * devices, "1,024 in all": lambda devices: 1024}
CLASSES, SIDE = 1000, 224


def main() -> None:
    """Write both files."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES[-1])
    everyone = jax.devices()
    arrays = blank_arrays(dict(train=128 * DEVICES[-1], test=64), SIDE)
    data = Dataset(name="synthetic", class_names=tuple(map(str, range(CLASSES))), **arrays)

    def predictions(card, devices, batch_size):
        """Return the predictions of every scheme on every mesh, the fastest first."""
        jax.devices = lambda: everyone[:devices]
        config = get_config()
        config.batch_size, config.dtype, config.parallelism = batch_size, "bfloat16", "auto"
        return plan.plan(config, data, card, GPUS_PER_HOST).predictions

    card = cost.load("h100")
    rows = []
    for devices in DEVICES:
        for batches, batch_of in BATCHES.items():
            best = {}
            for found in predictions(card, devices, batch_of(devices)):
                best.setdefault(found.parallelism, found)
            rows += [
                dict(devices=devices, batches=batches) | found.as_json() for found in best.values()
            ]
            print(devices, batches, next(iter(best)), flush=True)
    write("devices", card, rows)
    card = cost.load("h200")
    rows = [
        dict(devices=devices, batch_per_device=batch) | found.as_json()
        for devices in (2, 4)
        for batch in (32, 128, 512)
        for found in predictions(card, devices, batch * devices)
    ]
    write("unmeasured", card, rows)


def write(name: str, card: cost.Card, rows: list[dict]) -> None:
    """Write a file of predictions, with what made them."""
    results = dict(card=dataclasses.asdict(card), predictions=rows, **provenance())
    (FOLDER / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
