"""Define cuda-convnet's local layer: a convolution with a kernel per position.

Shapes: N batch, H height, W width, T pixels of a window, C channels in, D channels out.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnn_spmd.sharding.placement import UNPLACED

# He et al. 2015: one output sees the window of one position, not those of all positions.
HE = nnx.initializers.he_normal(in_axis=(2, 3), out_axis=4, batch_axis=(0, 1))


class Local(nnx.Module):
    """An untied convolution on maps of side x side pixels; stride 1, same size.

    Each position has a kernel and a bias of its own, in float32; the layer computes in `dtype`.
    """

    def __init__(
        self,
        side: int,
        channels_in: int,
        channels_out: int,
        window: int,
        *,
        dtype,
        rngs: nnx.Rngs,
        kernel_init=HE,
    ):
        self.window = window
        self.dtype = dtype
        shape_HWTCD = (side, side, window**2, channels_in, channels_out)
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), shape_HWTCD, jnp.float32),
            axes=(None, None, None, "conv_in", "conv_out"),
        )
        self.bias = nnx.Param(jnp.zeros((side, side, channels_out)), axes=(None, None, "conv_out"))

    def __call__(self, x_NHWC: jax.Array, place=UNPLACED) -> jax.Array:
        """Map [N, H, W, C] to [N, H, W, D].

        Each position is a matrix product, [N, T C] by [T C, D]. Where the placement splits D,
        devices sum the gradient of all taps, [N, H, W, T, C]: T times the bytes of x's gradient.
        """
        around = (self.window - 1) // 2, self.window // 2
        side = self.kernel.shape[0]
        x_NHWC = jnp.pad(x_NHWC.astype(self.dtype), [(0, 0), around, around, (0, 0)])
        taps = [
            x_NHWC[:, row : row + side, column : column + side]
            for row, column in np.ndindex(self.window, self.window)
        ]
        multiply = functools.partial(jnp.einsum, "nhwtc,hwtcd->nhwd")
        x_NHWD = place.product(multiply, jnp.stack(taps, 3), self.kernel, self.dtype)
        return place.product(jnp.add, x_NHWD, self.bias, self.dtype)
