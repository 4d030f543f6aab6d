"""Estimate the time of a traced program from the kernels that XLA for GPUs makes of it.

JAX traces a train step without a GPU, and lists its operations. XLA joins element-wise operations
into kernels (fusions); this module guesses which. A product (a convolution or a matrix product) and
a kernel of our own (Pallas) are a kernel each. All others are joined, except where an array must be
stored. A sum of many elements takes a second kernel. These arrays are stored:

  - what a product or a kernel of our own takes and returns, and what the program returns;
  - a sum or a maximum over an array;
  - what several kernels use, where storing it moves fewer bytes than computing it again, or where
    it takes an exponential or the like.

Each kernel reads the stored arrays that it needs, and writes its own. `seconds` gives the time of
all. docs/planning.md has the constants, and how far the estimates are off.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from cnn_spmd.analysis.cost import Card

# What becomes of JAX's operations, by their names; XLA joins all others.
_KINDS = {
    # They call another program: its operations take their place.
    "call": "jit closed_call remat2 custom_jvp_call custom_vjp_call shard_map",
    "product": "dot_general conv_general_dilated",
    # They are a kernel by themselves. Only what a loop takes and returns is seen.
    "alone": "pallas_call select_and_scatter_add scatter scatter-add sort scan while",
    "barrier": "optimization_barrier",  # XLA stores what goes through it
    "reduction": "reduce_sum reduce_max reduce_min reduce_and reduce_or argmax argmin",
    # They move nothing: they only change the shape, or a product reads its operand reordered.
    "free": "reshape squeeze expand_dims rev sharding_constraint reshard copy stop_gradient",
    # They read only the part of their operand that they return.
    "slice": "slice dynamic_slice gather",
    # They take long, so that XLA does not compute them again for each kernel that needs them.
    "slow": "exp exp2 log tanh logistic pow erf_inv random_bits "
    "reduce_window_sum reduce_window_max reduce_window_min",
}
KINDS = {name: kind for kind, names in _KINDS.items() for name in names.split()}

# Kernels of a step that this module does not see: those of the loop over steps, and of random keys.
# XLA's programs for an H100 have at least this many more.
SCALAR_KERNELS = 8

SMALL = 2**16  # bytes up to which an array is computed again, unless that is slow

# XLA for GPUs sums more elements than this in two kernels, the second over partial sums. Its
# programs for an H100 do so for sums over 5,408 rows, and not for those over 2,048.
SUMMED_AT_ONCE = 4096


class Kernel(NamedTuple):
    """What a kernel does.

    bytes: read and written. flops: of a product, 0 for other kernels. width: rows or columns of a
    product, whichever are fewer. itemsize: bytes of a number that is multiplied.
    """

    bytes: float
    flops: float = 0.0
    width: int = 0
    itemsize: int = 2


class Efficiency(NamedTuple):
    """Factors on a card's rates, which the kernels of networks do not reach.

    kernel: on kernel_seconds. copy: on copy_rate. float32: on product_rates, for 4-byte numbers.
    """

    kernel: float
    copy: float
    float32: float


# benchmarks/estimates.py fits these to measured steps of H100s and H200s.
EFFICIENCY = Efficiency(kernel=2.14, copy=0.839, float32=0.298)


def seconds(kernels: Sequence[Kernel], card: Card, efficiency: Efficiency = EFFICIENCY) -> float:
    """Return the time of a step's kernels, one after another, on a card that has rates.

    Each takes the card's kernel_seconds, and the longer one of its bytes at copy_rate and its FLOPs
    at the product rate of its width. `efficiency` corrects these. Between the points of the product
    rate it is linear, beyond them constant.
    """
    widths, rates = zip(*card.product_rates, strict=True)
    total = (len(kernels) + SCALAR_KERNELS) * card.kernel_seconds * efficiency.kernel
    for kernel in kernels:
        rate = np.interp(kernel.width, widths, rates)
        if kernel.itemsize > 2:
            rate *= efficiency.float32
        total += max(kernel.bytes / (card.copy_rate * efficiency.copy), kernel.flops / rate)
    return float(total)


def kernels_of(program: Any) -> list[Kernel]:
    """Return the kernels of a program that jax.make_jaxpr has traced."""
    operations, results = read(program)
    return _Fusion(operations, results).kernels()


# ---- Read a program


@dataclasses.dataclass(eq=False)
class Array:
    """An array of the program; `source` makes it, None for an argument.

    Two arrays are equal only if they are one object.
    """

    shape: tuple[int, ...]
    bytes: float
    source: "Operation | None" = None
    literal: str = ""  # a number in the program's text


@dataclasses.dataclass(eq=False)
class Operation:
    """An operation of the program."""

    name: str
    params: Mapping[str, Any]
    inputs: list[Array]
    outputs: list[Array] = dataclasses.field(default_factory=list)

    @property
    def kind(self) -> str:
        """Return the kind in KINDS; "" for an operation that XLA joins with others."""
        return KINDS.get(self.name, "")

    @property
    def is_alone(self) -> bool:
        """Return whether XLA joins the operation with no other."""
        return self.kind in ("product", "alone", "barrier")


def read(program: Any) -> tuple[list[Operation], list[Array]]:
    """Return the operations that a program needs, in order and each once, and its results."""
    arguments = [_array(variable.aval) for variable in program.jaxpr.invars]
    operations: list[Operation] = []
    results = _inline(program, arguments, operations)
    return _without_repetitions(_needed(operations, results), results)


def _array(aval: Any, source: Operation | None = None, literal: str = "") -> Array:
    shape = getattr(aval, "shape", ())
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    return Array(shape, 0 if literal else math.prod(shape) * itemsize, source, literal)


def _inline(program: Any, arguments: Sequence[Array], into: list[Operation]) -> list[Array]:
    """Append a program's operations to `into`, and return its results."""
    jaxpr = getattr(program, "jaxpr", program)
    constants = [_array(variable.aval) for variable in jaxpr.constvars]
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))

    def arrays(variables: Sequence[Any]) -> list[Array]:
        return [
            _array(v.aval, literal=str(v.val)) if isinstance(v, core.Literal) else known[v]
            for v in variables
        ]

    for equation in jaxpr.eqns:
        name, params, inputs = equation.primitive.name, equation.params, arrays(equation.invars)
        if KINDS.get(name) == "call":
            called = params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]
            outputs = _inline(called, inputs, into)
        elif name == "cond":
            outputs = _inline(_branch(params), inputs[1:], into)
        else:
            operation = Operation(name, params, inputs)
            operation.outputs = outputs = [_array(v.aval, operation) for v in equation.outvars]
            into.append(operation)
        known |= dict(zip(equation.outvars, outputs, strict=True))
    return arrays(jaxpr.outvars)


