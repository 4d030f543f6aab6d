"""Report on a compiled program: what a device holds, which collectives run."""

import importlib.metadata
import math
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from cnn_spmd.analysis import hlo, schedule
from cnn_spmd.plain_table import WIDTH, aligned

# Our names of what XLA's CompiledMemoryStats calls <name>_in_bytes.
_XLA_MEMORY = dict(
    argument="argument_size",
    output="output_size",
    temporary="temp_size",
    alias="alias_size",
    generated_code="generated_code_size",
    peak="peak_memory",
)
# The fields of `report` where there is no report.
UNKNOWN = dict(
    collectives=None,
    totals=dict.fromkeys(("count", "bytes", "ring_bytes")),
    memory=dict.fromkeys(f"{name}_bytes" for name in _XLA_MEMORY),
    overlap=schedule.UNKNOWN | dict(reason="there is no report on the program"),
)
NO_REDUCE_SCATTER = (
    "XLA for CPUs has no reduce-scatter. It makes an all-reduce of the same payload, which sends "
    "twice as much."
)
WHERE_IMAGES_LIVE = dict(  # by data.resident
    yes="a copy on every device", sharded="split over all devices", no="streamed from the host"
)


def bytes_per_device(tree: Any) -> int:
    """Return the bytes that one device holds of a tree of arrays.

    Leaves are arrays or ShapeDtypeStructs. Raises ValueError for a leaf without a sharding.
    """
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"no sharding on {jax.tree_util.keystr(path)}: {leaf!r}")
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def memory(compiled: jax.stages.Compiled) -> dict[str, int | None]:
    """Return XLA's account of the program's bytes per device.

    A value is None where the backend or its version does not give it.
    """
    stats = compiled.memory_analysis()
    return {
        f"{ours}_bytes": getattr(stats, f"{xlas}_in_bytes", None)
        for ours, xlas in _XLA_MEMORY.items()
    }


def compiler_of(mesh: jax.sharding.Mesh) -> dict:
    """Return compiler and mesh, JSON-ready.

    They belong to a report, as CPU and GPU compilers insert different collectives.
    """
    device = mesh.devices.flat[0]
    jaxlib = importlib.metadata.version("jaxlib")
    return dict(
        compiler=dict(platform=device.platform, device_kind=device.device_kind, jaxlib=jaxlib),
        mesh=dict(mesh.shape),
    )


def report(compiled: jax.stages.Compiled, mesh: jax.sharding.Mesh, steps: int = 1) -> dict:
    """Return compiler, mesh, memory per device and collectives per step, JSON-ready.

    compiled: a program of `steps` steps. overlap: what share of the collectives' time the schedule
    can hide (schedule.report).
    """
    module = hlo.Module(compiled.as_text(), dict(mesh.shape))
    collectives = module.collectives(steps)
    rows = hlo.summarise(collectives)
    totals = {key: sum(row[key] for row in rows) for key in ("count", "bytes", "ring_bytes")}
    where = compiler_of(mesh)
    platform, device_kind = (where["compiler"][key] for key in ("platform", "device_kind"))
    held = memory(compiled)
    if platform == "cpu":
        # XLA for CPUs leaves temporaries out of its peak.
        held["peak_bytes"] = None
    overlap = schedule.report(module, collectives, device_kind, platform)
    return where | dict(collectives=rows, totals=totals, memory=held, overlap=overlap)


def as_text(report: dict) -> str:
    """Return a run's report as text for people.

    It is at most 100 columns wide where names allow. A report with a part missing ends with a line
    that starts with "warning" and gives the reason.
    """
    parts = [
        _summary(report),
        _placement("Where each parameter lives between steps, MB per device", report["placement"]),
        _placement("Where each activation lives, MB per device", report["activations"]),
        _memory(report),
        _collectives(report["collectives"], report["totals"]),
        _overlap(report["overlap"]) if report["collectives"] else (),
        _theory(report),
        _prediction(report.get("prediction")),
        _warning(report),
    ]
    return "\n\n".join("\n".join(lines) for part in parts if (lines := [*part]))


def as_summary(report: dict) -> str:
    """Return the lines of `as_text` that a run prints as it starts.

    They say what was compiled, whether it fits, what it sends, and what does not lie as asked.
    """
    arrays = report["placement"] + report["activations"]
    lines = [
        *_summary(report),
        *_notes(arrays),
        *_prediction(report.get("prediction")),
        *_warning(report),
    ]
    return "\n".join(lines)


