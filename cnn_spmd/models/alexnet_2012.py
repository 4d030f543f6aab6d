"""Define AlexNet as published: two towers, one per GPU.

Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep Convolutional Neural Networks",
NIPS 2012.

The towers meet at conv3 and in the dense layers only (section 3.2); a response norm stays within
its tower.

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layers.
"""

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import FAST_FORMS, NORMAL_0_01, ONES
from cnn_spmd.layers.conv import conv, conv_relu
from cnn_spmd.layers.dense import dense, flatten
from cnn_spmd.layers.norm import response_norm_of_towers
from cnn_spmd.layers.pool import max_pool
from cnn_spmd.models.alexnet import AlexNet
from cnn_spmd.sharding.placement import UNPLACED

CHANNELS = (96, 256, 384, 384, 256)

# Section 3.3: k=2, n=5, alpha=1e-4, beta=0.75. The authors' code divides alpha by n, so alpha per
# term is 2e-5: see norm.response_norm.
RESPONSE_NORM = dict(size=5, alpha=1e-4 / 5, beta=0.75, k=2.0)

# Overlapping, section 3.4.
POOL = dict(window=3, strides=2)


class AlexNet2012(nnx.Module):
    """Five convolutions (three in two groups), response norms, pools, dense layers.

    60,965,224 parameters for 224x224, 1000 classes and `width` 4096. Initial weights are from
    N(0, 0.01); biases are 1 in conv2, conv4, conv5 and the hidden dense layers (section 5).
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
        fast_forms: tuple[str, ...] = FAST_FORMS,
    ):
        """Build the layers, with the arguments of AlexNet.

        Raises UserError for images below 64x64.
        """
        if image_size < 64:
            raise UserError(
                f"model.name=alexnet_2012: images of {image_size}x{image_size}, expected a side of "
                "at least 64 (published: 224): set --config.data.image_size for photographs"
            )
        self.dropout = dropout
        self.fast_forms = fast_forms
        common = dict(dtype=dtype, rngs=rngs, kernel_init=NORMAL_0_01)
        one = dict(common, bias_init=ONES)
        # A window of 11 with stride 4 makes 55 of 224 pixels if the last window may reach over the
        # edge, as in cuda-convnet.
        overhang = -(image_size - 11) % 4
        self.conv1 = conv(3, CHANNELS[0], 11, strides=4, padding=(0, overhang), **common)
        self.conv2 = conv(CHANNELS[0], CHANNELS[1], 5, groups=2, **one)
        self.conv3 = conv(CHANNELS[1], CHANNELS[2], 3, **common)
        self.conv4 = conv(CHANNELS[2], CHANNELS[3], 3, groups=2, **one)
        self.conv5 = conv(CHANNELS[3], CHANNELS[4], 3, groups=2, **one)
        side = (image_size + overhang - 11) // 4 + 1
        for _ in range(3):  # the pools: 55 -> 27 -> 13 -> 6
            side = (side - POOL["window"]) // POOL["strides"] + 1
        self.fc1 = dense("fc1", CHANNELS[4] * side**2, width, **one)
        self.fc2 = dense("fc2", width, width, **one)
        self.fc3 = dense("fc3", width, classes, **common)

    def features(self, images_NHWC: jax.Array, place=UNPLACED, train: bool = False) -> jax.Array:
        """Return what the convolutions make of the images: [N, H, W, 3] -> [B, F].

        The images have zero mean and unit scale. train has no effect here.
        """
        fast_forms = self.fast_forms
        x_NHWC = conv_relu("conv1", self.conv1, images_NHWC, place, fast_forms)
        x_NHWC = self._norm_and_pool("norm1", x_NHWC, place)
        x_NHWC = conv_relu("conv2", self.conv2, x_NHWC, place, fast_forms)
        x_NHWC = self._norm_and_pool("norm2", x_NHWC, place)
        x_NHWC = conv_relu("conv3", self.conv3, x_NHWC, place, fast_forms)
        x_NHWC = conv_relu("conv4", self.conv4, x_NHWC, place, fast_forms)
        x_NHWC = conv_relu("conv5", self.conv5, x_NHWC, place, fast_forms, POOL)
        return flatten(x_NHWC, place)

    def _norm_and_pool(self, name: str, x_NHWC: jax.Array, place) -> jax.Array:
        settings = dict(RESPONSE_NORM, fast_forms=self.fast_forms)
        x_NHWC = response_norm_of_towers(x_NHWC, self.towers, place, name, **settings)
        settings = dict(
            place=place, channels="group_in", fast_forms=self.fast_forms, name=f"{name} pool"
        )
        return max_pool(x_NHWC, **POOL, **settings)

    # Dense layers and dropout are those of the one-tower network.
    classify = AlexNet.classify
