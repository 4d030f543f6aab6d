"""AlexNet in its one-tower form (Krizhevsky 2014, "One weird trick", footnote 1; channels as its released configuration
and torchvision have them: 64, 192, 384, 256, 256).

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layers.
"""

import dataclasses

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.models import layers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What differs between image sizes: windows, strides and paddings of the first two convolutions and the pools."""

    conv1: dict
    conv2: dict
    pool: dict
    flat: int  # features that reach fc1: 256 channels times the last pool's area


SIZES = {
    224: Sizes(conv1=dict(window=11, strides=4, padding=2), conv2=dict(window=5, padding=2),
               pool=dict(window=3, strides=2), flat=256 * 6 * 6),  # 224 -> 55 -> 27 -> 13 -> 6
    32: Sizes(conv1=dict(window=3), conv2=dict(window=3),
              pool=dict(window=2, strides=2), flat=256 * 4 * 4),  # 32 -> 16 -> 8 -> 4
}
CHANNELS = (64, 192, 384, 256, 256)
WIDTH = 4096


class AlexNet(nnx.Module):
    """Five convolutions, three max pools, two 4096-wide dense layers with dropout, an output layer.

    61,100,840 parameters at 224x224 and 1000 classes; 35,855,178 at 32x32 and 10 classes.
    """

    def __init__(self, *, image_size: int, classes: int, dropout: float, dtype, rngs: nnx.Rngs):
        if image_size not in SIZES:
            raise UserError(f"model.name=alexnet: images of {image_size}x{image_size}, expected a side of "
                            f"{' or '.join(str(side) for side in sorted(SIZES))}")
        self.sizes, self.dropout, self.dtype = SIZES[image_size], dropout, dtype
        common = dict(dtype=dtype, rngs=rngs)
        self.conv1 = layers.conv(3, CHANNELS[0], **self.sizes.conv1, **common)
        self.conv2 = layers.conv(CHANNELS[0], CHANNELS[1], **self.sizes.conv2, **common)
        self.conv3 = layers.conv(CHANNELS[1], CHANNELS[2], 3, **common)
        self.conv4 = layers.conv(CHANNELS[2], CHANNELS[3], 3, **common)
        self.conv5 = layers.conv(CHANNELS[3], CHANNELS[4], 3, **common)
        self.fc1 = layers.dense("fc1", self.sizes.flat, WIDTH, **common)
        self.fc2 = layers.dense("fc2", WIDTH, WIDTH, **common)
        self.fc3 = layers.dense("fc3", WIDTH, classes, kernel_init=layers.SMALL, **common)

    def __call__(self, x_NHWC: jax.Array, *, place=layers.unplaced, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [B, classes] of images [N, side, side, 3] of zero mean and unit scale; no key: no dropout."""
        def conv(layer, x_NHWC):
            return place(nnx.relu(layer(x_NHWC)), "conv_batch", None, None, "conv_out")

        def pool(x_NHWC):
            return layers.max_pool(x_NHWC, **self.sizes.pool)

        def hidden(name, x_BF, key):
            x_BF = nnx.relu(getattr(self, name)(place(x_BF, "dense_batch", f"{name}_in")))
            x_BF = layers.dropout(x_BF, self.dropout, key)
            return place(x_BF, "dense_batch", f"{name}_out")  # after dropout: else the mask, too, is gathered

        keys = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        x_NHWC = pool(conv(self.conv1, x_NHWC))
        x_NHWC = pool(conv(self.conv2, x_NHWC))
        x_NHWC = conv(self.conv3, x_NHWC)
        x_NHWC = conv(self.conv4, x_NHWC)
        x_NHWC = pool(conv(self.conv5, x_NHWC))
        x_BF = x_NHWC.reshape(len(x_NHWC), -1)
        x_BF = hidden("fc1", x_BF, keys[0])
        x_BF = hidden("fc2", x_BF, keys[1])
        return place(self.fc3(place(x_BF, "output_batch", "fc3_in")), "output_batch", "fc3_out")
