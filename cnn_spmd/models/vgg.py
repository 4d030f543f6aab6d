"""Networks of growing depth for 32x32 images, each with 4096-wide dense layers: from none to thirteen convolutions.

VGG (Simonyan and Zisserman 2014, 1409.1556, table 1: 11 is its A, 16 its D; 8 is A with one convolution a stage): windows of
3, twice the channels after each of five pools, no norms; here 32 -> 1. Initial weights by He et al. 2015, without which 16
layers do not start to learn.
"""

from cnn_spmd.models.stack import Conv, Hidden, MaxPool, Output


def vgg(*stages: int) -> tuple:
    """So many convolutions in each of the five stages."""
    net = []
    for number, channels in zip(stages, (64, 128, 256, 512, 512), strict=True):
        net += [Conv(channels, 3)] * number + [MaxPool(2, 2)]
    return (*net, Hidden(), Hidden(), Output())


NETS = {
    "fully_connected": (Hidden(), Output()),  # two layers
    "one_convolution": (
        Conv(64, 3),
        MaxPool(4, 4),
        Hidden(),
        Hidden(),
        Output(),
    ),  # as many inputs of fc1 as AlexNet's
    "vgg_8": vgg(1, 1, 1, 1, 1),
    "vgg_11": vgg(1, 1, 2, 2, 2),
    "vgg_16": vgg(2, 2, 3, 3, 3),
}
