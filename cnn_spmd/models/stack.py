"""A network as a list of layers: what it is made of is data, and one class runs it.

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers import conv, dense, local
from cnn_spmd.layers import norm as norms
from cnn_spmd.layers.common import HE, LEVERS
from cnn_spmd.layers.pool import average_pool, max_pool
from cnn_spmd.sharding import placement

# `std` is that of the normal distribution from which a layer's weights start (None: He et al. 2015); biases start at zero.


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution of stride 1 that keeps the size.

    groups: towers that do not see each other. tied=False: a kernel and a bias of its own at each position (models/local.py).
    """

    channels: int
    window: int
    groups: int = 1
    tied: bool = True
    std: float | None = None
    activation: Callable = nnx.relu


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """ceil: a last window that reaches over the edge counts, as in cuda-convnet; else it is left out."""

    window: int
    strides: int
    ceil: bool = False


@dataclasses.dataclass(frozen=True)
class AveragePool:
    """A last window that reaches over the edge counts, and is divided by the area inside, as in cuda-convnet."""

    window: int
    strides: int
    ceil: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True)
class ResponseNorm:
    """norms.response_norm, whose alpha multiplies each term; groups: towers that do not see each other."""

    size: int
    alpha: float
    beta: float
    k: float
    within_map: bool = False
    groups: int = 1


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A dense layer with dropout; None is what config.model says (width, dropout)."""

    units: int | None = None
    dropout: float | None = None
    std: float | None = None


@dataclasses.dataclass(frozen=True)
class Output:
    """The last dense layer, a unit a class."""

    std: float | None = 0.01


def uses(net: Sequence) -> tuple[str, ...]:
    """Name the fields of config.model that a network's hidden layers take from the config."""
    hidden = [spec for spec in net if isinstance(spec, Hidden)]
    found = []
    if any(spec.units is None for spec in hidden):
        found.append("model.width")
    if any(spec.dropout is None for spec in hidden):
        found.append("model.dropout")
    return tuple(found)


class Stack(nnx.Module):
    """The network `net`, called `name`: convolutions, pools and norms; at most two hidden dense layers; the output layer.

    Its parameters are named in the order of the net: conv1, conv2, local3; fc1 and fc2 for the hidden layers, fc3 for the
    output, as in the placement table. Raises UserError for images that are too small.
    """

    def __init__(
        self,
        name: str,
        net: Sequence,
        *,
        image_size: int,
        classes: int,
        width: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
        levers: tuple[str, ...] = LEVERS,
    ):
        self.levers, self.towers = (
            levers,
            max((spec.groups for spec in net if isinstance(spec, Conv)), default=1),
        )
        plan, convolutions, hidden, side, channels = [], 0, 0, image_size, 3

        def initial(spec, he=HE) -> dict:
            return dict(
                kernel_init=he if spec.std is None else nnx.initializers.normal(spec.std),
                dtype=dtype,
                rngs=rngs,
            )

        for spec in net:
            match spec:
                case Conv():
                    convolutions += 1
                    label = f"{'conv' if spec.tied else 'local'}{convolutions}"
                    if spec.tied:
                        layer = conv.conv(
                            channels,
                            spec.channels,
                            spec.window,
                            groups=spec.groups,
                            **initial(spec),
                        )
                    else:
                        layer = local.Local(
                            side, channels, spec.channels, spec.window, **initial(spec, local.HE)
                        )
                    setattr(self, label, layer)
                    channels = spec.channels
                case MaxPool() | AveragePool():
                    label = ""
                    side = (
                        side - spec.window + (spec.strides - 1 if spec.ceil else 0)
                    ) // spec.strides + 1
                case ResponseNorm():
                    label = f"norm{convolutions}"
                case Hidden():
                    hidden += 1
                    label, spec = (
                        f"fc{hidden}",
                        dataclasses.replace(
                            spec,
                            units=spec.units or width,
                            dropout=dropout if spec.dropout is None else spec.dropout,
                        ),
                    )
                    setattr(
                        self,
                        label,
                        dense.dense(label, channels * side**2, spec.units, **initial(spec)),
                    )
                    side, channels = 1, spec.units
                case Output():
                    label = "fc3"
                    self.fc3 = dense.dense(label, channels * side**2, classes, **initial(spec))
            if side < 1:
                raise UserError(
                    f"model.name={name}: images of {image_size}x{image_size} are too small for its pools"
                )
            plan.append((label, spec))
        self.convolutional = tuple(
            entry for entry in plan if not isinstance(entry[1], Hidden | Output)
        )
        self.hidden = tuple(entry for entry in plan if isinstance(entry[1], Hidden))

    def features(
        self, x_NHWC: jax.Array, place=placement.UNPLACED, train: bool = False
    ) -> jax.Array:
        """What the convolutions make of images [N, side, side, 3] of zero mean; [B, F]."""
        channels, plan = "conv_in", list(self.convolutional)
        while plan:
            label, spec = plan.pop(0)
            match spec:
                case Conv(tied=True):
                    channels = "conv_out" if spec.groups == 1 else "group_out"
                    pool = (
                        dataclasses.asdict(plan.pop(0)[1])
                        if plan and isinstance(plan[0][1], MaxPool)
                        else None
                    )
                    x_NHWC = conv.conv_relu(
                        label,
                        getattr(self, label),
                        x_NHWC,
                        place,
                        self.levers,
                        pool,
                        spec.activation,
                    )
                case Conv():
                    channels = "conv_out"
                    x_NHWC = place(
                        x_NHWC, "conv_batch", None, None, "conv_in", name=f"{label} input"
                    )
                    x_NHWC = place(
                        getattr(self, label)(x_NHWC),
                        "conv_batch",
                        None,
                        None,
                        channels,
                        name=f"{label} output",
                    )
                    x_NHWC = spec.activation(x_NHWC)
                case MaxPool():
                    x_NHWC = max_pool(
                        x_NHWC,
                        **dataclasses.asdict(spec),
                        place=place,
                        channels=channels,
                        levers=self.levers,
                    )
                case AveragePool():
                    x_NHWC = place(
                        average_pool(x_NHWC, spec.window, spec.strides),
                        "conv_batch",
                        None,
                        None,
                        channels,
                    )
                case ResponseNorm():
                    settings = dict(
                        size=spec.size,
                        alpha=spec.alpha,
                        beta=spec.beta,
                        k=spec.k,
                        levers=self.levers,
                    )
                    if spec.within_map:
                        x_NHWC = place(
                            norms.response_norm(x_NHWC, within_map=True, **settings),
                            "conv_batch",
                            None,
                            None,
                            channels,
                        )
                    else:
                        channels = "group_in"
                        x_NHWC = norms.response_norm_of_towers(
                            x_NHWC, spec.groups, place, label, **settings
                        )
        return dense.flatten(x_NHWC, place)

    def classify(
        self, x_BF: jax.Array, place=placement.UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, classes] of the features; no key: no dropout."""
        keys = (
            [None] * len(self.hidden)
            if dropout_key is None
            else jax.random.split(dropout_key, len(self.hidden))
        )
        for (label, spec), key in zip(self.hidden, keys, strict=True):
            x_BF = dense.hidden(
                label,
                getattr(self, label),
                x_BF,
                place,
                spec.dropout,
                key,
                label == self.hidden[-1][0],
            )
        return dense.logits(self.fc3, x_BF, place)
