"""Place arrays on a mesh as a row of the placement table says."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cnn_spmd.errors import UnevenBatch, UserError, unknown
from cnn_spmd.sharding import at_rest, local, own_rows
from cnn_spmd.sharding.halo import Windows
from cnn_spmd.sharding.table import LOGICAL_AXES, MAY_BE_UNEVEN, MAY_REPLICATE, TABLE

Axes = tuple[str | None, ...]  # the logical axis of each dimension; None: not split


@dataclasses.dataclass(frozen=True)
class Placement:
    """A scheme, which is a row of the placement table, on a mesh.

    Inside a jitted function, `place(x, "dense_batch", "fc1_out")` puts an activation where the row
    puts its logical axes. `own_rows` are further schemes, from a config (own_rows.py). `record`, if
    given, is called with (name, axes, array) for each named activation while JAX traces it. `used`
    collects the logical axes that have split an array so far.

    Raises UserError for an unknown scheme, and for an own row that names an unknown axis.
    """

    mesh: Mesh
    parallelism: str
    own_rows: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    record: Callable[[str, Axes, jax.Array], None] | None = None
    used: set[str] = dataclasses.field(default_factory=set, compare=False)

    def __post_init__(self):
        _ = self.row  # for its errors

    # ---- Where an array lies.

    @functools.cached_property
    def row(self) -> Mapping[str, Any]:
        """Return the scheme's row: logical axis -> mesh axis or mesh axes."""
        own = {scheme: own_rows.read(scheme, row) for scheme, row in self.own_rows.items()}
        schemes = {**TABLE, **own}
        if self.parallelism not in schemes:
            more = ", or a row of your own in the field placement"
            raise unknown("parallelism", self.parallelism, schemes, more)
        return schemes[self.parallelism]

    def mesh_axes(self, axis: str | None) -> tuple[str, ...]:
        """Return the mesh axes that a logical axis is split over."""
        return _as_tuple(self.row.get(axis))

    def devices_on(self, mesh_axes: Any) -> int:
        """Count the shards of a dimension that is split over these mesh axes."""
        return math.prod(self.mesh.shape[name] for name in _as_tuple(mesh_axes))

    def shards(self, axis: str | None) -> int:
        """Count the shards of a logical axis."""
        return self.devices_on(self.mesh_axes(axis))

    def splits(self, axis: str) -> bool:
        """Return whether the row splits a logical axis over several devices of this mesh."""
        return self.shards(axis) > 1

    def hidden_output_batch(self, name: str) -> str:
        """Return the logical batch axis of the output of the last hidden layer, `name`.

        A layer whose columns are not split returns the output layer's batch directly. Where its
        rows are split, XLA can then scatter the partial sums while it adds them
        (hybrid_alternating).
        """
        return "dense_batch" if self.splits(f"{name}_out") else "output_batch"

    def map_axes(self, rows: int, channels: str | None) -> Axes:
        """Return the logical axes of maps with this many rows; channels: their logical axis.

        Maps with fewer rows than the devices that split the height are not split along it. Their
        batch is then split as that of the dense layers.
        """
        if self.shards("image_height") > rows:
            return "dense_batch", None, None, channels
        return "conv_batch", "image_height", None, channels

    def splits_height(self, axes: Axes) -> bool:
        """Return whether maps with these logical axes are split along their height."""
        return "image_height" in axes and self.splits("image_height")

    @property
    def features_batch(self) -> str:
        """Return the logical batch axis of what leaves the convolutions.

        Where the height is split, devices have traded rows for examples by then.
        """
        return "dense_batch" if self.splits("image_height") else "conv_batch"

    def spec(
        self, axes: Axes, shape: tuple[int, ...], name: str = "array", even: bool = False
    ) -> P:
        """Return the PartitionSpec of an array from its logical axes.

        even: rows of maps must divide too, as shard_map needs.

        Raises UserError, naming the array, its shape and the axis, where a size does not divide by
        its mesh axes; UnevenBatch where that is a batch. (jax.lax.with_sharding_constraint would
        replicate the array in silence.) Raises UserError too where one mesh axis splits two
        dimensions.
        """
        if len(axes) != len(shape):
            raise UserError(
                f"{name} {shape}: has {len(shape)} dimensions, but {len(axes)} logical axes {axes}"
            )
        spec = [self._split(name, shape, *pair, even) for pair in zip(axes, shape, strict=True)]
        split = zip(axes, map(_as_tuple, spec), strict=True)
        for (axis, one), (second, other) in itertools.combinations(split, 2):
            if both := [mesh_axis for mesh_axis in one if mesh_axis in other]:
                left = next((mesh_axis for mesh_axis in one if mesh_axis not in other), None)
                raise UserError(
                    f"{name} {shape}: {axis} and {second} are both split over {_named(both)} "
                    f"{self.where}: expected only one of them to be, such as {axis}={left!r}"
                )
        self.used.update(
            axis for axis, split in zip(axes, spec, strict=True) if self.devices_on(split) > 1
        )
        return P(*spec)

    def _split(
        self, name: str, shape: tuple[int, ...], axis: str | None, size: int, even: bool
    ) -> Any:
        """Return the entry of a PartitionSpec for one dimension of the array `name`."""
        if axis is None:
            return None
        if axis not in LOGICAL_AXES:
            expected = ", ".join(LOGICAL_AXES)
            raise UserError(
                f"{name} {shape}: no such logical axis {axis!r}, expected one of {expected}"
            )
        mesh_axes = self.row.get(axis)
        shards = self.shards(axis)
        if size % shards == 0 or (axis in MAY_BE_UNEVEN and size > shards and not even):
            return tuple(mesh_axes) if isinstance(mesh_axes, list) else mesh_axes
        if axis in MAY_REPLICATE:
            return None
        of_axes = f"{_named(_as_tuple(mesh_axes))} {self.where}"
        uneven = f"={size} does not divide by the {shards} devices of {of_axes}"
        array = f"{name} {shape}: {axis}"
        if not axis.endswith("batch"):
            raise UserError(f"{array}{uneven}: change the mesh or the parallelism")
        raise UnevenBatch(
            f"{array if len(shape) > 1 else name}{uneven}: expected a batch that is a multiple of "
            f"{shards}, such as {multiples_near(size, shards)}, or another mesh"
        )

    def sharding(self, axes: Axes, shape: tuple[int, ...], name: str = "array") -> NamedSharding:
        """Return the NamedSharding of an array. Raises as `spec` does."""
        return NamedSharding(self.mesh, self.spec(axes, shape, name))

    def shard_shape(self, spec: P, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of an array's largest shard."""
        return tuple(
            -(-size // self.devices_on(split)) for size, split in zip(shape, spec, strict=True)
        )

    @property
    def replicated(self) -> NamedSharding:
        """Return the sharding of an array that every device holds whole."""
        return NamedSharding(self.mesh, P())

    def spec_at_rest(self, axes: Axes, shape: tuple[int, ...], name: str = "array") -> P:
        """Return the PartitionSpec of a weight between steps, from its logical axes.

        Each dimension is split as `spec` says and, beyond that, over the mesh axes that the row's
        `at_rest` gives it. Mesh axes that split the weight already are skipped. Where a size does
        not divide, the dimension is split over fewer of them: the longest beginning of the list
        that divides, otherwise one of them. Raises as `spec` does.
        """
        spec = mesh_axes_of(self.spec(axes, shape, name))
        for dimension, (axis, size) in enumerate(zip(axes, shape, strict=True)):
            taken = sum(spec, ())
            free = [a for a in self._axes_at_rest(axis, shape) if a not in taken]
            for extra in (*(free[:n] for n in range(len(free), 0, -1)), *([a] for a in free)):
                split = *spec[dimension], *extra
                if size % self.devices_on(split) == 0:
                    spec[dimension] = split
                    break
        return P(
            *(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None for mesh_axes in spec)
        )

    def _axes_at_rest(self, axis: str | None, shape: tuple[int, ...]) -> list[str]:
        """Return the mesh axes that split a dimension of a weight at rest, beyond its use.

        A weight of one dimension, such as a bias, is small and lies as it is used.
        """
        names = _as_tuple(self.row.get("at_rest", {}).get(axis)) if len(shape) > 1 else ()
        return [name for name in names if self.mesh.shape[name] > 1]

    def sharding_at_rest(
        self, axes: Axes, shape: tuple[int, ...], name: str = "array"
    ) -> NamedSharding:
        """Return the NamedSharding of a weight between steps. Raises as `spec` does."""
        return NamedSharding(self.mesh, self.spec_at_rest(axes, shape, name))

    def of_state(self, state: Any) -> Any:
        """Return a sharding for each array of a train state, as it lies between steps.

        An nnx.Variable lies where its metadata `axes` says; one without, and any other array, is
        replicated. Weights (nnx.Param) lie where the row has them at rest. A momentum is built from
        its weight: it carries the weight's axes, and is a Param too. A variable without an array,
        which an optimizer for some parameters has of the others, stays as it is.
        """

        def sharding_of(path, leaf):
            if isinstance(leaf, nnx.Variable):
                if not jax.tree.leaves(leaf):
                    return leaf
                of_variable = self.sharding_at_rest if is_weight(leaf) else self.sharding
                return leaf.replace(of_variable(axes_of(leaf), leaf.shape, name_of(path)))
            return self.replicated

        return jax.tree_util.tree_map_with_path(
            sharding_of, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
        )

    # ---- Inside a jitted function.

    def __call__(self, x: jax.Array, *axes: str | None, name: str = "") -> jax.Array:
        """Constrain `x` to lie where the row puts its logical axes; `name` is for people."""
        if name and self.record:
            self.record(name, axes, x)
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, name or "array"))

    def batch_to_features(self, x_BF: jax.Array, rows: str | None) -> jax.Array:
        """Split what leaves the convolutions as the rows of the first dense kernel are.

        Where a mesh axis goes from the batch to the features, XLA inserts an all-to-all, and no
        device holds more than its share of x. The layer asks for the rest of the batch afterwards.
        Without this constraint, XLA would gather all of x on every device, and slice it.

        rows: the logical axis of the rows, such as "fc1_in". Where they do not divide, x stays as
        it is, and the layer raises the error.
        """
        batch, features = self.mesh_axes(self.features_batch), self.mesh_axes(rows)
        if set(batch).isdisjoint(features) or x_BF.shape[1] % self.shards(rows):
            return x_BF
        x_BF = self(x_BF, self.features_batch, None)
        rest = tuple(mesh_axis for mesh_axis in batch if mesh_axis not in features)
        sharding = NamedSharding(self.mesh, P(rest, features))
        return jax.lax.with_sharding_constraint(x_BF, sharding)

    def product(self, f: Callable, x: jax.Array, kernel: nnx.Param, dtype: Any) -> jax.Array:
        """Return f(x, kernel), with the kernel in `dtype` and where it is used: at_rest.py."""
        return at_rest.product(self, f, x, kernel, dtype)

    def micro_batches(self, x: jax.Array, count: int, *axes: str | None) -> jax.Array:
        """Reorder [B, ...] to micro-batches, [count, B / count, ...]; nothing moves.

        Each device gives every micro-batch its share of examples: example i is in micro-batch
        i % count. axes: the logical axes of `x`.
        """
        x = x.reshape(len(x) // count, count, *x.shape[1:])
        return self(x, axes[0], None, *axes[1:]).swapaxes(0, 1)

    def whole_batch(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Undo `micro_batches`: return [B, ...], with these logical axes."""
        x = x.swapaxes(0, 1)
        return self(x.reshape(-1, *x.shape[2:]), *axes)

    def towers(
        self,
        f: Callable,
        groups: int,
        *arrays: tuple[jax.Array, Axes],
        out: Axes,
        name: str,
        rows: bool = False,
    ) -> jax.Array:
        """Apply f to each of `groups` towers where its results live: sharding/local.py."""
        return local.towers(self, f, groups, *arrays, out=out, name=name, rows=rows)

    def local(self, axes: Axes, f: Callable, *arrays: jax.Array) -> Any:
        """Return f of each device's shards: on_shards in sharding/local.py."""
        return local.on_shards(self, axes, f, *arrays)

    def overlapping(
        self, x_NHWC: jax.Array, axes: Axes, windows: Windows, name: str, fill: float = 0.0
    ) -> jax.Array:
        """Return a map whose shards hold all rows that windows read: sharding/local.py."""
        return local.overlapping(self, x_NHWC, axes, windows, name, fill)

    # ---- For people.

    @property
    def mesh_name(self) -> str:
        """Return the mesh's shape as the command line spells it, such as 4x2."""
        return "x".join(str(size) for size in self.mesh.shape.values())

    @property
    def where(self) -> str:
        """Return the mesh and the scheme in parentheses, for errors."""
        return f"(mesh {self.mesh_name}, parallelism={self.parallelism})"

    def report(
        self, name: str, axes: Axes, shape: tuple[int, ...], itemsize: int, weight: bool = False
    ) -> dict:
        """Return a JSON-ready row on one array; itemsize: bytes per element.

        weight: report where it lies at rest. `note` says which axis the row asked to split and
        could not (MAY_REPLICATE, map_axes, or at rest), or is empty.
        """
        spec = (self.spec_at_rest if weight else self.spec)(axes, shape, name)
        split, notes = mesh_axes_of(spec), []
        for axis, size, got in zip(axes, shape, split, strict=True):
            at_rest = self._axes_at_rest(axis, shape) if weight else []
            asked = dict.fromkeys([*self.mesh_axes(axis), *at_rest])
            if asked.keys() - sum(split, ()):
                notes.append(
                    f"{axis}={size} does not divide by {'+'.join(asked)}={self.devices_on(asked)}: "
                    f"{'split over ' + '+'.join(got) if got else 'replicated'}"
                )
        if len(axes) == 4 and axes[0] == "dense_batch" and self.splits("image_height"):
            split = "+".join(self.mesh_axes("image_height"))
            notes.append(f"too few rows for {split}={self.shards('image_height')}: not split")
        return dict(
            name=name,
            shape=list(shape),
            logical_axes=list(axes),
            mesh_axes=[list(a) if isinstance(a, tuple) else a for a in spec],
            bytes=math.prod(shape) * itemsize,
            bytes_per_device=math.prod(self.shard_shape(spec, shape)) * itemsize,
            note="; ".join(notes),
        )


class Unplaced:
    """Stand in for a Placement where a network is called by itself: nothing moves."""

    record = None

    def __call__(self, x: jax.Array, *axes: str | None, name: str = "") -> jax.Array:
        """Return x as it is."""
        return x

    def product(self, f, x, kernel, dtype):
        """Return f(x, kernel), with the kernel in `dtype`."""
        return f(x, kernel[...].astype(dtype))

    def towers(self, f, groups, *arrays, out, name="", rows=False):
        """Apply f to each of `groups` towers, one after another."""
        return local.each_tower(f, groups, *(array for array, _ in arrays))

    def local(self, axes, f, *arrays):
        """Return f(*arrays): one device holds them all."""
        return f(*arrays)

    def map_axes(self, rows, channels):
        """Return the logical axes of maps."""
        return "conv_batch", "image_height", None, channels

    def shards(self, axis: str) -> int:
        """Return 1: nothing is split."""
        return 1

    def splits_height(self, axes) -> bool:
        """Return False: nothing is split."""
        return False

    def splits(self, axis: str) -> bool:
        """Return False: nothing is split."""
        return False

    def hidden_output_batch(self, name: str) -> str:
        """Return the output layer's logical batch axis."""
        return "output_batch"

    features_batch = "conv_batch"


UNPLACED = Unplaced()


def _as_tuple(mesh_axes: Any) -> tuple[str, ...]:
    """Return as a tuple the mesh axes that a row or PartitionSpec gives a dimension."""
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else tuple(mesh_axes)


def _named(mesh_axes: Sequence[str]) -> str:
    """Return "mesh axis data", or "mesh axes data and model", for errors."""
    return f"mesh {'axes' if len(mesh_axes) > 1 else 'axis'} {' and '.join(mesh_axes)}"


def multiples_near(size: int, divisor: int) -> str:
    """Return the multiples of `divisor` next to a size that is none, such as "96 or 104"."""
    less = size - size % divisor
    return " or ".join(f"{multiple}" for multiple in (less, less + divisor) if multiple)


def mesh_axes_of(spec: P) -> list[tuple[str, ...]]:
    """Return the mesh axes of each dimension; () where it is not split."""
    return [_as_tuple(mesh_axes) for mesh_axes in spec]


def axes_of(variable: nnx.Variable) -> Axes:
    """Return the logical axes of a variable; without metadata `axes`, all None."""
    return getattr(variable, "axes", None) or (None,) * len(variable.shape)


def is_weight(variable: nnx.Variable) -> bool:
    """Return whether a variable is a parameter, or what an optimizer keeps of one."""
    return isinstance(variable, nnx.Param)


def is_dense(variable: nnx.Variable) -> bool:
    """Return whether a parameter is one of the dense layers (see layers/dense.py)."""
    return getattr(variable, "part", None) == "dense"


def named_variables(state: Any) -> list[tuple[str, nnx.Variable]]:
    """Return the variables of a state with their names, such as "fc1.kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    return [(name_of(path), leaf) for path, leaf in leaves]


def name_of(path: tuple) -> str:
    """Return a parameter's name for people, such as "fc1.kernel", from its key path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")
