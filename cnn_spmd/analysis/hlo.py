"""Read the collectives of a compiled program, and what they move, from its HLO.

Under `jax.jit` with shardings, XLA chooses which collectives to insert. This module reads them from
the optimised HLO of one compiled program, `compiled.as_text()`, as jax 0.10 and 0.11 print it for
CPUs and GPUs. A form that it does not know raises an error: a collective that is silently left out
is worse than no count. It cannot see what a custom call sends.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from cnn_spmd.analysis import replica_groups

# A ring of g devices cuts the payload into g parts. This is how many of them each device sends.
# An all-reduce is a reduce-scatter followed by an all-gather, and each of the two sends every part
# but the device's own (Patarasuk and Yuan 2009).
RING_PARTS = {
    "all-reduce": lambda g: 2 * (g - 1),
    "reduce-scatter": lambda g: g - 1,
    "all-gather": lambda g: g - 1,
    "all-to-all": lambda g: g - 1,
    "ragged-all-to-all": lambda g: g - 1,
    "collective-permute": lambda g: g,
    "collective-broadcast": lambda g: g,
}
_DTYPES_BY_BYTES = {
    1: "pred s8 u8 f8e4m3fn f8e5m2",
    2: "s16 u16 f16 bf16",
    4: "s32 u32 f32",
    8: "s64 u64 f64 c64",
    16: "c128",
}
DTYPE_BYTES = {name: size for size, names in _DTYPES_BY_BYTES.items() for name in names.split()}

# JAX calls what it differentiates jvp(...), and its backward pass transpose(jvp(...)). XLA may
# merge collectives of several phases. Then the first phase in this order counts: gradients outweigh
# the loss or the norm that is sent with them.
PHASES = {"backward": r"\btranspose\(", "update": r"(?<![\w.-])update/", "forward": r"\bjvp\("}

# A shape is f32[8,32]{1,0:T(8,128)} or a tuple of shapes. No shape contains ") word(", where .*?
# stops.
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_CROSS_DEVICE = re.compile(r"\b(?:(?:all|collective|ragged-all)-|reduce-scatter|(?:send|recv)\b)")
_ARRAY = re.compile(r"([a-z]\w*)\[((?:\d+(?:,\d+)*)?)\]")
_COMPUTATION_HEADER = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')


def ring_bytes(operation: str, payload: float, devices: int) -> int:
    """Return the bytes that each device sends when a collective runs as a ring.

    devices: how many take part. payload: one device's whole payload, `Collective.bytes`. The
    factors are 2(g-1)/g for an all-reduce, (g-1)/g for an all-gather, reduce-scatter or all-to-all,
    1 for the others.
    """
    return round(RING_PARTS[operation](devices) * payload / devices)


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describe one collective instruction, as one device sees it.

    axes: the mesh axes along which the devices of a group differ, in the mesh's order, without axes
      of size 1. XLA may split an axis. Groups that are no whole axes have one entry, such as
      "data (2 of 4)": groups of 2 among the 4 devices along `data`.
    group_size: how many devices take part in a group.
    shapes: the arrays that one device receives.
    bytes: one device's whole payload. It is what the device holds before an all-reduce,
      reduce-scatter, all-to-all or collective-permute, and what it holds after an all-gather or
      collective-broadcast. For a ragged-all-to-all it is the output buffer, an upper bound.
    phase: "forward", "backward", "update" (under `jax.named_scope("update")`), or "" where JAX's
      op_name does not say. XLA for GPUs may drop the op_name of merged instructions; then the
      nearest named instructions upstream decide.
    name: the instruction's name.
    count: how often it runs per step. It runs more than once inside a loop, such as the one over
      the micro-batches of a variable batch. `bytes` and `ring_bytes` are those of one execution.
    """

    operation: str
    axes: tuple[str, ...]
    group_size: int
    shapes: tuple[str, ...]
    bytes: int
    phase: str
    name: str
    count: int = 1

    @property
    def ring_bytes(self) -> int:
        """Return the bytes that each device of the group sends in a ring."""
        return ring_bytes(self.operation, self.bytes, self.group_size)


