"""AlexNet 2012's response norms.

Shapes: N batch, H height, W width, C channels.
"""

from collections.abc import Container

import jax
import jax.numpy as jnp
import numpy as np


def response_norm(
    x_NHWC: jax.Array,
    *,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    within_map: bool = False,
    levers: Container[str] = ("own_gradients",),
) -> jax.Array:
    """x / (k + alpha * sum of x^2 over a window of `size`) ** beta, the window clipped at the edges.

    Across maps: `size` neighbouring channels (Krizhevsky et al. 2012, section 3.3). within_map: a square of `size` x `size`
    pixels of the same channel. alpha multiplies each term, as in that paper's formula. Krizhevsky's code divides its
    `scale` by the number of terms instead: for its settings pass scale / size (across maps) or scale / size**2 (within a
    map), with k = 1 in cuda-convnet. AlexNet's published 1e-4 is such a scale: 2e-5 a term. levers: "own_gradients" takes a
    gradient that keeps less than autodiff's.
    """
    norm = _response_norm if "own_gradients" in levers else _plain
    return norm(x_NHWC, (1, size, size, 1) if within_map else (1, 1, 1, size), alpha, beta, k)


def _plain(x_NHWC, window, alpha, beta, k):
    return (x_NHWC * jnp.exp(-beta * jnp.log(_bases(x_NHWC, window, alpha, k)))).astype(
        x_NHWC.dtype
    )


def _gradient(window, alpha, beta, k, x_NHWC, gradient_NHWC):
    bases = _bases(x_NHWC, window, alpha, k)
    scale = jnp.exp(-beta * jnp.log(bases))  # several times faster than a power
    term = (gradient_NHWC * x_NHWC * scale / bases).astype(x_NHWC.dtype)
    term = jax.lax.optimization_barrier(term)  # else it is made again for each window that holds it
    around = _window_sums(_wide(term), window, turned=True)
    return ((gradient_NHWC * scale - 2 * alpha * beta * x_NHWC * around).astype(x_NHWC.dtype),)


# Its gradient keeps x alone: the sums are made again, instead of written and read in float32.
_response_norm = jax.custom_vjp(_plain, nondiff_argnums=(1, 2, 3, 4))
_response_norm.defvjp(
    lambda x_NHWC, *settings: (_response_norm(x_NHWC, *settings), x_NHWC), _gradient
)


def _bases(x_NHWC, window, alpha, k):
    return k + alpha * _window_sums(jnp.square(_wide(x_NHWC)), window)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _window_sums(x_NHWC, window, turned=False):
    """The sum over each element's window; turned: over all elements whose windows hold it."""
    padding = [((n - 1) // 2, n // 2)[:: -1 if turned else 1] for n in window]
    return jax.lax.reduce_window(
        x_NHWC, np.zeros((), x_NHWC.dtype), jax.lax.add, window, (1, 1, 1, 1), padding
    )


def response_norm_of_towers(
    x_NHWC: jax.Array, groups: int, place, name: str, **settings
) -> jax.Array:
    """response_norm across the maps of each of `groups` towers by itself, as AlexNet's two GPUs did: nothing crosses."""
    axes, width = ("conv_batch", None, None, "group_in"), x_NHWC.shape[-1] // groups

    def norm(_, x_NHWC):
        towers = jnp.split(x_NHWC, x_NHWC.shape[-1] // width, -1)
        return jnp.concatenate([response_norm(x, **settings) for x in towers], -1)

    return place.towers(
        norm, groups, (place(x_NHWC, *axes, name=f"{name} input"), axes), out=axes, name=name
    )
