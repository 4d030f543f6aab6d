"""Make results/batches.md: what larger batches cost."""

from collections.abc import Sequence

from cnn_spmd.papers import measured, published
from cnn_spmd.papers.layout import HEAD, SEEDS, commands, hardware, joined
from cnn_spmd.papers.measured import DATA
from cnn_spmd.report import compare
from cnn_spmd.report.text import markdown_table, mean_and_deviation

LARGE_BATCHES = "large_batches.svg"
# Experiment, without _variable -> the name of its data in the table.
BATCH_DATA = {"owt_cifar": "CIFAR-10", "owt_imagenette": "Imagenette"}
RATES = {1.0: "k", 0.5: "sqrt(k)"}
# Part of an experiment's name -> the name of its data in the table.
LARGE_BATCH_DATA = {"cifar": "CIFAR-10", "imagenette": "Imagenette"}


def page() -> str:
    """Return the page on the cost of larger batches."""
    sweep = "python launch.py --config experiments/owt_"
    return joined(
        "# What larger batches cost",
        HEAD,
        """One weird trick's question (Krizhevsky 2014, section 5): test error in % for a batch k
        times as large as 128. The learning rate grows with k or with sqrt(k). The dense layers
        see the whole batch (as large), or 128 examples at a time and are updated after each
        (128). CIFAR-10 is `experiments/owt_cifar.py`. Imagenette, ten of ImageNet's classes, is
        the paper's network at 224x224 (`experiments/owt_imagenet.py:imagenette`, 90 epochs).""",
        batch_table(measured.load_summaries(DATA / "claims")),
        f"Measured on one H200. {SEEDS} {hardware()}",
        """The learning rate should grow with k, as the paper says. On CIFAR-10, updating the dense
        layers after each 128 images makes up for all that a batch of 1024 costs; on
        photographs, for more than half of what 512 costs; in the paper, for less than half of
        what 1024 costs.""",
        commands(
            "Commands",
            (
                "With --config.optimizer.scaling=0.5 the rate grows with sqrt(k).",
                [
                    f"{sweep}cifar.py --sweep batch_size=128,256,512,1024 --sweep seed=0,1,2",
                    f"{sweep}cifar.py:variable --sweep batch_size=256,512,1024 --sweep seed=0,1,2",
                    f"{sweep}imagenet.py:imagenette --mesh 1x1 --config.batch_size=512",
                    f"{sweep}imagenet.py:variable,imagenette --mesh 1x1 --config.batch_size=512",
                ],
            ),
        ),
        *large_batch_section(measured.load_single_runs()),
    )


def large_batch_section(runs: Sequence[dict]) -> list[str]:
    """Return the section on batches of up to 8,192; [] without such runs."""
    table = large_batch_table(runs)
    if not table:
        return []
    machines = {
        compare.machine(run) for run in runs if run["experiment"].startswith("large_batch_")
    }
    launch = "python launch.py --config experiments/large_batch_cifar.py:lars"
    return [
        "## Batches of up to 8,192",
        """Test error in % by network, rule and batch (`experiments/large_batch_cifar.py`). You et
        al. 2017 (arXiv 1708.03888) claim for AlexNet on ImageNet: accuracy falls from 57.6% at
        256 to 53.1% at 4K and 44.8% at 8K, if the learning rate grows with the batch after a
        warm-up. Batch norm reduces the gap at 8K from 14 points to 2.2. With LARS nothing is
        lost up to 8K.""",
        table,
        f"Measured on {', '.join(sorted(machines))}.",
        f"![Test error by batch size]({LARGE_BATCHES})",
        commands(
            "Command",
            (
                "The same for the other variants.",
                [f"{launch} --sweep batch_size=128,1024,4096,8192 --sweep seed=0,1,2"],
            ),
        ),
    ]


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
    return errors_table(errors, "rate times, dense batch")


def published_batch_errors() -> dict[tuple[str, int], float]:
    """Return the paper's errors by dense batch (in the table's words) and batch."""
    errors = {}
    for gpus, dense_batch, error, *_ in published.ONE_WEIRD_TRICK:
        dense = "128" if dense_batch == 128 and gpus > 1 else "as large"
        errors[dense, 128 * gpus] = error
    return errors


def errors_table(errors: dict[tuple[str, str, int], list[float]], setting_name: str) -> str:
    """Return errors in % by data, setting and batch, a column for each batch."""
    batches = sorted({batch for *_, batch in errors})
    rows = []
    for data, setting in dict.fromkeys((data, setting) for data, setting, _ in errors):
        found = [errors.get((data, setting, batch), []) for batch in batches]
        counts = dict.fromkeys(str(len(row)) for row in found if row)
        means = (mean_and_deviation(row, 2) for row in found)
        rows.append([data, setting, "/".join(counts), *means])
    header = ["data", setting_name, "n", *(f"batch {batch}" for batch in batches)]
    return markdown_table(header, rows)


def large_batch_errors(runs: Sequence[dict]) -> dict[tuple[str, str, int], list[float]]:
    """Return data, "network, rule" and batch -> errors in %.

    The runs are those of experiments/large_batch_cifar.py, whose experiments are named
    large_batch_cifar_lars_bn, large_batch_imagenette_linear, ...
    """
    errors: dict[tuple[str, str, int], list[float]] = {}
    for run in runs:
        if run["experiment"].startswith("large_batch_"):
            data, rule, *bn = run["experiment"].removeprefix("large_batch_").split("_")
            network = "AlexNet-BN" if bn else "AlexNet"
            key = (LARGE_BATCH_DATA[data], f"{network}, {rule}", run["batch_size"])
            errors.setdefault(key, []).append(100 * (1 - run["eval"]["accuracy"]))
    return dict(sorted(errors.items()))


def large_batch_table(runs: Sequence[dict]) -> str:
    """Return large_batch_errors as a table; "" without runs."""
    errors = large_batch_errors(runs)
    return errors_table(errors, "network, rule") if errors else ""
