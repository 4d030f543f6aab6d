"""Make results/meshes.md: sweeps over meshes and schemes."""

import collections
import itertools
from collections.abc import Iterable, Sequence

from cnn_spmd.papers.layout import commands, filled_in, joined, table
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare, run_tables
from cnn_spmd.training import runfiles

ACCURACY = "test accuracy, %"
NEXT = 2  # meshes and schemes that are named after the fastest
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
    paths = sorted((DATA / "sweeps").glob("*.json"))
    sweeps = {path.stem: runfiles.read_json(path) for path in paths}
    sections = "\n".join(itertools.starmap(sweep_section, sweeps.items()))
    return filled_in("meshes.md", spread=100 * spread(sweeps.values()), sweeps=sections)


def spread(sweeps: Iterable[dict]) -> float:
    """Return by what share the step of one GPU differs between sweeps, at most."""
    steps = collections.defaultdict(list)
    for sweep in sweeps:
        for run in sweep["runs"]:
            figures = run["figures"]
            if run["mesh"] == "1x1" and figures and figures["device_kind"] != "cpu":
                key = sweep["experiment"], figures["model"], figures["batch_size"]
                steps[key].append(figures["step_milliseconds"]["median"])
    return max(max(own) / min(own) - 1 for own in steps.values())


def sweep_section(name: str, sweep: dict) -> str:
    """Return the section on a sweep; name: of its file."""
    figures = next(run["figures"] for run in sweep["runs"] if run["figures"])
    network = f"{sweep['experiment']}: {figures['model']}, {figures['dataset']}"
    day = sweep["started"].partition("T")[0]
    parts = [f"## {network}, {compare.hardware_of(sweep)}, {day}"]
    for groups in sweep_panels(sweep):
        panel = groups[0].panel
        parts += [f"{panel[0].upper()}{panel[1:]}:", sweep_table(groups), fastest_text(groups)]
    parts += unfinished_runs(sweep)
    picture = f"{name}.png"
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


def sweep_panels(sweep: dict) -> list[list[compare.Group]]:
    """Return a panel per batch: a group for each mesh and scheme, of runs that differ in seed."""

    def batch_per_device(panel: list[compare.Group]) -> int:
        return panel[0].figures["batch_size"] // panel[0].devices

    return sorted(compare.panels_of(compare.groups_of(sweep["runs"])), key=batch_per_device)


def fastest_text(groups: Sequence[compare.Group]) -> str:
    """Name the fastest mesh and scheme on several GPUs, and the next ones; "" for fewer than 3."""
    steps = {
        f"{compare.mesh_name(group.mesh)} `{group.parallelism}`": group.average(
            "step_milliseconds", "median"
        )
        for group in groups
        if group.devices > 1 and group.figures["device_kind"] != "cpu"
    }
    if len(steps) <= NEXT:
        return ""
    first, *others = sorted(steps, key=steps.get)[: NEXT + 1]
    later = (f"{name} (+{100 * (steps[name] / steps[first] - 1):.1f} %)" for name in others)
    return f"The shortest step on several GPUs: {first}. Next: {', '.join(later)}."


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
