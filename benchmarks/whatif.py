"""Predict AlexNet's step on 1 to 512 H100s under each scheme, at its best mesh.

  python benchmarks/whatif.py

Needs no GPU. Writes results/data/predictions/devices.json, of which `python -m cnn_spmd.papers
--write` makes a section of results/predictions.md. Hosts have 8 GPUs. The batch per GPU is 128, or
the global batch is 1,024.
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

PATH = pathlib.Path(__file__).parent.parent / "results" / "data" / "predictions" / "devices.json"
DEVICES = [2**power for power in range(10)]
GPUS_PER_HOST = 8
# Batches by name: the global batch for a number of devices.
BATCHES = {"128 per GPU": lambda devices: 128 * devices, "1,024 in all": lambda devices: 1024}
CLASSES, SIDE = 1000, 224


def main() -> None:
    """Write the best mesh of each scheme, for each number of devices."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES[-1])
    everyone = jax.devices()
    card = cost.load("h100")
    arrays = blank_arrays(dict(train=128 * DEVICES[-1], test=64), SIDE)
    data = Dataset(name="synthetic", class_names=tuple(map(str, range(CLASSES))), **arrays)
    rows = []
    for devices in DEVICES:
        jax.devices = lambda count=devices: everyone[:count]
        for batches, batch_of in BATCHES.items():
            config = get_config()
            config.batch_size, config.dtype, config.parallelism = (
                batch_of(devices),
                "bfloat16",
                "auto",
            )
            best = {}
            for found in plan.plan(config, data, card, GPUS_PER_HOST).predictions:
                best.setdefault(found.parallelism, found)
            for found in best.values():
                row = dict(devices=devices, batches=batches, batch_size=found.batch_size)
                rows.append(row | found.as_json())
            print(devices, batches, next(iter(best)), flush=True)
    results = dict(card=dataclasses.asdict(card), predictions=rows, **provenance())
    PATH.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
