"""Find out along which mesh axes a collective runs, from the devices that its HLO names."""

import itertools
import math
import re

import numpy as np

# [4,2]T(1,0) is the numbers 0 to 7 as a 4x2 array, transposed.
_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"
_REPLICA_GROUPS = re.compile(
    r"\breplica_groups=(?:(?P<all>\{\})"
    r"|\{(?P<lists>\{[\d,]+\}(?:,\{[\d,]+\})*)\}"
    rf"|\[(?P<shape>\d+,\d+)\]<=(?P<iota>{_IOTA})"
    rf"|mesh\[(?P<mesh>'[^']+'=\d+(?:,'[^']+'=\d+)*)\](?:, device_ids=\((?P<ids>{_IOTA}|[\d,]+)\))?"
    r" \{(?P<axes>(?:'[^']+'(?::\(\d+\)\d+)?,?)*)\})(?=,|$)"
)


def axes_and_group_size(
    operation: str, attributes: str, mesh_shape: dict[str, int]
) -> tuple[tuple[str, ...], int]:
    """Return `axes` and `group_size` of an hlo.Collective.

    attributes: of its instruction. mesh_shape: as of hlo.Module. Raises ValueError for a form that
    is not known, and for groups of several sizes.
    """
    if operation == "collective-permute":
        axes = _axes_of_pairs(attributes, mesh_shape)
        return axes, math.prod(mesh_shape[axis] for axis in axes)
    groups = _replica_groups(operation, attributes, math.prod(mesh_shape.values()))
    return _axes_of_groups(groups, mesh_shape)


def _replica_groups(operation: str, attributes: str, devices: int) -> list[list[int]]:
    """Return the groups of device numbers that `replica_groups` stands for."""
    match = _REPLICA_GROUPS.search(attributes)
    if not match:
        raise ValueError("unknown or missing replica_groups")
    if match["all"]:
        return [list(range(devices))]
    of_replicas = "channel_id=" in attributes and "use_global_device_ids=true" not in attributes
    if of_replicas and operation in ("all-reduce", "all-gather", "reduce-scatter"):
        raise ValueError("replica_groups of replicas, not devices (no use_global_device_ids)")
    if match["lists"]:
        return [[int(n) for n in group.split(",")] for group in match["lists"][1:-1].split("},{")]
    if match["iota"]:
        return _iota(match["iota"]).reshape([int(n) for n in match["shape"].split(",")]).tolist()
    return _groups_of_xla_mesh(match["mesh"], match["ids"], match["axes"])


def _groups_of_xla_mesh(mesh: str, ids: str | None, axes: str) -> list[list[int]]:
    """Return the groups along `axes` of a mesh that XLA made.

    Its axes need not be ours. Devices form a group when they differ along the listed axes only. An
    axis may be listed in part (a sub-axis of Shardy): 'a':(2)4 is the digit of size 4 that follows
    a leading digit of size 2.
    """
    names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", mesh), strict=True)
    sizes = [int(n) for n in sizes]
    numbers = _iota(ids) if ids else np.arange(math.prod(sizes))
    coordinates = np.indices(sizes).reshape(len(sizes), -1)
    group_size = 1
    for name, leading, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", axes):
        axis = names.index(name)
        size = int(part or sizes[axis])
        stride, rest = divmod(sizes[axis], int(leading or 1) * size)
        if rest:
            raise ValueError(f"no such part of axis {name!r}")
        # With this digit at zero, the devices of a group have the same coordinates.
        coordinates[axis] -= coordinates[axis] // stride % size * stride
        group_size *= size
    return numbers[np.lexsort(coordinates)].reshape(-1, group_size).tolist()


def _iota(text: str) -> np.ndarray:
    """Return device numbers, flat, from `[4,2]T(1,0)` or from a list: `0,2,1,3`."""
    shape, _, order = text.partition("T")
    numbers = [int(n) for n in shape.strip("[]").split(",")]
    if not shape.startswith("["):
        return np.array(numbers)
    axes = [int(n) for n in order.strip("()").split(",")] if order else None
    return np.arange(math.prod(numbers)).reshape(numbers).transpose(axes).ravel()


def _axes_of_groups(
    groups: list[list[int]], mesh_shape: dict[str, int]
) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes along which groups of devices lie, and the size of a group."""
    if sorted(itertools.chain(*groups)) != list(range(math.prod(mesh_shape.values()))):
        raise ValueError(f"replica_groups do not hold each device of {mesh_shape} once")
    sizes = {len(group) for group in groups}
    if len(sizes) > 1:
        raise ValueError(f"replica_groups of several sizes: {sorted(sizes)}")
    (size,) = sizes
    differing = {axis for group in groups for axis in _differing(group, mesh_shape)}
    axes = tuple(axis for axis in mesh_shape if axis in differing)
    devices = math.prod(mesh_shape[axis] for axis in axes)
    if size < devices:
        axes = (f"{'+'.join(axes)} ({size} of {devices})",)
    return axes, size


def _axes_of_pairs(attributes: str, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which a collective-permute sends."""
    match = re.search(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}(?=,|$)", attributes)
    if not match:
        raise ValueError("unknown or missing source_target_pairs")
    pairs = re.findall(r"(\d+),(\d+)", match[1])
    axes = {axis for pair in pairs for axis in _differing([int(n) for n in pair], mesh_shape)}
    return tuple(axis for axis in mesh_shape if axis in axes)


def _differing(devices: list[int], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which some of the devices differ."""
    coordinates = np.unravel_index(devices, tuple(mesh_shape.values()))
    return tuple(axis for axis, along in zip(mesh_shape, coordinates, strict=True) if np.ptp(along))
