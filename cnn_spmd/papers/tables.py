"""The README's tables, from results/.

results/*.json are each the summary.json of a run, copied there: config, commit, versions, hardware and figures;
results/programs/*.json are reports of compiled programs, written by benchmarks/programs.py; results/sweeps/*.json are each
the sweep.json of a sweep; results/speed/*.json are written by benchmarks/speed.py; results/rates/*.json are lists of summaries
by which an experiment's learning rates were chosen.
"""

import collections
import json
import pathlib

from cnn_spmd.papers import claims, measured
from cnn_spmd.papers.measured import RESULTS
from cnn_spmd.report import compare, page
from cnn_spmd.report.compare import mean


def results_table(folder: pathlib.Path = RESULTS) -> str:
    """A Markdown table, one row for the runs that differ in nothing but their seed; mean, and ± sample deviation.

    Runs that are held against a paper's figure are in the papers' table instead.
    """
    groups = collections.defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        if not measured.shows(run):
            mesh = run["mesh"]
            key = (
                run["experiment"],
                run["dataset"],
                run["device_kind"],
                run["devices"],
                -mesh["data"],
                run["parallelism"],
                run["epochs"],
                compare.machine(run),
                compare.recipe(run),
            )
            groups[key].append(run)
    rows = []
    for _, runs in sorted(groups.items()):
        run = runs[0]
        rows.append(
            [
                run["experiment"],
                run["dataset"],
                compare.machine(run),
                f"{run['mesh']['data']}x{run['mesh']['model']}",
                run["parallelism"],
                f"{run['epochs']:g}",
                str(len(runs)),
                mean([100 * run["eval"]["accuracy"] for run in runs], 2),
                *(
                    mean([run[name] for run in runs], digits)
                    for name, digits in (
                        ("train_seconds", 1),
                        ("compile_seconds", 1),
                        ("images_per_second", 0),
                    )
                ),
            ]
        )
    return page.markdown_table(
        [
            "experiment",
            "data",
            "hardware",
            "mesh",
            "parallelism",
            "epochs",
            "n",
            "test accuracy, %",
            "train, s",
            "compile, s",
            "images/s",
        ],
        rows,
    )


