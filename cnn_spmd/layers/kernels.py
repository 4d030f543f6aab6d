"""GPU kernels (Pallas, by Triton) where XLA's own code moves many times the bytes it must.

A max pool that remembers where its maxima were, and its gradient: XLA keeps masks for the nine pixels of a window instead of
one number, and its own code for the gradient takes 3 to 4 times what the bytes cost (an H100, 512 maps of 55x55x64: 0.39 ms;
this kernel 0.10 ms; reading and writing each number once, 0.09 ms).
What a mask leaves out is neither read nor written, wherever its index points.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

WIDEST = (
    15  # the index is a byte: a window of 16x16 has 256 codes, which leaves no room for two marks
)
NONE = 254  # the index of a window that passes no gradient on: the ReLU after it is zero
WARPS = triton.CompilerParams(num_warps=8)


def max_and_index(
    x_NHWC: jax.Array, *bias_C: jax.Array, window: int, strides: int, counts: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Maxima [N, *counts, C] over windows, and where in its window each was: row * window + column, uint8.

    With a bias, relu(maximum + bias) and NONE where that is not positive. A program makes a row of a map, for some channels.
    """
    batch, height, width, channels = x_NHWC.shape
    high, wide = counts
    lanes, across = _lanes(channels), pl.next_power_of_2(wide)

    def kernel(x_ref, *refs):
        image, row, at = (
            pl.program_id(0),
            pl.program_id(1),
            pl.program_id(2) * lanes + jnp.arange(lanes)[None],
        )
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
    """The gradient [N, *sizes, C] by the pool's input; index: as max_and_index gives it.

    A program makes `strides` rows of a map: each pixel adds up the gradients of the windows that hold it and chose it.
    """
    batch, high, wide, channels = gradient_NKKC.shape
    height, width = sizes
    rows, columns = (-(-size // strides) for size in sizes)
    reach = -(-window // strides)  # so many windows, in each direction, hold a pixel
    lanes, across, sum_dtype = (
        _lanes(channels),
        pl.next_power_of_2(columns),
        _sum_dtype(gradient_NKKC),
    )

    def kernel(index_ref, gradient_ref, out_ref):
        image, row, at = (
            pl.program_id(0),
            pl.program_id(1),
            pl.program_id(2) * lanes + jnp.arange(lanes)[None],
        )
        column = jnp.arange(across)[:, None]

        def load(up, left):
            """Index and gradient of the windows that start `up` blocks above and `left` blocks before these pixels' own."""
            inside = (
                (row - up >= 0) & (row - up < high) & (column - left >= 0) & (column - left < wide)
            )
            mask = jnp.broadcast_to(inside, (across, lanes))
            where = (image, row - up, column - left, at)
            return (
                triton.load(index_ref.at[where], mask=mask, other=255).astype(jnp.int32),
                triton.load(gradient_ref.at[where], mask=mask, other=0).astype(sum_dtype),
            )

        windows = {(up, left): load(up, left) for up in range(reach) for left in range(reach)}
        for y in range(strides):
            for x in range(strides):
                total = jnp.zeros((across, lanes), sum_dtype)
                for (up, left), (index, gradient) in windows.items():
                    if y + strides * up < window and x + strides * left < window:
                        total += jnp.where(
                            index == (y + strides * up) * window + x + strides * left, gradient, 0
                        )
                down, right = row * strides + y, column * strides + x
                mask = jnp.broadcast_to((down < height) & (right < width), (across, lanes))
                where = (image, down, right, at)
                triton.store(out_ref.at[where], total.astype(out_ref.dtype), mask=mask)

    out = jax.ShapeDtypeStruct((batch, height, width, channels), gradient_NKKC.dtype)
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(batch, rows, channels // lanes),
        name="unpool",
        compiler_params=WARPS,
    )(index_NKKC, gradient_NKKC)


def _lanes(channels: int) -> int:
    return min(64, channels & -channels)  # Triton's blocks are powers of two


def _sum_dtype(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
