"""Compare runs: which differ in nothing but their seed, and their speedups.

A run is an entry of sweep.json: name, mesh, settings (the swept fields), status, reason, figures
(runfiles.figures_of). load.py adds its config and the digest of its data. A group is the completed
runs that differ in nothing but their seed. A panel is the groups that differ in nothing but mesh
and scheme: one chart compares the groups of a panel.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from cnn_spmd.config import complete, flat, own_name
from cnn_spmd.training import runfiles

# Fields of a config that change no number, not even the speed, or that have columns of their own.
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
# Fields that change the speed at most, and the seed: runs that differ in these are averaged.
NOT_THE_RECIPE = (
    *NOT_COMPARED,
    "seed",
    "steps_per_call",
    "collectives_in_flight",
    "model.fast",
    "data.resident",
)
SPEED = "images_per_second"  # the metric of runs that are ranked by their speed


def recipe(run: dict) -> str:
    """Return what two runs (summary.json) must share to be averaged."""
    fields = flat(complete(run["config"]))
    kept = {name: str(fields[name]) for name in fields if not name.startswith(NOT_THE_RECIPE)}
    return repr(sorted(kept.items()))


def panel_of(run: dict) -> str:
    """Return the panel of a run: its batch and its settings."""
    settings, figures = run["settings"], run["figures"]
    if "batch_per_device" in settings:
        batch = f"batch {settings['batch_per_device']} per device"
    else:
        batch = f"batch {figures.get('batch_size', settings.get('batch_size', '?'))}"
    known = ("mesh", "parallelism", "seed", "batch_size", "batch_per_device")
    others = [
        f"{name}={value_text(value)}"
        for name, value in settings.items()
        if name not in known and value != ""
    ]
    return ", ".join([batch, *others])


@dataclasses.dataclass(eq=False)
class Group:
    """The completed runs that differ in nothing but their seed; a seed counts once.

    mesh: its sizes. base: the one-device group of the panel, of the same scheme where there is one;
    None where the panel has no one-device run.
    """

    panel: str
    mesh: tuple[int, ...]
    parallelism: str
    runs: list[dict] = dataclasses.field(default_factory=list)
    base: "Group | None" = None

    @property
    def devices(self) -> int:
        """Return the number of devices of the mesh."""
        return math.prod(self.mesh)

    @property
    def figures(self) -> dict:
        """Return the figures of the first run, of which only those that all runs share count."""
        return self.runs[0]["figures"]

    def values(self, *path: str) -> list[float]:
        """Return a figure of each run that has it.

        path: its names, such as "step_milliseconds", "median".
        """
        found = [run["figures"] for run in self.runs]
        for name in path:
            found = [value.get(name) for value in found if value is not None]
        return [value for value in found if value is not None]

    def average(self, *path: str) -> float | None:
        """Return the mean of a figure over the runs; None where no run has it."""
        return statistics.mean(found) if (found := self.values(*path)) else None

    def speedups(self) -> list[float]:
        """Return each run's throughput relative to the base's mean; [] without a base."""
        return [rate / self.base.average(SPEED) for rate in self.values(SPEED)] if self.base else []


def groups_of(runs: list[dict]) -> list[Group]:
    """Return the groups of the completed runs.

    Their order is by panel (as they come), devices, mesh and scheme. Of runs of one seed, the first
    that has a speed counts.
    """
    groups: dict[tuple, Group] = {}
    completed = [run for run in runs if run["status"] == "completed" and run["figures"]]
    for run in sorted(completed, key=lambda run: not run["figures"][SPEED]):
        key = group_key(run)
        group = groups.setdefault(key, Group(*key))
        if run["figures"]["seed"] not in group.values("seed"):
            group.runs.append(run)
    panels = list(dict.fromkeys(map(panel_of, completed)))

    def order(group: Group) -> tuple:
        sizes = [-size for size in group.mesh]
        return panels.index(group.panel), group.devices, sizes, group.parallelism

    ordered = sorted(groups.values(), key=order)
    for group in ordered:
        bases = [each for each in ordered if each.panel == group.panel and each.devices == 1]
        timed = [each for each in bases if each.values(SPEED)]
        same_scheme = [each for each in timed if each.parallelism == group.parallelism]
        group.base = next(iter(same_scheme + timed), None)
    return ordered


def group_key(run: dict) -> tuple[str, tuple[int, ...], str]:
    """Return what the runs of a group share: panel, sizes of the mesh, and scheme."""
    mesh = tuple(run["figures"]["mesh"].values())
    return panel_of(run), mesh, run["figures"]["parallelism"]


def panels_of(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups by panel."""
    panels: dict[str, list[Group]] = {}
    for group in groups:
        panels.setdefault(group.panel, []).append(group)
    return list(panels.values())


