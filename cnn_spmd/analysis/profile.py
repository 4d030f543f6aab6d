"""Summarise a trace of jax.profiler: computing, communication, their overlap."""

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
    "Simulated devices share the CPU's cores. The time of an operation includes waiting for a "
    "core, and the time of a collective includes waiting for the slowest device. These times show "
    "what ran, not what an accelerator would gain."
)

# XLA names what it runs after the HLO instruction, such as all-reduce-start.1. NCCL's kernels have
# names of their own.
_SUFFIX = r"(?:\.(?:\d+|clone|remat\d*))*$"
_COLLECTIVE = re.compile(
    r"(?i)nccl|^(?:all-(?:reduce|gather|to-all)|ragged-all-to-all|reduce-scatter"
    rf"|collective-(?:permute|broadcast))(?:-start|-done)?{_SUFFIX}"
)
_CONTROL_FLOW = re.compile(rf"(?:while|conditional|call){_SUFFIX}")


class Event(NamedTuple):
    """A kernel, copy or CPU operation on one device; times in nanoseconds."""

    device: str | int
    name: str
    start: float
    end: float
    communication: bool


def trace(call: Callable[[], Any], calls: int, steps_per_call: int, folder: pathlib.Path) -> dict:
    """Run `calls` calls under the profiler and return their `summarise`.

    call: runs steps_per_call steps, and returns arrays that lie on every device it ran on. It runs
      once more before the trace starts, so that a compilation is not in it.
    folder: receives the raw trace. Each process of a cluster traces its own devices and needs a
      folder of its own.
    """
    jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    # Level 0 would leave out the CPU backend's operations.
    options.host_tracer_level = 1
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
    """Return where the time of a traced step goes, in milliseconds per step.

    data: the trace, or its .xplane.pb file, of `steps` steps on `devices` devices.

    The result is JSON-ready; times are means over devices.
      step: from the first event of any device to the last one, divided by the steps.
      communication: a collective runs. compute: anything else runs, copies included.
      exposed: a collective runs and nothing else does. idle: nothing runs.
      top: the TOP kernels with the most time; time and count are per step and device.
      note: what the times mean on a CPU, otherwise "".

    Raises ValueError where the trace has events of another number of devices.
    """
    events, on_gpu = _read_events(data)
    by_device = defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
    if len(by_device) != devices or not events:
        raise ValueError(f"the trace has events of {len(by_device)} devices, expected {devices}")

    def total_busy(*kinds: bool) -> float:
        return sum(
            busy((event.start, event.end) for event in device if event.communication in kinds)
            for device in by_device.values()
        )

    def per_step(nanoseconds: float) -> float:
        return round(nanoseconds / 1e6 / steps / devices, 4)

    window = devices * (max(event.end for event in events) - min(event.start for event in events))
    compute, either = total_busy(False), total_busy(False, True)
    return dict(
        steps=steps,
        devices=devices,
        step_milliseconds=per_step(window),
        compute_milliseconds=per_step(compute),
        communication_milliseconds=per_step(total_busy(True)),
        exposed_milliseconds=per_step(either - compute),
        idle_milliseconds=per_step(window - either),
        note="" if on_gpu else CPU_NOTE,
        top=_longest_kernels(events, steps * devices),
    )


def _read_events(data: ProfileData | pathlib.Path) -> tuple[list[Event], bool]:
    """Return the events of a trace, and whether they are of GPUs."""
    if not isinstance(data, ProfileData):
        data = ProfileData.from_file(str(data))
    planes = [plane for plane in data.planes if plane.name.startswith("/device:GPU:")]
    with warnings.catch_warnings():
        # The profiler's own classes cause this warning.
        warnings.filterwarnings("ignore", "builtin type .* has no __module__", DeprecationWarning)
        if planes:
            return list(gpu_events(planes)), True
        return list(cpu_events(data.find_plane_with_name("/host:CPU"))), False


def _longest_kernels(events: Iterable[Event], device_steps: int) -> list[dict]:
    """Return the TOP kernels by total time; device_steps: steps times devices."""
    times_by_kernel = defaultdict(list)
    for event in events:
        times_by_kernel[event.name, event.communication].append(event.end - event.start)
    longest = sorted(times_by_kernel.items(), key=lambda item: -sum(item[1]))
    return [
        dict(
            name=name,
            milliseconds=round(sum(times) / 1e6 / device_steps, 4),
            count=round(len(times) / device_steps, 2),
            communication=communication,
        )
        for (name, communication), times in longest[:TOP]
    ]


def busy(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def gpu_events(planes: Iterable) -> Iterator[Event]:
    """Yield what ran on each GPU's streams.

    A plane's other lines are left out: they are counters, or views derived from the streams.
    """
    for plane in planes:
        for line in plane.lines:
            if not line.name.startswith("Stream #"):
                continue
            for event in line.events:
                names = event.name, str(dict(event.stats).get("hlo_op", ""))
                communication = any(map(_COLLECTIVE.search, names))
                yield Event(plane.name, event.name, event.start_ns, event.end_ns, communication)


def cpu_events(plane: Any) -> Iterator[Event]:
    """Yield what the CPU backend ran for each device.

    A line of the plane is a thread, and a thread serves several devices in turn. An operation that
    hands its work to other threads returns early; the event "end: <name>" starts when the work is
    done. Loops and branches are left out, because the operations in them have events of their own.
    JAX may name a collective after its primitive (psum.3); a rendezvous inside shows what it is.
    """
    operations, ends, collectives = [], {}, set()
    for line in plane.lines if plane else ():
        outer = None
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats and not _CONTROL_FLOW.match(event.name):
                outer = event
                operations.append((event, stats))
            elif event.name.startswith("end: "):
                ends[stats["_c"]] = event.start_ns
            elif event.name == "Rendezvous" and outer and event.start_ns < outer.end_ns:
                collectives.add(outer.name)
    for event, stats in operations:
        communication = event.name in collectives or bool(_COLLECTIVE.search(event.name))
        end = ends.get(stats["_p"], event.end_ns)
        yield Event(stats["device_ordinal"], event.name, event.start_ns, end, communication)
