"""Make results/programs.md: programs that benchmarks/programs.py compiled.

MB are 1e6 bytes.
"""

import collections
import math
import pathlib
from collections.abc import Iterator, Sequence

from cnn_spmd.papers.layout import filled_in, joined, table
from cnn_spmd.papers.summaries import DATA, load_folder
from cnn_spmd.report import compare, text
from cnn_spmd.sharding.mesh import parse as mesh_sizes
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import runfiles

SIDE_BY_SIDE = dict(image_size=224, devices=8)  # the programs that show all schemes side by side


def page() -> str:
    """Return the page of compiled programs."""
    programs = load_programs()
    tables = (f"## {title}\n\n{rows}" for title, rows in program_tables(programs).items())
    return filled_in(
        "programs.md",
        schemes=schemes_table(programs),
        claims=claims_table(programs),
        tables=joined(*tables),
    )


def load_programs() -> list[dict]:
    """Return the reports of compiled programs in the order of the page."""

    def place(run: dict) -> tuple:
        shape = (list(run["mesh"].values()), run["parallelism"], run["in_flight"])
        network = (run["image_size"], run["devices"], run["compiler"]["platform"], run["model"])
        return network + shape

    return sorted(load_folder(DATA / "programs"), key=place)


def program_tables(programs: Sequence[dict]) -> dict[str, str]:
    """Return one table per network and target: what a device holds and sends."""
    tables: dict[str, list[dict[str, str]]] = {}
    for run, cells in program_rows(programs):
        kind = run["compiler"]["device_kind"]
        target = "CPU devices" if kind == "cpu" else compare.short_kind(kind)
        title = (
            f"{run['model']}, {run['image_size']}x{run['image_size']} images, "
            f"{run['devices']} x {target}, batch {run['batch_size']}"
        )
        tables.setdefault(title, []).append(cells)
    return {title: table(rows) for title, rows in tables.items()}


def program_rows(programs: Sequence[dict]) -> Iterator[tuple[dict, dict[str, str]]]:
    """Yield each program and its cells by column.

    In parentheses is the hidden share with more collectives in flight.
    """
    in_flight = {program_key(run): run for run in programs if run["in_flight"] > 1}
    for run in programs:
        if run["in_flight"] > 1:
            continue
        counts: collections.Counter[str] = collections.Counter()
        for row in run["collectives"]:
            counts[row["operation"].removeprefix("collective-")] += row["count"]
        hidden = text.optional(runfiles.hidden_share(run), 0, 100) or "-"
        if other := in_flight.get(program_key(run)):
            hidden += f" ({text.optional(runfiles.hidden_share(other), 0, 100)})"
        parameters = run["bytes_per_device"]["parameters"]
        yield (
            run,
            {
                "mesh": compare.mesh_name(run["mesh"].values()),
                "scheme": run["parallelism"],
                "parameter MB": f"{parameters / 1e6:.1f}",
                "peak MB": text.optional(run["memory"]["peak_bytes"], 0, 1e-6) or "-",
                "collectives per step": ", ".join(
                    f"{count} {operation}" for operation, count in sorted(counts.items())
                ),
                "ring MB per step": f"{run['totals']['ring_bytes'] / 1e6:.1f}",
                "closed form": text.optional(run["closed_form_ring_bytes"], 1, 1e-6) or "-",
                "hidden, %": hidden,
            },
        )


def program_key(run: dict) -> tuple:
    """Return what tells programs apart, except for the collectives in flight."""
    mesh = compare.mesh_name(run["mesh"].values())
    kind = run["compiler"]["device_kind"]
    return run["model"], run["image_size"], run["parallelism"], kind, mesh


def schemes_table(programs: Sequence[dict], sweeps: pathlib.Path = DATA / "sweeps") -> str:
    """Return a row for each scheme, of its program for SIDE_BY_SIDE on GPUs.

    The mesh is one that splits both axes, where there is one. timed: the most GPUs, of several, on
    which a sweep has run the scheme.
    """
    timed: dict[str, int] = {}
    for sweep in load_folder(sweeps):
        for run in sweep["runs"]:
            figures = run["figures"] or dict(device_kind="cpu")  # {} where it failed
            if run["mesh"] != "1x1" and figures["device_kind"] != "cpu":
                devices = math.prod(mesh_sizes(run["mesh"]).values())
                scheme = figures["parallelism"]
                timed[scheme] = max(devices, timed.get(scheme, 0))
    found: dict[str, dict[str, str]] = {}
    for run, cells in program_rows(programs):
        shown = all(run[field] == value for field, value in SIDE_BY_SIDE.items())
        scheme, splits_both = run["parallelism"], min(run["mesh"].values()) > 1
        on_gpus = run["compiler"]["platform"] != "cpu"
        if shown and on_gpus and (splits_both or scheme not in found):
            columns = ("mesh", "parameter MB", "peak MB", "ring MB per step", "hidden, %")
            found[scheme] = {
                "scheme": scheme,
                "network": run["model"],
                **{column: cells[column] for column in columns},
                "timed on": f"{timed[scheme]} GPUs" if scheme in timed else "-",
            }
    return table([found[scheme] for scheme in TABLE if scheme in found])


def claims_table(programs: Sequence[dict]) -> str:
    """Return what two schemes save beside the older ones, per mesh of H100s."""
    found = {
        (run["image_size"], compare.mesh_name(run["mesh"].values()), run["parallelism"]): run
        for run in programs
        if run["compiler"]["platform"] != "cpu" and run["in_flight"] == 1
    }
    rows = []
    for (size, mesh, scheme), run in found.items():
        if scheme == "dense_2d" and min(run["mesh"].values()) > 1:
            what, older = "dense ring MB, of hybrid's", found[size, mesh, "hybrid"]
            mine, theirs = dense_ring_bytes(run), dense_ring_bytes(older)
            published = "1/2"
        elif scheme == "sharded_update":
            what, older = "MB updated per device, of data's", found[size, mesh, "data"]
            mine, theirs = (each["bytes_per_device"]["parameters"] for each in (run, older))
            published = f"1/{run['devices']}"
        else:
            continue
        rows.append(
            {
                "scheme": scheme,
                "mesh": mesh,
                "images": f"{size}x{size}",
                "batch": str(run["batch_size"]),
                "what": what,
                "MB": f"{mine / 1e6:.1f} / {theirs / 1e6:.1f}",
                "share": f"{mine / theirs:.3f}",
                "published": published,
            }
        )
    return table(sorted(rows, key=lambda row: list(row.values())))


def dense_ring_bytes(run: dict) -> int:
    """Return the ring bytes without the gradients of the convolutions.

    Those are what a mesh of two axes sums over both of them.
    """
    of_convolutions = [
        row["ring_bytes"]
        for row in run["collectives"]
        if row["operation"] == "all-reduce" and len(row["axes"]) == 2
    ]
    return run["totals"]["ring_bytes"] - sum(of_convolutions)
