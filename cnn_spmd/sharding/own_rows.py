"""Read a config's own rows of the placement table, the field `placement`.

Such a row has the form of TABLE's, and two things more: `base` names a row of TABLE from which it
starts, and the mesh axes "ALL" stand for ALL.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cnn_spmd.errors import UserError
from cnn_spmd.sharding.table import ALL, LOGICAL_AXES, TABLE

KEYS = ("base", "at_rest", "gather_again")  # of a row, beside logical axes


def read(scheme: str, row: Any) -> dict[str, Any]:
    """Return the row of a config's own `scheme` as TABLE would have it.

    The row's entries replace those of its base; at_rest is one entry. Raises UserError for a base
    that is no row of TABLE, and unless the row maps logical axes to mesh axes.
    """
    where = f"placement.{scheme}"
    if not isinstance(row, Mapping):
        raise UserError(f"{where}={row}: expected a row such as {{'fc1_out': 'model'}}")
    if scheme in TABLE:
        raise UserError(f"{where}: is a built-in row, choose another name")
    if "base" in row and row["base"] not in list(TABLE):
        raise UserError(f"{where}.base={row['base']}: unknown, expected one of {', '.join(TABLE)}")
    row = {**TABLE.get(row.get("base"), {}), **row}
    at_rest = row.get("at_rest", {})
    if not isinstance(at_rest, Mapping):
        expected = "expected a row of weights such as {'fc1_in': 'data'}"
        raise UserError(f"{where}.at_rest={at_rest}: {expected}")
    again = row.get("gather_again")
    if "gather_again" in row and not ("at_rest" in row and isinstance(again, bool)):
        field = f"{where}.gather_again={again}"
        raise UserError(f"{field}: expected True or False, in a row with at_rest")
    used = {axis: row[axis] for axis in row if axis not in KEYS}
    others = {key: row[key] for key in KEYS[1:] if key in row}
    if "at_rest" in row:
        of_weights = [axis for axis in LOGICAL_AXES if axis.endswith(("_in", "_out"))]
        others["at_rest"] = _mesh_axes(f"{where}.at_rest", at_rest, of_weights)
    return _mesh_axes(where, used, (*LOGICAL_AXES, *KEYS)) | others


def _mesh_axes(where: str, row: Mapping, known_axes: Sequence[str]) -> dict[str, Any]:
    """Return `row`, which maps some of `known_axes` to mesh axes, with ALL for "ALL".

    Raises UserError for other axes.
    """
    for axis, mesh_axes in row.items():
        field = f"{where}.{axis}={mesh_axes}"
        if axis not in known_axes:
            expected = ", ".join(known_axes)
            raise UserError(f"{field}: no such logical axis, expected one of {expected}")
        several = isinstance(mesh_axes, tuple | list)
        names = list(mesh_axes) if several else [mesh_axes]
        known = all(name in ALL for name in names) and len(names) == len(set(names))
        if mesh_axes not in (None, "ALL") and not (names and known):
            expected = ", ".join(map(repr, ALL))
            raise UserError(f"{field}: expected {expected}, {ALL}, 'ALL' or None")
    return {axis: ALL if mesh_axes == "ALL" else mesh_axes for axis, mesh_axes in row.items()}
