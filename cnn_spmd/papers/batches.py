"""Make results/batches.md: what larger batches cost."""

from collections.abc import Sequence

from cnn_spmd.papers import large_batches, published, rates, summaries
from cnn_spmd.papers.layout import HEAD, SEEDS, about_data, commands, joined
from cnn_spmd.papers.summaries import DATA

# Experiment, without _variable -> the name of its data in the table.
BATCH_DATA = {"owt_cifar": "CIFAR-10", "owt_imagenette": "Imagenette"}
RATES = {1.0: "k", 0.5: "sqrt(k)"}


def page() -> str:
    """Return the page on the cost of larger batches."""
    sweep = "python launch.py --config experiments/owt_"
    best = rates.best_rates(rates.load_search())
    return joined(
        "# What larger batches cost",
        HEAD,
        """One weird trick's question (Krizhevsky 2014, section 5): test error in % for a batch k
        times as large as 128. The learning rate grows with k or with sqrt(k). The dense layers
        see the whole batch (as large), or 128 examples at a time and are updated after each
        (128). CIFAR-10 is `experiments/owt_cifar.py`. Imagenette, ten of ImageNet's classes, is
        the paper's network at 224x224 (`experiments/owt_imagenet.py:imagenette`, 90 epochs).""",
        batch_table(summaries.load_summaries(DATA / "claims")),
        f"Measured on one H200. {SEEDS} {about_data()}",
        """The learning rate should grow with k, as the paper says. On CIFAR-10, updating the dense
        layers after each 128 images makes up for all that a batch of 1024 costs; on
        photographs, for more than half of what 512 costs; in the paper, for less than half of
        what 1024 costs.""",
        commands(
            "With --config.optimizer.scaling=0.5 the rate grows with sqrt(k).",
            f"{sweep}cifar.py --sweep batch_size=128,256,512,1024 --sweep seed=0,1,2",
            f"{sweep}cifar.py:variable --sweep batch_size=256,512,1024 --sweep seed=0,1,2",
            f"{sweep}imagenet.py:imagenette --mesh 1x1 --config.batch_size=512",
            f"{sweep}imagenet.py:variable,imagenette --mesh 1x1 --config.batch_size=512",
        ),
        *large_batches.results_section(summaries.load_single_runs(), best),
    )


def batch_table(runs: Sequence[dict], paper: dict[tuple[str, int], float] | None = None) -> str:
    """Return test error in % by batch size, of the runs of experiments/owt_*.py.

    paper: the paper's errors on ImageNet, by default published_batch_errors().
    """
    paper = published_batch_errors() if paper is None else paper
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


def published_batch_errors() -> dict[tuple[str, int], float]:
    """Return the paper's errors by dense batch (in the table's words) and batch."""
    errors = {}
    for gpus, dense_batch, error, *_ in published.ONE_WEIRD_TRICK:
        dense = "128" if dense_batch == 128 and gpus > 1 else "as large"
        errors[dense, 128 * gpus] = error
    return errors
