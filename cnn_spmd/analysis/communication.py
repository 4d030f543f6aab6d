"""Predict the communication of a train step by theory.

Reports compare it with the compiled program. The rules are those of Gholami et al. 2018 (arXiv
1712.04432), one layer at a time, each a function below. W is the number of weights of a layer, d
the width of its input, d' the width of its output and B the global batch. The mesh has Pc data
devices and Pr model devices. In a ring a device sends:

  sum_weight_gradients  the weights' gradients are summed over the devices that share
                        the batch (equation 4; with split weights, 8)     2 (Pc-1)/Pc W/Pr
  move_between_layers   columns split: the input is all-gathered (3)        (Pr-1)/Pr B d/Pc
                        batch and rows split over Pc: examples are
                        exchanged for features (all-to-all), and back     2 (Pc-1)/Pc B d/(Pc Pr)
  sum_input_gradient    columns split: each device has a partial sum of the
                        input's gradient, and they are all-reduced (3)    2 (Pr-1)/Pr B d/Pc
  sum_output            rows split: each device has a partial sum of the
                        output, and they are all-reduced (the same, turned
                        around; Megatron-LM)                              2 (Pr-1)/Pr B d'/Pc
  exchange_halos        height split: a window of K rows reads K-1 rows of the
                        neighbours, of w pixels with c channels each; these
                        rows move forward, and their gradients backward
                        (Dryden et al. 2019, 1903.06681; sharding/halo.py)    (K-1) w c B/Pc each
  gather_weights        at rest, weights are split over D more devices than in
                        use: each is all-gathered, forward and, with
                        gather_again, backward                             (D-1)/D W each
  sum_statistics        batch norm over the global batch of C channels: two
                        sums per channel, forward and backward            4 (Pc-1)/Pc C/Pr each

dense_2d splits each kernel over both mesh axes, and no dense batch. Pc and Pr change places where
its columns lie on `data` (3), and where its rows do (sum_output).

Where the data set is sharded (data/sharded.py), each of D devices sends M images to each device:
exchange_images counts (D-1) M images. Where the height of images is split, and conv1's maps have
too few rows for that, give_whole_images counts an all-to-all of the images, forward.

When each device keeps only its shard of a sum, XLA can use a reduce-scatter, at half the cost of an
all-reduce. Gholami et al. ignore this; here it counts. One such sum is that of a gradient whose
weight is split at rest (Xu et al. 2020, arXiv 2004.13336; ZeRO, Rajbhandari et al. 2020, arXiv
1910.02054). Left out are scalars, labels, the sums of the softmax and, where classes are split, the
logits that the metrics gather. Left out too is by how much a fast form's gradient is larger than
the kernel: that of a convolution of images with strides (fast_conv.space_to_depth). coverage.py
says for which networks and placements the rules hold.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from flax import nnx
from jax.sharding import Mesh

from cnn_spmd.analysis.hlo import ring_bytes
from cnn_spmd.analysis.layout import Activation, Layer, activation_of, is_halo, layers_of
from cnn_spmd.sharding.placement import Placement


class Move(NamedTuple):
    """A collective of theory, or `count` equal ones.

    bytes: one device's payload, as in hlo.Collective; of all `count` together.
    """

    what: str
    operation: str
    axes: set[str]
    phase: str
    bytes: float
    count: int = 1


def move_between_layers(mesh: Mesh, before: Activation, after: Activation) -> Iterator[Move]:
    """Bring an activation to the next layer's layout, and its gradient back."""
    gathered = before.axes - after.axes
    # What a device holds before it gathers. Rows may have padding, which moves too.
    held = before.bytes if before.height else after.bytes / count_devices(mesh, gathered)
    whole = held * count_devices(mesh, gathered)
    yield Move(after.name, "all-gather", gathered, "forward", whole)
    # Slicing is free going forward; backward the slices of the gradient are gathered.
    sliced = after.axes - before.axes
    yield Move(
        after.name, "all-gather", sliced, "backward", after.bytes * count_devices(mesh, sliced)
    )
    # Placement.batch_to_features comes before the gather.
    exchanged = exchanged_axes(before, after)
    yield Move(after.name, "all-to-all", exchanged, "forward", held)
    yield Move(after.name, "all-to-all", exchanged, "backward", held)


