"""Make the section of results/batches.md on batches of up to 8,192.

Its runs are those of experiments/large_batch_cifar.py, at the learning rates that rates.py found.
Errors are in %; a run whose loss or weights became infinite or NaN has none: it diverged.
"""

import collections
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set

from cnn_spmd.papers import measured, published, summaries
from cnn_spmd.papers.layout import fence, filled_in, grid, table
from cnn_spmd.report import batch_scaling, compare, text
from cnn_spmd.report.text import mean_and_deviation

PICTURE = "large_batches.svg"
EXPERIMENTS = "large_batch_"  # begins their names: large_batch_cifar_lars_bn, ...
CIFAR = f"{EXPERIMENTS}cifar_"
# Parts of an experiment's name -> the names of its data and its rule in the tables.
DATA_NAMES = {"cifar": "CIFAR-10", "imagenette": "Imagenette"}
RULE_NAMES = {"linear": "SGD", "lars": "LARS", "larc": "LARC"}
MARGIN = 0.5  # points that a batch may add and still costs nothing: our choice, no paper has one
GUESSING = 90.0  # the error of a guess among ten classes, at which a diverged run counts
MISS = 0.1  # the most by which a fit may miss the steps, so that its knee is shown: our choice

# Experiment and batch -> the best learning rate of a search; several tie, or all diverged.
BestRates = dict[tuple[str, int], list[float]]
# Each experiment and batch of a search whose best rate is the smallest or the largest tried.
Edges = Set[tuple[str, int]]
# Data, "network, rule" and batch -> the errors of its runs; None where one diverged.
Errors = dict[tuple[str, str, int], list[float | None]]


def of_large_batches(runs: Iterable[dict]) -> list[dict]:
    """Return the runs of experiments/large_batch_cifar.py."""
    return [run for run in runs if run["experiment"].startswith(EXPERIMENTS)]


def names_of(experiment: str) -> tuple[str, str]:
    """Return the data, and "network, rule", of an experiment's name."""
    data, rule, *bn = experiment.removeprefix(EXPERIMENTS).split("_")
    return DATA_NAMES[data], f"{'AlexNet-BN' if bn else 'AlexNet'}, {RULE_NAMES[rule]}"


def error_of(run: dict) -> float | None:
    """Return the error of a run's last evaluation; None where it diverged."""
    return None if summaries.diverged(run) else 100 * (1 - run["eval"]["accuracy"])


def errors_of(runs: Sequence[dict]) -> Errors:
    """Return the errors of the runs of large batches, in the order of the table and of seeds."""
    errors = collections.defaultdict(list)
    for run in sorted(of_large_batches(runs), key=lambda run: run["seed"]):
        errors[*names_of(run["experiment"]), run["batch_size"]].append(error_of(run))
    return dict(sorted(errors.items()))


def errors_table(
    errors: Errors, setting_name: str, rates: Mapping[tuple[str, str, int], str] | None = None
) -> str:
    """Return errors by data, setting and batch, a column for each batch.

    rates: the learning rate of a cell, which stands after its errors in parentheses.
    """
    counts = collections.defaultdict(list)
    for data, setting, batch in sorted(errors, key=lambda key: key[2]):
        counts[data, setting].append(str(len(errors[data, setting, batch])))
    cells = {
        (data, setting, "/".join(dict.fromkeys(counts[data, setting])), batch): errors_text(own)
        + (f" ({rates[data, setting, batch]})" if rates else "")
        for (data, setting, batch), own in errors.items()
    }
    return grid(["data", setting_name, "n"], "batch {}", cells)


def errors_text(errors: Sequence[float | None]) -> str:
    """Return the mean and deviation of errors, and how many runs diverged."""
    finite = [error for error in errors if error is not None]
    diverged = len(errors) - len(finite)
    if not diverged:
        return mean_and_deviation(finite, 2)
    return f"{mean_and_deviation(finite, 2)}; {diverged} diverged" if finite else "diverged"


def rate_of(run: dict) -> float:
    """Return the config's learning rate, which is that of batch 128."""
    return run["config"]["optimizer"]["learning_rate"]


def rate_text(rate: float) -> str:
    """Return a rate without its leading zero, so that the widest table fits a screen."""
    return f"{rate:g}".removeprefix("0")


def rates_of(runs: Iterable[dict]) -> dict[tuple[str, str, int], str]:
    """Return the config's learning rate of runs as text, by data, setting and batch."""
    return {
        (*names_of(run["experiment"]), run["batch_size"]): rate_text(rate_of(run)) for run in runs
    }