def _branch(params: Mapping[str, Any]) -> Any:
    """Return the branch that a GPU takes; the last one where the platform does not decide."""
    platforms = params.get("branches_platforms") or ()
    for branch, names in zip(params["branches"], platforms, strict=False):
        if names and "cuda" in names:
            return branch
    return params["branches"][-1]


def _needed(operations: Sequence[Operation], results: Sequence[Array]) -> list[Operation]:
    """Leave out operations whose results nothing needs."""
    needed, kept = set(results), []
    for operation in reversed(operations):
        if not needed.isdisjoint(operation.outputs):
            needed.update(operation.inputs)
            kept.append(operation)
    return kept[::-1]


def _without_repetitions(
    operations: Sequence[Operation], results: Sequence[Array]
) -> tuple[list[Operation], list[Array]]:
    """Keep one of several operations that compute the same, as XLA does."""
    first: dict[tuple, Operation] = {}
    same: dict[Array, Array] = {}
    for operation in operations:
        operation.inputs = [same.get(array, array) for array in operation.inputs]
        inputs = tuple(array.literal or array for array in operation.inputs)
        # An operation by itself equals no other.
        params = operation if operation.kind == "alone" else str(operation.params)
        before = first.setdefault((operation.name, params, inputs), operation)
        same |= dict(zip(operation.outputs, before.outputs, strict=True))
    return list(first.values()), [same.get(array, array) for array in results]


