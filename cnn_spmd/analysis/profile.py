"""Where a step's time goes, device by device, from a trace that jax.profiler wrote: kernels, communication, overlap."""

import math
import pathlib
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.profiler import ProfileData

TOP = 15  # kernels that a summary names
CPU_NOTE = (
    "Simulated devices share the CPU's cores: an operation lasts until it is done, waiting for a core included, and a "
    "collective waits for the slowest device. The figures tell what ran, not what an accelerator would gain."
)

# NCCL's kernels; and whatever else runs for an HLO instruction that is a collective, as XLA names those (all-reduce-start.1).
_SUFFIX = r"(?:\.(?:\d+|clone|remat\d*))*$"
_COLLECTIVE = re.compile(
    r"(?i)nccl|^(?:all-(?:reduce|gather|to-all)|ragged-all-to-all|reduce-scatter"
    rf"|collective-(?:permute|broadcast))(?:-start|-done)?{_SUFFIX}"
)
_CONTROL_FLOW = re.compile(rf"(?:while|conditional|call){_SUFFIX}")


class Event(NamedTuple):
    """A kernel, a copy, or an operation of the CPU backend, on one device; times in nanoseconds."""

    device: str | int
    name: str
    start: float
    end: float
    communication: bool


def trace(call: Callable[[], Any], calls: int, steps_per_call: int, folder: pathlib.Path) -> dict:
    """The summary of `calls` calls under the profiler, after one to settle; the raw trace stays in `folder`.

    call: does steps_per_call steps and returns arrays that lie on all of the devices they ran on. Each process of a
    cluster traces its own devices, into a folder of its own.
    """
    jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1  # the CPU backend's operations; 0 leaves them out
    with jax.profiler.trace(folder, profiler_options=options):
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
    devices = {
        device for array in jax.tree.leaves(result) for device in array.sharding.addressable_devices
    }
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    return summarise(newest, calls * steps_per_call, len(devices))


def summarise(data: ProfileData | pathlib.Path, steps: int, devices: int) -> dict:
    """What a trace (or its .xplane.pb file) of `steps` steps says, in milliseconds a step, means over devices; JSON-ready.

    step: from the first event to the last, of any device. communication: while a collective runs; compute: while anything
    else does, copies too; exposed: communication under which nothing else runs; idle: nothing runs at all. top: the 15
    kernels with the most time, each with its time and count a step and device. note: what the figures mean, on a CPU.
    Raises ValueError unless the trace has events of just as many devices.
    """
    if not isinstance(data, ProfileData):
        data = ProfileData.from_file(str(data))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU:")]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "builtin type .* has no __module__", DeprecationWarning
        )  # the profiler's classes
        events = list(
            gpu_events(planes) if planes else cpu_events(data.find_plane_with_name("/host:CPU"))
        )
    by_device, by_name = defaultdict(list), defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
        by_name[event.name, event.communication].append(event.end - event.start)
    if len(by_device) != devices or not events:
        raise ValueError(f"the trace has events of {len(by_device)} devices, expected {devices}")

    def milliseconds(nanoseconds: float) -> float:
        return round(nanoseconds / 1e6 / steps / devices, 4)

    def total_busy(*kinds: bool) -> float:
        return sum(
            busy((event.start, event.end) for event in device if event.communication in kinds)
            for device in by_device.values()
        )

    window = devices * (max(event.end for event in events) - min(event.start for event in events))
    compute, either = total_busy(False), total_busy(False, True)
    top = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:TOP]
    return dict(
        steps=steps,
        devices=devices,
        step_milliseconds=milliseconds(window),
        compute_milliseconds=milliseconds(compute),
        communication_milliseconds=milliseconds(total_busy(True)),
        exposed_milliseconds=milliseconds(either - compute),
        idle_milliseconds=milliseconds(window - either),
        note="" if planes else CPU_NOTE,
        top=[
            dict(
                name=name,
                milliseconds=milliseconds(sum(times)),
                count=round(len(times) / steps / devices, 2),
                communication=communication,
            )
            for (name, communication), times in top
        ],
    )


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def gpu_events(planes: Iterable) -> Iterator[Event]:
    """What ran on each GPU's streams; a plane's other lines, counters or views derived from these, are left out."""
    for plane in planes:
        for line in plane.lines:
            for event in line.events if line.name.startswith("Stream #") else ():
                names = event.name, str(dict(event.stats).get("hlo_op", ""))
                yield Event(
                    plane.name,
                    event.name,
                    event.start_ns,
                    event.end_ns,
                    any(map(_COLLECTIVE.search, names)),
                )


def cpu_events(plane: Any) -> Iterator[Event]:
    """What the CPU backend ran for each device; a line is a thread, which serves any device in turn.

    An operation that hands its work to other threads returns early: "end: <name>" starts when it is done. Loops and branches
    are left out for what they run. Where JAX named a collective after a primitive (psum.3), the rendezvous in it tells.
    """
    found, ends, collectives = [], {}, set()
    for line in plane.lines if plane else ():
        outer = None
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats and not _CONTROL_FLOW.match(event.name):
                found.append((outer := event, stats))
            elif event.name.startswith("end: "):
                ends[stats["_c"]] = event.start_ns
            elif event.name == "Rendezvous" and outer and event.start_ns < outer.end_ns:
                collectives.add(outer.name)
    for event, stats in found:
        communication = event.name in collectives or bool(_COLLECTIVE.search(event.name))
        yield Event(
            stats["device_ordinal"],
            event.name,
            event.start_ns,
            ends.get(stats["_p"], event.end_ns),
            communication,
        )
