"""What a compiled XLA program moves between devices: the collectives of its HLO.

`jax.jit` with shardings leaves it to XLA which collectives to insert. This module reads them back from the optimised
HLO text of one compiled program (`compiled.as_text()`), as jax 0.10 and 0.11 print it on CPUs and GPUs. A form it does
not know raises: a collective left out in silence is worse than no count. What a custom call does it cannot see.
"""

import dataclasses
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

# Parts of 1/g of the payload that each of g devices sends when the collective runs as a ring. An all-reduce is a
# reduce-scatter and then an all-gather, and each passes on every part but one (Patarasuk and Yuan, 2009).
RING_PARTS = {"all-reduce": lambda g: 2 * (g - 1)}
RING_PARTS |= dict.fromkeys(
    ("all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all"), lambda g: g - 1
)
RING_PARTS |= dict.fromkeys(("collective-permute", "collective-broadcast"), lambda g: g)
DTYPE_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "f16": 2,
    "bf16": 2,
}
DTYPE_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
# JAX calls what it differentiates jvp(...), and the backward pass transpose(jvp(...)). A collective that XLA merged
# from several phases goes to the first of these that it names: gradients outweigh the loss or norm that rode along.
PHASES = {"backward": r"\btranspose\(", "update": r"(?<![\w.-])update/", "forward": r"\bjvp\("}