def programs_table(folder: pathlib.Path = RESULTS / "programs") -> str:
    """A Markdown table, one row a compiled program: what a device holds, and what a step moves (MB of 1e6 bytes)."""
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    runs.sort(
        key=lambda run: (
            run["image_size"],
            run["devices"],
            run["compiler"]["platform"],
            run["model"],
            list(run["mesh"].values()),
            run["parallelism"],
        )
    )
    lines = [
        "| network | compiled for | mesh | parallelism | batch | parameters, MB a device | collectives | ring MB a step "
        "| theory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        counts = ", ".join(
            f"{sum(row['count'] for row in run['collectives'] if row['operation'] == operation)} {operation}"
            for operation in sorted({row["operation"] for row in run["collectives"]})
        )
        lines.append(
            f"| {run['model']}, {run['image_size']}x{run['image_size']} | {run['devices']} x {run['compiler']['device_kind']} "
            f"| {run['mesh']['data']}x{run['mesh']['model']} | {run['parallelism']} | {run['batch_size']} "
            f"| {run['bytes_per_device']['parameters'] / 1e6:.1f} | {counts} | {run['totals']['ring_bytes'] / 1e6:.1f} "
            f"| {run['closed_form_ring_bytes'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def sweeps_table(folder: pathlib.Path = RESULTS / "sweeps") -> str:
    """A Markdown table for each sweep: a row a mesh and scheme, columns for each batch; below it what did not work, and why.

    Runs that differ in nothing but their seed are averaged.
    """
    held, parts = "parameters and optimizer, MB a device", []
    for path in sorted(folder.glob("*.json")):
        sweep = json.loads(path.read_text())
        panels: dict[str, int] = {}  # and the batch a device
        rows: dict[tuple[str, str], dict[str, dict[str, str]]] = collections.defaultdict(
            dict
        )  # mesh, scheme -> panel -> cells
        for group in compare.groups_of(sweep["runs"]):
            figures = group["runs"][0]["figures"]
            panels.setdefault(group["panel"], figures["batch_size"] // group["devices"])
            cells = dict(zip(compare.COLUMNS, compare.cells(group), strict=True))
            rows[cells["mesh"], cells["parallelism"]][group["panel"]] = cells
        shown = ["images/s", "step, ms (p10 to p90)", "speedup", "ring MB a step"]
        if figures["dataset"] != "synthetic":
            shown.append("test accuracy, %")
        columns = [(panel, column) for panel in sorted(panels, key=panels.get) for column in shown]
        table = []
        for row, found in rows.items():
            every = list(found.values())
            table.append(
                [
                    *row,
                    every[0][held],
                    "/".join(dict.fromkeys(cells["n"] for cells in every)),
                    *(found.get(panel, {}).get(column, "") for panel, column in columns),
                ]
            )
        header = [
            f"{panel}: {column}" if column == shown[0] else column for panel, column in columns
        ]
        parts += [
            f"{sweep['experiment']}, {figures['dataset']}, {compare.hardware_of(sweep)}:",
            page.markdown_table(["mesh", "parallelism", held, "n", *header], table),
        ]
        parts += [
            f"{run['name']}: {run['status']}: {run['reason']}"
            for run in sweep["runs"]
            if run["status"] != "completed"
        ]
    return "\n\n".join(parts)


def speed_table(folder: pathlib.Path = RESULTS / "speed") -> str:
    """A Markdown table: our fastest step beside PyTorch's fastest of the same machine and session, by batch.

    On several GPUs also beside our own on one, and beside `data`, where they were measured.
    """
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    batches = [
        (run["gpus"], run["hardware"]["device_kind"], batch)
        for run in runs
        for batch in run["batches"]
    ]
    rows = []
    for gpus, device_kind, batch in sorted(
        batches, key=lambda row: (*row[:2], row[2]["batch_per_gpu"])
    ):
        done = {
            side: [row for row in batch[side] if "error" not in row] for side in ("ours", "peer")
        }
        ours, peer = (
            max(
                (row for row in done[side] if row["gpus"] == gpus),
                key=lambda row: row["images_per_second"],
                default=None,
            )
            for side in ("ours", "peer")
        )
        if not (
            ours and peer
        ):  # measured without the other, or failed: there is nothing to hold it against
            continue
        several = done["ours"] if gpus > 1 else []
        others = (
            [row["images_per_second"] for row in several if row["gpus"] == 1],
            [
                row["images_per_second"]
                for row in several
                if row["gpus"] == gpus and row["parallelism"] == "data"
            ],
        )
        rows.append(
            [
                f"{gpus} x {device_kind}",
                str(batch["batch_per_gpu"]),
                f"{ours['mesh']} {ours['parallelism']}",
                f"{ours['images_per_second']:,}",
                f"{peer['images_per_second']:,} ({peer['name']})",
                f"{ours['images_per_second'] / peer['images_per_second']:.2f}",
                f"{100 * ours['matrix_share']:.0f}",
                f"{100 * peer['matrix_share']:.0f}",
                *(
                    f"{ours['images_per_second'] / other[0]:.2f}" if other else ""
                    for other in others
                ),
            ]
        )
    return page.markdown_table(
        [
            "hardware",
            "batch a GPU",
            "mesh",
            "ours, images/s",
            "PyTorch, images/s",
            "ratio",
            "ours, % of the matrix rate",
            "PyTorch, %",
            "ours over one GPU",
            "ours over `data`",
        ],
        rows,
    )


TABLES = {
    "results": results_table,
    "papers": measured.measured_table,
    "programs": programs_table,
    "sweeps": sweeps_table,
    "speed": speed_table,
    "depth": lambda: claims.depth_table(claims.read(RESULTS / "claims")),
    "batches": lambda: measured.batch_table(claims.read(RESULTS / "claims")),
}