def numbers(runs: Sequence[dict], metric: str) -> list[float]:
    """Return a metric, SPEED or one of the last evaluation, of each run that has it."""
    # Older sweeps have accuracy and loss outside `eval` only.
    found = (run["figures"] | (run["figures"].get("eval") or {}) for run in runs)
    return [figures[metric] for figures in found if figures.get(metric) is not None]


def metric_label(name: str, split: str) -> str:
    """Return the header of a metric's column, or the label of its axis; split: as of split_of."""
    if name == SPEED:
        return "images/s"
    return f"{split} {name}, %" if name in runfiles.SHARES else f"{split} {name}"


def factor_of(metric: str) -> float:
    """Return 100 for a metric that is shown in percent, otherwise 1."""
    return 100 if metric in runfiles.SHARES else 1


def split_of(configs: Iterable[dict]) -> str:
    """Return on which images runs are evaluated: "test", "validation", or both words.

    configs: the runs' flat configs; a run without data.validation is evaluated on the test split.
    """
    splits = {"validation" if config.get("data.validation") else "test" for config in configs}
    return " or ".join(sorted(splits)) or "test"


def data_name(run: dict) -> str:
    """Return the name of a run's data set, as config.own_name; "" where it is not known."""
    name, config = run["figures"].get("dataset") or "", run["config"]
    kind = config.get("data.name") or ""
    return own_name(kind, config.get("data.dir") or "", name or kind)


def by_data(runs: Sequence[dict]) -> dict[str, list[dict]]:
    """Return the runs whose accuracies compare, by the name of their images (data_name).

    Their data set, its digest and the split are the same. A run without a digest compares with
    those of its data set if these have one digest. Where two data sets are called alike, the full
    name stands, which has the digest in it.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        data = run["figures"].get("dataset") or run["config"].get("data.name") or "unknown data"
        groups.setdefault((data, split_of([run["config"]])), []).append(run)
    names = [(data_name(members[0]), split) for (_, split), members in groups.items()]
    named: dict[str, list[dict]] = {}
    for (data, split), members in groups.items():
        name = data_name(members[0])
        data = name if name and names.count((name, split)) == 1 else data
        data += "" if split == "test" else f", {split} images"
        several = len({run["digest"] for run in members} - {None}) > 1
        for run in members:
            digest = f" (digest {(run['digest'] or 'unknown')[:8]})" if several else ""
            named.setdefault(data + digest, []).append(run)
    return named


def value_text(value: Any) -> str:
    """Return a setting's value as text: "1" for 1.0."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def mesh_name(sizes: Iterable[int]) -> str:
    """Return the name of a mesh with these sizes: "4x2" for data=4, model=2."""
    return "x".join(map(str, sizes))


def machine(run: dict) -> str:
    """Return the devices of a run (summary.json) in words: "2 x H100", "CPU, 4 cores"."""
    if run["device_kind"] == "cpu":
        return f"CPU, {run['host_cores']} cores"
    return f"{run['devices']} x {short_kind(run['device_kind'])}"


def short_kind(device_kind: str) -> str:
    """Return "H100" for "NVIDIA H100 80GB HBM3"."""
    return device_kind.removeprefix("NVIDIA ").split(" ")[0]


def hardware_of(sweep: dict) -> str:
    """Return the hardware of a sweep in words."""
    hardware = sweep["hardware"]
    if not hardware:
        return "hardware not known (no run has finished)"
    if hardware["device_kind"] == "cpu":
        simulated = f"{sweep['devices']} devices simulated on one " if sweep["devices"] > 1 else ""
        return f"{simulated}CPU, {hardware['host_cores']} cores"
    return f"{sweep['devices']} x {hardware['device_kind']}, {hardware['host_cores']} host cores"
