"""Describe AlexNet 2012 for 32x32 images, and versions without one of its ideas.

It is scaled as in models/alexnet.py: windows of 3 and no strides in the convolutions, so that maps
are 32 -> 16 -> 8 -> 4 pixels wide. The four-layer network of the paper's figure 1 is here too.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from cnn_spmd.models.stack import AveragePool, Conv, Hidden, MaxPool, Output, ResponseNorm

# Section 3.4. Both give maps of the same sizes, as the paper's two do.
OVERLAPPING = MaxPool(3, 2, ceil=True)
PLAIN = MaxPool(2, 2)

# Section 3.3, whose constants are for pixels of 0 to 255. These images have unit deviation; the
# deviation of CIFAR-10's pixels is 62 to 67 per channel, so squares are 64**2 times smaller.
NORM = ResponseNorm(size=5, alpha=1e-4 / 5 * 64**2, beta=0.75, k=2.0)

# Section 3.2, footnote 1: the one-tower network has half the channels, except in its last layer.
TWO_TOWERS = (96, 256, 384, 384, 256)
ONE_TOWER = (48, 128, 192, 192, 256)


def alexnet(
    channels: tuple = TWO_TOWERS,
    towers: int = 2,
    norm: ResponseNorm | None = NORM,
    pool: MaxPool = OVERLAPPING,
    without: str = "",
) -> tuple:
    """Return AlexNet 2012: five convolutions, pools, norms, two hidden dense layers.

    without: the name of a convolution to leave out; its pool stays, and so do the maps' sizes.
    """
    one, two, three, four, five = channels
    norms = [dataclasses.replace(norm, groups=towers)] if norm else []
    net = {
        "conv1": [Conv(one, 3), *norms, pool],
        "conv2": [Conv(two, 3, groups=towers), *norms, pool],
        "conv3": [Conv(three, 3)],
        "conv4": [Conv(four, 3, groups=towers)],
        "conv5": [Conv(five, 3, groups=towers), pool],
    }
    if without:
        net[without] = [layer for layer in net[without] if layer == pool]
    return (*itertools.chain(*net.values()), Hidden(), Hidden(), Output())


def four_layers(activation: Callable) -> tuple:
    """Return the network of figure 1 with `activation`.

    The paper says only "four-layer convolutional"; these are the layers of cuda-convnet's 19pct.
    """
    return (
        Conv(32, 5, activation=activation),
        OVERLAPPING,
        Conv(32, 5, activation=activation),
        AveragePool(3, 2),
        Conv(64, 5, activation=activation),
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
