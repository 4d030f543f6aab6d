"""Find the steps to a target accuracy against batch size, and the knee of that curve.

Shallue et al. 2019 (arXiv 1811.03600) count, for each batch size, the steps of the run that reaches
a test error first, over all other settings that were tried. At small batches, twice the batch needs
half of the steps (perfect scaling). At large ones, more images per step save no steps.

McCandlish et al. 2018 (arXiv 1812.06162), section 2, give the curve a form with two parameters:

  S = S_min (1 + B_crit / B)        S: steps, B: batch size

The knee is B_crit. There a run needs twice the fewest possible steps, S_min, and twice the fewest
possible images, S_min B_crit. The fit is by least squares of log S.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

LEAST = 3  # batch sizes; with two, any curve of two parameters fits
# The fit tries this many knees, equally spaced in the logarithm. They reach beyond the measured
# batch sizes by OUTSIDE, so that the fit can say that the knee is not among them.
CANDIDATES = 10_001
OUTSIDE = 100


class Reached(NamedTuple):
    """The evaluation by which a run has the target, and the one before (0: none)."""

    step: int
    before: int
    run: dict


class Batch(NamedTuple):
    """The runs of one batch size, and those that reached the target, fastest first."""

    size: int
    runs: list[dict]
    reached: list[Reached]


class Knee(NamedTuple):
    """A fit: B_crit, S_min, and by what share it misses the steps (root mean square)."""

    batch: float
    fewest_steps: float
    miss: float


class Scaling(NamedTuple):
    """Steps to a target by batch size; knee: None where too few reached the target."""

    target: float  # accuracy, from 0 to 1
    reason: str  # for this target
    batches: list[Batch]
    knee: Knee | None

    @property
    def steps(self) -> dict[int, int]:
        """Return batch size -> steps, for those that reached the target."""
        return {batch.size: batch.reached[0].step for batch in self.batches if batch.reached}

    @property
    def knee_is_measured(self) -> bool:
        """Return whether the knee lies among the batch sizes that reached the target."""
        return bool(self.knee) and min(self.steps) <= self.knee.batch <= max(self.steps)

    @property
    def noise(self) -> tuple[int, float] | None:
        """Return the smallest batch size with a noise scale, and that noise scale."""
        scales = ((batch.size, noise_scale(batch)) for batch in self.batches)
        return next(((size, scale) for size, scale in scales if scale), None)


def measure(sweep: dict, target_error: float | None = None) -> Scaling | None:
    """Return the scaling of a sweep (load.load_sweeps).

    target_error: from 0 to 1; None: the lowest whole percent that every batch size reaches.
    Returns None unless runs of at least three batch sizes, of one network on one data set, were
    evaluated. The sweep must set batch_size: with batch_per_device, it is about speed.
    """
    by_size: dict[int, list[dict]] = {}
    for run in sweep["runs"]:
        size = run["settings"].get("batch_size")
        if isinstance(size, int) and run["status"] not in ("refused", "pending"):
            by_size.setdefault(size, []).append(run)
    found = [run["figures"] for runs in by_size.values() for run in runs if run["figures"]]
    subjects = {(figures["model"], figures["dataset"]) for figures in found}
    random_images = any(dataset == "synthetic" for _, dataset in subjects)
    best = {
        size: max(accuracies)
        for size, runs in by_size.items()
        if (accuracies := [accuracy for run in runs for _, accuracy in evaluations(run)])
    }
    if len(best) < LEAST or len(subjects) > 1 or random_images:
        return None
    if target_error is None:
        target, reason = target_of_all(best)
    else:
        target, reason = round(1 - target_error, 9), "set by --target_error"
    batches = [Batch(size, runs, reached(runs, target)) for size, runs in sorted(by_size.items())]
    scaling = Scaling(target, reason, batches, None)
    return scaling._replace(knee=fit_knee(scaling.steps))


def target_of_all(best: Mapping[int, float]) -> tuple[float, str]:
    """Return the accuracy that every batch size reaches, in whole percent, and why.

    best: batch size -> its best accuracy. An accuracy below one percent is not rounded.
    """
    worst = min(best, key=best.get)
    return whole_percent(best[worst]), (
        "the lowest that every batch size reaches, in whole percent. It is set by batch "
        f"{worst:,}, whose best error is {100 * (1 - best[worst]):.2f} %; --target_error takes "
        "another"
    )


def whole_percent(share: float) -> float:
    """Return a share, rounded down to whole percent; below one percent, as it is."""
    # In floating point, 100 * 0.29 is a little less than 29.
    return math.floor(round(100 * share, 6)) / 100 or share


def evaluations(run: dict) -> list[tuple[int, float]]:
    """Return step and accuracy of each evaluation of a run after step 0, in order."""
    rows = [row for row in run["metrics"] if row["split"] in ("eval", "final")]
    found = ((row["step"], row.get("accuracy")) for row in rows if row["step"] > 0)
    return sorted((step, accuracy) for step, accuracy in found if accuracy is not None)


def reached(runs: list[dict], target: float) -> list[Reached]:
    """Return when each run that reached the target did so, fastest first."""
    found = []
    for run in runs:
        before = 0
        for step, accuracy in evaluations(run):
            if accuracy >= target:
                found.append(Reached(step, before, run))
                break
            before = step
    return sorted(found, key=lambda each: each.step)


def fit_knee(steps: Mapping[int, float]) -> Knee | None:
    """Return the fit of batch size -> steps; None for fewer than three batch sizes."""
    if len(steps) < LEAST:
        return None
    sizes = np.array(list(steps), float)
    logs = np.log(list(steps.values()))
    knees = np.geomspace(sizes.min() / OUTSIDE, sizes.max() * OUTSIDE, CANDIDATES)
    # For a given knee, the best log S_min is a mean.
    fewest = logs - np.log1p(knees[:, None] / sizes)
    errors = fewest.std(axis=1)
    best = errors.argmin()
    return Knee(float(knees[best]), math.exp(fewest[best].mean()), math.expm1(errors[best]))


def noise_scale(batch: Batch) -> float | None:
    """Return the simple noise scale where the best setting reaches the target.

    tr(S) and |G|^2 are each averaged over the setting's seeds, at the evaluation nearest to the
    target (training/noise_scale.py). Returns None where none was measured, or noise hides G.
    """

    def setting(found: Reached) -> dict:
        return found.run["settings"] | dict(seed=None)

    traces, norms = [], []
    for found in batch.reached:
        rows = [row for row in found.run["metrics"] if is_noise(row)]
        if rows and setting(found) == setting(batch.reached[0]):
            nearest = min(rows, key=lambda row, step=found.step: abs(row["step"] - step))
            traces.append(nearest["trace"])
            norms.append(nearest["gradient_norm2"])
    trace, norm = sum(traces), sum(norms)
    return trace / norm if trace > 0 and norm > 0 else None


def is_noise(row: dict) -> bool:
    """Return whether a line of metrics.jsonl is a whole measurement of the noise scale."""
    figures = (row.get("trace"), row.get("gradient_norm2"))
    return row["split"] == "noise" and all(isinstance(each, int | float) for each in figures)
