"""Measure how fast devices compute and copy, and what collectives between them cost.

Times are the host's: it waits for the devices before it reads the clock.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from cnn_spmd.analysis import hlo, roofline
from cnn_spmd.layers import common
from cnn_spmd.sharding import mesh as meshes

ROUNDS = 6  # of each measurement; the first warms up, and the median of the others counts
CALLS = 30  # of a program in a round, so that the time of a launch hardly counts
CONVOLUTIONS = 4  # one after another in a program
CHAINS = 20  # of tiny kernels, one after another in a program
MAP_SIDE = 32  # pixels, of what they convolve
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
    repeats: int  # of a collective or a kernel in a program
    work: int  # bytes that a device adds to between two collectives
    widths: tuple[int, ...]  # channels of the convolutions, in and out
    elements: int  # that a convolution takes


# `work` takes an H100 about 80 us.
GPU = Sizes(
    8192,
    2**29,
    tuple(2**n for n in range(16, 29, 2)),
    100,
    work=2**27,
    widths=(16, 32, 64, 128, 256, 512),
    elements=2**24,
)
CPU = Sizes(
    1024,
    2**24,
    tuple(2**n for n in range(16, 23, 2)),
    30,
    work=2**12,
    widths=(16, 64),
    elements=2**16,
)


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


def kernel_seconds(sizes: Sizes) -> float:
    """Return what a kernel takes besides its work: one of a chain of tiny ones.

    A program repeats the chain CHAINS times, so that the time to launch it hardly counts.
    """

    def chain(_: jax.Array, x: jax.Array) -> jax.Array:
        for _ in range(sizes.repeats):
            x = lax.optimization_barrier(x + 1)  # the barrier keeps each addition a kernel
        return x

    x = jnp.zeros(ALIGNED, jnp.float32)
    program = jax.jit(lambda x: lax.fori_loop(0, CHAINS, chain, x))
    return median_seconds(lambda: program(x), calls=4) / (CHAINS * sizes.repeats)


def product_rates(sizes: Sizes, kernel_seconds: float) -> Iterator[tuple[int, float]]:
    """Yield the rate of convolutions by their channels, in FLOP/s for numbers of 2 bytes.

    It is that of a 3x3 convolution with its two gradients. A CPU computes in float32: from the
    rate that is yielded, roofline.py gets the measured one. kernel_seconds: subtracted for each
    product.
    """
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    factor = 1 / roofline.EFFICIENCY.float32 if on_cpu else 1
    for width in sizes.widths:
        keys = jax.random.split(jax.random.key(width), 2)
        images = sizes.elements // (MAP_SIDE**2 * width)
        x = jax.random.normal(keys[0], (images, MAP_SIDE, MAP_SIDE, width), dtype)
        kernel = jax.random.normal(keys[1], (3, 3, width, width), dtype) / (9 * width) ** 0.5
        call = functools.partial(jax.jit(_convolutions), x, kernel)
        seconds = median_seconds(call, calls=4) / CONVOLUTIONS
        flops = 3 * 2 * x.size * kernel.size // width
        yield width, factor * flops / max(seconds - 3 * kernel_seconds, seconds / 2)


def _convolutions(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Convolve, and compute both gradients, CONVOLUTIONS times; each needs the one before."""
    for _ in range(CONVOLUTIONS):
        y, gradients = jax.vjp(lambda *of: common.convolve(*of, [(1, 1)] * 2), x, kernel)
        x, by_kernel = gradients(y)
        kernel = kernel + 1e-6 * by_kernel
    return x, kernel


def collectives(
    devices: Sequence[jax.Device], sizes: Sizes
) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Yield each operation over all `devices`, and its points (ring bytes, seconds).

    A program repeats a collective and some work in a loop. The seconds are those of one repetition,
    less those of the same loop without a collective. The work takes a GPU longer than the host
    needs to launch a repetition. Without it the GPU would wait for the host, and a small collective
    would cost nothing. Noise may make a small difference zero or negative: no measurement.
    """
    count = len(devices)
    mesh = meshes.make(count, 1, devices=devices)
    alone = _repetition_seconds(mesh, "", ALIGNED, sizes)
    for operation in OPERATIONS:
        points = []
        for wanted in sizes.ring_bytes:
            elements, ring_bytes = elements_for(operation, wanted, count)
            seconds = _repetition_seconds(mesh, operation, elements, sizes)
            points.append((ring_bytes, seconds - alone))
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
    mesh: jax.sharding.Mesh, operation: str, elements: int, sizes: Sizes
) -> float:
    """Return the seconds of one repetition; arguments are those of `compile_loop`."""
    program = compile_loop(mesh, operation, elements, sizes)
    shardings = program.input_shardings[0]
    shapes = [(each * mesh.size,) for each in (elements, sizes.work // 4)]
    arrays = [
        jax.device_put(np.zeros(shape, np.float32), sharding)
        for shape, sharding in zip(shapes, shardings, strict=True)
    ]
    return median_seconds(lambda: program(*arrays), calls=1) / sizes.repeats


def compile_loop(
    mesh: jax.sharding.Mesh, operation: str, elements: int, sizes: Sizes
) -> jax.stages.Compiled:
    """Return the program that repeats a collective over AXIS, which holds all devices, and work.

    operation: one of OPERATIONS, or "" for the work alone. elements: float32, that each device
    gives.
    """

    def body(_: int, arrays: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Let the work need the collective, and the next collective need the work."""
        x, work = arrays
        y = OPERATIONS[operation](x, mesh.size) if operation else x
        work = work + y[1]
        # XLA sums in place: the old x would have to be copied first.
        into = y if operation == "all-reduce" else x
        return into.at[0].set(work[0]), work

    spec = PartitionSpec(AXIS)

    def loop(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.fori_loop(0, sizes.repeats, body, arrays)

    mapped = jax.shard_map(loop, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    arguments = [
        jax.ShapeDtypeStruct((each * mesh.size,), jnp.float32, sharding=NamedSharding(mesh, spec))
        for each in (elements, sizes.work // 4)
    ]
    return jax.jit(mapped).lower(*arguments).compile()
