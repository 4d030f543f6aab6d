"""Describe AlexNet with batch norm, as in an author's files for large batches.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks", 2017 (1708.03888); the
files are models/alexnet_bn of github.com/borisgin/nvcaffe. It is AlexNet of 2012 in two groups; the
inputs of conv2 to conv5 are normalised, and there are no response norms. The norms have no scale
and no bias. Initial weights and biases are those of the files.

The files crop 227x227. As in models/alexnet_2012.py, conv1 makes maps of 55x55 of 224 pixels too.
For 32x32 the windows of the convolutions are 3x3 and without strides, as in
models/alexnet_2012_small.py.
"""

from cnn_spmd.models import alexnet_2012
from cnn_spmd.models.stack import BatchNorm, Conv, Hidden, MaxPool, Output, Stack

NORM = BatchNorm(epsilon=1e-4, momentum=0.9)


def layers(image_size: int) -> tuple:
    """Return the layers for images of this side: 32 pixels, or those of photographs."""
    small = image_size <= 32
    pool = MaxPool(3, 2, ceil=small)
    one, two, three, four, five = alexnet_2012.CHANNELS
    start = dict(std=0.01, bias=0.01)
    grouped = dict(start, groups=2)
    return (
        Conv(one, 3, **start) if small else Conv(one, 11, strides=4, **start),
        pool,
        NORM,
        Conv(two, 3 if small else 5, **grouped),
        pool,
        NORM,
        Conv(three, 3, **start),
        NORM,
        Conv(four, 3, **grouped),
        NORM,
        Conv(five, 3, **grouped),
        pool,
        Hidden(std=0.005, bias=0.1),
        Hidden(std=0.005, bias=0.1),
        Output(std=0.01, bias=0.01),
    )


def alexnet_bn(*, image_size: int, **settings) -> Stack:
    """Build the network; the arguments are those of AlexNet, and batch_norm (see Stack)."""
    return Stack("alexnet_bn", layers(image_size), image_size=image_size, **settings)
