"""The report on a compiled program: what a device holds of it, and the collectives that are in it (hlo.py)."""

import importlib.metadata
import math

import jax

from cnn_spmd.analysis.hlo import parse_collectives, summarise


def bytes_per_device(tree) -> int:
    """Bytes that one device holds of a tree of arrays, or of ShapeDtypeStructs with shardings (without: ValueError)."""
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if getattr(leaf, "sharding", None) is None:
            raise ValueError(f"no sharding on {jax.tree_util.keystr(path)}: {leaf!r}")
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


MEMORY = dict(
    argument="argument_size",
    output="output_size",
    temporary="temp_size",
    alias="alias_size",
    generated_code="generated_code_size",
    peak="peak_memory",
)  # ours -> XLA's
# What stands in a report's place where there is none.
UNKNOWN = dict(
    collectives=None,
    totals=dict.fromkeys(("count", "bytes", "ring_bytes")),
    memory=dict.fromkeys(f"{key}_bytes" for key in MEMORY),
)


def memory(compiled) -> dict[str, int | None]:
    """XLA's own account of the program's bytes on one device; None where the backend or version does not say."""
    stats = compiled.memory_analysis()
    return {
        f"{key}_bytes": getattr(stats, f"{name}_in_bytes", None) for key, name in MEMORY.items()
    }


def compiler_of(mesh: jax.sharding.Mesh) -> dict:
    """Name the compiler, as CPU's and GPU's insert different collectives, and the mesh; JSON-ready."""
    device, jaxlib = mesh.devices.flat[0], importlib.metadata.version("jaxlib")
    return dict(
        compiler=dict(platform=device.platform, device_kind=device.device_kind, jaxlib=jaxlib),
        mesh=dict(mesh.shape),
    )


def report(compiled, mesh: jax.sharding.Mesh, steps: int = 1) -> dict:
    """All this for one compiled program of `steps` steps, JSON-ready; collectives are those of a step."""
    rows = summarise(parse_collectives(compiled.as_text(), dict(mesh.shape), steps))
    totals = {key: sum(row[key] for row in rows) for key in ("count", "bytes", "ring_bytes")}
    where = compiler_of(mesh)
    on_cpu = where["compiler"]["platform"] == "cpu"
    held = memory(compiled) | (
        dict(peak_bytes=None) if on_cpu else {}
    )  # XLA's CPU leaves temporaries out
    return where | dict(collectives=rows, totals=totals, memory=held)


def as_text(report: dict) -> str:
    """The report of a run as lines for a person: mesh, placement, bytes a device, collectives, memory, compile time.

    A report that is not whole ends with a line that starts with WARNING and says why.
    """

    def table(title: str, rows: list[dict]) -> list[str]:
        lines = [
            f"  {title:<14}{'shape':<20}{'logical axes':<38}{'mesh axes':<26}{'MB a device':>12}"
        ]
        for row in rows:
            logical, mesh = (
                ", ".join(
                    "-" if axis is None else "+".join(axis) if isinstance(axis, list) else axis
                    for axis in row[column]
                )
                for column in ("logical_axes", "mesh_axes")
            )
            lines.append(
                f"  {row['name']:<14}{'x'.join(map(str, row['shape'])):<20}{logical:<38}{mesh:<26}"
                f"{row['bytes_per_device'] / 1e6:>12.3f}"
                + (f"  NOTE: {row['note']}" if row["note"] else "")
            )
        return lines

    mesh = " x ".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    stands_in = f" (fallback for {report['fallback']})" if report["fallback"] else ""
    held, compiler = report["bytes_per_device"], report["compiler"]
    memory = ", ".join(
        f"{name.removesuffix('_bytes')} {size / 1e6:.1f}"
        for name, size in report["memory"].items()
        if size
    )
    lines = [
        f"mesh {mesh}, {report['devices']} x {compiler['device_kind']}, parallelism {report['parallelism']}, global batch "
        f"{report['batch_size']}, {report['param_count']:,} parameters, data {report['dataset']}{stands_in}, "
        + ("whole on every device" if report["data_on_device"] else "streamed from the host"),
        *table("parameter", report["placement"]),
        *table("activation", report["activations"]),
    ]
    if None not in held.values():
        lines.append(
            f"a device holds {held['parameters'] / 1e6:.1f} MB of parameters and {held['optimizer'] / 1e6:.1f} MB of "
            f"optimizer state; memory of the compiled step in MB: {memory or 'not known'}"
        )
    for row in report["collectives"] or ():
        lines.append(
            f"  {row['count']:>3} {row['operation']:<20} over {'+'.join(row['axes']):<11} {row['phase']:<10}"
            f"{row['bytes'] / 1e6:>10.3f} MB, {row['ring_bytes'] / 1e6:.3f} MB sent a device and step"
        )
    if report["collectives"] == []:
        lines.append("  no collectives")
    for row in report["communication"] or ():
        theory = row["closed_form_bytes"]
        lines.append(
            f"  {row['kind']} over {'+'.join(row['axes'])}: {row['compiled_bytes'] / 1e6:.3f} MB compiled, "
            + ("not covered by theory" if theory is None else f"{theory / 1e6:.3f} MB in theory")
        )
    cached = report.get("programs_from_cache")
    lines.append(
        f"compiled for {compiler['platform']} (jaxlib {compiler['jaxlib']}) in {report['compile_seconds']:.1f} s"
        + (f", {cached} programs from the cache" if cached else "")
    )
    if "error" in report:
        lines.append(f"WARNING: there is no whole report on this program: {report['error']}")
    return "\n".join(lines)
