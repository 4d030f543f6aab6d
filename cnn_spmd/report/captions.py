"""Say in captions on which hardware and how many runs a chart rests, and what is left out."""

from collections.abc import Sequence

from cnn_spmd.report import compare
from cnn_spmd.report.compare import Group

MOST_NAMES = 6  # of runs in a caption


def timed_caption(sweep: dict, groups: list[Group]) -> str:
    """Return hardware, number of runs and what is left out, for a chart of times."""
    return (
        f"{compare.hardware_of(sweep)}; {count_text(groups)}. Left out: first chunks (warm-up), "
        f"compilation, evaluation, checkpoints{left_out_text(sweep['runs'])}."
    )


def compiled_caption(sweep: dict, groups: list[Group]) -> str:
    """Return the same, for a chart of what a compiled program holds or moves."""
    count = count_text(groups, chunks=False)
    return (
        f"From the step as compiled for {compare.hardware_of(sweep)}; {count}. "
        f"Left out: evaluation{left_out_text(sweep['runs'])}."
    )


def count_text(groups: Sequence[Group], chunks: bool = True) -> str:
    """Return how many runs, and steady chunks of each, a point stands for."""
    sizes = {len(group.runs) for group in groups}
    if not sizes:
        return "n = 0"
    counted = f"n = {range_text(sizes)} run{'s' * (sizes != {1})} (seeds) per point"
    counted += ", averaged" * (max(sizes) > 1)
    steady = {n for group in groups for n in group.values("steady_calls")}
    if chunks and steady:
        counted += f", each over {range_text(steady)} steady chunk{'s' * (steady != {1})}"
    return counted


def range_text(numbers: set[int]) -> str:
    """Return "3" for {3}, "1 to 3" for {1, 3}."""
    return f"{min(numbers)}" if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def left_out_text(runs: Sequence[dict]) -> str:
    """Return the runs that did not complete or have no speed, by reason; "" for none."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if run["status"] != "completed":
            names.setdefault(run["status"], []).append(run["name"])
        elif not run["figures"].get("images_per_second"):
            names.setdefault("that had no step left to time", []).append(run["name"])
    return "".join(f"; runs {status}: {names_text(some)}" for status, some in names.items())


def names_text(names: Sequence[str], separator: str = ", ") -> str:
    """Return names joined by a separator; of many, only the first."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return separator.join(names[:MOST_NAMES]) + more
