"""Closed-form communication of a train step: what theory says that a placement moves, beside what the compiler made of it.

The rules are those of Gholami et al. 2018 (1712.04432, equations 3, 4 and 8), a layer at a time and for any row of the
placement table; with W a layer's weights, d the width of its input, B the global batch, Pr model and Pc data devices:

  weights split over Pr   gradients are all-reduced over the devices that share the batch     2 (Pc-1)/Pc W/Pr
  columns split over Pr   the input is all-gathered going forward                               (Pr-1)/Pr B d/Pc
                          and its gradient, a partial sum on each device, all-reduced         2 (Pr-1)/Pr B d/Pc
  rows split over Pr      the output is a partial sum on each device and is all-reduced       2 (Pr-1)/Pr B d'/Pc

An all-reduce whose result is only kept in part is a reduce-scatter, at half the cost, which that paper does not count: so it is
wherever the gathered input lay split over the same devices, and where the output's batch is split over those of the rows (its
gradient is then gathered). Scalars, labels and the softmax's sums are left out.
"""

import itertools
from collections.abc import Sequence

from flax import nnx

from cnn_spmd.analysis.hlo import RING_PARTS
from cnn_spmd.sharding.placement import Placement, mesh_axes_of


def covers(place: Placement, compiled: Sequence[dict]) -> bool:
    """Tell whether the closed form knows how a placement moves its batch.

    It knows batches that are split further, or gathered, along the last of their mesh axes. For other
    moves XLA permutes devices, and may split an axis (Collective.axes in hlo.py).
    """
    sizes = place.mesh.shape
    rows = [place.row.get(f"{layers}_batch") for layers in ("conv", "dense", "output")]
    batches = [[axis for axis in axes if sizes[axis] > 1] for axes in mesh_axes_of(rows)]
    nested = all(
        one[: len(other)] == other or other[: len(one)] == one
        for one, other in itertools.pairwise(batches)
    )
    return nested and all(axis in sizes for row in compiled for axis in row["axes"])


def closed_form(
    place: Placement,
    activations: Sequence[tuple[str, tuple, tuple]],
    params: Sequence[tuple[str, nnx.Param]],
    itemsize: int,
    dense_updates: int = 1,
) -> list[dict]:
    """JSON-ready rows: what, operation, axes, phase, bytes (payload of one device) and ring_bytes, as in hlo.py.

    activations: name ("conv1 input", "conv1 output"), logical axes and shape of each, in the order of the network;
    params: name ("conv1.kernel") and abstract variable; itemsize: bytes of an element of the compute dtype, in which
    activations and gradients move; dense_updates: of a step, in a variable batch, each of which needs gradients of its own,
    while all parts together move the activations of the whole. (Where parts are summed before one update, compilers reduce
    some or all of them by themselves: more than theory.)
    """
    rows, previous, batch_axes = [], None, {}
    kernels = {
        name.split(".")[0]: mesh_axes_of(place.spec(param.axes, param.shape, name))
        for name, param in params
        if name.endswith(".kernel")
    }

    def move(what: str, operation: str, axes: set[str], phase: str, payload: float) -> None:
        axes = [axis for axis, size in place.mesh.shape.items() if axis in axes and size > 1]
        if axes:
            rows.append(
                dict(what=what, operation=operation, axes=axes, phase=phase, bytes=round(payload))
            )

    for name, axes, shape in activations:
        layer, _, end = name.partition(" ")
        dims = mesh_axes_of(place.spec(axes, shape, name))
        held = place.report(name, axes, shape, itemsize)["bytes_per_device"]
        inputs, outputs = (
            (set(dim) for dim in kernels[layer][-2:]) if layer in kernels else (set(), set())
        )
        after = {axis for dim in dims for axis in dim}
        if end == "output":
            scattered = inputs & after
            move(name, "all-reduce", inputs - scattered, "forward", held)
            move(
                name,
                "reduce-scatter",
                scattered,
                "forward",
                held * place.devices_on(tuple(scattered)),
            )
            move(
                name, "all-gather", scattered, "backward", held * place.devices_on(tuple(scattered))
            )
        else:
            batch_axes[layer] = dims[0]
            before = set() if previous is None else {axis for dim in previous for axis in dim}
            if previous is not None:
                gathered, sliced = before - after, after - before
                outputs -= set(
                    dims[-1]
                )  # a device that holds whole towers has the whole gradient of their channels
                move(name, "all-gather", gathered, "forward", held)
                operation = "reduce-scatter" if gathered and outputs <= gathered else "all-reduce"
                move(name, operation, outputs, "backward", held)
                move(name, "all-gather", sliced, "backward", held * place.devices_on(tuple(sliced)))
                turned = {
                    axis
                    for a, b in zip((previous[0], previous[-1]), (dims[0], dims[-1]), strict=True)
                    for axis in set(a) - set(b)
                    if axis in after
                }
                for phase in ("forward", "backward"):
                    move(name, "all-to-all", turned, phase, held)
        previous = dims

    for name, param in params:
        held = place.report(name, param.axes, param.shape, itemsize)["bytes_per_device"]
        times = dense_updates if name.startswith("fc") else 1
        move(name, "all-reduce", set(batch_axes[name.split(".")[0]]), "backward", times * held)

    for row in rows:
        devices = place.devices_on(row["axes"])
        row["ring_bytes"] = round(RING_PARTS[row["operation"]](devices) * row["bytes"] / devices)
    return rows


def compare(compiled: Sequence[dict], theory: Sequence[dict] | None) -> list[dict]:
    """Rows a set of mesh axes and kind (gather, reduce, or a kind of its own): payload compiled, payload in theory.

    theory: None where the closed form does not cover the program; so is then the payload in theory.
    All-reduce and reduce-scatter are one kind: their payload is the same, and the CPU compiler knows the former only.
    """
    kinds = {"all-gather": "gather", "all-reduce": "reduce", "reduce-scatter": "reduce"}
    totals: dict[tuple, list[int]] = {}
    for column, rows in enumerate((compiled, theory or ())):
        for row in rows:
            key = kinds.get(row["operation"], row["operation"]), tuple(row["axes"])
            totals.setdefault(key, [0, 0])[column] += row["bytes"]
    return [
        dict(
            kind=kind,
            axes=list(axes),
            compiled_bytes=got,
            closed_form_bytes=None if theory is None else expected,
        )
        for (kind, axes), (got, expected) in sorted(totals.items())
    ]
