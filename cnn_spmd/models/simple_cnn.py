"""The smallest convolutional network: convolution, ReLU, pool, dense. The one to follow an array through by hand."""

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.models import layers


class SimpleCNN(nnx.Module):
    """A 3x3 convolution to 32 channels, ReLU, a 2x2 max pool and an output layer (fc3 in the placement table)."""

    def __init__(self, *, image_size: int, classes: int, dropout: float, dtype, rngs: nnx.Rngs):
        if image_size % 2:
            raise UserError(f"model.name=simple_cnn: images of {image_size}x{image_size}, expected an even side")
        del dropout  # there is no hidden dense layer to drop from
        self.conv1 = layers.conv(3, 32, 3, dtype=dtype, rngs=rngs)
        self.fc3 = layers.dense("fc3", 32 * (image_size // 2) ** 2, classes, dtype=dtype, rngs=rngs,
                                kernel_init=layers.SMALL)

    def __call__(self, x_NHWC: jax.Array, *, place=layers.unplaced, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [B, classes] of images [N, side, side, 3] of zero mean and unit scale."""
        x_NHWC = place(nnx.relu(self.conv1(x_NHWC)), "conv_batch", None, None, "conv_out")
        x_BF = layers.max_pool(x_NHWC, 2, 2).reshape(len(x_NHWC), -1)
        return place(self.fc3(place(x_BF, "output_batch", "fc3_in")), "output_batch", "fc3_out")
