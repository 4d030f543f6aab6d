"""Pool on GPUs with kernels of our own (Pallas, compiled by Triton).

A max pool that remembers where its maxima were, and its gradient. XLA's own code for that gradient
moves several times the bytes that it must: a mask for each pixel of a window. These kernels read
and write each number about once.

In every kernel, triton.load and triton.store skip the elements that `mask` leaves out, even where
their index lies outside the array.

Shapes: N batch, H height, W width, C channels; K windows along the height or the width.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# The index of a maximum is one byte. A window of 16x16 has 256 pixels, which would leave no byte
# for the two marks below.
WIDEST = 15
# The index of a window that passes no gradient on, as the ReLU after it gives zero.
NONE = 254
# An index that no window has.
OUTSIDE = 255

WARPS = triton.CompilerParams(num_warps=8)


def max_and_index(
    x_NHWC: jax.Array, *bias_C: jax.Array, window: int, strides: int, counts: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Return the maxima [N, K, K, C] over windows and where in its window each was.

    counts: the number of windows, down and right. The index is row * window + column, as uint8; of
    equal maxima it is the first. With a bias, returns relu(maximum + bias), and the index NONE
    where that is not positive.

    One program of the kernel computes one row of windows, for some channels.
    """
    batch, height, width, channels = x_NHWC.shape
    high, wide = counts
    lanes, across = _lanes(channels), pl.next_power_of_2(wide)

    def kernel(x_ref, *refs):
        image, row = pl.program_id(0), pl.program_id(1)
        at = pl.program_id(2) * lanes + jnp.arange(lanes)[None]
        column = jnp.arange(across)[:, None]
        for code in range(window * window):
            down, right = row * strides + code // window, column * strides + code % window
            mask = jnp.broadcast_to((down < height) & (right < width), (across, lanes))
            where = (image, down, right, at)
            tap = triton.load(x_ref.at[where], mask=mask, other=-jnp.inf).astype(_sum_dtype(x_NHWC))
            if code == 0:
                largest, index = tap, jnp.zeros((across, lanes), jnp.int32)
            else:
                larger = (tap > largest) | (tap != tap)
                largest, index = jnp.where(larger, tap, largest), jnp.where(larger, code, index)
        if bias_C:
            largest = largest + triton.load(refs[0].at[at]).astype(largest.dtype)
            largest = jnp.maximum(largest.astype(x_NHWC.dtype), 0)
            index = jnp.where(largest > 0, index, NONE)
        mask = jnp.broadcast_to(column < wide, (across, lanes))
        for ref, value in zip(refs[-2:], (largest, index), strict=True):
            triton.store(ref.at[image, row, column, at], value.astype(ref.dtype), mask=mask)

    shape = (batch, high, wide, channels)
    out = jax.ShapeDtypeStruct(shape, x_NHWC.dtype), jax.ShapeDtypeStruct(shape, jnp.uint8)
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(batch, high, channels // lanes),
        name="max_and_index",
        compiler_params=WARPS,
    )(x_NHWC, *bias_C)


def unpool(
    index_NKKC: jax.Array,
    gradient_NKKC: jax.Array,
    window: int,
    strides: int,
    sizes: tuple[int, int],
) -> jax.Array:
    """Return the gradient [N, *sizes, C] by the pool's input, summed in float32 or wider.

    index_NKKC: from max_and_index. Each pixel adds up the gradients of the windows that hold it and
    have their maximum there.

    One program of the kernel computes `strides` rows of a map, for some channels: a row of blocks
    of strides x strides pixels.
    """
    batch, high, wide, channels = gradient_NKKC.shape
    height, width = sizes
    rows, columns = (-(-size // strides) for size in sizes)
    reach = -(-window // strides)  # windows that hold a pixel, along each dimension
    lanes, across = _lanes(channels), pl.next_power_of_2(columns)
    sum_dtype = _sum_dtype(gradient_NKKC)

    def kernel(index_ref, gradient_ref, out_ref):
        image, row = pl.program_id(0), pl.program_id(1)
        at = pl.program_id(2) * lanes + jnp.arange(lanes)[None]
        column = jnp.arange(across)[:, None]

        def load(up, left):
            """Load index and gradient of the windows that start (up, left) blocks before these."""
            inside = (
                (row - up >= 0) & (row - up < high) & (column - left >= 0) & (column - left < wide)
            )
            mask = jnp.broadcast_to(inside, (across, lanes))
            where = (image, row - up, column - left, at)
            index = triton.load(index_ref.at[where], mask=mask, other=OUTSIDE).astype(jnp.int32)
            gradient = triton.load(gradient_ref.at[where], mask=mask, other=0).astype(sum_dtype)
            return index, gradient

        windows = {(up, left): load(up, left) for up in range(reach) for left in range(reach)}
        for y in range(strides):
            for x in range(strides):
                total = jnp.zeros((across, lanes), sum_dtype)
                for (up, left), (index, gradient) in windows.items():
                    down, right = y + strides * up, x + strides * left
                    if down < window and right < window:
                        total += jnp.where(index == down * window + right, gradient, 0)
                down, right = row * strides + y, column * strides + x
                mask = jnp.broadcast_to((down < height) & (right < width), (across, lanes))
                where = (image, down, right, at)
                triton.store(out_ref.at[where], total.astype(out_ref.dtype), mask=mask)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, height, width, channels), gradient_NKKC.dtype),
        grid=(batch, rows, channels // lanes),
        name="unpool",
        compiler_params=WARPS,
    )(index_NKKC, gradient_NKKC)


def _lanes(channels: int) -> int:
    """Return how many channels a program handles: a power of two, as Triton's blocks are."""
    return min(64, channels & -channels)


def _sum_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
