"""Compile the schemes for meshes that are not in this machine.

  python benchmarks/programs.py

Needs requirements.txt (jax[cuda12]) for the GPU compiler, and no GPU. Writes one report per program
to results/data/programs/, from which the pages in results/ are generated. The programs are float32,
so that the bytes of the CPU's and of the GPU's compiler compare.
"""

import json
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

# Both must be set before jax is imported.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import jax
import ml_collections

from cnn_spmd.analysis import target
from cnn_spmd.training.dry_run import dry_run
from cnn_spmd.training.provenance import provenance
from experiments.alexnet_cifar import get_config

FOLDER = pathlib.Path(__file__).parent.parent / "results" / "data" / "programs"
# Image size -> classes.
CLASSES = {32: 10, 224: 1000}
# Devices -> meshes. The row `data` splits nothing over `model`: it takes Nx1 instead.
MESHES = {8: [(4, 2), (1, 8)], 64: [(8, 8)], 512: [(64, 8)]}
GPUS_PER_HOST = 8


class Case(NamedTuple):
    """One program; compiler is "cpu" or a card of analysis/target.py."""

    model: str
    image_size: int
    parallelism: str
    mesh: tuple[int, int]
    compiler: str


def cases() -> Iterator[Case]:
    """Yield what is compiled."""
    for count, meshes in MESHES.items():
        for compiler in ("cpu", "h100") if count == 8 else ("h100",):
            for size in CLASSES:
                yield Case("alexnet", size, "data", (count, 1), compiler)
                for parallelism in ("model", "hybrid", "hybrid_alternating"):
                    for mesh in meshes:
                        yield Case("alexnet", size, parallelism, mesh, compiler)
    for compiler in ("cpu", "h100"):
        yield Case("alexnet_2012", 224, "two_tower", (4, 2), compiler)


def config_of(case: Case) -> ml_collections.ConfigDict:
    """Return the config of a case."""
    config = get_config()
    data, model = case.mesh
    config.update(
        dict(
            batch_size=max(1024, 16 * data * model),
            parallelism=case.parallelism,
            dtype="float32",
            mesh=dict(data=data, model=model),
            model=dict(name=case.model),
        )
    )
    config.data.name = "synthetic"
    config.data.synthetic.update(
        dict(
            image_size=case.image_size,
            classes=CLASSES[case.image_size],
            train_examples=config.batch_size,
        )
    )
    return config


def main() -> None:
    """Compile each case and write its report."""
    jax.config.update("jax_num_cpu_devices", 8)
    # Asked first: the files that are written make the checkout differ from its commit.
    code = provenance()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for case in cases():
        data, model = case.mesh
        devices = None
        if case.compiler != "cpu":
            hosts = max(1, data * model // GPUS_PER_HOST)
            devices = target.devices(f"{case.compiler}:{hosts}x{GPUS_PER_HOST}")
        report = dry_run(config_of(case), None, devices)
        for name in ("placement", "activations", "closed_form"):
            del report[name]
        report |= dict(image_size=case.image_size, **code)
        name = f"{case.model}-{case.image_size}-{case.parallelism}-{data}x{model}-{case.compiler}"
        (FOLDER / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