def commands_of(runs: Iterable[dict]) -> list[str]:
    """Return the command of each setting on CIFAR-10, that of its smallest seed."""
    first: dict[tuple[str, int], str] = {}
    for run in sorted(runs, key=lambda run: (run["experiment"], run["batch_size"], run["seed"])):
        if run["experiment"].startswith(CIFAR) and "command" in run:
            first.setdefault((run["experiment"], run["batch_size"]), measured.command_of(run))
    return list(first.values())


def lowest_text(errors: Errors) -> str:
    """Say which network and rule has the lowest mean error at each batch, on CIFAR-10."""
    lowest: dict[int, tuple[float, str]] = {}
    for (data, setting, batch), own in errors.items():
        if data == DATA_NAMES["cifar"] and None not in own:
            found = statistics.mean(own), setting
            lowest[batch] = min(lowest.get(batch, found), found)
    parts = (
        f"at {batch:,} images {errors_text(errors[DATA_NAMES['cifar'], setting, batch])} % with "
        f"{setting}"
        for batch, (_, setting) in sorted(lowest.items())
    )
    return f"The lowest errors: {'; '.join(parts)}."


def machines_of(runs: Iterable[dict]) -> str:
    """Return the hardware of runs in words."""
    return ", ".join(sorted({compare.machine(run) for run in runs}))


def section(runs: Sequence[dict], best: BestRates, edges: Edges, worse: Sequence[dict] = ()) -> str:
    """Return the section on the runs at the best rates of a search; "" without runs.

    worse: runs of some of these settings at the search's best rate, whose errors are higher.
    """
    runs = of_large_batches(runs)
    errors = errors_of(runs)
    if not errors:
        return ""
    has_imagenette = DATA_NAMES["imagenette"] in {data for data, *_ in errors}
    return filled_in(
        "large_batches.md",
        epochs=max(run["epochs"] for run in runs),
        errors=errors_table(errors, "network, rule", rates_of(runs)),
        lowest=lowest_text(errors),
        machines=machines_of(runs),
        rates=rates_text(runs, best, edges),
        worse=worse_text(worse),
        imagenette="" if has_imagenette else "Imagenette was not run with these rules.",
        margin=MARGIN,
        guessing=GUESSING,
        claims=claims_table(errors, edges),
        at_edge="Rate at an edge: a better one may lie beyond those tried." if edges else "",
        steps=steps_section(runs),
        commands=fence(*commands_of(runs)),
    )


def cost(runs: Sequence[dict], variant: str, batch: int) -> float:
    """Return how many points of error a batch adds on CIFAR-10, compared with 128."""
    errors = errors_of(runs)
    setting = names_of(f"{CIFAR}{variant}")
    return statistics.mean(errors[*setting, batch]) - statistics.mean(errors[*setting, 128])


def rates_text(runs: Sequence[dict], best: BestRates, edges: Edges) -> str:
    """Say whether runs have the best rates of the search, and where better ones may exist."""
    others = settings_text(
        run
        for run in runs
        if rate_of(run) not in best.get((run["experiment"], run["batch_size"]), ())
    )
    text = "Learning rates are the best of [rates.md](rates.md#large-batches)"
    text += f", except {others}." if others else "."
    unsure = settings_text(run for run in runs if (run["experiment"], run["batch_size"]) in edges)
    return text + (f" A better rate may lie beyond those tried for {unsure}." if unsure else "")


def worse_text(worse: Iterable[dict]) -> str:
    """Say what runs at the search's best rate reached, where the table has a better rate."""
    errors, rates = errors_of(worse), rates_of(worse)
    if not errors:
        return ""
    parts = [
        f"{setting} at batch {batch:,}: {errors_text(own)} ({rates[data, setting, batch]})"
        for (data, setting, batch), own in errors.items()
    ]
    return (
        f"Whole runs at the search's best rate have a higher test error: {'; '.join(parts)}. So "
        "test errors chose the rate of these cells: take them as optimistic."
    )


def settings_text(runs: Iterable[dict]) -> str:
    """Return each "data, network, rule at batch B" of runs once."""
    names = {
        f"{', '.join(names_of(run['experiment']))} at batch {run['batch_size']:,}" for run in runs
    }
    return "; ".join(sorted(names))


# ---- What You et al. claim


def claims_table(errors: Errors, edges: Edges) -> str:
    """Return what published.LARGE_BATCHES claims, and whether it holds on CIFAR-10."""
    return table([claim_row(*row[:3], errors, edges) for row in published.LARGE_BATCHES])


