"""Define the smallest convolutional network, to follow an array through by hand.

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layer.
"""

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import FAST_FORMS, NORMAL_0_01
from cnn_spmd.layers.conv import conv, conv_relu
from cnn_spmd.layers.dense import dense, flatten, logits
from cnn_spmd.sharding.placement import UNPLACED

CHANNELS = 32


class SimpleCNN(nnx.Module):
    """A 3x3 convolution to 32 channels, ReLU, a 2x2 max pool, the output layer."""

    def __init__(
        self,
        *,
        image_size: int,
        classes: int,
        width: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
        fast_forms: tuple[str, ...] = FAST_FORMS,
    ):
        """Build the layers, with the arguments of AlexNet.

        Raises UserError for an odd image size.
        """
        del width, dropout  # there is no hidden dense layer
        if image_size % 2:
            raise UserError(
                f"model.name=simple_cnn: images of {image_size}x{image_size}, expected an even side"
            )
        self.fast_forms = fast_forms
        features = CHANNELS * (image_size // 2) ** 2
        self.conv1 = conv(3, CHANNELS, 3, dtype=dtype, rngs=rngs)
        self.fc3 = dense("fc3", features, classes, dtype=dtype, rngs=rngs, kernel_init=NORMAL_0_01)

    def features(self, images_NHWC: jax.Array, place=UNPLACED, train: bool = False) -> jax.Array:
        """Return what the convolution makes of the images: [N, H, W, 3] -> [B, F].

        The images have zero mean and unit scale. train has no effect here.
        """
        pool = dict(window=2, strides=2)
        x_NHWC = conv_relu("conv1", self.conv1, images_NHWC, place, self.fast_forms, pool)
        return flatten(x_NHWC, place)

    def classify(
        self, x_BF: jax.Array, place=UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits [B, classes] of the features."""
        return logits(self.fc3, x_BF, place)