# ---- Join operations into kernels


class _Fusion:
    """Decides which arrays are stored, and which kernels make them."""

    def __init__(self, operations: Sequence[Operation], results: Sequence[Array]):
        self.operations, self.results = operations, results
        self.stored: set[Array] = set()  # of those that joined operations make
        # What an array is computed from: array -> the bytes that are read of it.
        self.needs: dict[Array, dict[Array, float]] = {}
        # How many kernels must run one after another until an array is there.
        self.levels: dict[Array, int] = {}
        # The kernels of joined operations. (an array that the kernel reads, its level) -> the
        # arrays that it writes, and the bytes that it reads of each array.
        self.joined: dict[tuple[Array, int], tuple[list[Array], dict[Array, float]]] = {}
        self.made_by: dict[Array, tuple[Array, int]] = {}  # array -> key of `joined`
        self.with_epilogue: set[Array] = set()  # of products' results

    def kernels(self) -> list[Kernel]:
        """Return the kernels."""
        self._store()
        self.needs.clear()  # they were found while fewer arrays were stored
        kernels = []
        for operation in self.operations:
            if operation.kind in ("product", "alone"):
                kernels.append(_kernel(operation))
            elif operation.kind == "reduction" and _summed(operation) > SUMMED_AT_ONCE:
                kernels.append(Kernel(operation.outputs[0].bytes))
            if operation.is_alone:
                before = [array for each in operation.inputs for array in self._sources(each)]
                for output in operation.outputs:
                    self.levels[output] = 1 + self._level(before)
                continue
            for output in operation.outputs:
                if output in self.stored:
                    self._place(output)
        for outputs, needs in self.joined.values():
            reads = sum(size for array, size in needs.items() if array not in outputs)
            kernels.append(Kernel(reads + sum(output.bytes for output in outputs)))
        return kernels

    def _place(self, output: Array) -> None:
        """Choose the kernel that writes a stored array.

        It is the product before it, as its epilogue, or a kernel of `joined`, or a new one.
        """
        needs = self._needs(output)
        level = self._level(needs)
        reduces = _kind(output) == "reduction"
        largest = max(needs, key=lambda array: array.bytes, default=output)
        if not reduces and _kind(largest) == "product" and largest not in self.with_epilogue:
            others = sum(needs.values()) - needs[largest]
            if others < largest.bytes / 4 and output.bytes <= largest.bytes:
                self.with_epilogue.add(largest)  # cuDNN and cuBLAS add a bias and apply a ReLU
                self.levels[output] = level
                return
        self.levels[output] = level + 1
        # A kernel may write several arrays: what is computed from an array that it has at hand, and
        # what reads the same large array at the same time.
        at_hand = [
            array
            for array in needs
            if _kind(array) != "reduction" and (reduces or array.shape == output.shape)
        ]
        keys = [
            key
            for key in dict.fromkeys(self.made_by.get(array) for array in at_hand)
            if key and all(self._is_there(array, key) for array in needs)
        ]
        keys += [(array, level) for array in needs if array.bytes == largest.bytes]
        first = keys[0] if keys else (output, level)
        key = next((key for key in keys if key in self.joined), first)
        outputs, reads = self.joined.setdefault(key, ([], {}))
        outputs.append(output)
        for array, size in needs.items():
            reads[array] = max(size, reads.get(array, 0.0))
        self.made_by[output] = key

    def _is_there(self, array: Array, key: tuple[Array, int]) -> bool:
        """Return whether the kernel `key` has an array at hand, or earlier kernels make it."""
        at_hand = self.made_by.get(array) == key and _kind(array) != "reduction"
        return at_hand or self._level([array]) <= key[1]

    def _store(self) -> None:
        """Find the arrays that are stored."""
        users: Counter[Array] = Counter()
        for operation in self.operations:
            if operation.kind != "free":
                users.update({_behind(array) for array in operation.inputs})
            if operation.is_alone:
                self._keep(operation.inputs)
            if operation.kind == "reduction":
                self._keep(operation.outputs)
        self._keep(self.results)
        for operation in self.operations:
            if operation.is_alone or operation.kind == "free":
                continue
            for output in operation.outputs:
                more = users[output] - 1
                if more < 1 or output in self.stored:
                    continue
                # Each use but the first reads the inputs again. To store it is to write it once,
                # and to read it for each use.
                again = sum(self._needs(output).values())
                is_slow = operation.kind == "slow"
                is_large = output.bytes > SMALL and more * again > (more + 2) * output.bytes
                if is_slow or is_large:
                    self.stored.add(output)

    def _keep(self, arrays: Iterable[Array]) -> None:
        """Store arrays; what a product or the like returns is stored anyway."""
        for array in map(_behind, arrays):
            if array.source and not array.source.is_alone:
                self.stored.add(array)

    def _sources(self, array: Array) -> dict[Array, float]:
        """Return the stored arrays that an array is read from, and the bytes read of each."""
        array = _behind(array)
        if array.source is None or array.source.is_alone or array in self.stored:
            return {array: array.bytes}
        return self._needs(array)

    def _needs(self, array: Array) -> dict[Array, float]:
        """Return the stored arrays that the operation that makes an array reads."""
        if array not in self.needs:
            found: dict[Array, float] = {}
            for each in array.source.inputs:
                for source, size in self._sources(each).items():
                    if array.source.kind == "slice":
                        size = min(size, array.bytes)
                    found[source] = max(size, found.get(source, 0.0))
            self.needs[array] = found
        return self.needs[array]

    def _level(self, arrays: Iterable[Array]) -> int:
        return max((self.levels.get(array, 0) for array in arrays), default=0)


