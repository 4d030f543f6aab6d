"""AlexNet as published (Krizhevsky, Sutskever, Hinton, NIPS 2012): two towers that meet at conv3 and in the dense layers.

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layers.
"""

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers import conv, dense
from cnn_spmd.layers import norm as norms
from cnn_spmd.layers.common import LEVERS, ONES, SMALL
from cnn_spmd.layers.pool import max_pool
from cnn_spmd.sharding import placement

CHANNELS = (96, 256, 384, 384, 256)
# Section 3.3: k=2, n=5, alpha=1e-4, beta=.75. The authors' code divides alpha by n (norms.response_norm): 2e-5 a term.
RESPONSE_NORM = dict(size=5, alpha=1e-4 / 5, beta=0.75, k=2.0)
POOL = dict(window=3, strides=2)  # overlapping, section 3.4


class AlexNet2012(nnx.Module):
    """Five convolutions (the 2nd, 4th and 5th in two groups), response norms, overlapping pools, two dense layers.

    60,965,224 parameters at 224x224, 1000 classes and `width` 4096. Initial weights N(0, .01); biases 1 in conv2, conv4,
    conv5 and the hidden dense layers (section 5). A response norm stays within its tower: the towers meet in conv3 and
    the dense layers only (section 3.2).
    """

    towers = 2

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
        if image_size < 64:
            raise UserError(
                f"model.name=alexnet_2012: images of {image_size}x{image_size}, expected a side of "
                "at least 64 (published: 224): set --config.data.image_size for photographs"
            )
        self.dropout, self.levers = dropout, levers
        common = dict(dtype=dtype, rngs=rngs, kernel_init=SMALL)
        one = dict(bias_init=ONES)
        # 224 pixels and windows of 11 by strides of 4 make 55 if the last window may reach over the edge (cuda-convnet).
        overhang = -(image_size - 11) % 4
        self.conv1 = conv.conv(3, CHANNELS[0], 11, strides=4, padding=(0, overhang), **common)
        self.conv2 = conv.conv(CHANNELS[0], CHANNELS[1], 5, groups=2, **one, **common)
        self.conv3 = conv.conv(CHANNELS[1], CHANNELS[2], 3, **common)
        self.conv4 = conv.conv(CHANNELS[2], CHANNELS[3], 3, groups=2, **one, **common)
        self.conv5 = conv.conv(CHANNELS[3], CHANNELS[4], 3, groups=2, **one, **common)
        side = -(-(image_size - 11) // 4) + 1
        for _ in range(3):  # 55 -> 27 -> 13 -> 6
            side = (side - 3) // 2 + 1
        self.fc1 = dense.dense("fc1", CHANNELS[4] * side**2, width, **one, **common)
        self.fc2 = dense.dense("fc2", width, width, **one, **common)
        self.fc3 = dense.dense("fc3", width, classes, **common)

    def features(
        self, x_NHWC: jax.Array, place=placement.UNPLACED, train: bool = False
    ) -> jax.Array:
        """What the convolutions make of images [N, side, side, 3] of zero mean and unit scale; [B, F]."""

        def norm_pool(name, x_NHWC):
            x_NHWC = norms.response_norm_of_towers(
                x_NHWC, self.towers, place, name, **RESPONSE_NORM, levers=self.levers
            )
            return max_pool(x_NHWC, **POOL, place=place, channels="group_in", levers=self.levers)

        x_NHWC = norm_pool("norm1", conv.conv_relu("conv1", self.conv1, x_NHWC, place, self.levers))
        x_NHWC = norm_pool("norm2", conv.conv_relu("conv2", self.conv2, x_NHWC, place, self.levers))
        x_NHWC = conv.conv_relu("conv3", self.conv3, x_NHWC, place, self.levers)
        x_NHWC = conv.conv_relu("conv4", self.conv4, x_NHWC, place, self.levers)
        x_NHWC = conv.conv_relu("conv5", self.conv5, x_NHWC, place, self.levers, POOL)
        return dense.flatten(x_NHWC, place)

    def classify(
        self, x_BF: jax.Array, place=placement.UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, classes] of the features; no key: no dropout."""
        return dense.dense_head(self, x_BF, place, self.dropout, dropout_key)
