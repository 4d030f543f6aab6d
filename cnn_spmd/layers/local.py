"""The locally connected layer, cuda-convnet's "local": a convolution whose kernel is another one at each position.

Shapes: N batch, H height, W width, T pixels of a window, C channels in, D channels out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

# He et al. 2015: the inputs of one output are a window of one position, not all positions.
HE = nnx.initializers.he_normal(in_axis=(2, 3), out_axis=4, batch_axis=(0, 1))


class Local(nnx.Module):
    """An untied convolution of stride 1 that keeps the size, `side` x `side`; a kernel and a bias a position, float32."""

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
        self.window, self.dtype = window, dtype
        self.kernel = nnx.Param(
            kernel_init(
                rngs.params(), (side, side, window**2, channels_in, channels_out), jnp.float32
            ),
            axes=(None, None, None, "conv_in", "conv_out"),
        )
        self.bias = nnx.Param(jnp.zeros((side, side, channels_out)), axes=(None, None, "conv_out"))

    def __call__(self, x_NHWC: jax.Array) -> jax.Array:
        """[N, H, W, C] to [N, H, W, D], as one matrix product a position: [N, T C] by [T C, D].

        Where D is split over devices, the gradient of x is summed over them as [N, H, W, T, C]: T times what it need be.
        """
        kernel_HWTCD, side = self.kernel[...].astype(self.dtype), self.kernel.shape[0]
        around = (self.window - 1) // 2, self.window // 2
        x_NHWC = jnp.pad(x_NHWC.astype(self.dtype), [(0, 0), around, around, (0, 0)])
        taps = [
            x_NHWC[:, row : row + side, column : column + side]
            for row, column in np.ndindex(self.window, self.window)
        ]
        return jnp.einsum("nhwtc,hwtcd->nhwd", jnp.stack(taps, 3), kernel_HWTCD) + self.bias[
            ...
        ].astype(self.dtype)