def exchanged_axes(before: Activation, after: Activation) -> set[str]:
    """Return the mesh axes that go from batch to rows or features, or back."""
    kept = before.axes & after.axes
    return {axis for axis in kept if (axis in before.batch) != (axis in after.batch)}


def sum_input_gradient(before: Activation, layer: Layer) -> Iterator[Move]:
    """Sum the partial gradients of a layer's input, where its columns are split."""
    # In a layer of towers each device has all columns that its input channels meet.
    summed = set(layer.columns) - set(layer.input.features)
    gathered = before.axes - layer.input.axes
    # Each device keeps only the shard that it had before the forward all-gather.
    operation = "reduce-scatter" if gathered and summed <= gathered else "all-reduce"
    yield Move(layer.input.name, operation, summed, "backward", layer.input.bytes)


def sum_output(mesh: Mesh, layer: Layer) -> Iterator[Move]:
    """Sum the partial outputs of a layer, where its rows are split.

    Each device keeps a shard of the sum where the output is split.
    """
    name, held = layer.output.name, layer.output.bytes
    scattered = set(layer.rows) & layer.output.axes
    unscattered = held * count_devices(mesh, scattered)
    yield Move(name, "all-reduce", set(layer.rows) - scattered, "forward", held)
    yield Move(name, "reduce-scatter", scattered, "forward", unscattered)
    yield Move(name, "all-gather", scattered, "backward", unscattered)


def sum_weight_gradients(layer: Layer, updates: int) -> Iterator[Move]:
    """Sum each parameter's gradient over the batch's devices, once per update."""
    for name, weight in layer.weights.items():
        if not weight.at_rest:
            summed = layer.input.shared
            yield Move(name, "all-reduce", summed, "backward", updates * weight.bytes)


def gather_weights(mesh: Mesh, layer: Layer, uses: int, again: bool) -> Iterator[Move]:
    """Gather each weight that is split at rest, and split the sum of its gradient.

    uses: micro-batches. again: gather once more in the backward pass. Mesh axes of the batch that
    do not split the weight sum the shards.
    """
    for name, weight in layer.weights.items():
        if weight.at_rest:
            gathered, whole = set(weight.at_rest), uses * weight.bytes
            for phase in ("forward", "backward") if again else ("forward",):
                yield Move(name, "all-gather", gathered, phase, whole)
            scattered = layer.input.shared & gathered
            shard = whole / count_devices(mesh, scattered)
            yield Move(name, "reduce-scatter", scattered, "backward", whole)
            yield Move(name, "all-reduce", layer.input.shared - scattered, "backward", shard)


def sum_statistics(layer: Layer) -> Iterator[Move]:
    """Sum the statistics of a batch norm over the batch's devices.

    The sums of the backward pass are the gradients of its scale and bias too.
    """
    for phase, held in layer.statistics.items():
        yield Move(layer.input.name, "all-reduce", layer.input.shared, phase, held)


def in_parts(moves: Iterable[Move], count: int) -> Iterator[Move]:
    """Return the moves as `count` collectives each."""
    return (move._replace(count=count) for move in moves)


def exchange_halos(halos: Sequence[Activation], first: str) -> Iterator[Move]:
    """Send rows of maps to the neighbours that read them, and their gradients back.

    first: the first layer, whose images need no gradient.
    """
    for halo in halos:
        yield Move(halo.name, "collective-permute", set(halo.height), "forward", halo.bytes)
        if halo.name != f"{first} halo":
            yield Move(halo.name, "collective-permute", set(halo.height), "backward", halo.bytes)


def give_whole_images(place: Placement, first: Layer, shape: tuple[int, ...]) -> Iterator[Move]:
    """Trade rows of images for examples, where images have enough rows, and conv1's maps too few.

    shape: of the images, which move as float32. They need no gradient.
    """
    if first.input.is_map:
        images = activation_of(place, "images", place.map_axes(shape[1], None), shape, itemsize=4)
        moves = move_between_layers(place.mesh, images, first.input)
        yield from (move for move in moves if move.phase == "forward")


def exchange_images(mesh: Mesh, image_bytes: int) -> Iterator[Move]:
    """Send each device the images of its batch, where the data set is sharded."""
    if image_bytes:
        every_axis = {axis for axis in mesh.axis_names if mesh.shape[axis] > 1}
        yield Move("images", "all-to-all", every_axis, "", image_bytes)