# A shape is f32[8,32]{1,0:T(8,128)} or a tuple of shapes; none holds ") word(", so .*? stops at its end.
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)")
_CROSS_DEVICE = re.compile(r"\b(?:(?:all|collective|ragged-all)-|reduce-scatter|(?:send|recv)\b)")
_ARRAY = re.compile(r"([a-z]\w*)\[((?:\d+(?:,\d+)*)?)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$")  # its header
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_OP_NAME = re.compile(r'\bop_name="((?:[^"\\]|\\.)*)"')
_IOTA = r"\[[\d,]+\](?:T\([\d,]+\))?"  # [4,2]T(1,0): 0..7 as a 4x2 array, transposed
_REPLICA_GROUPS = re.compile(
    r"\breplica_groups=(?:(?P<all>\{\})"
    r"|\{(?P<lists>\{[\d,]+\}(?:,\{[\d,]+\})*)\}"
    rf"|\[(?P<shape>\d+,\d+)\]<=(?P<iota>{_IOTA})"
    rf"|mesh\[(?P<mesh>'[^']+'=\d+(?:,'[^']+'=\d+)*)\](?:, device_ids=\((?P<ids>{_IOTA}|[\d,]+)\))?"
    r" \{(?P<axes>(?:'[^']+'(?::\(\d+\)\d+)?,?)*)\})(?=,|$)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction, as one device sees it.

    `axes` are the mesh axes along which the devices of a group differ, in the mesh's order (never one of size 1), and
    `group_size`, g, is the product of their sizes. XLA may split an axis: groups that are no whole axes have one entry,
    such as "data (2 of 4)", groups of 2 among the 4 devices along `data`. `shapes` are the arrays that one device receives.

    `bytes` is one device's whole payload: what it holds before an all-reduce, reduce-scatter, all-to-all or
    collective-permute, and after an all-gather or collective-broadcast; for a ragged-all-to-all its output buffer, an
    upper bound. `ring_bytes` is what the busiest device sends when the collective runs as a ring: bytes times 2(g-1)/g
    for an all-reduce, (g-1)/g for an all-gather, reduce-scatter or all-to-all, and 1 for a permute or broadcast.

    `count` is how often it runs in a step: more than once in a loop of its own, such as that over the parts of a variable
    batch. Bytes are of one of them.

    `phase` is "forward", "backward", "update" (under `jax.named_scope("update")`), or "" where JAX's op_name does not
    tell. XLA for GPUs may drop the op_name of what it merges: then the nearest named instructions upstream decide.
    """

    operation: str
    axes: tuple[str, ...]
    group_size: int
    shapes: tuple[str, ...]
    bytes: int
    ring_bytes: int
    phase: str
    name: str
    count: int = 1


def parse_collectives(
    hlo_text: str, mesh_shape: dict[str, int], steps: int = 1
) -> list[Collective]:
    """Every collective of an HLO module, one entry an instruction, in the order of the text.

    `mesh_shape` maps axis names to sizes, `dict(mesh.shape)`; devices are numbered row by row, as XLA numbers the
    partitions of a program jitted over that mesh. `steps`: an outermost loop that runs so often is that over the steps of a
    call, and what is in it counts once. An asynchronous collective counts where it starts. Groups of one device move nothing
    and are left out. Raises ValueError, quoting the line, for an operation, shape, element type or syntax of groups that is
    not known, for groups of several sizes, for `send` or `recv`, and for a loop whose number of runs is not told.
    """
    instructions, collectives, callers, computation = {}, [], {}, ""
    for line in re.sub(r"/\*index=\d+\*/", "", hlo_text).splitlines():
        try:
            if match := _INSTRUCTION.match(line):
                name, shape, opcode, rest = match.groups()
                instructions[name] = rest
                for called in re.findall(r"[\w.-]+", " ".join(_CALLED.findall(rest))):
                    trips = _TRIP_COUNT.search(rest) if opcode == "while" else None
                    callers.setdefault(called, []).append(
                        (computation, [trips and int(trips[1])] * (opcode == "while"))
                    )
                if _CROSS_DEVICE.search(opcode) and not opcode.endswith(("-update", "-done")):
                    found = _collective(name, shape, opcode, instructions, mesh_shape)
                    collectives += [(computation, line, collective) for collective in found]
            elif match := _COMPUTATION.match(line):
                computation = match[1]
            elif not re.search("^HloModule|{$", line) and _CROSS_DEVICE.search(
                re.sub(r'"[^"]*"', "", line)
            ):
                raise ValueError("neither a header nor an instruction, yet it names a collective")
        except ValueError as error:
            raise ValueError(f"{error}, in the HLO line: {line.strip()[:300]}") from error
    counted = []
    for computation, line, collective in collectives:
        count = 0
        for loops in _loops(computation, callers):
            if None in loops:
                raise ValueError(
                    f"a loop does not tell how often it runs, around the HLO line: {line.strip()[:300]}"
                )
            count += math.prod(loops[1:] if steps > 1 and loops[:1] == [steps] else loops)
        counted.append(dataclasses.replace(collective, count=count))
    return counted


def _loops(computation: str, callers: dict[str, list[tuple[str, list]]]) -> list[list]:
    """How often the loops around a computation run, the outermost first (None: not told); a list a way to come to it."""
    if computation not in callers:
        return [[]]
    return [
        outer + trips for caller, trips in callers[computation] for outer in _loops(caller, callers)
    ]


def _collective(name, shape, opcode, instructions, mesh_shape) -> list[Collective]:
    """The collective that an instruction is or starts; none where the groups are of one device."""
    operation = opcode.removesuffix("-start")
    attributes = instructions[name].split(", metadata={")[0]
    if operation in ("send", "recv") and "is_host_transfer=true" in attributes:
        return []
    if operation not in RING_PARTS:
        raise ValueError(f"unknown collective {opcode!r}")
    if operation == "collective-permute":
        axes = _permuted_axes(attributes, mesh_shape)
        size = math.prod(mesh_shape[axis] for axis in axes)
    else:
        axes, size = _grouped_axes(
            _replica_groups(operation, attributes, math.prod(mesh_shape.values())), mesh_shape
        )
    if not axes:
        return []
    shape = re.sub(r"\{[^{}]*\}", "", shape)  # the layouts
    received = _received(operation, shape) if opcode.endswith("-start") else shape
    shapes = [match[0] for match in _ARRAY.finditer(received)]
    if not shapes or _ARRAY.sub("", received).strip("(), "):
        raise ValueError(f"unknown shape {shape!r}")
    payload = 0
    for dtype, dimensions in _ARRAY.findall(received):
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown element type {dtype!r}")
        payload += DTYPE_BYTES[dtype] * math.prod(int(n) for n in dimensions.split(",") if n)
    payload *= size if operation == "reduce-scatter" else 1
    ring_bytes = round(RING_PARTS[operation](size) * payload / size)
    return [
        Collective(
            operation,
            axes,
            size,
            tuple(shapes),
            payload,
            ring_bytes,
            _phase(name, instructions),
            name,
        )
    ]


def _received(operation: str, shape: str) -> str:
    """The result's shape within an asynchronous start's, (operands, result, contexts...), each an array or a tuple."""
    inner = shape[1:-1] if shape.startswith("(") else shape
    elements = re.findall(r"\([^()]*\)|[^\s,(]+\[[^\]]*\]", inner)
    if operation == "all-reduce" and not shape.startswith("(("):
        return shape  # in jax 0.10 this start, unlike all others, has the result's shape; in 0.11 it is like them
    if ", ".join(elements) != inner or len(elements) < 2 or set(elements[2:]) - {"u32[]", "s32[]"}:
        raise ValueError(f"unknown shape {shape!r} of an asynchronous start")
    return elements[1]


def _replica_groups(operation: str, attributes: str, devices: int) -> list[list[int]]:
    """The groups of device numbers that `replica_groups` stands for."""
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
    # A mesh of XLA's making, whose axes need not be ours: devices that agree off the listed axes form a group. An axis
    # may be listed in part (Shardy's sub-axes): 'a':(2)4 is the digit of size 4 after a leading digit of size 2.
    names, sizes = zip(*re.findall(r"'([^']+)'=(\d+)", match["mesh"]), strict=True)
    sizes = [int(n) for n in sizes]
    ids = _iota(match["ids"]) if match["ids"] else np.arange(math.prod(sizes))
    coordinates, group_size = np.indices(sizes).reshape(len(sizes), -1), 1
    for name, leading, part in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match["axes"]):
        axis = names.index(name)
        size = int(part or sizes[axis])
        stride, rest = divmod(sizes[axis], int(leading or 1) * size)
        if rest:
            raise ValueError(f"no such part of axis {name!r}")
        coordinates[axis] -= coordinates[axis] // stride % size * stride
        group_size *= size
    return ids[np.lexsort(coordinates)].reshape(-1, group_size).tolist()


def _iota(text: str) -> np.ndarray:
    """Device numbers, flat, from `[4,2]T(1,0)` or from a list, `0,2,1,3`."""
    shape, _, order = text.partition("T")
    numbers = [int(n) for n in shape.strip("[]").split(",")]
    if not shape.startswith("["):
        return np.array(numbers)
    axes = [int(n) for n in order.strip("()").split(",")] if order else None
    return np.arange(math.prod(numbers)).reshape(numbers).transpose(axes).ravel()


def _grouped_axes(
    groups: list[list[int]], mesh_shape: dict[str, int]
) -> tuple[tuple[str, ...], int]:
    """The `axes` of a Collective, and the number of devices in a group."""
    if sorted(itertools.chain(*groups)) != list(range(math.prod(mesh_shape.values()))):
        raise ValueError(f"replica_groups do not hold each device of {mesh_shape} once")
    sizes = {len(group) for group in groups}
    if len(sizes) > 1:
        raise ValueError(f"replica_groups of several sizes: {sorted(sizes)}")
    (size,) = sizes
    differing = {axis for group in groups for axis in _differing(group, mesh_shape)}
    axes = tuple(axis for axis in mesh_shape if axis in differing)
    devices = math.prod(mesh_shape[axis] for axis in axes)
    return axes if size == devices else (f"{'+'.join(axes)} ({size} of {devices})",), size


def _permuted_axes(attributes: str, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    match = re.search(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}(?=,|$)", attributes)
    if not match:
        raise ValueError("unknown or missing source_target_pairs")
    pairs = re.findall(r"(\d+),(\d+)", match[1])
    axes = {axis for pair in pairs for axis in _differing([int(n) for n in pair], mesh_shape)}
    return tuple(axis for axis in mesh_shape if axis in axes)


def _differing(devices: list[int], mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which some of the devices differ."""
    coordinates = np.unravel_index(devices, tuple(mesh_shape.values()))
    return tuple(axis for axis, along in zip(mesh_shape, coordinates, strict=True) if np.ptp(along))


def _phase(name: str, instructions: dict[str, str]) -> str:
    """The phase of the instruction's op_name or, where it has none, of the nearest named instructions upstream."""
    op_names, queue, seen = [], [name], set()
    while queue:
        current = queue.pop()
        if current not in seen and current in instructions:
            seen.add(current)
            if match := _OP_NAME.search(instructions[current]):
                op_names.append(match[1])
            else:
                queue += re.findall(r"%([\w.-]+)", instructions[current].split(")")[0])
    return next(
        (phase for phase, mark in PHASES.items() if re.search(mark, "\n".join(op_names))), ""
    )


def summarise(collectives: Iterable[Collective]) -> list[dict]:
    """JSON-ready rows, one an (operation, axes, phase), with count and summed bytes; most ring_bytes first."""
    groups = defaultdict(list)
    for c in collectives:
        groups[c.operation, c.axes, c.phase].append(c)
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
