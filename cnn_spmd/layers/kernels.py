"""Pool on GPUs with kernels of our own (Pallas, compiled by Triton).

A max pool that remembers where its maxima were, and its gradient. XLA's own code for that gradient
moves several times the bytes that it must: a mask for each pixel of a window. These kernels read
and write each number about once.

In every kernel, triton.load and triton.store skip the elements that `mask` leaves out, even where
their index lies outside the array.

Shapes: N batch, H height, W width, C channels; K windows along the height or the width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
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
    """
    batch, _, _, channels = x_NHWC.shape
    shape = (batch, *counts, channels)
    return pl.pallas_call(
        functools.partial(_max_and_index_kernel, window, strides),
        out_shape=(
            jax.ShapeDtypeStruct(shape, x_NHWC.dtype),
            jax.ShapeDtypeStruct(shape, jnp.uint8),
        ),
        grid=(batch, counts[0], channels // _lanes(channels)),
        name="max_and_index",
        compiler_params=WARPS,
    )(x_NHWC, *bias_C)


def _max_and_index_kernel(window, strides, x_ref, *refs):
    """Compute a row of windows for some channels; refs: bias (if any), maxima, index."""
    *bias_ref, largest_ref, index_ref = refs
    _, height, width, channels = x_ref.shape
    wide = largest_ref.shape[2]
    lanes, across = _lanes(channels), pl.next_power_of_2(wide)
    image, row, at = _program(lanes)
    column = jnp.arange(across)[:, None]
    for code in range(window * window):
        down, right = row * strides + code // window, column * strides + code % window
        mask = jnp.broadcast_to((down < height) & (right < width), (across, lanes))
        where = (image, down, right, at)
        tap = triton.load(x_ref.at[where], mask=mask, other=-jnp.inf).astype(_sum_dtype(x_ref))
        if code == 0:
            largest, index = tap, jnp.zeros((across, lanes), jnp.int32)
        else:
            larger = (tap > largest) | (tap != tap)  # a NaN counts as a maximum
            largest, index = jnp.where(larger, tap, largest), jnp.where(larger, code, index)
    if bias_ref:
        largest = largest + triton.load(bias_ref[0].at[at]).astype(largest.dtype)
        largest = jnp.maximum(largest.astype(x_ref.dtype), 0)
        index = jnp.where(largest > 0, index, NONE)
    mask = jnp.broadcast_to(column < wide, (across, lanes))
    for ref, value in ((largest_ref, largest), (index_ref, index)):
        triton.store(ref.at[image, row, column, at], value.astype(ref.dtype), mask=mask)


def unpool(
    index_NKKC: jax.Array,
    gradient_NKKC: jax.Array,
    window: int,
    strides: int,
    sizes: tuple[int, int],
) -> jax.Array:
    """Return the gradient [N, *sizes, C] by the pool's input.

    index_NKKC: from max_and_index. Each pixel adds up, in float32 or wider, the gradients of the
    windows that hold it and have their maximum there.
    """
    batch, _, _, channels = gradient_NKKC.shape
    rows = -(-sizes[0] // strides)
    return pl.pallas_call(
        functools.partial(_unpool_kernel, window, strides),
        out_shape=jax.ShapeDtypeStruct((batch, *sizes, channels), gradient_NKKC.dtype),
        grid=(batch, rows, channels // _lanes(channels)),
        name="unpool",
        compiler_params=WARPS,
    )(index_NKKC, gradient_NKKC)


def _unpool_kernel(window, strides, index_ref, gradient_ref, out_ref):
    """Compute one row of blocks of strides x strides pixels, for some channels."""
    _, high, wide, channels = gradient_ref.shape
    _, height, width, _ = out_ref.shape
    reach = -(-window // strides)  # windows that hold a pixel, along each dimension
    lanes, across = _lanes(channels), pl.next_power_of_2(-(-width // strides))
    sum_dtype = _sum_dtype(gradient_ref)
    image, row, at = _program(lanes)
    column = jnp.arange(across)[:, None]

    def load(up, left):
        """Load index and gradient of the windows that start (up, left) blocks earlier."""
        inside = (row - up >= 0) & (row - up < high) & (column - left >= 0) & (column - left < wide)
        mask = jnp.broadcast_to(inside, (across, lanes))
        where = (image, row - up, column - left, at)
        index = triton.load(index_ref.at[where], mask=mask, other=OUTSIDE).astype(jnp.int32)
        gradient = triton.load(gradient_ref.at[where], mask=mask, other=0).astype(sum_dtype)
        return index, gradient

    windows = {(up, left): load(up, left) for up in range(reach) for left in range(reach)}
    for y, x in np.ndindex(strides, strides):
        total = jnp.zeros((across, lanes), sum_dtype)
        for (up, left), (index, gradient) in windows.items():
            down, right = y + strides * up, x + strides * left
            if down < window and right < window:
                total += jnp.where(index == down * window + right, gradient, 0)
        down, right = row * strides + y, column * strides + x
        mask = jnp.broadcast_to((down < height) & (right < width), (across, lanes))
        where = (image, down, right, at)
        triton.store(out_ref.at[where], total.astype(out_ref.dtype), mask=mask)


def _program(lanes: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return which image, row and channels this program of the grid works on."""
    image, row = pl.program_id(0), pl.program_id(1)
    return image, row, pl.program_id(2) * lanes + jnp.arange(lanes)[None]


def _lanes(channels: int) -> int:
    """Return the number of channels per program: a power of two, as Triton needs."""
    return min(64, channels & -channels)


def _sum_dtype(x) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
