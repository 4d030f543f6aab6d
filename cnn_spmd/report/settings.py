"""Find the settings that vary among runs, and what the runs are ranked by.

A setting is a field of the config, or "mesh". A combination is the runs that share the value of
every setting but the seed. Runs are those of load.load_sweeps.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cnn_spmd import config as configs
from cnn_spmd.report import batch_scaling, captions, compare
from cnn_spmd.report.compare import SPEED

# Settings that change the speed, and what is learned at most through rounding or the batch: a
# sweep of batch_per_device is about speed, one of batch_size is not.
OF_SPEED = (*compare.NOT_THE_RECIPE, "mesh", "parallelism", "batch_per_device", "device_kind")
MOST_NAMED = 2  # settings that a line of a legend has room to name
MOST_VALUES = 12  # of a setting, or of a fact, that are named


class Setting(NamedTuple):
    """A setting that varies.

    label: its name, without sections where that is clear. values: in order. along: the other
    settings that change with it, in every run.
    """

    name: str
    label: str
    values: list
    along: list[str]


class Combination(NamedTuple):
    """The runs that differ in nothing but their seed; values: by the settings' labels."""

    values: dict[str, Any]
    runs: list[dict]

    @property
    def completed(self) -> list[dict]:
        """Return the completed runs."""
        return [run for run in self.runs if run["status"] == "completed"]

    def having(self, metric: str) -> list[dict]:
        """Return the completed runs that have a metric; of several with one seed, the first."""
        found: dict[Any, dict] = {}
        for run in self.completed:
            if compare.numbers([run], metric):
                found.setdefault(value_of(run, "seed"), run)
        return list(found.values())

    def numbers(self, metric: str) -> list[float]:
        """Return a metric of each of these runs."""
        return compare.numbers(self.having(metric), metric)


class Overview(NamedTuple):
    """What varies among the runs of a sweep, and what they are ranked by.

    metric: "accuracy" or SPEED. target: the accuracy to which seconds are counted; None where there
    is none. split: of the evaluations, as of compare.split_of. is_of_lone_runs: as the sweep has it
    (load.sweep_of_lone_runs).
    """

    settings: list[Setting]
    combinations: list[Combination]
    metric: str
    target: float | None
    split: str
    is_of_lone_runs: bool

    @property
    def metric_name(self) -> str:
        """Return what the runs are ranked by in words: "test accuracy" or "images/s"."""
        return "images/s" if self.metric == SPEED else f"{self.split} accuracy"

    def name_of(self, combination: Combination) -> str:
        """Return what sets a combination apart: the names of lone runs, or a sweep's settings."""
        if self.is_of_lone_runs:
            return captions.names_text([run["name"] for run in combination.runs])
        return values_text(combination.values)


def overview(sweep: dict, target_error: float | None) -> Overview:
    """Return the overview of a sweep; target_error: as target_accuracy takes it."""
    runs = sweep["runs"]
    found = varied(runs)
    combos = combinations(runs, found)
    return Overview(
        found,
        combos,
        main_metric(runs, found),
        target_accuracy(combos, target_error),
        compare.split_of(run["config"] for run in runs),
        sweep.get("is_of_lone_runs", False),
    )


def varied(runs: Sequence[dict]) -> list[Setting]:
    """Return the settings of more than one value among these runs.

    Settings that change together are one, named after the first.
    """
    names = dict.fromkeys(["mesh", *(name for run in runs for name in run["settings"])])
    found: dict[Any, Setting] = {}
    for name in names:
        values = [value_of(run, name) for run in runs]
        texts = list(map(str, values))
        known = dict(zip(texts, values, strict=True))
        known.pop("None", None)
        if len(known) < 2:
            continue
        pattern = "seed" if name == "seed" else tuple(map(texts.index, texts))
        if pattern in found:
            found[pattern].along.append(name)
        else:
            short = name.removesuffix(".name").rsplit(".", 1)[-1]
            found[pattern] = Setting(name, short, ordered(known.values()), [])
    labels = [each.label for each in found.values()]
    return [
        each if labels.count(each.label) == 1 else each._replace(label=each.name)
        for each in found.values()
    ]


def training_of(combination: Combination, overview: Overview) -> list[str]:
    """Return what decides on what a combination learns: its settings except mesh and scheme.

    Where each device has its own batch norm, mesh and scheme decide, too.
    """
    run = combination.runs[0]
    is_per_device = value_of(run, "model.batch_norm") == "per_device"
    of_speed = ("data.dir", "data.resident") if is_per_device else configs.COMPUTING
    names = [name for each in overview.settings for name in (each.name, *each.along)]
    decide = [
        name
        for name in names
        if name != "batch_per_device" and not configs.is_part_of(name, of_speed)
    ]
    batch = (run["figures"] or {}).get("batch_size")
    return [str(batch), *(str(value_of(run, name)) for name in decide if name != "seed")]


def value_of(run: dict, name: str) -> Any:
    """Return a run's value of a setting; None where it is not known."""
    if name == "mesh":
        sizes = run["figures"].get("mesh")
        return compare.mesh_name(sizes.values()) if sizes else run["mesh"]
    places = (run["settings"], run["figures"], run["config"])
    return next((place[name] for place in places if place.get(name) is not None), None)


