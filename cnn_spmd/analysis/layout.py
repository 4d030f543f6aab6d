"""Lay out the layers of a network on a placement, for the rules of communication.py."""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from flax import nnx

from cnn_spmd.sharding.placement import Placement, axes_of, is_dense, mesh_axes_of


class NotCovered(Exception):
    """The closed form does not cover a network on a placement; the text says why."""


class Activation(NamedTuple):
    """The layout of one activation: on which mesh axes each dimension is split.

    Mesh axes of size 1 are left out.
    """

    name: str
    batch: tuple[str, ...]
    height: tuple[str, ...]  # rows of a map
    features: tuple[str, ...]  # channels of a map, features of a dense layer
    is_map: bool
    bytes: int  # on each device, in the compute dtype

    @property
    def axes(self) -> set[str]:
        """Return every mesh axis on which the activation is split."""
        return {*self.batch, *self.height, *self.features}

    @property
    def shared(self) -> set[str]:
        """Return the mesh axes along which devices hold other examples, or other rows."""
        return {*self.batch, *self.height}


class Weight(NamedTuple):
    """The layout of one parameter.

    at_rest: the mesh axes that split it between steps, and do not in its use.
    """

    bytes: int  # on each device in its use, in the compute dtype
    at_rest: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a network, with the layout of its activations and weights.

    rows, columns: mesh axes on which the kernel's input and output dimension are split. A norm has
    neither, and its layout does not change. A mean over maps has no kernel either: its rows are the
    mesh axes over which it sums, its columns those of its channels. statistics: phase ->
    bytes that the devices of a batch norm sum there.
    """

    name: str
    input: Activation
    output: Activation
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    weights: dict[str, Weight]  # by the parameter's name
    is_dense: bool
    statistics: dict[str, int] = dataclasses.field(default_factory=dict)


def layers_of(
    place: Placement,
    activations: Sequence[tuple[str, tuple, tuple]],
    variables: Sequence[tuple[str, nnx.Variable]],
    itemsize: int,
) -> list[Layer]:
    """Return the network's layers in order; arguments are those of communication.closed_form.

    Raises NotCovered where activations and variables do not pair up into layers.
    """
    laid_out = {}
    for name, axes, shape in activations:
        if name in laid_out:
            raise NotCovered(f"{name!r} is there twice: a layer runs more than once")
        laid_out[name] = activation_of(place, name, axes, shape, itemsize)
    unused = dict(variables)
    layers = []
    for name in (name.removesuffix(" input") for name in laid_out if name.endswith(" input")):
        own = {key: unused.pop(key) for key in list(unused) if key.rpartition(".")[0] == name}
        layers.append(_layer(place, name, laid_out, own, itemsize))
    if unused:
        raise NotCovered(f"{next(iter(unused))} belongs to no layer that it knows")
    order = [
        end for layer in layers for end in dict.fromkeys((layer.input.name, layer.output.name))
    ]
    if order != [name for name in laid_out if not is_halo(name)]:
        raise NotCovered("layers are not one after another")
    return layers


def is_halo(name: str) -> bool:
    """Return whether an activation is the halo of a layer (sharding/local.py)."""
    return name.endswith(" halo")


def activation_of(
    place: Placement, name: str, axes: tuple, shape: tuple, itemsize: int
) -> Activation:
    """Return the layout of an activation.

    Raises NotCovered for one without features, and where its width is split.
    """
    if len(shape) < 2:
        raise NotCovered(f"{name!r} has no features")
    spec = place.spec(axes, shape, name)
    first, *between, last = _split_axes(place, spec)
    if any(between[1:]):
        raise NotCovered(f"the width of {name!r} is split")
    held = math.prod(place.shard_shape(spec, shape)) * itemsize
    return Activation(name, first, sum(between, ()), last, len(shape) == 4, held)


def _layer(
    place: Placement,
    name: str,
    activations: dict[str, Activation],
    own: dict[str, nnx.Variable],
    itemsize: int,
) -> Layer:
    """Return the layer `name`, whose variables are `own`."""
    given = activations[f"{name} input"]
    statistics = _statistics(place, own, itemsize)
    if not own and f"{name} output" in activations:
        result = activations[f"{name} output"]
        # A mean over the map: each device has a partial sum, over its rows.
        summed = tuple(axis for axis in given.height if axis not in result.height)
        return Layer(name, given, result, summed, given.features, {}, is_dense=False)
    if statistics or not own:
        return Layer(name, given, given, (), (), {}, is_dense=False, statistics=statistics)
    unknown = own.keys() - {f"{name}.kernel", f"{name}.bias"}
    if unknown or f"{name}.kernel" not in own or f"{name} output" not in activations:
        raise NotCovered(
            f"{name} is no layer with a kernel, at most a bias, an input and an output"
        )
    kernel = own[f"{name}.kernel"]
    if given.height and kernel.shape[0] > 1 and f"{name} halo" not in activations:
        raise NotCovered(f"{name}: the height of its maps is split, and XLA chooses what moves")
    weights = {key: _weight(place, key, param, itemsize) for key, param in own.items()}
    spec = place.spec(axes_of(kernel), kernel.shape, f"{name}.kernel")
    rows, columns = _split_axes(place, spec)[-2:]
    given_and_result = given, activations[f"{name} output"]
    return Layer(name, *given_and_result, rows, columns, weights, is_dense(kernel))


def _weight(place: Placement, name: str, param: nnx.Variable, itemsize: int) -> Weight:
    """Return the layout of the parameter `name`."""
    sharding = place.sharding(axes_of(param), param.shape, name)
    at_rest = place.spec_at_rest(axes_of(param), param.shape, name)
    used, resting = (sum(_split_axes(place, spec), ()) for spec in (sharding.spec, at_rest))
    held = math.prod(sharding.shard_shape(param.shape)) * itemsize
    return Weight(held, tuple(axis for axis in resting if axis not in used))


def _statistics(place: Placement, own: dict[str, nnx.Variable], itemsize: int) -> dict[str, int]:
    """Return phase -> bytes of the statistics of a batch norm; no phase for other layers."""
    averages = [variable for variable in own.values() if isinstance(variable, nnx.BatchStat)]
    if not averages:
        return {}
    average = averages[0]
    channels = place.sharding(axes_of(average), average.shape).shard_shape(average.shape)
    # The mean and the variance, in float32 or wider.
    return dict.fromkeys(average.sums, 2 * math.prod(channels) * max(itemsize, 4))


def _split_axes(place: Placement, spec) -> list[tuple[str, ...]]:
    """Return the mesh axes of each dimension, without those of size 1."""
    return [
        tuple(axis for axis in axes if place.mesh.shape[axis] > 1) for axes in mesh_axes_of(spec)
    ]
