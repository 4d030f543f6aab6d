"""Define AlexNet in its one-tower form (Krizhevsky 2014, footnote 1).

The paper is "One weird trick for parallelizing convolutional neural networks", 1404.5997. CHANNELS
are those of the configuration that its author released; torchvision uses them too. (AlexNet of 2012
has two towers of convolutions, one per GPU: models/alexnet_2012.py.)

A name ends in its dimensions: images_BHWC is [batch, height, width, channels], x_BF is [batch,
features].
"""

import dataclasses

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import FAST_FORMS, NORMAL_0_01
from cnn_spmd.layers.conv import conv, conv_relu
from cnn_spmd.layers.dense import dense, dropout_keys, flatten, hidden, logits
from cnn_spmd.sharding.placement import UNPLACED

CHANNELS = (64, 192, 384, 256, 256)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What depends on the image size: keyword arguments of `conv` and of the max pool."""

    conv1: dict
    conv2: dict
    pool: dict
    side: int  # of fc1's input map, in pixels


SIZES = {
    # The sides of the maps: 224 -> 55 -> 27 -> 13 -> 6. A convolution without `padding` keeps the
    # side of its map.
    224: Sizes(
        conv1=dict(window=11, strides=4, padding=(2, 2)),
        conv2=dict(window=5),
        pool=dict(window=3, strides=2),
        side=6,
    ),
    # For CIFAR-10, our scaling: 32 -> 16 -> 8 -> 4.
    32: Sizes(
        conv1=dict(window=3),
        conv2=dict(window=3),
        pool=dict(window=2, strides=2),
        side=4,
    ),
}


class AlexNet(nnx.Module):
    """Five convolutions, three max pools, two dense layers with dropout, an output layer.

    With `width` 4096 it has 61,100,840 parameters for 224x224 and 1000 classes, and 35,855,178 for
    32x32 and 10 classes.
    """

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
        """Build the layers with float32 parameters; they compute in `dtype`.

        image_size: pixels per side, a key of SIZES. width: features of fc1 and of fc2. dropout:
        the probability that training zeroes one of them. fast_forms: which fast forms of the
        layers to use (layers/common.py); () uses the plain forms.

        Raises UserError for an image size that is not in SIZES.
        """
        if image_size not in SIZES:
            raise UserError(
                f"model.name=alexnet: images of {image_size}x{image_size}, expected a side of "
                f"{' or '.join(str(side) for side in sorted(SIZES))}: set --config.data.image_size "
                "for photographs, tfds:NAME and npz, or --config.data.crop"
            )
        self.sizes = SIZES[image_size]
        self.dropout = dropout
        self.fast_forms = fast_forms
        common = dict(dtype=dtype, rngs=rngs)
        # A kernel's logical axes: (None, None, "conv_in", "conv_out") for each convolution, and
        # ("fc1_in", "fc1_out") for dense("fc1").
        self.conv1 = conv(3, CHANNELS[0], **self.sizes.conv1, **common)
        self.conv2 = conv(CHANNELS[0], CHANNELS[1], **self.sizes.conv2, **common)
        self.conv3 = conv(CHANNELS[1], CHANNELS[2], window=3, **common)
        self.conv4 = conv(CHANNELS[2], CHANNELS[3], window=3, **common)
        self.conv5 = conv(CHANNELS[3], CHANNELS[4], window=3, **common)
        self.fc1 = dense("fc1", CHANNELS[4] * self.sizes.side**2, width, **common)
        self.fc2 = dense("fc2", width, width, **common)
        self.fc3 = dense("fc3", width, classes, kernel_init=NORMAL_0_01, **common)

    def features(self, images_BHWC: jax.Array, place=UNPLACED, train: bool = False) -> jax.Array:
        """Return the output of the convolutions, flattened to [B, F].

        images_BHWC: of zero mean and unit scale. place: the Placement, which constrains where each
        activation lives. train: for networks with batch norm; no effect here.
        """
        pool, fast_forms = self.sizes.pool, self.fast_forms
        # Each layer places its input and output (layers/conv.py); the names are for reports.
        x_BHWC = conv_relu("conv1", self.conv1, images_BHWC, place, fast_forms, pool)
        x_BHWC = conv_relu("conv2", self.conv2, x_BHWC, place, fast_forms, pool)
        x_BHWC = conv_relu("conv3", self.conv3, x_BHWC, place, fast_forms)
        x_BHWC = conv_relu("conv4", self.conv4, x_BHWC, place, fast_forms)
        x_BHWC = conv_relu("conv5", self.conv5, x_BHWC, place, fast_forms, pool)
        return flatten(x_BHWC, place)

    def classify(
        self, x_BF: jax.Array, place=UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits [B, classes]; without a key there is no dropout.

        Here the batch moves from conv_batch (of x_BF) to dense_batch (in `hidden`) to output_batch:
        in `logits`, or already in fc2 (last=True) where fc2's columns are not split. Under
        `hybrid`, XLA gathers x_BF along `model` for fc1.
        """
        keys = dropout_keys(dropout_key, 2)
        x_BF = hidden(self.fc1, x_BF, place, self.dropout, keys[0])
        x_BF = hidden(self.fc2, x_BF, place, self.dropout, keys[1], last=True)
        return logits(self.fc3, x_BF, place)
