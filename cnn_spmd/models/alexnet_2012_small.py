"""AlexNet 2012 for 32x32 images, and what it is without one of its ideas; and the four-layer net of its figure 1.

AlexNet as models/alexnet.py scales it: windows of 3 and no strides in the convolutions, so that 32 -> 16 -> 8 -> 4.
"""

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx

from cnn_spmd.models.stack import AveragePool, Conv, Hidden, MaxPool, Output, ResponseNorm

OVERLAPPING, PLAIN = (
    MaxPool(3, 2, ceil=True),
    MaxPool(2, 2),
)  # section 3.4; of equal sizes, as there
# Section 3.3, whose numbers go with pixels of 0 to 255. These images have unit deviation: CIFAR-10's is 62 to 67 a channel.
NORM = ResponseNorm(size=5, alpha=1e-4 / 5 * 64**2, beta=0.75, k=2.0)
TWO_TOWERS, ONE_TOWER = (
    (96, 256, 384, 384, 256),
    (48, 128, 192, 192, 256),
)  # section 3.2, footnote 1: half, but for the last


def alexnet(
    channels: tuple = TWO_TOWERS,
    towers: int = 2,
    norm: ResponseNorm | None = NORM,
    pool: MaxPool = OVERLAPPING,
    without: str = "",
) -> tuple:
    """Its five convolutions, pools and norms, and two hidden dense layers; without: the convolution to leave out."""
    one, two, three, four, five = channels
    norms = [dataclasses.replace(norm, groups=towers)] if norm else []
    net = {
        "conv1": [Conv(one, 3), *norms, pool],
        "conv2": [Conv(two, 3, groups=towers), *norms, pool],
        "conv3": [Conv(three, 3)],
        "conv4": [Conv(four, 3, groups=towers)],
        "conv5": [Conv(five, 3, groups=towers), pool],
    }
    if without:  # its pool stays, and so do the sizes
        net[without] = [layer for layer in net[without] if layer == pool]
    return (*itertools.chain(*net.values()), Hidden(), Hidden(), Output())


def four_layers(activation) -> tuple:
    """Figure 1 says no more of its net than "four-layer convolutional": these are the layers of cuda-convnet's 19pct."""

    def conv(channels):
        return Conv(channels, 5, activation=activation)

    return (
        conv(32),
        OVERLAPPING,
        conv(32),
        AveragePool(3, 2),
        conv(64),
        AveragePool(3, 2),
        Output(),
    )


NETS = {
    "alexnet_2012_small": alexnet(),
    "alexnet_2012_small_no_lrn": alexnet(norm=None),
    "alexnet_2012_small_plain_pool": alexnet(pool=PLAIN),
    "alexnet_2012_small_no_conv2": alexnet(without="conv2"),
    "alexnet_2012_small_no_conv3": alexnet(without="conv3"),
    "alexnet_2012_small_no_conv4": alexnet(without="conv4"),
    "alexnet_2012_small_one_tower": alexnet(ONE_TOWER, towers=1),
    "four_layers_relu": four_layers(nnx.relu),
    "four_layers_tanh": four_layers(jnp.tanh),
}