def held_by_device(report: dict) -> dict[str, int] | None:
    """Return the bytes that a device holds while it trains, by what they are.

    None where the backend does not give XLA's account of the program, or there is no report.
    """
    account, held = report["memory"], report["bytes_per_device"]
    needed = [account.get(f"{name}_bytes") for name in ("argument", "output", "alias", "temporary")]
    if None in (*needed, *held.values()):
        return None
    argument, output, alias, temporary = needed
    state = dict(parameters=held["parameters"]) | {"optimizer state": held["optimizer"]}
    if model_state := report.get("model_state_bytes_per_device"):
        state["model state"] = model_state
    images = report["image_bytes_per_device"]
    if report["streamed_bytes_per_device"]:  # a chunk's images, and those of the next chunk
        images = 2 * max(argument - sum(state.values()), 0)
    return state | dict(images=images, temporary=temporary + max(output - alias, 0))


def fits(report: dict) -> bool | None:
    """Return whether what a device holds fits in its memory; None where that is not known."""
    held, memory = held_by_device(report), report.get("device_memory_bytes")
    return None if held is None or memory is None else sum(held.values()) <= memory


def _fit_text(report: dict) -> str:
    """Return ", fits in its 80.0 GB", or that it does not; empty if nobody knows."""
    fit = fits(report)
    if fit is None:
        return ""
    verb = "fits" if fit else "does NOT fit"
    return f", {verb} in its {report['device_memory_bytes'] / 1e9:.1f} GB"


def _summary(report: dict) -> Iterator[str]:
    """Yield what was compiled, for which devices, and how long it took."""
    compiler = report["compiler"]
    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    data = report["dataset"]
    if report["fallback"]:
        data += f" (fallback for {report['fallback']})"
    data += f", {WHERE_IMAGES_LIVE[report['data_resident']]}"
    yield f"mesh {mesh}, {report['devices']} x {compiler['device_kind']}"
    yield f"parallelism {report['parallelism']}, global batch {report['batch_size']}, data {data}"
    yield f"model {report['model']}, {report['param_count']:,} parameters, {report['dtype']}"
    cached = report.get("programs_from_cache")
    yield (
        f"compiled for {compiler['platform']} (jaxlib {compiler['jaxlib']}) in "
        f"{report['compile_seconds']:.1f} s"
        + (f", {cached} programs from the cache" if cached else "")
    )
    if held := held_by_device(report):
        parts = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in held.items())
        total = f"{sum(held.values()) / 1e6:.1f} MB"
        yield from _wrapped(f"memory per device: {total} ({parts}){_fit_text(report)}")
    if report["collectives"]:
        count, sent = (report["totals"][name] for name in ("count", "ring_bytes"))
        theory = report["closed_form_ring_bytes"]
        beside = "theory does not cover it" if theory is None else f"{theory / 1e6:.1f} in theory"
        yield (
            f"sent per device and step: {sent / 1e6:.1f} MB by {count} "
            f"collective{'s' * (count > 1)} ({beside})"
        )


def _placement(title: str, arrays: list[dict]) -> Iterator[str]:
    """Yield a table of arrays: the mesh axes of each dimension, MB per device."""
    if not arrays:
        return
    cells = [
        (
            array["name"],
            "x".join(map(str, array["shape"])),
            _axes_text(array["logical_axes"]),
            _axes_text(array["mesh_axes"]),
            _megabytes(array["bytes_per_device"]),
        )
        for array in arrays
    ]
    header = ("name", "shape", "logical axes", "mesh axes", "MB")
    total = ("total", "", "", "", _megabytes(sum(array["bytes_per_device"] for array in arrays)))
    yield from aligned(title, header, cells, total=total)
    yield from _notes(arrays)


def _notes(arrays: list[dict]) -> Iterator[str]:
    """Yield a line for each array that does not lie as the scheme asks."""
    for array in arrays:
        if array["note"]:
            yield from _wrapped(f"  NOTE: {array['name']}: {array['note']}")


