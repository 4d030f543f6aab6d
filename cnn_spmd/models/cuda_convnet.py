"""Describe the CIFAR-10 networks of Krizhevsky's cuda-convnet (2011).

Layers and settings are those of its example-layers/*.cfg.
Their pools count a last window that reaches over the edge (ceil). cuda-convnet's response norm has
k = 1 and divides `scale` by the number of its terms.
"""

from collections.abc import Sequence

from cnn_spmd.models.stack import AveragePool, Conv, Hidden, Local, MaxPool, Output, ResponseNorm

MAX = MaxPool(3, 2, ceil=True)
AVERAGE = AveragePool(3, 2)
WITHIN = ResponseNorm(size=3, alpha=5e-5 / 3**2, beta=0.75, k=1.0, within_map=True)
ACROSS = ResponseNorm(size=9, alpha=0.001 / 9, beta=0.75, k=1.0)


def shallow(*head: Hidden | Output, norm: Sequence[ResponseNorm] = ()) -> tuple:
    """Return three convolutions for 32x32 images (32 -> 16 -> 8 -> 4) and `head`.

    cuda-convnet's first ReLU comes after its pool, which gives the same numbers.
    """
    return (
        Conv(32, 5, std=1e-4),
        MAX,
        *norm,
        Conv(32, 5, std=0.01),
        AVERAGE,
        *norm,
        Conv(64, 5, std=0.01),
        AVERAGE,
        *head,
    )


def local_layers(channels: int, norm: Sequence[ResponseNorm] = ()) -> tuple:
    """Return two convolutions and two local layers for crops of 24x24: 24 -> 12 -> 6.

    channels: those of the first local layer.
    """
    return (
        Conv(64, 5, std=1e-4),
        MAX,
        *norm,
        Conv(64, 5, std=0.01),
        *norm,
        MAX,
        Local(channels, 3, std=0.04),
        Local(32, 3, std=0.04),
        Output(0.01),
    )


NETS = {
    "cuda_convnet_80sec": shallow(Hidden(64, dropout=0.0, std=0.1), Output(0.1)),
    "cuda_convnet_19pct": shallow(Output(0.01)),
    "cuda_convnet_18pct": shallow(Output(0.01), norm=[WITHIN]),
    "cuda_convnet_13pct": local_layers(32),
    "cuda_convnet_11pct": local_layers(64, norm=[ACROSS]),
    # The 11pct network without its response norms; cuda-convnet has no such file.
    "cuda_convnet_11pct_no_lrn": local_layers(64),
}
