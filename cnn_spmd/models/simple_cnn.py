"""The smallest convolutional network: convolution, ReLU, pool, dense. The one to follow an array through by hand."""

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers import conv, dense
from cnn_spmd.layers.common import LEVERS, SMALL
from cnn_spmd.sharding import placement


class SimpleCNN(nnx.Module):
    """A 3x3 convolution to 32 channels, ReLU, a 2x2 max pool and an output layer (fc3 in the placement table)."""

    towers = 1

    def __init__(
        self,
        *,
        image_size: int,
        classes: int,
        width: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
        levers: tuple[str, ...] = LEVERS,
    ):
        if image_size % 2:
            raise UserError(
                f"model.name=simple_cnn: images of {image_size}x{image_size}, expected an even side"
            )
        self.levers = levers
        del width, dropout  # there is no hidden dense layer
        self.conv1 = conv.conv(3, 32, 3, dtype=dtype, rngs=rngs)
        self.fc3 = dense.dense(
            "fc3", 32 * (image_size // 2) ** 2, classes, dtype=dtype, rngs=rngs, kernel_init=SMALL
        )

    def features(
        self, x_NHWC: jax.Array, place=placement.UNPLACED, train: bool = False
    ) -> jax.Array:
        """What the convolution makes of images [N, side, side, 3] of zero mean and unit scale; [B, F]."""
        x_NHWC = conv.conv_relu(
            "conv1", self.conv1, x_NHWC, place, self.levers, dict(window=2, strides=2)
        )
        return dense.flatten(x_NHWC, place)

    def classify(
        self, x_BF: jax.Array, place=placement.UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, classes] of the features."""
        return dense.logits(self.fc3, x_BF, place)
