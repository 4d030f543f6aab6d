"""The CIFAR-10 nets of Krizhevsky's cuda-convnet (2011), as its example-layers/*.cfg have them.

They count pooled maps by rounding up (ceil). cuda-convnet's rnorm has k = 1 and divides `scale` by the number of its terms.
"""

from collections.abc import Sequence

from cnn_spmd.models.stack import AveragePool, Conv, Hidden, MaxPool, Output, ResponseNorm

MAX = MaxPool(3, 2, ceil=True)
AVERAGE = AveragePool(3, 2)
WITHIN = ResponseNorm(size=3, alpha=5e-5 / 3**2, beta=0.75, k=1.0, within_map=True)
ACROSS = ResponseNorm(size=9, alpha=0.001 / 9, beta=0.75, k=1.0)


def shallow(*head: Hidden | Output, norm: Sequence[ResponseNorm] = ()) -> tuple:
    """Three convolutions for images of 32x32: 32 -> 16 -> 8 -> 4. The first ReLU comes after its pool, which is the same."""
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


def local(channels: int, norm: Sequence[ResponseNorm] = ()) -> tuple:
    """Two convolutions and two locally connected layers, the first with `channels`, for crops of 24x24: 24 -> 12 -> 6."""
    return (
        Conv(64, 5, std=1e-4),
        MAX,
        *norm,
        Conv(64, 5, std=0.01),
        *norm,
        MAX,
        Conv(channels, 3, tied=False, std=0.04),
        Conv(32, 3, tied=False, std=0.04),
        Output(0.01),
    )


NETS = {
    "cuda_convnet_80sec": shallow(Hidden(64, dropout=0.0, std=0.1), Output(0.1)),
    "cuda_convnet_19pct": shallow(Output(0.01)),
    "cuda_convnet_18pct": shallow(Output(0.01), norm=[WITHIN]),
    "cuda_convnet_13pct": local(32),
    "cuda_convnet_11pct": local(64, norm=[ACROSS]),
    "cuda_convnet_11pct_no_lrn": local(
        64
    ),  # what the 11pct net would be without response norms: no net of cuda-convnet's
}
