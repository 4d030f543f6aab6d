"""Pools, and the ReLU that may change places with them.

Shapes: N batch, H height, W width, C channels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnn_spmd.layers import kernels
from cnn_spmd.layers.common import LEVERS
from cnn_spmd.sharding.placement import UNPLACED


@jax.custom_vjp
def bias_relu(x: jax.Array, bias_C: jax.Array) -> jax.Array:
    """relu(x + bias_C), the bias along the last axis ("own_gradients"); its gradient is summed in float32.

    The gradient looks at the result, which the next layer keeps anyway. What jax.nn.relu looks at, x + bias_C, is then never
    written: cuDNN makes one kernel of a convolution, its bias and the ReLU. (Not "> 0", which XLA traces back to x + bias_C.)
    """
    return jnp.maximum(x + bias_C, 0)


def _bias_relu_gradient(kept, gradient):
    result, bias_C = kept
    gradient = jnp.where(result != 0, gradient, 0)
    return gradient, _sum_to(bias_C, gradient)


bias_relu.defvjp(
    lambda x, bias_C: (bias_relu(x, bias_C), (bias_relu(x, bias_C), bias_C)), _bias_relu_gradient
)


def _sum_to(bias_C: jax.Array, gradient: jax.Array) -> jax.Array:
    """The bias's gradient."""
    wide = jnp.promote_types(gradient.dtype, jnp.float32)
    return gradient.sum(tuple(range(gradient.ndim - 1)), dtype=wide).astype(bias_C.dtype)


def max_pool(
    x_NHWC: jax.Array,
    window: int,
    strides: int,
    ceil: bool = False,
    *,
    place=UNPLACED,
    channels: str = "conv_out",
    levers=LEVERS,
    bias_C: jax.Array | None = None,
) -> jax.Array:
    """Max over square windows; windows wider than the stride overlap (Krizhevsky et al. 2012, section 3.4).

    ceil: a last window that reaches over the edge counts, as in cuda-convnet; else it is left out. channels: their logical
    axis; the result is placed as the input is, else XLA may gather the larger input for what comes next. bias_C: is added to
    the maxima, with a ReLU on top.
    The pool remembers where the first maximum of each window was ("pool_index"): a byte an output is all
    that the gradient needs. Without that lever, and for windows above kernels.WIDEST, windows that
    neither overlap nor leave a gap are a reshape and a max, among whose equal maxima the gradient is
    shared; others are two maxima in a row.
    """
    axes = ("conv_batch", None, None, channels)
    height, width = x_NHWC.shape[1:3]
    if "pool_index" in levers and window <= kernels.WIDEST:
        settings = Pool(
            window, strides, ceil, (height, width), functools.partial(place.local, axes)
        )
        return place(_indexed_max_pool(x_NHWC, bias_C, settings), *axes)
    if window == strides and height % window == 0 and width % window == 0:
        parts = height // window, window, width // window, window
        x_NHWC = x_NHWC.reshape(len(x_NHWC), *parts, x_NHWC.shape[-1]).max((2, 4))
    else:
        x_NHWC = _max_along(1, _max_along(2, x_NHWC, window, strides, ceil), window, strides, ceil)
    x_NHWC = place(x_NHWC, *axes)
    if bias_C is None:
        return x_NHWC
    return place(
        bias_relu(x_NHWC, bias_C) if "own_gradients" in levers else nnx.relu(x_NHWC + bias_C), *axes
    )


def _max_along(dimension: int, x: jax.Array, window: int, strides: int, ceil: bool) -> jax.Array:
    """Max over windows of one dimension: elementwise maxima of strided slices, which any partitioning leaves in place."""
    return functools.reduce(jnp.maximum, _taps(dimension, x, window, strides, ceil))


def _taps(dimension: int, x: jax.Array, window: int, strides: int, ceil: bool) -> list[jax.Array]:
    """The first, second, ... element of every window along a dimension."""
    overhang = _overhang(x.shape[dimension], window, strides) if ceil else 0
    if overhang:
        x = jax.lax.pad(
            x,
            jnp.array(-jnp.inf, x.dtype),
            [(0, overhang if i == dimension else 0, 0) for i in range(x.ndim)],
        )
    last = (x.shape[dimension] - window) // strides * strides
    return [
        jax.lax.slice_in_dim(x, start, start + last + 1, strides, dimension)
        for start in range(window)
    ]


class Pool(NamedTuple):
    """A max pool that remembers its maxima: its settings, the size of what it pools, and `place.local` for its kernels."""

    window: int
    strides: int
    ceil: bool
    sizes: tuple[int, int]
    local: Callable


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _indexed_max_pool(x_NHWC, bias_C, pool):
    return _max_and_index(x_NHWC, bias_C, pool)[0]