def ordered(values: Sequence) -> list:
    """Return values sorted where all are numbers, otherwise as they come."""
    values = list(values)
    return sorted(values) if all(map(is_number, values)) else values


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_of_learning(name: str) -> bool:
    """Return whether a setting changes neither the speed nor the bytes of a program."""
    if name.startswith("optimizer."):
        return name != "optimizer.name"
    return name in ("model.dropout", "label_smoothing", "epochs", "steps")


def combinations(runs: Sequence[dict], settings: Sequence[Setting]) -> list[Combination]:
    """Return the combinations of the settings' values that runs have, as they come."""
    found: dict[tuple, Combination] = {}
    for run in runs:
        values = {each.label: value_of(run, each.name) for each in settings if each.name != "seed"}
        found.setdefault(tuple(map(str, values.values())), Combination(values, [])).runs.append(run)
    return list(found.values())


def values_text(values: Mapping[str, Any]) -> str:
    """Return "mesh=4x2, learning_rate=0.1" for a combination's values."""
    texts = {label: compare.value_text(value) for label, value in values.items()}
    return ", ".join(f"{label}={text}" for label, text in texts.items() if text)


def legend_title(values: Mapping[str, Any]) -> str:
    """Return the labels of settings, joined, where a line of a legend has no room for them."""
    return ", ".join(values) if len(values) > MOST_NAMED else ""


def legend_text(values: Mapping[str, Any]) -> str:
    """Return a combination's values as a line of a legend, without labels that legend_title has."""
    if legend_title(values):
        return ", ".join(map(compare.value_text, values.values()))
    return values_text(values)


def list_text(values: Sequence) -> str:
    """Return values joined by commas; of many, the first and the last."""
    texts = list(map(compare.value_text, values))
    if len(texts) > MOST_VALUES:
        texts = [*texts[: MOST_VALUES - 1], f"... {texts[-1]} ({len(texts)} values)"]
    return ", ".join(texts)


# ---- Metrics


def are_random(runs: Sequence[dict]) -> bool:
    """Return whether the images of all runs are random, where that is known.

    What is learned of them says nothing.
    """
    names = (run["figures"].get("dataset") or run["config"].get("data.name") for run in runs)
    return set(filter(None, names)) == {"synthetic"}


def is_evaluated(run: dict) -> bool:
    """Return whether a run was evaluated, and not on random images."""
    return bool(batch_scaling.evaluations(run)) and not are_random([run])


def main_metric(runs: Sequence[dict], settings: Sequence[Setting]) -> str:
    """Return what the runs are ranked by: accuracy, or SPEED.

    It is SPEED where nothing but the speed can differ, where no run has an accuracy, and where the
    images are random.
    """
    others = [each.name for each in settings if each.name != "seed"]
    about_speed = others and all(name.startswith(OF_SPEED) for name in others)
    if about_speed or not compare.numbers(runs, "accuracy") or are_random(runs):
        return SPEED
    return "accuracy"


def ranked(overview: Overview) -> list[Combination]:
    """Return the combinations that have the metric, best mean first.

    Where two are equal, the faster one is first.
    """

    def place(combination: Combination) -> tuple[float, float]:
        speeds = combination.numbers(SPEED) or [0.0]
        return statistics.mean(combination.numbers(overview.metric)), statistics.mean(speeds)

    found = [each for each in overview.combinations if each.numbers(overview.metric)]
    return sorted(found, key=place, reverse=True)


def at_edges(combination: Combination, overview: Overview) -> str:
    """Say which numbers of a combination are the smallest or largest tried; "" for none."""
    said = []
    for each in overview.settings:
        is_tuned = each.name not in ("seed", "data.validation")
        if not is_tuned or not all(map(is_number, each.values)):
            continue
        edges = {each.values[0]: "smallest", each.values[-1]: "largest"}
        if word := edges.get(combination.values[each.label]):
            said.append(f"{each.label} is the {word} value tried")
    return ", ".join(said)


# ---- Time to an accuracy


def timed_evaluations(run: dict) -> list[tuple[float, float]]:
    """Return seconds of training and accuracy of each evaluation after step 0.

    Returns [] for a single evaluation: its seconds are the run's length, and say nothing of when
    the accuracy was reached.
    """
    seconds = {
        row["step"]: row["train_seconds"]
        for row in run["metrics"]
        if row["split"] == "train" and is_number(row.get("train_seconds"))
    }
    accuracies = dict(batch_scaling.evaluations(run))
    found = [(seconds[step], share) for step, share in accuracies.items() if step in seconds]
    return found if len(found) > 1 else []


def seconds_to(run: dict, target: float) -> float | None:
    """Return the seconds of training at the first evaluation that has the accuracy."""
    return next((at for at, share in timed_evaluations(run) if share >= target), None)


def target_accuracy(found: Sequence[Combination], target_error: float | None) -> float | None:
    """Return 1 - target_error, or the accuracy that half of the combinations reach.

    The latter is rounded down to whole percent. None where no combination was evaluated at known
    seconds, or only one without a target_error, and where the images are random.
    """
    reached = []
    for combination in found:
        runs = filter(is_evaluated, combination.runs)
        shares = [share for run in runs for _, share in timed_evaluations(run)]
        reached += [max(shares)] if shares else []
    if target_error is not None and reached:
        return round(1 - target_error, 9)
    if len(reached) < 2:
        return None
    return batch_scaling.whole_percent(sorted(reached, reverse=True)[(len(reached) - 1) // 2])
