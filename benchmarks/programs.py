"""Compile every scheme of the table for meshes that are not in this machine.

  python benchmarks/programs.py

Needs requirements.txt (jax[cuda12]) for the GPU compiler, and no GPU. Writes one report per program
to results/data/programs/, from which the pages in results/ are generated. The programs are float32,
so that the bytes of the CPU's and of the GPU's compiler compare. Programs for eight GPUs are also
compiled with several collectives in flight, to see what the schedule then hides. A program that a
mesh or a network refuses is left out, with a line that says why.
"""

import itertools
import math
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
from cnn_spmd.errors import UserError
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import runfiles
from cnn_spmd.training.dry_run import dry_run
from cnn_spmd.training.provenance import provenance
from experiments.alexnet_cifar import get_config

FOLDER = DATA / "programs"
# Image size -> classes.
CLASSES = {32: 10, 224: 1000}
# Devices -> meshes. A row that only splits over all devices at once takes Nx1 instead.
MESHES = {2: [(1, 2)], 4: [(2, 2)], 8: [(4, 2), (1, 8)], 64: [(8, 8)], 512: [(64, 8)]}
GPUS_PER_HOST = 8
IN_FLIGHT = 4  # more of them hid no more of AlexNet's communication
# By scheme and image size, where it is not alexnet: two_tower needs a network in two towers.
NETWORKS = {("two_tower", 32): "alexnet_2012_small", ("two_tower", 224): "alexnet_2012"}


class Case(NamedTuple):
    """One program.

    compiler: "cpu" or a card of analysis/target.py. in_flight: the config's collectives_in_flight.
    """

    model: str
    image_size: int
    parallelism: str
    mesh: tuple[int, int]
    compiler: str
    in_flight: int = 1

    @property
    def name(self) -> str:
        """Return the name of the case's file, without .json."""
        data, model = self.mesh
        network = f"{self.model}-{self.image_size}-{self.parallelism}"
        in_flight = f"-in_flight{self.in_flight}" if self.in_flight > 1 else ""
        return f"{network}-{data}x{model}-{self.compiler}{in_flight}"


def cases() -> Iterator[Case]:
    """Yield what is compiled."""
    for count, size, parallelism in itertools.product(MESHES, CLASSES, TABLE):
        model = NETWORKS.get((parallelism, size), "alexnet")
        compilers = [("h100", 1)]
        if count == 8:
            compilers += [("h100", IN_FLIGHT), ("cpu", 1)]
        for mesh in MESHES[count] if uses_one_axis(TABLE[parallelism]) else [(count, 1)]:
            for compiler, in_flight in compilers:
                yield Case(model, size, parallelism, mesh, compiler, in_flight)


def uses_one_axis(row: dict) -> bool:
    """Return whether a row of the table splits anything over one mesh axis alone."""
    return any(
        uses_one_axis(axes) if isinstance(axes, dict) else isinstance(axes, str)
        for axes in row.values()
    )


def config_of(case: Case) -> ml_collections.ConfigDict:
    """Return the config of a case."""
    config = get_config()
    data, model = case.mesh
    batch_size = max(1024, 16 * data * model)
    images = dict(
        image_size=case.image_size, classes=CLASSES[case.image_size], train_examples=batch_size
    )
    config.update(
        dict(
            batch_size=batch_size,
            parallelism=case.parallelism,
            dtype="float32",
            collectives_in_flight=case.in_flight,
            mesh=dict(data=data, model=model),
            model=dict(name=case.model),
            data=dict(name="synthetic", synthetic=images),
        )
    )
    return config


def main() -> None:
    """Compile each case and write its report."""
    jax.config.update("jax_num_cpu_devices", 8)
    # Asked first: the files that are written make the checkout differ from its commit.
    code = provenance()
    for case in cases():
        devices = None
        if case.compiler != "cpu":
            gpus = min(math.prod(case.mesh), GPUS_PER_HOST)
            devices = target.devices(f"{case.compiler}:{math.prod(case.mesh) // gpus}x{gpus}")
        try:
            report = dry_run(config_of(case), None, devices)
        except UserError as error:
            print(f"{case.name} is left out: {error}")
            continue
        for name in ("placement", "activations", "closed_form"):
            del report[name]
        report |= dict(image_size=case.image_size, in_flight=case.in_flight, **code)
        runfiles.write_json(FOLDER / f"{case.name}.json", report)


if __name__ == "__main__":
    main()