def _max_and_index(x_NHWC, bias_C, pool):
    """The maxima (with a bias: relu(maximum + bias)), and what the gradient needs: where in its window each was."""
    counts = tuple(
        (size + (_overhang(size, pool.window, pool.strides) if pool.ceil else 0) - pool.window)
        // pool.strides
        + 1
        for size in pool.sizes
    )

    def choose(*arrays):
        return jax.lax.platform_dependent(
            *arrays,
            default=functools.partial(_plain_max_and_index, pool),
            cuda=functools.partial(
                kernels.max_and_index, window=pool.window, strides=pool.strides, counts=counts
            ),
        )

    largest, index = pool.local(choose, x_NHWC, *(() if bias_C is None else (bias_C,)))
    return largest, (index, bias_C)


def _plain_max_and_index(pool, x_NHWC, *bias_C):
    settings = pool.window, pool.strides, pool.ceil
    taps = [tap for rows in _taps(1, x_NHWC, *settings) for tap in _taps(2, rows, *settings)]
    largest, index = taps[0], jnp.zeros(taps[0].shape, jnp.uint8)
    for code, tap in enumerate(taps[1:], 1):
        larger = (tap > largest) | jnp.isnan(tap)
        largest, index = jnp.where(larger, tap, largest), jnp.where(larger, jnp.uint8(code), index)
    if bias_C:
        largest = jnp.maximum(largest + bias_C[0], 0)
        index = jnp.where(largest > 0, index, jnp.uint8(kernels.NONE))
    return largest, index


def _unpool(pool, kept, gradient):
    """Each pixel's gradient: of the few windows that hold it, those whose maximum it was; and the bias's."""
    (index, bias_C), settings = (
        kept,
        dict(window=pool.window, strides=pool.strides, sizes=pool.sizes),
    )

    def choose(index, gradient):
        return jax.lax.platform_dependent(
            index,
            gradient,
            cuda=functools.partial(kernels.unpool, **settings),
            default=functools.partial(_plain_unpool, **settings),
        )

    bias_gradient = (
        None if bias_C is None else _sum_to(bias_C, jnp.where(index == kernels.NONE, 0, gradient))
    )
    return pool.local(choose, index, gradient), bias_gradient


def _plain_unpool(index, gradient, window, strides, sizes):
    blocks, reach, total = [-(-size // strides) for size in sizes], -(-window // strides), 0
    for row, column in np.ndindex(
        reach, reach
    ):  # of the window that starts so many blocks before the pixel's own

        def shifted(x, value, by=(row, column)):
            widths = [
                (low, of - size - low, 0)
                for of, size, low in zip(blocks, x.shape[1:3], by, strict=True)
            ]
            x = jax.lax.pad(x, np.array(value, x.dtype), [(0, 0, 0), *widths, (0, 0, 0)])
            return x[:, :, None, :, None]

        rows, columns = np.arange(strides) + strides * row, np.arange(strides) + strides * column
        codes = np.where(
            (rows[:, None] < window) & (columns < window), rows[:, None] * window + columns, 255
        ).astype(np.uint8)
        here = shifted(index, kernels.NONE) == codes[None, None, :, None, :, None]
        total = total + jnp.where(here, shifted(gradient, 0), 0)
    batch, channels = len(gradient), gradient.shape[-1]
    return total.reshape(batch, *(count * strides for count in blocks), channels)[
        :, : sizes[0], : sizes[1]
    ]


_indexed_max_pool.defvjp(_max_and_index, _unpool)


def average_pool(x_NHWC: jax.Array, window: int, strides: int) -> jax.Array:
    """Mean over square windows, ceil mode, as in cuda-convnet: a window over the edge is divided by the area inside."""
    padding = [(0, _overhang(size, window, strides)) for size in x_NHWC.shape[1:3]]
    sums = jax.lax.reduce_window(
        x_NHWC,
        np.zeros((), x_NHWC.dtype),
        jax.lax.add,
        (1, window, window, 1),
        (1, strides, strides, 1),
        [(0, 0), *padding, (0, 0)],
    )
    inside = [
        np.minimum(window, size - strides * np.arange(count))
        for size, count in zip(x_NHWC.shape[1:3], sums.shape[1:3], strict=True)
    ]
    return sums / np.outer(*inside)[None, :, :, None].astype(x_NHWC.dtype)


def _overhang(size: int, window: int, strides: int) -> int:
    """How far the last window reaches over the edge in ceil mode; negative: how far before it the last one ends."""
    over = -(size - window) % strides
    return over if over < window else over - strides
