"""THE TABLE: where every kind of array lives, for each kind of parallelism.

Models, data and optimizer name *logical* axes only ("fc1_out", "conv_batch"); a row of the table maps them to the axes
of the mesh, and what it does not name is replicated. Changing where an array lives is changing one entry here.
"""

import dataclasses
import math
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cnn_spmd.errors import UserError

BOTH = ("data", "model")

# Activations have a batch axis: of the convolutions, of the dense layers, of the output layer (logits, labels and loss).
# Weights have an input (rows) and an output (columns) axis a layer; a dense layer's activations are split as its kernel
# is. fc1 and fc2 are the 4096-wide layers, fc3 is the output layer.
TABLE: dict[str, dict[str, Any]] = {
    # Every device holds all weights and its share of the batch; gradients are all-reduced.
    "data": dict(conv_batch=BOTH, dense_batch=BOTH, output_batch=BOTH),
    # One weird trick (Krizhevsky 2014, scheme a): convolutions as above; the dense layers, which hold ~95% of the
    # weights and do ~5% of the work, are split by columns, and their input is gathered along `model` instead.
    "hybrid": dict(conv_batch=BOTH, dense_batch="data", output_batch="data",
                   fc1_out="model", fc2_out="model", fc3_out="model"),
}
LOGICAL_AXES = ("conv_batch", "dense_batch", "output_batch", "conv_in", "conv_out",
                "fc1_in", "fc1_out", "fc2_in", "fc2_out", "fc3_in", "fc3_out")

# CIFAR-10's 10 classes divide by few model axes. The output layer is small, so it is replicated then, and the placement
# report of the run says so; for every other axis, an indivisible size is an error.
MAY_REPLICATE = ("fc3_out",)


@dataclasses.dataclass(frozen=True)
class Placement:
    """One row of the table on one mesh. Called as `place(x, "conv_batch", None, ...)`, it constrains an activation."""

    mesh: Mesh
    parallelism: str

    def __post_init__(self):
        if self.parallelism not in TABLE:
            raise UserError(f"parallelism={self.parallelism}: unknown, expected one of {', '.join(TABLE)}")

    def spec(self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = "activation") -> P:
        """The PartitionSpec of an array whose dimensions carry the logical `axes`; None is replicated.

        Raises UserError, naming the array, its shape and the axis, where a dimension does not divide by its mesh axes:
        jax.lax.with_sharding_constraint would replicate in silence instead.
        """
        row, spec = TABLE[self.parallelism], []
        for axis, size in zip(axes, shape, strict=True):
            if axis is not None and axis not in LOGICAL_AXES:
                raise KeyError(f"{name}: logical axis {axis!r} is not one of {LOGICAL_AXES}")
            mesh_axes = row.get(axis)
            parts = self.parts(mesh_axes)
            if size % parts and axis in MAY_REPLICATE:
                mesh_axes = None
            elif size % parts:
                raise UserError(f"{name} {shape}: {axis}={size} does not divide by the {parts} devices of mesh axis "
                                f"{mesh_axes} (mesh {self.shape}, parallelism={self.parallelism}): change the mesh or "
                                f"{'batch_size' if axis.endswith('batch') else 'the parallelism'}")
            spec.append(mesh_axes)
        return P(*spec)

    def parts(self, mesh_axes: str | tuple[str, ...] | None) -> int:
        """Into how many parts a dimension on these mesh axes is split."""
        names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        return math.prod(self.mesh.shape[name] for name in names)

    def sharding(self, axes: tuple[str | None, ...], shape: tuple[int, ...], name: str = "activation") -> NamedSharding:
        """The NamedSharding of `spec`, with its errors."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    def __call__(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Constrains `x` inside a jitted function to where the table puts its logical axes."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape))

    @property
    def replicated(self) -> NamedSharding:
        """Every device holds the whole array."""
        return NamedSharding(self.mesh, P())

    @property
    def shape(self) -> str:
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
        return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))

    def report(self, params: nnx.State) -> list[dict]:
        """A JSON-ready row a parameter: name, shape, logical axes, mesh axes, bytes, bytes a device, note.

        `note` says which axis the table asked to split and could not (MAY_REPLICATE), else it is empty.
        """
        rows = []
        for path, leaf in jax.tree_util.tree_leaves_with_path(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            sharding = self.sharding(leaf.axes, leaf.shape, name_of(path))
            missed = [f"{axis}={size} does not divide by {TABLE[self.parallelism][axis]}: replicated"
                      for axis, size, got in zip(leaf.axes, leaf.shape, sharding.spec, strict=True)
                      if got is None and TABLE[self.parallelism].get(axis) is not None]
            size = leaf.dtype.itemsize
            rows.append(dict(name=name_of(path), shape=list(leaf.shape), logical_axes=list(leaf.axes),
                             mesh_axes=[list(a) if isinstance(a, tuple) else a for a in sharding.spec],
                             bytes=math.prod(leaf.shape) * size,
                             bytes_per_device=math.prod(sharding.shard_shape(leaf.shape)) * size, note="; ".join(missed)))
        return rows


def name_of(path: tuple) -> str:
    """A parameter's name for people, such as "fc1.kernel", from its key path."""
    return ".".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