def _axes_text(axes: Sequence[str | list[str] | None]) -> str:
    """Return one entry per dimension, such as "data+model, -, -"; "-": not split."""
    return ", ".join("+".join(axis) if isinstance(axis, list) else axis or "-" for axis in axes)


def _memory(report: dict) -> Iterator[str]:
    """Yield what a device holds while it trains, and XLA's account of the train step."""
    if held := held_by_device(report):
        cells = [(name, _megabytes(size)) for name, size in held.items()]
        total = (f"total{_fit_text(report)}", _megabytes(sum(held.values())))
        yield from aligned("Memory per device", ("what", "MB"), cells, total=total)
    if streamed := report["streamed_bytes_per_device"]:
        yield f"  {streamed / 1e6:.1f} MB of images per step from the host"
    sizes = ", ".join(
        f"{name.removesuffix('_bytes').replace('_', ' ')} {size / 1e6:.1f}"
        for name, size in report["memory"].items()
        if size
    )
    if sizes:
        yield from _wrapped(f"  XLA's account of the program, MB: {sizes}")


def _collectives(rows: list[dict] | None, totals: dict) -> Iterator[str]:
    """Yield a table of the collectives that XLA inserted."""
    if rows is None:
        return
    title = "Collectives per step, MB per device, summed over the count"
    if not rows:
        yield f"{title}: no collectives"
        return
    cells = [
        (
            row["operation"],
            "+".join(row["axes"]),
            row["phase"],
            str(row["count"]),
            _megabytes(row["bytes"]),
            _megabytes(row["ring_bytes"]),
        )
        for row in rows
    ]
    header = ("operation", "over mesh axes", "phase", "count", "payload", "sent in a ring")
    sums = (str(totals["count"]), _megabytes(totals["bytes"]), _megabytes(totals["ring_bytes"]))
    yield from aligned(title, header, cells, numbers=3, total=("total", "", "", *sums))


def _overlap(overlap: dict) -> Iterator[str]:
    """Yield what share of the communication the schedule can hide, or why it is not known."""
    if overlap["hidden_share"] is None:
        yield from _wrapped(f"What the schedule can hide is not known: {overlap['reason']}")
    else:
        yield (
            f"Estimate: the schedule can hide {overlap['hidden_share']:.0%} of "
            f"{overlap['communication_milliseconds']:.3f} ms of communication per step "
            f"({overlap['hidden_bytes_share']:.0%} of the bytes)"
        )


def _theory(report: dict) -> Iterator[str]:
    """Yield the payloads of the compiled program beside those of the closed form."""
    reason = report.get("closed_form_not_covered")
    if reason:
        yield from _wrapped(f"closed form: not covered: {reason}")
    if report["closed_form"] is None or not report["communication"]:
        return
    cells = [
        (
            row["kind"],
            "+".join(row["axes"]),
            _megabytes(row["compiled_bytes"]),
            _megabytes(row["closed_form_bytes"]),
        )
        for row in report["communication"]
    ]
    title = "Payload per device and step, MB: compiled, and in theory (Gholami et al. 2018)"
    header = ("kind", "over mesh axes", "compiled", "in theory")
    sent = (report["totals"]["ring_bytes"], report["closed_form_ring_bytes"])
    total = ("all, sent in rings", "", *map(_megabytes, sent))
    yield from aligned(title, header, cells, numbers=2, total=total)
    if sends_twice(report):
        yield from _wrapped(f"  {NO_REDUCE_SCATTER}")


def sends_twice(report: dict) -> bool:
    """Return whether NO_REDUCE_SCATTER is true of a report's program."""
    moves = report["closed_form"] or ()
    scattered = any(row["operation"] == "reduce-scatter" for row in moves)
    return scattered and report["compiler"]["platform"] == "cpu"


def _prediction(prediction: dict | None) -> Iterator[str]:
    if prediction:
        terms = ", ".join(f"{name} {time:.3f}" for name, time in prediction["terms"].items())
        origin = ", computing estimated" if prediction["estimated"] else ""
        yield from _wrapped(
            f"Predicted step: {prediction['predicted_milliseconds']:.3f} ms by the calibration of "
            f"{prediction['card']} ({terms}{origin})"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3f}"


def _warning(report: dict) -> Iterator[str]:
    if "error" in report:
        yield f"warning: there is no whole report on this program: {report['error']}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="    ", break_long_words=False)