def _shorten(line: str) -> str:
    return line.strip()[:300]


class Instruction(NamedTuple):
    """One instruction of an HLO module, in the words of the text."""

    name: str
    shape: str
    opcode: str
    rest: str  # its operands and attributes
    computation: str  # the name of the computation that it stands in

    @property
    def operands(self) -> list[str]:
        """Return the names of the operands."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """Return the names of the computations that it calls."""
        return re.findall(r"[\w.-]+", " ".join(_CALLED.findall(self.rest)))

    @property
    def trip_count(self) -> int | None:
        """Return how often a `while` runs; None where it is not in the text."""
        match = _TRIP_COUNT.search(self.rest)
        return int(match[1]) if match else None


class Module:
    """An HLO module, read from its text.

    mesh_shape: axis name -> size, `dict(mesh.shape)`. Devices are numbered row by row, as XLA
      numbers the partitions of a program that is jitted over that mesh.
    instructions: each by its name, which is unique in a module, in the order of the text.
    callers: computation -> (calling computation, trip counts) of each call. The trip counts are [n]
      for the body of a loop that runs n times, [None] where n is not in the text, [] otherwise.

    Raises ValueError, quoting the line, for an unknown operation, shape, element type or syntax of
    groups. It also does so for groups of several sizes, and for `send` and `recv`.
    """

    def __init__(self, hlo_text: str, mesh_shape: dict[str, int]):
        self.mesh_shape = mesh_shape
        self.instructions: dict[str, Instruction] = {}
        self.callers: dict[str, list[tuple[str, list[int | None]]]] = defaultdict(list)
        self._computation = ""
        self._found: list[tuple[str, Collective]] = []  # the line, and what it says
        for line in re.sub(r"/\*index=\d+\*/", "", hlo_text).splitlines():
            try:
                self._read(line)
            except ValueError as error:
                raise ValueError(f"{error}, in the HLO line: {_shorten(line)}") from error

    def collectives(self, steps: int = 1) -> list[Collective]:
        """Return each collective, in the order of the text.

        steps: the steps of a chunk. An outermost loop that runs `steps` times is the loop over the
        steps, and its body counts once.

        An asynchronous collective counts where it starts. Groups of one device move nothing and are
        left out. Raises ValueError, quoting the line, for a loop whose trip count is not in the
        text.
        """
        return [
            dataclasses.replace(collective, count=self._count_per_step(collective, line, steps))
            for line, collective in self._found
        ]

    def _read(self, line: str) -> None:
        """Read the next line. Raises ValueError for a form that is not known."""
        if match := _INSTRUCTION.match(line):
            instruction = Instruction(*match.groups(), self._computation)
            self.instructions[instruction.name] = instruction
            trips = [instruction.trip_count] if instruction.opcode == "while" else []
            for called in instruction.called:
                self.callers[called].append((self._computation, trips))
            if collective := _read_collective(instruction, self):
                self._found.append((line, collective))
        elif match := _COMPUTATION_HEADER.match(line):
            self._computation = match[1]
        elif not re.search("^HloModule|{$", line):
            without_text = re.sub(r'"[^"]*"', "", line)
            if _CROSS_DEVICE.search(without_text):
                raise ValueError("neither a header nor an instruction, yet it names a collective")

    def _enclosing_loops(self, computation: str) -> list[list[int | None]]:
        """Return the trip counts around a computation, outermost first, per call path."""
        if computation not in self.callers:
            return [[]]
        paths = []
        for caller, trips in self.callers[computation]:
            paths += [outer + trips for outer in self._enclosing_loops(caller)]
        return paths

    def _count_per_step(self, collective: Collective, line: str, steps: int) -> int:
        """Return how often a collective runs per step; `line` is for errors."""
        count = 0
        for loops in self._enclosing_loops(self.instructions[collective.name].computation):
            if None in loops:
                raise ValueError(
                    f"a loop does not say how often it runs, around the HLO line: {_shorten(line)}"
                )
            is_loop_over_steps = steps > 1 and loops[:1] == [steps]
            count += math.prod(loops[1:] if is_loop_over_steps else loops)
        return count


def _read_collective(instruction: Instruction, module: Module) -> Collective | None:
    """Return the collective that an instruction is or starts, or None.

    A collective of one device moves nothing, and is None, too.
    """
    name, shape, opcode, rest, _ = instruction
    if not _CROSS_DEVICE.search(opcode) or opcode.endswith(("-update", "-done")):
        return None
    operation = opcode.removesuffix("-start")
    attributes = rest.split(", metadata={")[0]
    if operation in ("send", "recv") and "is_host_transfer=true" in attributes:
        return None
    if operation not in RING_PARTS:
        raise ValueError(f"unknown collective {opcode!r}")
    axes, size = replica_groups.axes_and_group_size(operation, attributes, module.mesh_shape)
    if not axes:
        return None
    shape = re.sub(r"\{[^{}]*\}", "", shape)  # without its layouts
    received = _received(operation, shape) if opcode.endswith("-start") else shape
    shapes = tuple(arrays(received))
    if not shapes or _ARRAY.sub("", received).strip("(), "):
        raise ValueError(f"unknown shape {shape!r}")
    payload = sum(map(array_bytes, shapes))
    if operation == "reduce-scatter":
        payload *= size
    phase = _phase(name, module.instructions)
    return Collective(operation, axes, size, shapes, payload, phase, name)


def arrays(shape: str) -> list[str]:
    """Return the arrays of a shape, without their layouts: ["f32[8,32]"]."""
    return [match[0] for match in _ARRAY.finditer(shape)]


def array_bytes(shape: str) -> int:
    """Return the bytes of an array, such as f32[8,32]."""
    dtype, dimensions = _ARRAY.fullmatch(shape).groups()
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"unknown element type {dtype!r}")
    return DTYPE_BYTES[dtype] * math.prod(int(n) for n in dimensions.split(",") if n)


def _received(operation: str, shape: str) -> str:
    """Return the result's shape within the shape of an asynchronous start.

    That shape is (operands, result, contexts...), each an array or a tuple.
    """
    if operation == "all-reduce" and not shape.startswith("(("):
        # In jax 0.10 this start alone has the shape of its result; in 0.11 it is like the others.
        return shape
    inner = shape[1:-1] if shape.startswith("(") else shape
    elements = re.findall(r"\([^()]*\)|[^\s,(]+\[[^\]]*\]", inner)
    if ", ".join(elements) != inner or len(elements) < 2 or set(elements[2:]) - {"u32[]", "s32[]"}:
        raise ValueError(f"unknown shape {shape!r} of an asynchronous start")
    return elements[1]


def _phase(name: str, instructions: dict[str, Instruction]) -> str:
    """Return the phase of an instruction, from its op_name or those nearest upstream."""
    op_names, queue, seen = [], [name], set()
    while queue:
        current = queue.pop()
        if current in seen or current not in instructions:
            continue
        seen.add(current)
        if match := _OP_NAME.search(instructions[current].rest):
            op_names.append(match[1])
        else:
            queue += instructions[current].operands
    names = "\n".join(op_names)
    return next((phase for phase, mark in PHASES.items() if re.search(mark, names)), "")


def summarise(collectives: Iterable[Collective]) -> list[dict]:
    """Return JSON-ready rows, one per (operation, axes, phase), most ring bytes first.

    A row has operation, axes, phase; count, bytes and ring_bytes are sums, per device and step.
    """
    groups = defaultdict(list)
    for collective in collectives:
        groups[collective.operation, collective.axes, collective.phase].append(collective)
    rows = [
        dict(
            operation=operation,
            axes=list(axes),
            phase=phase,
            count=sum(c.count for c in group),
            bytes=sum(c.count * c.bytes for c in group),
            ring_bytes=sum(c.count * c.ring_bytes for c in group),
        )
        for (operation, axes, phase), group in sorted(groups.items())
    ]
    return sorted(rows, key=lambda row: -row["ring_bytes"])
