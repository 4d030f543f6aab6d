"""Make results/batches.md: what larger batches cost."""

from collections.abc import Sequence

from cnn_spmd.papers import large_batches, published, rates, summaries
from cnn_spmd.papers.layout import filled_in
from cnn_spmd.papers.summaries import DATA

# Experiment, without _variable -> the name of its data in the table.
BATCH_DATA = {"owt_cifar": "CIFAR-10", "owt_imagenette": "Imagenette"}
RATES = {1.0: "k", 0.5: "sqrt(k)"}


def page() -> str:
    """Return the page on the cost of larger batches."""
    runs, search = summaries.load_single_runs(), rates.load_search()
    claims = summaries.load_summaries(DATA / "claims")
    return filled_in(
        "batches.md",
        errors=batch_table(claims, published_batch_errors()),
        imagenette_steps=steps_of(claims, "owt_imagenette", 512),
        cifar_steps=steps_of(runs, "large_batch_cifar_linear", 4096),
        cost=large_batches.cost(runs, "linear", 4096),
        cost_with_batch_norm=large_batches.cost(runs, "linear_bn", 4096),
        large_batches=large_batches.section(
            runs, rates.best_rates(search), rates.edges(search), rates.load_other_rates()
        ),
    )


def batch_table(runs: Sequence[dict], paper: dict[tuple[str, int], float]) -> str:
    """Return test error in % by batch size, of the runs of experiments/owt_*.py.

    paper: as of published_batch_errors.
    """
    errors: dict[tuple[str, str, int], list[float]] = {
        ("ILSVRC-2012, published", f"k, {dense}", batch): [error]
        for (dense, batch), error in paper.items()
    }
    for run in runs:
        data = BATCH_DATA.get(run["experiment"].removesuffix("_variable"))
        if data:
            dense = "128" if run["config"]["dense_microbatch"] else "as large"
            rate = RATES[run["config"]["optimizer"]["scaling"]]
            key = (data, f"{rate}, {dense}", run["batch_size"])
            errors.setdefault(key, []).append(100 * (1 - run["eval"]["accuracy"]))
    return large_batches.errors_table(errors, "rate times, dense batch")


def steps_of(runs: Sequence[dict], experiment: str, batch: int) -> int:
    """Return the most steps of the runs of an experiment with a batch."""
    return max(
        run["steps"]
        for run in runs
        if (run["experiment"], run["batch_size"]) == (experiment, batch)
    )


def published_batch_errors() -> dict[tuple[str, int], float]:
    """Return the paper's errors by dense batch (in the table's words) and batch."""
    errors = {}
    for gpus, dense_batch, error, *_ in published.ONE_WEIRD_TRICK:
        dense = "128" if dense_batch == 128 and gpus > 1 else "as large"
        errors[dense, 128 * gpus] = error
    return errors