def claim_row(variant: str, batch: int, words: str, errors: Errors, edges: Edges) -> dict[str, str]:
    """Return the cells of a row of published.LARGE_BATCHES."""
    rule, *bn = variant.split("_")
    costs = words != published.NO_LOSS
    # What a batch costs is a sum of errors with these signs.
    signs = {(variant, batch): 1, (variant, 128): -1}
    name = RULE_NAMES[rule] + (" with batch norm" if bn else "")
    claim = f"{name}: batch {batch:,} costs {'accuracy' if costs else 'nothing'}"
    if bn and costs:
        signs = {(rule, batch): 1, (rule, 128): -1, (variant, batch): -1, (variant, 128): 1}
        claim = f"{RULE_NAMES[rule]}: batch {batch:,} costs less with batch norm"
    terms = []
    for (name, size), sign in signs.items():
        own = errors.get((*names_of(f"{CIFAR}{name}"), size), [])
        terms.append([sign * (GUESSING if error is None else error) for error in own])
    points, holds = verdict(terms, costs)
    if holds and any((f"{CIFAR}{name}", size) in edges for name, size in signs):
        holds += ", rate at an edge"
    cells = {"claim": claim, "published, ImageNet": words}
    return cells | {"points here, ± standard error": points, "holds here": holds}


def verdict(terms: Sequence[Sequence[float]], costs: bool) -> tuple[str, str]:
    """Return the mean of the terms' sums by seed ± its standard error, and if a claim holds.

    terms: the errors of each group of runs, with the group's sign. costs: whether the claim is that
    the mean is above MARGIN; otherwise, that it is not.
    """
    sums = [sum(errors) for errors in zip(*terms, strict=False)]
    if not sums:
        return "not measured", ""
    points = statistics.mean(sums)
    holds = "yes" if (points > MARGIN) == costs else "no"
    if len(sums) == 1:  # no deviation is known
        return f"{points:+.2f}", f"{holds}, not certain"
    error = statistics.stdev(sums) / math.sqrt(len(sums))
    certain = abs(points - MARGIN) > 2 * error
    return f"{points:+.2f} ± {error:.2f}", holds if certain else f"{holds}, not certain"


# ---- Steps to a target, and the noise scale


def steps_section(runs: Sequence[dict]) -> str:
    """Return the section on steps to a target and the noise scale; "" without metrics."""
    runs, scalings = [run for run in runs if "metrics" in run], {}
    for experiment in sorted({run["experiment"] for run in runs}):
        own = [run for run in runs if run["experiment"] == experiment]
        if scaling := batch_scaling.measure(dict(runs=list(map(as_swept, own)))):
            scalings[experiment] = scaling
    if not scalings:
        return ""
    batches = sorted({batch.size for scaling in scalings.values() for batch in scaling.batches})
    rows = []
    for experiment, scaling in scalings.items():
        row = {"data, network, rule": ", ".join(names_of(experiment))}
        row["target, %"] = f"{100 * (1 - scaling.target):.4g}"
        for batch in batches:
            row[f"batch {batch}"] = text.optional(scaling.steps.get(batch), 0)
        knee, shown = scaling.knee, scaling.knee_is_measured and scaling.knee.miss <= MISS
        row["knee"] = f"{knee.batch:,.0f}" if shown else "-"
        row["miss, %"] = f"{100 * knee.miss:.0f}" if knee else "-"
        rows.append(row | {"noise scale": noise_text(scaling)})
    noise = filter(batch_scaling.is_noise, (row for run in runs for row in run["metrics"]))
    noise_batches = max((row["batches"] for row in noise), default=0)
    return filled_in(
        "large_batches_steps.md", steps=table(rows), miss=100 * MISS, noise_batches=noise_batches
    )


def noise_text(scaling: batch_scaling.Scaling) -> str:
    """Return the range over seeds of the noise scale, at the smallest batch that has one."""
    if not scaling.noise:
        return "-"
    size, _ = scaling.noise
    (batch,) = (each for each in scaling.batches if each.size == size)
    found = [batch_scaling.noise_scale(batch._replace(reached=[own])) for own in batch.reached]
    scales = sorted(filter(None, found))
    return f"{scales[0]:,.0f} to {scales[-1]:,.0f} (batch {size:,})" if scales else "-"


def as_swept(run: dict) -> dict:
    """Return a run as batch_scaling takes it: as one of a sweep of batch_size."""
    settings = dict(batch_size=run["batch_size"], seed=run["seed"])
    return dict(settings=settings, status=run["status"], figures=run, metrics=run["metrics"])
