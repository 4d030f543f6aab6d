"""Run functions on the shards that each device holds (shard_map helpers).

XLA partitions most operations well by itself. These helpers serve the rest: GPU kernels, which XLA
cannot partition, grouped convolutions, for which XLA would gather the whole batch, and windows
where the height of maps is split. Layers reach them as `place.local`, `place.towers` and
`place.overlapping`; the argument `place` is that Placement.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cnn_spmd.errors import UserError
from cnn_spmd.sharding.halo import Halo, Windows

Axes = tuple[str | None, ...]


def on_shards(place, axes: Axes, f: Callable, *arrays: jax.Array) -> Any:
    """Return f(*arrays), computed by each device from its own shards; nothing moves.

    axes: the logical axes of the first array and of every result. An array of fewer dimensions has
    the last of them, as a bias has its map's channels.

    JAX cannot differentiate the result: use it inside a derivative rule (jax.custom_vjp).
    """
    specs = tuple(place.spec(axes[-array.ndim :], array.shape, even=True) for array in arrays)
    mapped = jax.shard_map(f, mesh=place.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(*arrays)


def each_tower(f: Callable, groups: int, *arrays: jax.Array) -> jax.Array:
    """Apply f to each of `groups` towers and join the results along the channels.

    f: takes one piece of each array, cut along its last dimension, and returns one array.
    """
    pieces = [jnp.split(array, groups, -1) for array in arrays]
    return jnp.concatenate([f(*tower) for tower in zip(*pieces, strict=True)], -1)


def towers(
    place,
    f: Callable,
    groups: int,
    *arrays: tuple[jax.Array, Axes],
    out: Axes,
    name: str,
    rows: bool = False,
) -> jax.Array:
    """Apply f to each of `groups` towers, on the devices that hold its results.

    f: as in each_tower. arrays: each with its logical axes; all towers' channels, in order, are its
    last dimension. out: the logical axes of the result. name: the layer's, for errors. rows: f
    works on the rows of one device, from `overlapping`.

    Where the row splits the channels of the result, a device computes the towers whose channels it
    holds. With more devices than towers it computes a shard of one tower. Nothing moves between
    towers.

    Raises UserError where towers and devices do not divide, and where the row splits the incoming
    channels (group_in) over other mesh axes than the outgoing ones.
    """
    mesh_axes = place.mesh_axes(out[-1])
    if not rows and (groups == 1 or not mesh_axes):
        return each_tower(f, groups, *(array for array, _ in arrays))
    if groups > 1:
        _check_towers(place, groups, out[-1], name)
    devices = place.shards(out[-1])
    held = max(1, groups // devices)

    def own(shard, axes):
        """Cut this device's towers out of a shard that holds all towers."""
        if held == groups or place.mesh_axes(axes[-1]):
            return shard
        tower = jax.lax.axis_index(mesh_axes) * groups // devices
        width = shard.shape[-1] // groups
        return jax.lax.dynamic_slice_in_dim(shard, tower * width, held * width, -1)

    def on_device(*shards):
        cut = [own(shard, axes) for shard, (_, axes) in zip(shards, arrays, strict=True)]
        return each_tower(f, held, *cut)

    mapped = jax.shard_map(
        on_device,
        mesh=place.mesh,
        in_specs=tuple(place.spec(axes, array.shape, name, even=True) for array, axes in arrays),
        # The result's shape is not known yet. One element per device divides, as its channels will.
        out_specs=place.spec(out, tuple(map(place.shards, out)), name),
    )
    return mapped(*(array for array, _ in arrays))


def _check_towers(place, groups: int, axis: str, name: str) -> None:
    """Raise UserError where the row cannot split `groups` towers along `axis`."""
    incoming, outgoing = place.mesh_axes("group_in"), place.mesh_axes(axis)
    devices = place.shards(axis)
    if incoming and incoming != outgoing:
        raise UserError(
            f"{name}: group_in={'+'.join(incoming)} and {axis}={'+'.join(outgoing)} {place.where}: "
            "expected the same"
        )
    # A tower may be split over devices only if each of them has the whole input of the tower.
    if groups % devices and (devices % groups or incoming):
        raise UserError(
            f"{name}: its {groups} towers do not divide by the {devices} devices of mesh axis "
            f"{'+'.join(outgoing)} {place.where}"
        )


def overlapping(
    place, x_NHWC: jax.Array, axes: Axes, windows: Windows, name: str, fill: float
) -> jax.Array:
    """Return a map, split by height, whose shards hold all rows that their windows read.

    axes: the logical axes of the map and of the windows' result. name: the layer's. fill: what rows
    outside of the map hold. The shards overlap, so that the result has more rows than the map.

    Raises UserError where windows read more than the rows of the two neighbours.
    """
    halo = Halo(windows, place.shards("image_height"), place.mesh_axes("image_height"))
    halo.refuse_too_large(name, place.where)
    batch, _, width, channels = x_NHWC.shape
    if place.record and halo.above + halo.below:
        moved = batch, halo.devices * (halo.above + halo.below), width, channels
        place.record(f"{name} halo", axes, jax.ShapeDtypeStruct(moved, x_NHWC.dtype))
    x_NHWC = halo.even(x_NHWC)
    spec = place.spec(axes, x_NHWC.shape, name, even=True)
    exchange = functools.partial(halo.exchange, fill=fill)
    return jax.shard_map(exchange, mesh=place.mesh, in_specs=spec, out_specs=spec)(x_NHWC)
