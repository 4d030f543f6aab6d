"""Compute where the windows of a pool lie, and cut their elements out of a map."""

import jax
import jax.numpy as jnp


def overhang(size: int, window: int, strides: int) -> int:
    """Return how far the last window reaches over the edge in ceil mode.

    A negative result: how far before the edge that window ends.
    """
    over = -(size - window) % strides
    return over if over < window else over - strides


def count(size: int, window: int, strides: int, ceil: bool) -> int:
    """Return the number of windows along a dimension of `size` elements.

    ceil: a last window that reaches over the edge counts, as in cuda-convnet.
    """
    over = overhang(size, window, strides) if ceil else 0
    return (size + over - window) // strides + 1


def taps(dimension: int, x: jax.Array, window: int, strides: int, ceil: bool) -> list[jax.Array]:
    """Return the first, second, ... element of every window along a dimension.

    Each of the `window` results is a strided slice, which leaves any partitioning in place. What
    lies beyond the edge is minus infinity.
    """
    beyond = overhang(x.shape[dimension], window, strides) if ceil else 0
    if beyond:
        widths = [(0, beyond if i == dimension else 0, 0) for i in range(x.ndim)]
        x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), widths)
    last = (x.shape[dimension] - window) // strides * strides
    return [
        jax.lax.slice_in_dim(x, start, start + last + 1, strides, dimension)
        for start in range(window)
    ]
