"""Runs side by side: which differ in nothing but their seed, and how much faster than one device they are.

A run is an entry of sweep.json (sweep.py): name, mesh, settings (what was swept), status, reason and figures
(report.figures_of). A group is the completed runs that differ in nothing but their seed; a panel is the groups that differ
in nothing but mesh and parallelism, the ones that one chart compares.
"""

import statistics

from cnn_spmd.config import flat

COLUMNS = [
    "mesh",
    "parallelism",
    "batch and settings",
    "n",
    "images/s",
    "step, ms (p10 to p90)",
    "speedup",
    "efficiency, %",
    "parameters and optimizer, MB a device",
    "ring MB a step",
    "theory",
    "test accuracy, %",
]


# Fields of a config that change no number, not even the speed, or that every table has a column for.
NOT_COMPARED = (
    "schema",
    "run",
    "mesh.",
    "data.dir",
    "data.fallback",
    "checkpoint.",
    "eval.every_epochs",
    "profile",
)
# ... or nothing but the speed, and the seed: runs that differ in these are averaged.
NOT_THE_RECIPE = (*NOT_COMPARED, "seed", "steps_per_call", "model.levers", "data.resident")

# Fields that older runs in results/ do not have, and what they would have said.
LATER = {"optimizer.clip_norm": 0.0, "data.skip_bad": 0}


def recipe(run: dict) -> str:
    """What the summary.json of two runs must share for their figures to be averaged: the config but for NOT_THE_RECIPE."""
    fields = LATER | flat(run["config"])
    return repr(
        sorted(
            (name, str(value))
            for name, value in fields.items()
            if not name.startswith(NOT_THE_RECIPE)
        )
    )


def machine(run: dict) -> str:
    """The devices of a run, from its summary.json, in words."""
    if run["device_kind"] == "cpu":
        return f"CPU, {run['host_cores']} cores"
    return f"{run['devices']} x {run['device_kind']}"


def panel_of(run: dict) -> str:
    """What a run shares with those it is compared with: its batch, a device where that was swept, and other settings."""
    settings, figures = run["settings"], run["figures"]
    if "batch_per_device" in settings:
        batch = f"batch {settings['batch_per_device']} a device"
    else:
        batch = f"batch {figures.get('batch_size', settings.get('batch_size', '?'))}"
    known = ("mesh", "parallelism", "seed", "batch_size", "batch_per_device")
    return ", ".join(
        [batch, *(f"{name}={value}" for name, value in settings.items() if name not in known)]
    )


def key_of(run: dict) -> tuple[str, tuple[int, int], str]:
    """What the runs of a group share, of a completed run: panel, mesh (data, model), parallelism."""
    figures = run["figures"]
    return (
        panel_of(run),
        (figures["mesh"]["data"], figures["mesh"]["model"]),
        figures["parallelism"],
    )


def groups_of(runs: list[dict]) -> list[dict]:
    """The completed runs in groups, ordered by panel (as they come), devices, mesh and parallelism.

    A seed counts once, by the first run that has a speed. Each: panel, mesh (data, model), devices, parallelism, runs, and
    base: the group on one device in the same panel, of the same parallelism where there is a choice; None where there is none.
    """
    groups = {}
    completed = [run for run in runs if run["status"] == "completed" and run["figures"]]
    for run in sorted(completed, key=lambda run: not run["figures"]["images_per_second"]):
        panel, mesh, parallelism = key = key_of(run)
        groups.setdefault(
            key,
            dict(
                panel=panel, mesh=mesh, devices=mesh[0] * mesh[1], parallelism=parallelism, runs=[]
            ),
        )
        if run["figures"]["seed"] not in values(groups[key], "seed"):
            groups[key]["runs"].append(run)
    panels = list(dict.fromkeys(map(panel_of, completed)))
    ordered = sorted(
        groups.values(),
        key=lambda group: (
            panels.index(group["panel"]),
            group["devices"],
            -group["mesh"][0],
            group["parallelism"],
        ),
    )
    for group in ordered:
        alone = [
            other
            for other in ordered
            if other["panel"] == group["panel"]
            and other["devices"] == 1
            and values(other, "images_per_second")
        ]
        alone.sort(key=lambda other: other["parallelism"] != group["parallelism"])
        group["base"] = alone[0] if alone else None
    return ordered


def values(group: dict, *path: str) -> list[float]:
    """A figure of each run of a group, such as ("step_milliseconds", "median"); runs that have none are left out."""
    found = [run["figures"] for run in group["runs"]]
    for name in path:
        found = [value.get(name) for value in found if value is not None]
    return [value for value in found if value is not None]


def average(group: dict, *path: str) -> float | None:
    """The mean of a figure over a group's runs; None where no run has it."""
    return statistics.mean(found) if (found := values(group, *path)) else None


def speedups(group: dict) -> list[float]:
    """Throughput of each run relative to the mean of the base; empty where there is no one-device run."""
    if group["base"] is None:
        return []
    return [
        rate / average(group["base"], "images_per_second")
        for rate in values(group, "images_per_second")
    ]


def mean(numbers: list[float], digits: int) -> str:
    """The mean with thousands separated, and ± the sample standard deviation where there are several; "" for none."""
    if not numbers:
        return ""
    text = f"{statistics.mean(numbers):,.{digits}f}"
    return text + (f" ± {statistics.stdev(numbers):,.{digits}f}" if len(numbers) > 1 else "")


def rate(numbers: list[float]) -> str:
    """Images/s: whole ones, with a decimal where they are few."""
    return mean(numbers, 0 if max(numbers, default=0) >= 100 else 1)


def cells(group: dict) -> list[str]:
    """A group's row under COLUMNS."""
    times = {name: average(group, "step_milliseconds", name) for name in ("median", "p10", "p90")}
    gains = speedups(group)
    held = [
        sum(size or 0 for size in run["figures"]["bytes_per_device"].values()) / 1e6
        for run in group["runs"]
    ]
    theory = average(group, "closed_form_ring_bytes")
    # Older runs, which have no theory for a variable batch, counted one part of it.
    older = theory is None and any(
        run["figures"].get("dense_microbatch", 1) for run in group["runs"]
    )
    ring = None if older else average(group, "ring_bytes")
    return [
        "x".join(map(str, group["mesh"])),
        group["parallelism"],
        group["panel"],
        str(len(group["runs"])),
        rate(values(group, "images_per_second")),
        ""
        if None in times.values()
        else "{median:,.3f} ({p10:,.3f} to {p90:,.3f})".format(**times),
        mean(gains, 2),
        f"{100 * statistics.mean(gains) / group['devices']:.1f}" if gains else "",
        f"{statistics.mean(held):,.1f}",
        *("" if moved is None else f"{moved / 1e6:,.1f}" for moved in (ring, theory)),
        mean([100 * accuracy for accuracy in values(group, "accuracy")], 2),
    ]


def hardware_of(sweep: dict) -> str:
    """The hardware in words."""
    hardware = sweep["hardware"]
    if not hardware:
        return "hardware not known (no run has finished)"
    if hardware["device_kind"] == "cpu":
        simulated = f"{sweep['devices']} devices simulated on one " if sweep["devices"] > 1 else ""
        return f"{simulated}CPU, {hardware['host_cores']} cores"
    return f"{sweep['devices']} x {hardware['device_kind']}, {hardware['host_cores']} host cores"
