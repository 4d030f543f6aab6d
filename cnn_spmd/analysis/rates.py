"""Measure how fast devices compute and copy, and what collectives between them cost.

Times are the host's: it waits for the devices before it reads the clock.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cnn_spmd.analysis import hlo
from cnn_spmd.sharding import mesh as meshes

ROUNDS = 6  # of each measurement; the first warms up, and the median of the others counts
CALLS = 30  # of a program in a round, so that the time of a launch hardly counts
AXIS = "data"  # the mesh axis over which the collectives are measured
# Elements of the smallest part of an array that a collective cuts. Parts are multiples of it, so
# that they are aligned in memory as those of most layers are.
ALIGNED = 64

# Each operation on the elements x [n] of a device. `devices` says how many take part.
OPERATIONS: dict[str, Callable[[jax.Array, int], jax.Array]] = {
    "all-reduce": lambda x, devices: lax.psum(x, AXIS),
    "all-gather": lambda x, devices: lax.all_gather(x, AXIS, tiled=True),
    "reduce-scatter": lambda x, devices: lax.psum_scatter(x, AXIS, tiled=True),
    "all-to-all": lambda x, devices: lax.all_to_all(x, AXIS, 0, 0, tiled=True),
    "collective-permute": lambda x, devices: lax.ppermute(
        x, AXIS, [(i, (i + 1) % devices) for i in range(devices)]
    ),
}


class Sizes(NamedTuple):
    """How much is measured at once: enough to fill the device, little enough for a second."""

    matrix: int  # rows and columns of both factors
    copied: int  # bytes
    ring_bytes: tuple[int, ...]  # of the collectives
    repeats: int  # of a collective in a program


GPU = Sizes(8192, 2**29, tuple(2**n for n in range(16, 29, 2)), 100)
CPU = Sizes(1024, 2**24, tuple(2**n for n in range(16, 23, 2)), 30)


def sizes_for(platform: str) -> Sizes:
    """Return the sizes that suit devices of a platform, "cpu" or another."""
    return CPU if platform == "cpu" else GPU


def median_seconds(call: Callable[[], Any], calls: int = CALLS) -> float:
    """Return the seconds of a call, as one of `calls` in a row."""
    times = []
    for _ in range(ROUNDS):
        since = time.perf_counter()
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - since) / calls)
    return statistics.median(times[1:])


def matrix_rate(sizes: Sizes) -> float:
    """Return the FLOP/s of a product of square matrices, in bfloat16, on a CPU in float32."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    shape = sizes.matrix, sizes.matrix
    a, b = (jax.random.normal(jax.random.key(i), shape, dtype) for i in range(2))
    product = jax.jit(jnp.matmul)
    return 2 * sizes.matrix**3 / median_seconds(lambda: product(a, b))


def copy_rate(sizes: Sizes) -> float:
    """Return the bytes/s, read plus written, of a large copy."""
    x = jnp.zeros(sizes.copied // 4, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / median_seconds(lambda: copy(x))


def collectives(
    devices: Sequence[jax.Device], sizes: Sizes
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Yield each operation over all `devices`, and its points (ring bytes, seconds).

    A program repeats a collective in a loop. The seconds are those of one repetition, less those of
    the same loop without a collective.
    """
    count = len(devices)
    mesh = meshes.make(count, 1, devices=devices)
    empty = _repetition_seconds(mesh, "", ALIGNED, sizes.repeats)
    for operation in OPERATIONS:
        points = []
        for wanted in sizes.ring_bytes:
            elements, ring_bytes = elements_for(operation, wanted, count)
            seconds = _repetition_seconds(mesh, operation, elements, sizes.repeats)
            # On a busy host, noise may exceed what a small collective takes.
            points.append((ring_bytes, max(0.0, seconds - empty)))
        yield operation, points


def elements_for(operation: str, ring_bytes: int, devices: int) -> tuple[int, int]:
    """Return the float32 that each device gives to a collective, and its ring bytes.

    These are `ring_bytes`, or slightly more.
    """
    parts = hlo.RING_PARTS[operation](devices)
    part = math.ceil(ring_bytes / (4 * parts * ALIGNED)) * ALIGNED
    elements = part if operation == "all-gather" else part * devices
    return elements, hlo.ring_bytes(operation, 4 * part * devices, devices)


def _repetition_seconds(
    mesh: jax.sharding.Mesh, operation: str, elements: int, repeats: int
) -> float:
    """Return the seconds of one repetition; arguments are those of `compile_loop`."""
    program = compile_loop(mesh, operation, elements, repeats)
    (argument,) = program.input_shardings[0]
    shape = (elements * mesh.size,)
    x = jax.jit(lambda: jnp.zeros(shape, jnp.float32), out_shardings=argument)()
    return median_seconds(lambda: program(x), calls=1) / repeats


def compile_loop(
    mesh: jax.sharding.Mesh, operation: str, elements: int, repeats: int
) -> jax.stages.Compiled:
    """Return the program that repeats a collective over AXIS, which holds all devices.

    operation: one of OPERATIONS, or "" for a loop without a collective. elements: float32, that
    each device gives.
    """

    def body(_: int, x: jax.Array) -> jax.Array:
        """Write an element of the result into x, so that no repetition can be left out."""
        y = OPERATIONS[operation](x, mesh.size) if operation else x
        # XLA sums in place: the old x would have to be copied first.
        into = y if operation == "all-reduce" else x
        return into.at[0].set(y[1])

    spec = PartitionSpec(AXIS)
    mapped = jax.shard_map(
        lambda x: lax.fori_loop(0, repeats, body, x),
        mesh=mesh,
        in_specs=spec,
        out_specs=spec,
        check_vma=False,
    )
    shape = (elements * mesh.size,)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
    return jax.jit(mapped).lower(x).compile()
