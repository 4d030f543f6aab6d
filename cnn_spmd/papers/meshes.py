"""Make results/meshes.md: sweeps over meshes and schemes."""

import pathlib
from collections.abc import Sequence

from cnn_spmd.papers.layout import commands, filled_in, joined, table
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare, run_tables
from cnn_spmd.training import runfiles

ACCURACY = "test accuracy, %"
# Column -> its name in the report's table (run_tables.comparison_row).
SWEEP_COLUMNS = {
    "mesh": "mesh",
    "scheme": "parallelism",
    "n": "n",
    "MB per device": "parameters and optimizer, MB per device",
    "images/s": "images/s",
    "step, ms (p10 to p90)": "step, ms (p10 to p90)",
    "speedup": "speedup",
    "ring MB per step": "ring MB per step",
    ACCURACY: ACCURACY,
}


def page() -> str:
    """Return the page of sweeps over meshes and schemes."""
    sections = map(sweep_section, sorted((DATA / "sweeps").glob("*.json")))
    return filled_in("meshes.md", sweeps="\n".join(sections))


def sweep_section(path: pathlib.Path) -> str:
    """Return the section on the sweep in a file."""
    sweep = runfiles.read_json(path)
    dataset = next(run["figures"]["dataset"] for run in sweep["runs"] if run["figures"])
    parts = [f"## {sweep['experiment']}, {dataset}, {compare.hardware_of(sweep)}"]
    for panel, rows in sweep_tables(sweep).items():
        parts += [f"{panel[0].upper()}{panel[1:]}:", rows]
    parts += unfinished_runs(sweep)
    picture = f"{path.stem}.png"
    if (DATA.parent / picture).exists():
        parts.append(f"Charts of this sweep: [{picture}]({picture}).")
    hardware = sweep["hardware"]
    source = f"Commit {hardware['commit']}, jax {hardware['versions']['jax']}."
    parts.append(commands(source, *sweep.get("commands", [sweep_command(sweep)])))
    return joined(*parts)


def unfinished_runs(sweep: dict) -> list[str]:
    """Return a sentence on each run of a sweep that did not complete."""
    return [
        f"{run['name']}: {run['status']}: {run['reason']}"
        for run in sweep["runs"]
        if run["status"] != "completed"
    ]


def sweep_tables(sweep: dict) -> dict[str, str]:
    """Return one table per batch: a row for each mesh and scheme, seeds averaged."""

    def batch_per_device(panel: list[compare.Group]) -> int:
        return panel[0].figures["batch_size"] // panel[0].devices

    panels = compare.panels_of(compare.groups_of(sweep["runs"]))
    panels.sort(key=batch_per_device)
    return {panel[0].panel: sweep_table(panel) for panel in panels}


def sweep_table(groups: Sequence[compare.Group]) -> str:
    """Return the table of one panel; accuracies where the data are no random images."""
    columns = dict(SWEEP_COLUMNS)
    if groups[0].figures["dataset"] == "synthetic":
        columns.pop(ACCURACY)
    rows = map(run_tables.comparison_row, groups)
    return table([{name: row[of] for name, of in columns.items()} for row in rows])


def sweep_command(sweep: dict) -> str:
    """Return the command of a sweep, put together for files that do not have it.

    Those have the arguments that all runs share.
    """
    if sweep.get("command"):
        return sweep["command"]
    meshes = dict.fromkeys(run["mesh"] for run in sweep["runs"])
    swept: dict[str, dict[str, None]] = {}
    for run in sweep["runs"]:
        for name, value in run["settings"].items():
            swept.setdefault(name, {})[str(value)] = None
    arguments = [*sweep["arguments"], f"--mesh {','.join(meshes)}"]
    for name, values in swept.items():
        flag = "--batch_per_device " if name == "batch_per_device" else f"--sweep {name}="
        arguments.append(flag + ",".join(values))
    return f"python launch.py {' '.join(arguments)}"
