"""Pool by maximum and remember where each maximum was (the fast form "pool_index").

The gradient of a max pool needs one number per window: which pixel was the maximum. XLA's own form
keeps a mask for each pixel of the window, or the whole input. Here it is one byte per window. It
applies to windows of up to kernels.WIDEST pixels per side, whose pixels a byte can number.

On NVIDIA GPUs the two halves are the kernels of layers/kernels.py, elsewhere the plain functions
below.

Shapes: N batch, H height, W width, C channels; K windows along the height or the width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.layers import kernels, windows
from cnn_spmd.layers.activation import bias_gradient


class Pool(NamedTuple):
    """The settings of a max pool, and how to run a function on each device's shard."""

    window: int
    strides: int
    ceil: bool
    sizes: tuple[int, int]  # height and width of the input
    on_shards: Callable  # (f, *arrays) -> f(*arrays), by each device from its own shards

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the number of windows, down and right."""
        return tuple(
            windows.count(size, self.window, self.strides, self.ceil) for size in self.sizes
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def indexed_max_pool(x_NHWC: jax.Array, bias_C: jax.Array | None, pool: Pool) -> jax.Array:
    """Return the maxima [N, K, K, C]; with a bias, relu(maxima + bias_C).

    Where maxima in a window are equal, the first gets the gradient. A NaN counts as a maximum.
    """
    return _forward(x_NHWC, bias_C, pool)[0]


def _forward(x_NHWC, bias_C, pool):
    """Return the maxima, and what the gradient needs: the index of each, and the bias."""

    def choose(*arrays):
        return jax.lax.platform_dependent(
            *arrays,
            default=functools.partial(plain_max_and_index, pool),
            cuda=functools.partial(
                kernels.max_and_index, window=pool.window, strides=pool.strides, counts=pool.counts
            ),
        )

    largest, index = pool.on_shards(choose, x_NHWC, *(() if bias_C is None else (bias_C,)))
    return largest, (index, bias_C)


def _backward(pool, kept, gradient):
    """Return the gradients by x and by the bias."""
    index, bias_C = kept
    settings = dict(window=pool.window, strides=pool.strides, sizes=pool.sizes)

    def choose(index, gradient):
        return jax.lax.platform_dependent(
            index,
            gradient,
            cuda=functools.partial(kernels.unpool, **settings),
            default=functools.partial(plain_unpool, **settings),
        )

    by_bias = None
    if bias_C is not None:
        by_bias = bias_gradient(bias_C, jnp.where(index == kernels.NONE, 0, gradient))
    return pool.on_shards(choose, index, gradient), by_bias


indexed_max_pool.defvjp(_forward, _backward)


def plain_max_and_index(
    pool: Pool, x_NHWC: jax.Array, *bias_C: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Do what kernels.max_and_index does, for XLA to compile on any platform."""
    settings = pool.window, pool.strides, pool.ceil
    rows = windows.taps(1, x_NHWC, *settings)
    taps = [tap for row in rows for tap in windows.taps(2, row, *settings)]
    largest, index = taps[0], jnp.zeros(taps[0].shape, jnp.uint8)
    for code, tap in enumerate(taps[1:], 1):
        larger = (tap > largest) | jnp.isnan(tap)
        largest, index = jnp.where(larger, tap, largest), jnp.where(larger, jnp.uint8(code), index)
    if bias_C:
        largest = jnp.maximum(largest + bias_C[0], 0)
        index = jnp.where(largest > 0, index, jnp.uint8(kernels.NONE))
    return largest, index


def plain_unpool(
    index_NKKC: jax.Array,
    gradient_NKKC: jax.Array,
    window: int,
    strides: int,
    sizes: tuple[int, int],
) -> jax.Array:
    """Do what kernels.unpool does, for XLA to compile on any platform.

    The map is cut into blocks of strides x strides pixels. A block's first pixel is where a window
    starts; the windows that start in the blocks above and to the left may reach the block too.
    """
    batch, _, _, channels = gradient_NKKC.shape
    blocks = [-(-size // strides) for size in sizes]
    reach = -(-window // strides)  # windows that hold a pixel, along each dimension
    pixels = np.arange(strides)
    total = 0
    for up, left in np.ndindex(reach, reach):
        # Where in the window that starts (up, left) blocks before lies each pixel of the block?
        rows, columns = pixels[:, None] + strides * up, pixels + strides * left
        inside = (rows < window) & (columns < window)
        codes = np.where(inside, rows * window + columns, kernels.OUTSIDE).astype(np.uint8)
        index = _shift(index_NKKC, (up, left), blocks, kernels.NONE)
        chosen = index == codes[None, None, :, None, :, None]
        total = total + jnp.where(chosen, _shift(gradient_NKKC, (up, left), blocks, 0), 0)
    x = total.reshape(batch, *(blocks_along * strides for blocks_along in blocks), channels)
    return x[:, : sizes[0], : sizes[1]]


def _shift(x_NKKC: jax.Array, by: tuple[int, int], blocks: list[int], fill: int) -> jax.Array:
    """Give each block the value of the window that starts `by` blocks before it.

    Returns [N, blocks down, 1, blocks right, 1, C], with `fill` where there is no such window.
    """
    widths = [
        (low, blocks_along - size - low, 0)
        for blocks_along, size, low in zip(blocks, x_NKKC.shape[1:3], by, strict=True)
    ]
    value = np.array(fill, x_NKKC.dtype)
    x = jax.lax.pad(x_NKKC, value, [(0, 0, 0), *widths, (0, 0, 0)])
    return x[:, :, None, :, None]
