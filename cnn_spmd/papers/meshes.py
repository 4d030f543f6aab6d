"""Make results/meshes.md: sweeps over meshes and schemes."""

import collections
import itertools
from collections.abc import Iterable, Sequence

from cnn_spmd.papers import predictions
from cnn_spmd.papers.layout import commands, filled_in, joined, table
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare, run_tables
from cnn_spmd.training import runfiles

ACCURACY = "test accuracy, %"
NEXT = 2  # meshes and schemes that are named after the fastest
NEAR = 0.01  # slower by so much may be faster in another run: our choice
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
    best = fastest_table([sweeps[name] for name in predictions.ALL_SCHEMES.values()])
    return filled_in("meshes.md", spread=100 * spread(sweeps.values()), best=best, sweeps=sections)


def fastest_table(sweeps: Iterable[dict]) -> str:
    """Return the fastest mesh and scheme of sweeps by batch, and those that are nearly as fast."""
    rows = []
    for sweep in sweeps:
        for groups in sweep_panels(sweep):
            first, *others = by_step(groups, sweep["devices"])
            near = [name for name, step, _ in others if step < (1 + NEAR) * first[1]]
            rows.append(
                {
                    "GPUs": compare.hardware_of(sweep).partition(",")[0],
                    "batch per GPU": str(batch_per_device(groups)),
                    "fastest": first[0],
                    "step, ms": f"{first[1]:.3f}",
                    "speedup": f"{first[2].speedups()[0]:.2f}",
                    f"step at most {100 * NEAR:g} % longer": ", ".join(near) or "-",
                }
            )
    return table(rows)


def by_step(
    groups: Iterable[compare.Group], devices: int
) -> list[tuple[str, float, compare.Group]]:
    """Return mesh and scheme, the step in ms and the group of those on `devices`, fastest first."""
    found = [
        (
            f"{compare.mesh_name(group.mesh)} `{group.parallelism}`",
            group.average("step_milliseconds", "median"),
            group,
        )
        for group in groups
        if group.devices == devices
    ]
    return sorted(found, key=lambda row: row[1])


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
    network = f"{sweep['experiment']}: {figures['model']}"
    day = sweep["started"].partition("T")[0]
    meshes = ", ".join(dict.fromkeys(run["mesh"] for run in sweep["runs"]))
    kind, _, cores = compare.hardware_of(sweep).partition(", ")
    parts = [f"## {network}, {kind}, {day}: {meshes}", f"Data: {figures['dataset']}; {cores}."]
    for groups in sweep_panels(sweep):
        panel = groups[0].panel
        parts += [f"{panel[0].upper()}{panel[1:]}:", sweep_table(groups), fastest_text(groups)]
    parts += unfinished_runs(sweep)
    picture = f"{name}.png"
    if (DATA.parent / picture).exists():
        parts.append(f"Charts of this sweep: [{picture}]({picture}).")
    if "note" in sweep:
        parts.append(sweep["note"])
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


def batch_per_device(panel: Sequence[compare.Group]) -> int:
    """Return the images that each device has in a step of a panel."""
    return panel[0].figures["batch_size"] // panel[0].devices


def sweep_panels(sweep: dict) -> list[list[compare.Group]]:
    """Return a panel per batch: a group for each mesh and scheme, of runs that differ in seed."""

    return sorted(compare.panels_of(compare.groups_of(sweep["runs"])), key=batch_per_device)


def fastest_text(groups: Sequence[compare.Group]) -> str:
    """Name the fastest mesh and scheme on the most GPUs, and the next ones; "" for fewer than 3."""
    most = max(group.devices for group in groups)
    steps = by_step(groups, most)
    if len(steps) <= NEXT or groups[0].figures["device_kind"] == "cpu":
        return ""
    (first, shortest, _), *others = steps[: NEXT + 1]
    later = (f"{name} (+{100 * (step / shortest - 1):.1f} %)" for name, step, _ in others)
    return f"The shortest step of these rows on {most} GPUs: {first}. Next: {', '.join(later)}."


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