def closed_form(
    place: Placement,
    activations: Sequence[tuple[str, tuple, tuple]],
    variables: Sequence[tuple[str, nnx.Variable]],
    itemsize: int,
    dense_updates: int = 1,
    image_bytes: int = 0,
    micro_batches: int = 1,
) -> list[dict]:
    """Return what theory says that a train step moves, as JSON-ready rows.

    activations: (name, logical axes, shape) of each layer's input and output, in the network's
      order; names are such as "conv1 input". "conv1 halo" is what all devices get of neighbours.
    variables: (name, abstract variable) of each parameter, and of the model state; names are such
      as "conv1.kernel".
    itemsize: bytes per element of the compute dtype, in which activations and gradients move.
    dense_updates: updates of the dense layers per step. In a variable batch there are several, and
      each needs gradients of its own. The micro-batches together move the activations of one
      batch. (Where their gradients are summed before one update, XLA reduces some or all of them
      one by one: more than theory.)
    image_bytes: one device's payload where the devices exchange the images of a step; otherwise 0.
    micro_batches: of the dense layers. Weights that are split at rest are gathered for each
      one, and their gradients are summed and split.

    A row has what, operation, axes, phase, bytes (one device's payload) and ring_bytes, as in
    hlo.py; and count, the collectives that have these bytes together. Raises NotCovered where a
    layer cannot be identified; coverage.py has the other limits.
    """
    if place.mesh.size == 1:
        return []
    moves = list(exchange_images(place.mesh, image_bytes))
    before = None
    layers = layers_of(place, activations, variables, itemsize)
    for layer in layers:
        own = []
        if before is not None:
            own += move_between_layers(place.mesh, before, layer.input)
            own += sum_input_gradient(before, layer)
        own += sum_output(place.mesh, layer)
        own += sum_statistics(layer)
        moves += in_parts(own, micro_batches if layer.is_dense else 1)
        before = layer.output
    moves += give_whole_images(place, layers[0], activations[0][2])
    halos = [activation_of(place, *each, itemsize) for each in activations if is_halo(each[0])]
    moves += exchange_halos(halos, layers[0].name)
    for number, layer in enumerate(layers):
        # The first layer's weights are not needed backward: nobody wants the images' gradient.
        again = place.row.get("gather_again", False) and number > 0
        uses, updates = (micro_batches, dense_updates) if layer.is_dense else (1, 1)
        moves += in_parts(gather_weights(place.mesh, layer, uses, again), uses)
        moves += in_parts(sum_weight_gradients(layer, updates), updates)
    return [_row(place.mesh, move) for move in moves if count_devices(place.mesh, move.axes) > 1]


def _row(mesh: Mesh, move: Move) -> dict:
    axes = [axis for axis in mesh.axis_names if axis in move.axes]
    payload = round(move.bytes)
    sent = ring_bytes(move.operation, payload, count_devices(mesh, axes))
    return move._asdict() | dict(axes=axes, bytes=payload, ring_bytes=sent)


def count_devices(mesh: Mesh, axes: Sequence[str] | set[str]) -> int:
    """Return how many devices lie along these mesh axes."""
    return math.prod(mesh.shape[axis] for axis in axes)


# An all-reduce and a reduce-scatter have the same payload, and the CPU compiler makes only the
# former: they are one kind.
_KINDS = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "reduce"}


def compare(compiled: Sequence[dict], theory: Sequence[dict] | None) -> list[dict]:
    """Return the payload per kind and mesh axes, compiled beside theory.

    The rows are JSON-ready. compiled: rows of hlo.summarise. theory: rows of closed_form; None
    where it does not cover the program; closed_form_bytes is then None too. A kind is "gather",
    "reduce" or an operation.
    """
    totals: dict[tuple, list[int]] = {}
    for column, rows in enumerate((compiled, theory or ())):
        for row in rows:
            kind = _KINDS.get(row["operation"], row["operation"])
            totals.setdefault((kind, tuple(row["axes"])), [0, 0])[column] += row["bytes"]
    return [
        dict(
            kind=kind,
            axes=list(axes),
            compiled_bytes=got,
            closed_form_bytes=None if theory is None else expected,
        )
        for (kind, axes), (got, expected) in sorted(totals.items())
    ]