def _kind(array: Array) -> str:
    """Return the kind of the operation that makes an array."""
    return array.source.kind if array.source else ""


def _summed(operation: Operation) -> float:
    """Return over how many elements a reduction goes for each one that it returns."""
    (whole, *_), (part, *_) = operation.inputs, operation.outputs
    return math.prod(whole.shape) / max(math.prod(part.shape), 1)


def _behind(array: Array) -> Array:
    """Return the array that "free" operations only give another shape."""
    while _kind(array) == "free":
        array = array.source.inputs[0]
    return array


def _kernel(operation: Operation) -> Kernel:
    """Return the kernel of an operation that is one by itself."""
    moved = sum(array.bytes for array in itertools.chain(operation.inputs, operation.outputs))
    if operation.kind != "product":
        return Kernel(moved)
    left, right = (array.shape for array in operation.inputs)
    if operation.name == "dot_general":
        (contracted, _), (batched, _) = operation.params["dimension_numbers"]
        inner, batch = (math.prod(left[axis] for axis in axes) for axes in (contracted, batched))
        rows, columns = math.prod(left) // (inner * batch), math.prod(right) // (inner * batch)
        flops = 2 * batch * rows * columns * inner
    else:
        numbers, out = operation.params["dimension_numbers"], operation.outputs[0].shape
        columns = out[numbers.out_spec[1]]
        rows = math.prod(out) // columns
        # Zeros that a stride puts between the elements of the input are not multiplied.
        skipped = math.prod(operation.params["lhs_dilation"])
        flops = 2 * math.prod(out) * math.prod(right) / right[numbers.rhs_spec[0]] / skipped
    item = operation.inputs[0]
    itemsize = round(item.bytes / max(math.prod(item.shape), 1))
    return Kernel(moved, flops, min(rows, columns), itemsize)
