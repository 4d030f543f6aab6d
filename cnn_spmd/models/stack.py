"""Describe a network as a list of layers, and build and run it.

Each description builds its layer, says what maps come out, and applies it.

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layers.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers import batch_norm, conv, dense, local, norm, pool, windows
from cnn_spmd.layers.common import FAST_FORMS, HE
from cnn_spmd.sharding.placement import UNPLACED


class Maps(NamedTuple):
    """What passes from one layer to the next: maps of side x side pixels."""

    side: int
    channels: int
    axis: str  # the logical axis of the channels


class Call(NamedTuple):
    """What a layer needs to be applied, besides its input."""

    name: str  # such as "conv1", for the placement report
    layer: Any  # the nnx.Module with its parameters; None for layers that have none
    axis: str  # the logical axis of the input's channels
    place: Any  # a Placement, or UNPLACED
    fast_forms: tuple[str, ...]  # the fast forms it may use: layers/common.py
    train: bool


def initial(std: float | None, he: Callable = HE) -> Callable:
    """Return the initialiser of a normal distribution; None stands for He et al. 2015."""
    return he if std is None else nnx.initializers.normal(std)


@dataclasses.dataclass(frozen=True)
class MaxPool:
    """A max pool.

    ceil: a last window that reaches over the edge counts, as in cuda-convnet.
    """

    prefix: ClassVar[str] = "pool"

    window: int
    strides: int
    ceil: bool = False

    def maps(self, maps: Maps) -> Maps:
        """Return what comes out of `maps`."""
        return maps._replace(side=windows.count(maps.side, self.window, self.strides, self.ceil))

    def apply(self, call: Call, x_NHWC: jax.Array) -> jax.Array:
        """Return the pooled maps."""
        settings = dict(
            place=call.place, channels=call.axis, fast_forms=call.fast_forms, name=call.name
        )
        return pool.max_pool(x_NHWC, **dataclasses.asdict(self), **settings)


@dataclasses.dataclass(frozen=True)
class AveragePool:
    """An average pool in ceil mode (as MaxPool), as in cuda-convnet."""

    prefix: ClassVar[str] = "pool"

    window: int
    strides: int

    def maps(self, maps: Maps) -> Maps:
        """Return what comes out of `maps`."""
        return maps._replace(side=windows.count(maps.side, self.window, self.strides, ceil=True))

    def apply(self, call: Call, x_NHWC: jax.Array) -> jax.Array:
        """Return the pooled maps."""
        settings = dict(place=call.place, channels=call.axis, name=call.name)
        return pool.average_pool(x_NHWC, self.window, self.strides, **settings)


@dataclasses.dataclass(frozen=True)
class Conv:
    """A convolution with its activation.

    groups: towers that do not see each other. std: of the normal distribution of the initial
    weights (None: He et al. 2015). bias: what biases start at. strides: 1 keeps the size; above 1
    there is no padding, and the last window may reach over the edge, as in cuda-convnet. pool: a
    max pool that follows at once, which may change places with the activation (conv.conv_relu);
    Stack sets it.
    """

    prefix: ClassVar[str] = "conv"

    channels: int
    window: int
    groups: int = 1
    std: float | None = None
    activation: Callable = nnx.relu
    pool: MaxPool | None = None
    bias: float = 0.0
    strides: int = 1

    def build(self, maps: Maps, **common) -> nnx.Module:
        """Build the layer for `maps`; common: dtype and rngs."""
        if self.strides > 1:
            overhang = windows.overhang(maps.side, self.window, self.strides)
            common.update(strides=self.strides, padding=(0, overhang))
        return conv.conv(
            maps.channels,
            self.channels,
            self.window,
            groups=self.groups,
            kernel_init=initial(self.std),
            bias_init=nnx.initializers.constant(self.bias),
            **common,
        )

    def maps(self, maps: Maps) -> Maps:
        """Return what comes out of `maps`."""
        axis = "conv_out" if self.groups == 1 else "group_out"
        side = maps.side
        if self.strides > 1:
            side = windows.count(side, self.window, self.strides, ceil=True)
        maps = Maps(side, self.channels, axis)
        return self.pool.maps(maps) if self.pool else maps

    def apply(self, call: Call, x_NHWC: jax.Array) -> jax.Array:
        """Return the maps after convolution, bias, activation and pool."""
        pooling = dataclasses.asdict(self.pool) if self.pool else None
        return conv.conv_relu(
            call.name, call.layer, x_NHWC, call.place, call.fast_forms, pooling, self.activation
        )


@dataclasses.dataclass(frozen=True)
class Local:
    """A locally connected layer (layers/local.py) with its activation; as Conv."""

    prefix: ClassVar[str] = "local"

    channels: int
    window: int
    std: float | None = None
    activation: Callable = nnx.relu

    def build(self, maps: Maps, **common) -> nnx.Module:
        """Build the layer for `maps`; common: dtype and rngs."""
        settings = dict(kernel_init=initial(self.std, local.HE), **common)
        return local.Local(maps.side, maps.channels, self.channels, self.window, **settings)

    def maps(self, maps: Maps) -> Maps:
        """Return what comes out of `maps`."""
        return Maps(maps.side, self.channels, "conv_out")

    def apply(self, call: Call, x_NHWC: jax.Array) -> jax.Array:
        """Return the maps after the layer and its activation."""
        rows = x_NHWC.shape[1]
        before, after = (call.place.map_axes(rows, axis) for axis in ("conv_in", "conv_out"))
        x_NHWC = call.place(x_NHWC, *before, name=f"{call.name} input")
        x_NHWC = call.place(call.layer(x_NHWC, call.place), *after, name=f"{call.name} output")
        return self.activation(x_NHWC)


@dataclasses.dataclass(frozen=True)
class ResponseNorm:
    """A norm.response_norm; groups: towers, each of which is normalised by itself."""

    prefix: ClassVar[str] = "norm"

    size: int
    alpha: float
    beta: float
    k: float
    within_map: bool = False
    groups: int = 1

    def maps(self, maps: Maps) -> Maps:
        """Return what comes out of `maps`."""
        return maps if self.within_map else maps._replace(axis="group_in")

    def apply(self, call: Call, x_NHWC: jax.Array) -> jax.Array:
        """Return the normalised maps."""
        settings = dict(
            size=self.size, alpha=self.alpha, beta=self.beta, k=self.k, fast_forms=call.fast_forms
        )
        if not self.within_map:
            return norm.response_norm_of_towers(
                x_NHWC, self.groups, call.place, call.name, **settings
            )
        return norm.response_norm_within_map(x_NHWC, call.place, call.axis, call.name, **settings)


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A batch_norm.BatchNorm without scale and bias; Stack sets per_device.

    epsilon, momentum: as there.
    """

    prefix: ClassVar[str] = "norm"

    epsilon: float
    momentum: float
    per_device: bool = False

    def build(self, maps: Maps, **common) -> nnx.Module:
        """Build the layer for `maps`."""
        settings = dict(dataclasses.asdict(self), axis=maps.axis, affine=False)
        return batch_norm.BatchNorm(maps.channels, **settings)

    def maps(self, maps: Maps) -> Maps:
        """Return what comes out of `maps`."""
        return maps

    def apply(self, call: Call, x_NHWC: jax.Array) -> jax.Array:
        """Return the normalised maps."""
        return call.layer(call.name, x_NHWC, call.place, call.train, call.fast_forms)


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A dense layer with ReLU and dropout.

    units, dropout: None stands for model.width and model.dropout. std, bias: as in Conv.
    """

    units: int | None = None
    dropout: float | None = None
    std: float | None = None
    bias: float = 0.0


@dataclasses.dataclass(frozen=True)
class Output:
    """The last dense layer, with a unit per class; std, bias: as in Conv."""

    std: float | None = 0.01
    bias: float = 0.0


def fully_connected(
    name: str, layer: Hidden | Output, features: int, units: int, **common
) -> nnx.Module:
    """Build the dense layer that `layer` describes, from `features` to `units`."""
    settings = dict(
        kernel_init=initial(layer.std), bias_init=nnx.initializers.constant(layer.bias), **common
    )
    return dense.dense(name, features, units, **settings)


def paired(layers: Iterable) -> list:
    """Give each convolution the max pool that follows it at once: they run as one."""
    result = []
    for layer in layers:
        before = result[-1] if result else None
        if isinstance(layer, MaxPool) and isinstance(before, Conv) and before.pool is None:
            result[-1] = dataclasses.replace(before, pool=layer)
        else:
            result.append(layer)
    return result


def named(layers: Iterable) -> Iterator[tuple[str, Any]]:
    """Name the layers: "conv1", "conv2", "local3"; "norm2" is the norm after conv2."""
    number = 0
    for layer in layers:
        number += isinstance(layer, Conv | Local)
        yield f"{layer.prefix}{number}", layer


def uses(net: Iterable) -> tuple[str, ...]:
    """Return which fields of the config the layers of `net` leave open."""
    hidden = [layer for layer in net if isinstance(layer, Hidden)]
    width = ("model.width",) if any(layer.units is None for layer in hidden) else ()
    dropout = ("model.dropout",) if any(layer.dropout is None for layer in hidden) else ()
    normalised = ("model.batch_norm",) if any(isinstance(layer, BatchNorm) for layer in net) else ()
    return width + dropout + normalised


class Stack(nnx.Module):
    """A network of the layers in a list.

    Convolutions, pools and norms come first, then at most two Hidden layers, then the Output. The
    parameters are named by kind and place: conv1, conv2, local3; fc1 and fc2 for the hidden
    layers, fc3 for the output, as in the placement table.
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
        fast_forms: tuple[str, ...] = FAST_FORMS,
        batch_norm: str = "global",
    ):
        """Build the layers of `net`; the other arguments as for AlexNet.

        name: the network's, for errors. batch_norm: "global" or "per_device". Raises UserError for
        images that are too small.
        """
        *hidden, output = [layer for layer in net if isinstance(layer, Hidden | Output)]
        convolutional = paired(layer for layer in net if not isinstance(layer, Hidden | Output))
        self.fast_forms = fast_forms
        self.towers = max((x.groups for x in convolutional if isinstance(x, Conv)), default=1)
        common = dict(dtype=dtype, rngs=rngs)

        maps, self.convolutional = Maps(image_size, 3, "conv_in"), ()
        for label, layer in named(convolutional):
            if isinstance(layer, BatchNorm):
                layer = dataclasses.replace(layer, per_device=batch_norm == "per_device")
            if hasattr(layer, "build"):
                setattr(self, label, layer.build(maps, **common))
            self.convolutional += ((label, layer, maps.axis),)
            maps = layer.maps(maps)
            if maps.side < 1:
                raise UserError(
                    f"model.name={name}: images of {image_size}x{image_size} are too small for its "
                    "pools, expected larger ones: set --config.data.image_size for photographs"
                )

        features, self.hidden = maps.side**2 * maps.channels, ()
        for number, layer in enumerate(hidden, 1):
            label, units = f"fc{number}", layer.units or width
            setattr(self, label, fully_connected(label, layer, features, units, **common))
            rate = dropout if layer.dropout is None else layer.dropout
            self.hidden += ((label, rate),)
            features = units
        self.fc3 = fully_connected("fc3", output, features, classes, **common)

    def features(self, images_NHWC: jax.Array, place=UNPLACED, train: bool = False) -> jax.Array:
        """Return what the convolutional layers make of the images: [N, H, W, 3] -> [B, F].

        The images have zero mean. train: batch norm uses the statistics of the batch.
        """
        x_NHWC = images_NHWC
        for label, layer, axis in self.convolutional:
            call = Call(label, getattr(self, label, None), axis, place, self.fast_forms, train)
            x_NHWC = layer.apply(call, x_NHWC)
        return dense.flatten(x_NHWC, place)

    def classify(
        self, x_BF: jax.Array, place=UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits [B, classes]; without a key there is no dropout."""
        keys = dense.dropout_keys(dropout_key, len(self.hidden))
        for (label, rate), key in zip(self.hidden, keys, strict=True):
            layer, last = getattr(self, label), label == self.hidden[-1][0]
            x_BF = dense.hidden(layer, x_BF, place, rate, key, last)
        return dense.logits(self.fc3, x_BF, place)
