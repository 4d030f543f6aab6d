"""Decide whether the closed form holds for a network on a placement.

The rules in communication.py describe a chain of convolutions, norms and dense layers. There are
few ways from one layer's layout to the next. Paths may lead around convolutions where all maps have
one layout, with whole channels. Other networks and placements train as well, but XLA may move other
arrays than the rules say. They are not covered.
"""

import itertools
from collections.abc import Sequence

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Literal

from cnn_spmd.analysis.communication import exchanged_axes
from cnn_spmd.analysis.layout import Layer, NotCovered, layers_of
from cnn_spmd.sharding.placement import Placement, Unplaced


def covers(
    place: Placement,
    network: nnx.Module,
    images: jax.ShapeDtypeStruct,
    activations: Sequence[tuple[str, tuple, tuple]],
    variables: Sequence[tuple[str, nnx.Variable]],
    compiled: Sequence[dict] = (),
) -> str | None:
    """Return why the closed form does not hold; None: it holds.

    network: the abstract module (nnx.eval_shape). images: [N, H, W, C] as it takes them.
    activations, variables: as closed_form takes them. compiled: rows of hlo.summarise.
    """
    if place.mesh.size == 1:
        return None
    try:
        _check_compiled(place, compiled)
        _check_state(network)
        layers = layers_of(place, activations, variables, itemsize=1)
        for layer in layers:
            _check_layer(layer)
        for layer, following in itertools.pairwise(layers):
            _check_step_between(layer, following)
        _check_chain(network, images, layers)
    except NotCovered as reason:
        return str(reason)
    return None


def _check_compiled(place: Placement, compiled: Sequence[dict]) -> None:
    """Refuse programs in which XLA split a mesh axis (hlo.Collective.axes)."""
    for axis in (axis for row in compiled for axis in row["axes"]):
        if axis not in place.mesh.shape:
            raise NotCovered(f"XLA splits a mesh axis: {axis}")


def _check_state(network: nnx.Module) -> None:
    """Refuse model state other than that of layers/batch_norm.py."""
    for path, variable in nnx.to_flat_state(nnx.state(network)):
        if not isinstance(variable, nnx.Param) and not hasattr(variable, "sums"):
            name = ".".join(map(str, path))
            raise NotCovered(f"{name} is model state ({type(variable).__name__})")


def _check_layer(layer: Layer) -> None:
    """Refuse a layer whose kernel, input and output fit none of the known splits."""
    name, given, result = layer.name, layer.input, layer.output
    if given.height and layer.weights and (layer.rows or layer.columns):
        raise NotCovered(f"{name}: both the height and the channels of its maps are split")
    has_towers = not layer.rows and layer.columns == given.features
    if layer.weights and layer.rows != given.features and not has_towers:
        raise NotCovered(f"{name}: its input's features are not split as its kernel's rows are")
    if layer.weights and layer.columns != result.features:
        raise NotCovered(f"{name}: its output's features are not split as its kernel's columns are")
    # A sum over split rows may be scattered over the batch. No other layer changes the batch.
    scattered = result.batch[len(given.batch) :]
    is_scattered_sum = given.batch + scattered == result.batch and set(scattered) <= set(layer.rows)
    if result.batch != given.batch and not is_scattered_sum:
        raise NotCovered(f"{name}: the batch of its output is not split as that of its input is")


def _check_step_between(layer: Layer, following: Layer) -> None:
    """Refuse a change of layout between two layers that is not one simple collective.

    Into the first dense layer it may be two: Placement.batch_to_features, then a gather.
    """
    before, after = layer.output, following.input
    where = f"from {before.name} to {after.name}"
    gathered, exchanged = set(before.batch) - after.axes, exchanged_axes(before, after)
    changes = [exchanged]
    for old, new in ((before, after), (after, before)):
        changes += [{*axes} - new.axes for axes in (old.batch, old.height, old.features)]
    in_turn = following.is_dense and not layer.is_dense and gathered and exchanged
    if sum(map(bool, changes)) > (2 if in_turn else 1):
        raise NotCovered(f"{where}: the layout changes in several ways at once")
    shared = min(len(before.batch), len(after.batch))
    to_features = tuple(axis for axis in after.features if axis in before.batch)
    others = before.batch[: len(before.batch) - len(to_features)]
    if before.batch[:shared] != after.batch[:shared] or before.batch != others + to_features:
        raise NotCovered(f"{where}: the batch is split in another order of mesh axes")
    is_flattened = before.is_map and not after.is_map
    if is_flattened and after.axes.intersection(before.features):
        raise NotCovered(f"{where}: split channels are gathered, flattened and split again")


class _Marking(Unplaced):
    """A `place` that marks each named activation in the jaxpr, and constrains nothing."""

    def __call__(self, x: jax.Array, *axes: str | None, name: str = "") -> jax.Array:
        return checkpoint_name(x, name) if name else x


def _check_chain(
    network: nnx.Module, images: jax.ShapeDtypeStruct, layers: Sequence[Layer]
) -> None:
    """Refuse a path around a layer, as in residual networks, where an array may move on it.

    None moves where all maps are split alike, with whole channels, and the paths join before the
    dense layers.
    """
    graph, state = nnx.split(network)
    place = _Marking()

    def logits(images_NHWC, state):
        model = nnx.merge(graph, state)
        return model.classify(model.features(images_NHWC, place), place)

    jaxpr = jax.make_jaxpr(logits)(images, state).jaxpr
    always = _on_every_path(jaxpr)
    marked = {each.params["name"] for each in jaxpr.eqns if each.primitive.name == "name"}
    maps = [end for layer in layers for end in (layer.input, layer.output) if end.is_map]
    layouts = {(end.batch, end.height, end.features) for end in maps}
    alike = len(layouts) == 1 and not any(end.features for end in maps)
    # Pools have names only where the height is split.
    for end in (layer.output for layer in layers if layer.output.name in marked):
        if end.name not in always and not (alike and end.is_map):
            raise NotCovered(f"a path leads around {end.name!r}: the network is no chain of layers")


def _on_every_path(jaxpr: Jaxpr) -> frozenset[str]:
    """Return the marks on every path from a jaxpr's first input to its first result."""
    passed = {jaxpr.invars[0]: frozenset()}
    for equation in jaxpr.eqns:
        inputs = [var for var in equation.invars if not isinstance(var, Literal) and var in passed]
        if not inputs:
            continue
        marks = frozenset.intersection(*(passed[var] for var in inputs))
        if equation.primitive.name == "name":
            marks |= {equation.params["name"]}
        passed |= dict.fromkeys(equation.outvars, marks)
    return passed.get(jaxpr.outvars[0], frozenset())
