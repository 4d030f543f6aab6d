"""AlexNet in its one-tower form (Krizhevsky 2014, "One weird trick", footnote 1; channels as its released configuration
and torchvision have them: 64, 192, 384, 256, 256).

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layers.
"""

import dataclasses

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers import conv, dense
from cnn_spmd.layers.common import LEVERS, SMALL
from cnn_spmd.sharding import placement


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What differs between image sizes: windows, strides and paddings of the first two convolutions and the pools."""

    conv1: dict
    conv2: dict
    pool: dict
    side: int  # pixels of what reaches fc1


SIZES = {
    224: Sizes(
        conv1=dict(window=11, strides=4, padding=(2, 2)),
        conv2=dict(window=5),
        pool=dict(window=3, strides=2),
        side=6,
    ),  # 224 -> 55 -> 27 -> 13 -> 6
    32: Sizes(
        conv1=dict(window=3), conv2=dict(window=3), pool=dict(window=2, strides=2), side=4
    ),  # 32 -> 16 -> 8 -> 4
}
CHANNELS = (64, 192, 384, 256, 256)


class AlexNet(nnx.Module):
    """Five convolutions, three max pools, two dense layers with dropout, an output layer.

    With `width` 4096, 61,100,840 parameters at 224x224 and 1000 classes; 35,855,178 at 32x32 and 10 classes.
    """

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
        if image_size not in SIZES:
            raise UserError(
                f"model.name=alexnet: images of {image_size}x{image_size}, expected a side of "
                f"{' or '.join(str(side) for side in sorted(SIZES))}: set "
                "--config.data.image_size for photographs, or --config.data.crop"
            )
        self.sizes, self.dropout, self.levers = SIZES[image_size], dropout, levers
        common = dict(dtype=dtype, rngs=rngs)
        self.conv1 = conv.conv(3, CHANNELS[0], **self.sizes.conv1, **common)
        self.conv2 = conv.conv(CHANNELS[0], CHANNELS[1], **self.sizes.conv2, **common)
        self.conv3 = conv.conv(CHANNELS[1], CHANNELS[2], 3, **common)
        self.conv4 = conv.conv(CHANNELS[2], CHANNELS[3], 3, **common)
        self.conv5 = conv.conv(CHANNELS[3], CHANNELS[4], 3, **common)
        self.fc1 = dense.dense("fc1", CHANNELS[4] * self.sizes.side**2, width, **common)
        self.fc2 = dense.dense("fc2", width, width, **common)
        self.fc3 = dense.dense("fc3", width, classes, kernel_init=SMALL, **common)

    def features(
        self, x_NHWC: jax.Array, place=placement.UNPLACED, train: bool = False
    ) -> jax.Array:
        """What the convolutions make of images [N, side, side, 3] of zero mean and unit scale; [B, F]."""
        x_NHWC = conv.conv_relu("conv1", self.conv1, x_NHWC, place, self.levers, self.sizes.pool)
        x_NHWC = conv.conv_relu("conv2", self.conv2, x_NHWC, place, self.levers, self.sizes.pool)
        x_NHWC = conv.conv_relu("conv3", self.conv3, x_NHWC, place, self.levers)
        x_NHWC = conv.conv_relu("conv4", self.conv4, x_NHWC, place, self.levers)
        x_NHWC = conv.conv_relu("conv5", self.conv5, x_NHWC, place, self.levers, self.sizes.pool)
        return dense.flatten(x_NHWC, place)

    def classify(
        self, x_BF: jax.Array, place=placement.UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, classes] of the features; no key: no dropout."""
        return dense.dense_head(self, x_BF, place, self.dropout, dropout_key)
