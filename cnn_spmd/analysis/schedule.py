"""Estimate how much of its communication a compiled program's schedule can hide.

XLA for GPUs gives each collective a start and a done, and puts both into one schedule with all
other instructions. What stands between them computes while the collective runs. This module walks
through the schedule with two clocks, one for computing and one for the link: collectives run one
after another, each from its start on, and a done waits for its collective. What nobody waits for is
hidden. Times are estimates from a few rates (Rates), and so is the share.

It cannot see that a collective and a kernel slow each other down where they share a GPU's
multiprocessors and memory, that devices wait for each other, or the time between kernels.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cnn_spmd.analysis.hlo import Collective, Instruction, Module, array_bytes, arrays


class Rates(NamedTuple):
    """What a device and its link can do.

    flops: FLOP/s of products of 2-byte numbers; those of n bytes run at 2/n of it, which for
      float32 means that products use TF32. bandwidth: bytes/s of the device's memory. link: bytes/s
      that a device sends in a ring. latency: seconds of a collective besides its bytes.
    """

    flops: float
    bandwidth: float
    link: float
    latency: float


# flops: results/data/speed/h100-x1.json and h200-x2.json, matrix_flop_per_second. bandwidth: data
# sheets of NVIDIA. link: results/data/sweeps/alexnet-224-4xh200.json, the ring bytes of `data` on
# 4x1 over what its step takes longer than that of one GPU. latency: small all-reduces of XLA and
# NCCL between two H200s. Links between hosts are slower, and then less is hidden.
_LINK = dict(link=295e9, latency=12e-6)
RATES = {
    "NVIDIA H100 80GB HBM3": Rates(flops=720e12, bandwidth=3.35e12, **_LINK),
    "NVIDIA H200": Rates(flops=701e12, bandwidth=4.8e12, **_LINK),
}

# These move no data. The time of an asynchronous copy is left out.
_FREE = re.compile(
    "parameter|constant|get-tuple-element|tuple|bitcast|partition-id|replica-id|after-all"
    "|add-dependency|opt-barrier|.*-start|.*-done"
)
_SLICING = ("slice", "dynamic-slice", "gather")
_CALLS = ("while", "call", "conditional")
_DIM_LABELS = re.compile(r"\bdim_labels=\w+?_(\w+)->")
_CONTRACTED = re.compile(r'\blhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d",]*)[}\]]')

# The fields of `report` where nothing is known.
UNKNOWN = dict(
    hidden_share=None,
    hidden_bytes_share=None,
    communication_milliseconds=None,
    hidden_milliseconds=None,
    rates=None,
    collectives=[],
)


class Overlap(NamedTuple):
    """What the schedule does with one collective; times are seconds of one execution."""

    collective: Collective
    seconds: float
    between: float  # of computing between start and done
    hidden: float  # of `seconds`: nobody waits for the collective


def report(
    module: Module, collectives: Sequence[Collective], device_kind: str, platform: str
) -> dict:
    """Return what share of its communication a program's schedule can hide, JSON-ready.

    collectives: those of the module, with their counts per step. Times are milliseconds per device
      and step.
    hidden_share: of the time of all collectives. hidden_bytes_share: the same, where each
      collective weighs as many ring bytes as it sends. collectives: a row for each.
    reason: why the share is null; null where it is not.
    """
    rates, reason = RATES.get(device_kind), None
    if not collectives:
        reason = "there are no collectives"
    elif platform == "cpu":
        reason = "XLA for CPUs gives a collective no start and no done"
    elif rates is None:
        reason = f"RATES in cnn_spmd/analysis/schedule.py has no {device_kind}"
    else:
        try:
            found = Schedule(module, rates).overlaps(collectives)
            return _summary(found) | dict(rates=rates._asdict(), reason=None)
        except (ValueError, LookupError) as error:  # a form of the text that is not known
            reason = f"{type(error).__name__}: {error}"
    return UNKNOWN | dict(reason=reason)


def _summary(found: Sequence[Overlap]) -> dict:
    """Return the fields of `report`, without rates and reason."""
    rows = [
        dict(
            name=collective.name,
            operation=collective.operation,
            axes=list(collective.axes),
            phase=collective.phase,
            count=collective.count,
            ring_bytes=collective.count * collective.ring_bytes,
            milliseconds=round(1e3 * collective.count * seconds, 4),
            computing_between_milliseconds=round(1e3 * collective.count * between, 4),
            hidden_milliseconds=round(1e3 * collective.count * hidden, 4),
        )
        for collective, seconds, between, hidden in found
    ]

    def total(value: Callable[[Overlap], float]) -> float:
        return sum(row.collective.count * value(row) for row in found)

    seconds, hidden = total(lambda row: row.seconds), total(lambda row: row.hidden)
    sent = total(lambda row: row.collective.ring_bytes)
    sent_hidden = total(lambda row: row.collective.ring_bytes * row.hidden / row.seconds)
    return dict(
        hidden_share=round(hidden / seconds, 4),
        hidden_bytes_share=round(sent_hidden / sent, 4),
        communication_milliseconds=round(1e3 * seconds, 4),
        hidden_milliseconds=round(1e3 * hidden, 4),
        collectives=rows,
    )


class Schedule:
    """The computations of a scheduled module, and the times of their instructions."""

    def __init__(self, module: Module, rates: Rates):
        self.rates = rates
        self.instructions = module.instructions
        self.computations: dict[str, list[Instruction]] = defaultdict(list)
        self.wrappers: dict[str, Instruction] = {}  # by the computation that they call
        for instruction in module.instructions.values():
            self.computations[instruction.computation].append(instruction)
            if instruction.opcode in ("fusion", "async-start"):
                self.wrappers |= dict.fromkeys(instruction.called, instruction)

    def overlaps(self, collectives: Sequence[Collective]) -> list[Overlap]:
        """Return what the schedule does with each of the module's collectives, in their order.

        Raises ValueError for a collective whose done does not follow its start in one computation,
        and for an element type that is not known.
        """
        starts: dict[str, Collective] = {}  # by the name of the instruction that starts them
        for collective in collectives:
            start = self.instructions[collective.name]
            while start.computation in self.wrappers:
                start = self.wrappers[start.computation]
            if start.name in starts:
                raise ValueError(f"{start.name} starts several collectives")
            starts[start.name] = collective
        computations = dict.fromkeys(self.instructions[name].computation for name in starts)
        found = [overlap for name in computations for overlap in self._walk(name, starts)]
        order = {collective.name: place for place, collective in enumerate(collectives)}
        return sorted(found, key=lambda overlap: order[overlap.collective.name])

    def _walk(self, computation: str, starts: dict[str, Collective]) -> list[Overlap]:
        """Walk through one computation's schedule, and return its collectives."""
        computed = waited = link_free = 0.0
        # By the name of the start: when it has the link, until when, and what was computed before.
        running: dict[str, tuple[float, float, float]] = {}
        between: dict[str, float] = {}
        waits: list[tuple[float, float]] = []  # from, until
        for instruction in self.computations[computation]:
            name, clock = instruction.name, computed + waited
            if name in starts:
                begin = max(clock, link_free)
                seconds = self.rates.latency + starts[name].ring_bytes / self.rates.link
                link_free = begin + seconds
                running[name] = begin, link_free, computed
                if instruction.opcode.endswith("-start"):
                    continue
                done = name
            elif instruction.opcode.endswith("-done") and instruction.operands[0] in running:
                done = instruction.operands[0]
            else:
                computed += self._seconds(instruction)
                continue
            _, end, before = running[done]
            between[done] = computed - before
            if end > clock:
                waits.append((clock, end))
                waited += end - clock
        rows = []
        for name, (begin, end, _) in running.items():
            if name not in between:
                raise ValueError(f"{name} has no done in {computation}")
            exposed = sum(max(0.0, min(end, b) - max(begin, a)) for a, b in waits)
            rows.append(Overlap(starts[name], end - begin, between[name], end - begin - exposed))
        return rows

    def _seconds(self, instruction: Instruction) -> float:
        """Estimate the time of an instruction that computes: a roofline."""
        if _FREE.fullmatch(instruction.opcode):
            return 0.0
        if instruction.opcode in _CALLS:
            times = [
                sum(map(self._seconds, self.computations[name])) for name in instruction.called
            ]
            return (instruction.trip_count or 1) * sum(times)
        arithmetic = self._flop_seconds(instruction)
        return max(arithmetic, self._bytes(instruction) / self.rates.bandwidth)

    def _bytes(self, instruction: Instruction) -> int:
        """Return the bytes that an instruction reads and writes; of a slice, only its own."""
        written = _size(instruction.shape)
        if instruction.opcode in _SLICING:
            return 2 * written
        reads = [_size(self.instructions[name].shape) for name in instruction.operands]
        if instruction.opcode == "fusion":
            inside = [row for name in instruction.called for row in self.computations[name]]
            for parameter in (row for row in inside if row.opcode == "parameter"):
                users = [row for row in inside if parameter.name in row.operands]
                if all(user.opcode in _SLICING for user in users):
                    place = int(parameter.rest.split(")")[0])
                    reads[place] = min(reads[place], sum(_size(user.shape) for user in users))
        return written + sum(reads)

    def _flop_seconds(self, instruction: Instruction) -> float:
        """Return the time that products alone would take."""
        if instruction.opcode == "fusion":
            inside = (row for name in instruction.called for row in self.computations[name])
            return sum(map(self._flop_seconds, inside))
        rest = instruction.rest
        contracted, labels = _CONTRACTED.search(rest), _DIM_LABELS.search(rest)
        if not contracted and not labels:
            return 0.0
        result = arrays(instruction.shape)[0]
        operands = (self.instructions[name] for name in instruction.operands[:2])
        left, right = (arrays(operand.shape)[0] for operand in operands)
        if contracted:
            sizes = _sizes(left)
            products = _count(result) * math.prod(
                sizes[int(n)] for n in re.findall(r"\d+", contracted[1])
            )
        else:
            output, kernel = result, right
            if "convBackwardInput" in rest:
                output = left
            elif "convBackwardFilter" in rest:
                output, kernel = right, result
            columns = _sizes(kernel)[labels[1].index("o")]
            products = _count(output) * _count(kernel) // columns
        item_bytes = array_bytes(left) / _count(left)
        return 2 * products / (self.rates.flops * 2 / item_bytes)


def _sizes(array: str) -> list[int]:
    return [int(n) for n in array.split("[")[1].rstrip("]").split(",") if n]


def _count(array: str) -> int:
    return math.prod(_sizes(array))


def _size(shape: str) -> int:
    """Return the bytes of a shape, which may be a tuple."""
    return sum(map(array_bytes, arrays(shape)))
