"""Describe networks of growing depth for 32x32 images: 0 to 13 convolutions.

VGG is Simonyan and Zisserman 2014 (1409.1556), table 1: vgg_11 is its A, vgg_16 its D, and vgg_8 is
A with one convolution per stage. Windows are 3x3, channels grow after each of five pools, there are
no norms; here 32 -> 1 pixels. Initial weights are those of He et al. 2015, without which 16 layers
do not start to learn. Dense layers are `model.width` wide, except the output.
"""

from cnn_spmd.models.stack import Conv, Hidden, MaxPool, Output


def vgg(*stages: int) -> tuple:
    """Return a VGG with as many convolutions per stage as `stages` says."""
    net = []
    for number, channels in zip(stages, (64, 128, 256, 512, 512), strict=True):
        net += [Conv(channels, 3)] * number
        net.append(MaxPool(2, 2))
    return (*net, Hidden(), Hidden(), Output())


NETS = {
    # Two layers.
    "fully_connected": (Hidden(), Output()),
    # The pool leaves fc1 as many inputs as AlexNet's has.
    "one_convolution": (Conv(64, 3), MaxPool(4, 4), Hidden(), Hidden(), Output()),
    "vgg_8": vgg(1, 1, 1, 1, 1),
    "vgg_11": vgg(1, 1, 2, 2, 2),
    "vgg_16": vgg(2, 2, 3, 3, 3),
}
