"""Make results/programs.md: programs that benchmarks/programs.py compiled.

MB are 1e6 bytes.
"""

import collections
import pathlib
from collections.abc import Iterator, Sequence

from cnn_spmd.papers.layout import HEAD, commands, joined
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare, text
from cnn_spmd.report.text import markdown_table
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import runfiles

PROGRAM_HEADER = ["mesh", "scheme", "MB per device", "peak MB", "collectives per step"]
PROGRAM_HEADER += ["ring MB per step", "closed form", "hidden, %"]
SIDE_BY_SIDE = dict(image_size=224, devices=8)  # the programs that show all schemes side by side


def page() -> str:
    """Return the page of compiled programs."""
    parts = [
        "# What a step moves",
        HEAD,
        """Train steps as compiled, in float32, for the CPU and for NVIDIA H100 80GB HBM3; the
        GPU's compiler needs no GPU. Ring MB is what a device sends per step if each collective
        runs as a ring. The closed form is that of `cnn_spmd/analysis/communication.py` (Gholami
        et al. 2018): it counts a reduce-scatter, which the GPU's compiler makes, where the
        CPU's makes an all-reduce of twice the cost. Where weights are split, a few bytes more
        are summed for the norm by which gradients are clipped. MB per device are parameters;
        peak is XLA's account of the whole program, which it does not give for CPUs.
        Hidden is the share of the communication's time that the schedule of the GPU's program can
        hide behind computing, by the estimate of `cnn_spmd/analysis/schedule.py`, as if each link
        were NVLink; "-": not estimated. In parentheses is the share with
        `collectives_in_flight=4`, where XLA's own limit is 1. What the column cannot see:
        [performance](../docs/performance.md#what-the-schedule-can-hide).""",
    ]
    programs = load_programs()
    parts += [
        "## The schemes side by side",
        """224x224 images on eight H100s, and columns of the tables below. What each scheme does is
        in [parallelism](../docs/parallelism.md), what timings there are in [meshes](meshes.md).""",
        schemes_table(programs),
        "## What papers claim",
        """PaSE (IPDPS 2021) says that a dense split over two axes halves what one weird trick
        moves in the dense layers. That depends on the global batch: dense_2d sums activations,
        hybrid sums weights. Xu et al. (2020) divide the update by the number of devices. Biases
        are not divided here, and a kernel whose size does not divide is split over fewer.""",
        claims_table(programs),
    ]
    for title, table in program_tables(programs).items():
        parts += [f"## {title}", table]
    parts.append(
        commands(
            """All of them; needs requirements.txt. Then the same for any config: here 64 hosts
            of 8 H100s, on a laptop.""",
            "python benchmarks/programs.py",
            "python launch.py --config experiments/alexnet_cifar.py --dry_run --target h100:64x8",
        )
    )
    return joined(*parts)


def load_programs(folder: pathlib.Path = DATA / "programs") -> list[dict]:
    """Return the reports of compiled programs in the order of the page."""
    programs = [runfiles.read_json(path) for path in folder.glob("*.json")]

    def place(run: dict) -> tuple:
        shape = (list(run["mesh"].values()), run["parallelism"], run["in_flight"])
        network = (run["image_size"], run["devices"], run["compiler"]["platform"], run["model"])
        return network + shape

    return sorted(programs, key=place)


def program_tables(programs: Sequence[dict]) -> dict[str, str]:
    """Return one table per network and target: what a device holds and sends."""
    tables: dict[str, list[list[str]]] = {}
    for run, cells in program_rows(programs):
        kind = run["compiler"]["device_kind"]
        target = "CPU devices" if kind == "cpu" else compare.short_kind(kind)
        title = (
            f"{run['model']}, {run['image_size']}x{run['image_size']} images, "
            f"{run['devices']} x {target}, batch {run['batch_size']}"
        )
        tables.setdefault(title, []).append(cells)
    return {title: markdown_table(PROGRAM_HEADER, rows) for title, rows in tables.items()}


def program_rows(programs: Sequence[dict]) -> Iterator[tuple[dict, list[str]]]:
    """Yield each program and its cells under PROGRAM_HEADER.

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
        yield (
            run,
            [
                compare.mesh_name(run["mesh"].values()),
                run["parallelism"],
                f"{run['bytes_per_device']['parameters'] / 1e6:.1f}",
                text.optional(run["memory"]["peak_bytes"], 0, 1e-6) or "-",
                ", ".join(f"{count} {operation}" for operation, count in sorted(counts.items())),
                f"{run['totals']['ring_bytes'] / 1e6:.1f}",
                text.optional(run["closed_form_ring_bytes"], 1, 1e-6) or "-",
                hidden,
            ],
        )


def program_key(run: dict) -> tuple:
    """Return what tells programs apart, except for the collectives in flight."""
    mesh = compare.mesh_name(run["mesh"].values())
    kind = run["compiler"]["device_kind"]
    return run["model"], run["image_size"], run["parallelism"], kind, mesh


def schemes_table(programs: Sequence[dict], sweeps: pathlib.Path = DATA / "sweeps") -> str:
    """Return a row for each scheme, of its program for SIDE_BY_SIDE on GPUs.

    The mesh is one that splits both axes, where there is one. timed: whether a sweep has run the
    scheme on several GPUs.
    """
    timed = set()
    for path in sweeps.glob("*.json"):
        for run in runfiles.read_json(path)["runs"]:
            figures = run["figures"] or dict(device_kind="cpu")  # {} where it failed
            if run["mesh"] != "1x1" and figures["device_kind"] != "cpu":
                timed.add(figures["parallelism"])
    columns = ["mesh", "MB per device", "peak MB", "ring MB per step", "hidden, %"]
    found: dict[str, list[str]] = {}
    for run, cells in program_rows(programs):
        shown = all(run[field] == value for field, value in SIDE_BY_SIDE.items())
        scheme, splits_both = run["parallelism"], min(run["mesh"].values()) > 1
        on_gpus = run["compiler"]["platform"] != "cpu"
        if shown and on_gpus and (splits_both or scheme not in found):
            row = dict(zip(PROGRAM_HEADER, cells, strict=True))
            chosen = [row[column] for column in columns]
            found[scheme] = [scheme, run["model"], *chosen, "yes" if scheme in timed else "no"]
    rows = [found[scheme] for scheme in TABLE if scheme in found]
    return markdown_table(["scheme", "network", *columns, "timed on GPUs"], rows)


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
        cells = [scheme, mesh, f"{size}x{size}", str(run["batch_size"]), what]
        numbers = f"{mine / 1e6:.1f} / {theirs / 1e6:.1f}"
        rows.append([*cells, numbers, f"{mine / theirs:.3f}", published])
    header = ["scheme", "mesh", "images", "batch", "what", "MB", "share", "published"]
    return markdown_table(header, sorted(rows))


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
