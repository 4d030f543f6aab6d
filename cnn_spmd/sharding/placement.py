"""Place arrays on a mesh as a row of the table says."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cnn_spmd.errors import UserError
from cnn_spmd.sharding import local
from cnn_spmd.sharding.table import BOTH, LOGICAL_AXES, MAY_REPLICATE, TABLE


@dataclasses.dataclass(frozen=True)
class Placement:
    """One row of the table on one mesh. Called as `place(x, "conv_batch", None, ...)`, it constrains an activation.

    `own_rows` are further rows by their names, from a config; `record` is called with (name, axes, array) of every named
    activation as it is traced.
    """

    mesh: Mesh
    parallelism: str
    own_rows: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    record: Callable[[str, tuple, jax.Array], None] | None = None

    def __post_init__(self):
        """Raises UserError for an unknown row, and for a row that names an axis there is none of."""
        rows = {**TABLE, **self.own_rows}
        if self.parallelism not in rows:
            raise UserError(
                f"parallelism={self.parallelism}: unknown, expected one of {', '.join(map(str, rows))}"
            )
        for name, row in self.own_rows.items():
            if not isinstance(row, Mapping):
                raise UserError(
                    f"placement.{name}={row}: expected a row such as {{'fc1_out': 'model'}}"
                )
            if name in TABLE:
                raise UserError(f"placement.{name}: is a built-in row, choose another name")
            for axis, mesh_axes in row.items():
                field = f"placement.{name}.{axis}={mesh_axes}"
                if axis not in LOGICAL_AXES:
                    raise UserError(
                        f"{field}: no such logical axis, expected one of {', '.join(LOGICAL_AXES)}"
                    )
                names = (
                    sorted(map(str, mesh_axes))
                    if isinstance(mesh_axes, tuple | list)
                    else [mesh_axes]
                )
                if names not in ([None], ["data"], ["model"], [*BOTH]):
                    raise UserError(f"{field}: expected 'data', 'model', ('data', 'model') or None")

    @property
    def row(self) -> Mapping[str, Any]:
        """Logical axis -> mesh axes."""
        return {**TABLE, **self.own_rows}[self.parallelism]

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = "array") -> P:
        """The PartitionSpec of an array whose dimensions carry the logical `axes`; None is replicated.

        Raises UserError, naming the array, its shape and the axis, where a dimension does not divide by its mesh axes
        (jax.lax.with_sharding_constraint would replicate in silence), or two dimensions are split on the same mesh axis.
        """
        spec, where = [], f"(mesh {self.mesh_name}, parallelism={self.parallelism})"
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and axis not in LOGICAL_AXES:
                raise KeyError(f"{name}: logical axis {axis!r} is not one of {LOGICAL_AXES}")
            mesh_axes = self.row.get(axis)
            parts = self.parts(mesh_axes)
            if size % parts and axis in MAY_REPLICATE:
                mesh_axes = None
            elif size % parts:
                raise UserError(
                    f"{name} {shape}: {axis}={size} does not divide by the {parts} devices of mesh axis "
                    f"{'+'.join(_names(mesh_axes))} {where}: change the mesh or "
                    f"the {'batch' if axis.endswith('batch') else 'parallelism'}"
                )
            spec.append(tuple(mesh_axes) if isinstance(mesh_axes, list) else mesh_axes)
        used = [mesh_axis for mesh_axes in spec for mesh_axis in _names(mesh_axes)]
        if len(used) != len(set(used)):
            raise UserError(
                f"{name} {shape}: two of its axes {axes} are split on the same mesh axis {where}"
            )
        return P(*spec)

    def parts(self, mesh_axes: str | tuple[str, ...] | None) -> int:
        """Into how many parts a dimension on these mesh axes is split."""
        return math.prod(self.mesh.shape[name] for name in _names(mesh_axes))

    def parts_of(self, axis: str) -> int:
        """Into how many parts the table splits a logical axis."""
        return self.parts(self.row.get(axis))

    def sharding(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = "array"
    ) -> NamedSharding:
        """The NamedSharding of `spec`, with its errors."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    def __call__(self, x: jax.Array, *axes: str | None, name: str = "") -> jax.Array:
        """Constrains `x` inside a jitted function to where the table puts its logical axes; `name` is for people."""
        if name and self.record:
            self.record(name, axes, x)
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, name or "array"))

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds the whole array."""
        return NamedSharding(self.mesh, P())

    @property
    def mesh_name(self) -> str:
        """The mesh's shape as the command line spells it, such as 4x2."""
        return "x".join(str(size) for size in self.mesh.shape.values())

    def of_state(self, state: Any) -> Any:
        """A sharding for each array of a train state: an nnx.Variable lives where its `axes` say, a scalar everywhere.

        Optimizer state is built by mapping over the parameters, so a momentum carries its weight's axes by itself.
        """

        def one(path, leaf):
            if isinstance(leaf, nnx.Variable):
                return leaf.replace(self.sharding(leaf.axes, leaf.shape, name_of(path)))
            return self.replicated

        return jax.tree_util.tree_map_with_path(
            one, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )

    def report(
        self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...], itemsize: int
    ) -> dict:
        """A JSON-ready row for one array: name, shape, logical axes, mesh axes, bytes, bytes a device, note.

        `note` says which axis the table asked to split and could not (MAY_REPLICATE), else it is empty.
        """
        sharding = self.sharding(axes, shape, name)
        missed = [
            f"{axis}={size} does not divide by {'+'.join(_names(self.row[axis]))}={self.parts(self.row[axis])}: "
            "replicated"
            for axis, size, got in zip(axes, shape, sharding.spec, strict=True)
            if got is None and self.row.get(axis) is not None
        ]
        return dict(
            name=name,
            shape=list(shape),
            logical_axes=list(axes),
            mesh_axes=[list(a) if isinstance(a, tuple) else a for a in sharding.spec],
            bytes=math.prod(shape) * itemsize,
            bytes_per_device=math.prod(sharding.shard_shape(shape)) * itemsize,
            note="; ".join(missed),
        )

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Return the mesh axes on which the row splits a logical axis; () where it does not."""
        return _names(self.row.get(axis))

    def splits(self, axis: str) -> bool:
        """Tell whether the row splits a logical axis over several devices of this mesh."""
        return self.parts_of(axis) > 1

    def hidden_output_batch(self, name: str) -> str:
        """Return the logical batch axis of what the last hidden layer, called `name`, returns.

        A layer whose columns are whole returns the output layer's batch directly. Where its rows
        are split, XLA can then scatter the partial sums while it adds them (hybrid_alternating).
        """
        return "dense_batch" if self.splits(f"{name}_out") else "output_batch"

    def towers(
        self, f: Callable, groups: int, *arrays: tuple[jax.Array, tuple], out: tuple, name: str
    ) -> jax.Array:
        """Apply f to each of `groups` towers where its results live: see sharding/local.py."""
        return local.towers(self, f, groups, *arrays, out=out, name=name)

    def local(self, axes: tuple[str | None, ...], f: Callable, *arrays: jax.Array) -> Any:
        """Return f of the shards that each device holds: see on_shards in sharding/local.py."""
        return local.on_shards(self, axes, f, *arrays)


def _names(mesh_axes: Any) -> tuple[str, ...]:
    return (
        ()
        if mesh_axes is None
        else (mesh_axes,)
        if isinstance(mesh_axes, str)
        else tuple(mesh_axes)
    )


def mesh_axes_of(spec: P) -> list[tuple[str, ...]]:
    """The mesh axes of each dimension, () where it is whole."""
    return [_names(mesh_axes) for mesh_axes in spec]


def name_of(path: tuple) -> str:
    """A parameter's name for people, such as "fc1.kernel", from its key path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


class Unplaced:
    """The `place` of a network that is called by itself, as in a notebook or a test: leaves every array where it is."""

    record = None

    def __call__(self, x: jax.Array, *axes: str | None, name: str = "") -> jax.Array:
        return x

    def parts_of(self, axis: str) -> int:
        return 1

    def splits(self, axis: str) -> bool:
        return False

    def hidden_output_batch(self, name: str) -> str:
        return "output_batch"

    def towers(self, f, groups, *arrays, out, name=""):
        return local.each_tower(f, groups, *(array for array, _ in arrays))

    def local(self, axes, f, *arrays):
        return f(*arrays)


UNPLACED = Unplaced()
