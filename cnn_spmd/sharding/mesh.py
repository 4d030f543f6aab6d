"""Build and validate the (data, model) device mesh."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from cnn_spmd.config import MOST_CPU_DEVICES
from cnn_spmd.errors import UserError

AXES = ("data", "model")
MOST_DEVICES = 2**16  # more than any machine has


def parse(text: str) -> tuple[int, int]:
    """Reads a mesh shape as the command line spells it: "4x2" is data=4, model=2.

    Raises UserError where the text is not two positive integers joined by an x.
    """
    if sizes := pair(text.lower()):
        return sizes
    raise UserError(
        f"--mesh={text}: expected DATAxMODEL with two positive integers, such as 4x2, of at most "
        f"{MOST_DEVICES} devices"
    )


def pair(text: str) -> tuple[int, int] | None:
    """Read two positive integers joined by an x; None for other texts.

    Their product is at most MOST_DEVICES.
    """
    sizes = text.split("x")
    if len(sizes) == 2 and all(size.isdecimal() and len(size) < 9 for size in sizes):
        data, model = map(int, sizes)
        if 0 < data * model <= MOST_DEVICES:
            return data, model
    return None


def shape(data: int, model: int, devices: int) -> tuple[int, int]:
    """Resolves -1 ("what is left of the devices") in a mesh shape and checks that it fits.

    Raises UserError naming the fields, where the shape does not fit `devices` devices.
    """
    asked = f"mesh.data={data}, mesh.model={model}"
    if data == model == -1 or any(size != -1 and size < 1 for size in (data, model)):
        raise UserError(
            f"{asked}: each must be a positive integer, and at most one -1 (what is left of the devices)"
        )
    fixed = model if data == -1 else data
    if -1 in (data, model):
        if devices % fixed:
            raise UserError(f"{asked}: {fixed} does not divide the {devices} devices there are")
        data, model = (devices // fixed, model) if data == -1 else (data, devices // fixed)
    if data * model > devices:
        simulate = f", or simulate devices on the CPU with --cpu_devices={data * model}"
        raise UserError(
            f"{asked}: needs {data * model} devices, but there are {devices}: choose a mesh whose product "
            f"is at most {devices}{simulate if data * model <= MOST_CPU_DEVICES else ''}"
        )
    return data, model


def make(data: int, model: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A (data, model) mesh over the first data * model devices; either size may be -1.

    Axes are Auto: XLA's partitioner chooses what our constraints leave open (Explicit ones, the default of
    jax.make_mesh, refuse the ambiguous contractions of a model-parallel backward pass).
    Raises UserError where the shape does not fit, or leaves a process of a cluster without its devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    data, model = shape(data, model, len(devices))
    if data * model < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"mesh.data={data}, mesh.model={model}: uses {data * model} of {len(devices)} devices, but with "
            f"{jax.process_count()} processes the mesh must hold them all"
        )
    return jax.make_mesh(
        (data, model), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[: data * model]
    )
