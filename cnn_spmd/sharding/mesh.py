"""Build and validate the device mesh."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh

from cnn_spmd.config import MESH_AXES, MOST_CPU_DEVICES
from cnn_spmd.errors import UserError

MOST_DEVICES = 2**16  # more than any machine has
SPELLING = "x".join(axis.upper() for axis in MESH_AXES)


def parse(text: str) -> dict[str, int]:
    """Return the size of each mesh axis that a mesh's name spells.

    "4x2" is data=4, model=2. Raises UserError unless `text` has one positive integer per mesh axis,
    joined by x.
    """
    sizes = sizes_in(text.lower())
    if sizes is None:
        raise UserError(
            f"--mesh={text}: expected {SPELLING} with positive integers, such as 4x2, of at most "
            f"{MOST_DEVICES} devices"
        )
    return dict(zip(MESH_AXES, sizes, strict=True))


def shapes_over(devices: int) -> list[str]:
    """Return the names of all meshes over this many devices: 8x1, 4x2, 2x4, 1x8."""
    divisors = [size for size in range(devices, 0, -1) if devices % size == 0]
    shapes = itertools.product(divisors, repeat=len(MESH_AXES))
    return ["x".join(map(str, sizes)) for sizes in shapes if math.prod(sizes) == devices]


def sizes_in(text: str, count: int = len(MESH_AXES)) -> tuple[int, ...] | None:
    """Return `count` positive integers that x joins in `text`, otherwise None.

    Their product is at most MOST_DEVICES.
    """
    words = text.split("x")
    if len(words) != count or not all(word.isdecimal() and len(word) < 9 for word in words):
        return None
    sizes = tuple(map(int, words))
    return sizes if 0 < math.prod(sizes) <= MOST_DEVICES else None


def shape(asked: Mapping[str, int], devices: int) -> dict[str, int]:
    """Return the size of each mesh axis, for the sizes that the config asks for.

    asked: by mesh axis; -1 takes the devices that are left. devices: how many there are. Raises
    UserError naming the config's fields where it does not fit.
    """
    sizes = asked.values()
    fields = _fields(asked)
    if sum(size == -1 for size in sizes) > 1 or any(size != -1 and size < 1 for size in sizes):
        raise UserError(
            f"{fields}: each must be a positive integer, and at most one -1 "
            "(what is left of the devices)"
        )
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % fixed:
        raise UserError(f"{fields}: {fixed} does not divide the {devices} devices there are")
    found = {axis: devices // fixed if size == -1 else size for axis, size in asked.items()}
    needed = math.prod(found.values())
    if needed > devices:
        simulate = f", or simulate devices on the CPU with --cpu_devices={needed}"
        raise UserError(
            f"{fields}: needs {needed} devices, but there are {devices}: choose a mesh whose "
            f"product is at most {devices}{simulate if needed <= MOST_CPU_DEVICES else ''}"
        )
    return found


def make(*sizes: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over the first devices, with one size per mesh axis.

    One size may be -1. devices: None stands for all that JAX finds. The axes are Auto: XLA's
    partitioner chooses what our constraints leave open. (Explicit axes, the default of
    jax.make_mesh, refuse contractions of a model-parallel backward pass as ambiguous.)

    Raises UserError where the shape does not fit, or leaves out devices of a cluster.
    """
    devices = list(jax.devices() if devices is None else devices)
    found = shape(dict(zip(MESH_AXES, sizes, strict=True)), len(devices))
    used = math.prod(found.values())
    if used < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"{_fields(found)}: uses {used} of {len(devices)} devices, but with "
            f"{jax.process_count()} processes the mesh must hold them all"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(found.values()), MESH_AXES, axis_types=types, devices=devices[:used])


def _fields(sizes: Mapping[str, int]) -> str:
    """Return sizes as the config's fields spell them."""
    return ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
