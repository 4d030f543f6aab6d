"""Layers that carry logical axes, so that placement.py can say where their arrays live.

Shapes: N batch, H height, W width, C channels; B batch and F features of a dense layer.
"""

import jax
import jax.numpy as jnp
from flax import nnx

HE = nnx.initializers.he_normal()  # keeps the variance through a ReLU (He et al. 2015, 1502.01852, eq. 10)
SMALL = nnx.initializers.normal(0.01)  # of the output layer: training starts from even odds (AlexNet 2012, section 5)


def unplaced(x: jax.Array, *axes: str | None) -> jax.Array:
    """The `place` of a network on one device: leaves every array where it is."""
    return x


def conv(channels_in: int, channels_out: int, window: int, *, strides: int = 1, padding="SAME", dtype, rngs) -> nnx.Conv:
    """A square 2-D convolution, NHWC by HWIO, with bias; float32 parameters, computed in `dtype`."""
    return nnx.Conv(channels_in, channels_out, (window, window), strides, padding=padding, dtype=dtype,
                    kernel_init=HE, kernel_metadata={"axes": (None, None, "conv_in", "conv_out")},
                    bias_metadata={"axes": ("conv_out",)}, rngs=rngs)


def dense(name: str, features_in: int, features_out: int, *, dtype, rngs, kernel_init=HE) -> nnx.Linear:
    """A dense layer with bias whose logical axes are `name`_in (rows) and `name`_out (columns)."""
    return nnx.Linear(features_in, features_out, dtype=dtype,
                      kernel_init=kernel_init, kernel_metadata={"axes": (f"{name}_in", f"{name}_out")},
                      bias_metadata={"axes": (f"{name}_out",)}, rngs=rngs)


def max_pool(x_NHWC: jax.Array, window: int, strides: int) -> jax.Array:
    """Max over square windows, unpadded; windows wider than the stride overlap (Krizhevsky et al. 2012, section 3.4).

    Windows that neither overlap nor leave a gap are a reshape and a max: its gradient fuses into elementwise code, where
    that of a general pool is a scatter (CIFAR-size AlexNet's step on an H200, batch 512: 1.86 ms against 2.35 ms). Among
    equal maxima of a window the gradient is then shared, instead of given to the first.
    """
    height, width = x_NHWC.shape[1:3]
    if window == strides and height % window == 0 and width % window == 0:
        batch, channels = len(x_NHWC), x_NHWC.shape[-1]
        return x_NHWC.reshape(batch, height // window, window, width // window, window, channels).max((2, 4))
    return nnx.max_pool(x_NHWC, (window, window), (strides, strides))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes each element with probability `rate` and scales up the rest; no key (evaluation) leaves x as it is.

    The mask is drawn for the logical array, so it is the same on every mesh.
    """
    if key is None or rate == 0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)
