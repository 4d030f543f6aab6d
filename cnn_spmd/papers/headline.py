"""Make README's headline table: the six results to know first, with links."""

import re
from collections.abc import Sequence

from cnn_spmd.papers import measured, tables
from cnn_spmd.papers.measured import DATA
from cnn_spmd.report import compare
from cnn_spmd.report.text import markdown_table, mean_and_deviation
from cnn_spmd.training import runfiles

BEGIN = "<!-- headline: begin -->\n"
END = "<!-- headline: end -->"


def with_headline(readme: str) -> str:
    """Return README's text with the table between its markers, if it has them."""
    between = f"(?<={BEGIN}).*?(?={END})"
    return re.sub(between, lambda _: f"{headline_table()}\n", readme, count=1, flags=re.DOTALL)


def headline_table() -> str:
    """Return the table as Markdown, six rows."""
    summaries = measured.load_summaries(DATA)
    claims = measured.load_summaries(DATA / "claims")
    rows = [
        [*accuracy_cells(summaries), link("cifar10")],
        [*paper_cells("cuda-convnet's CIFAR-10 networks", "11pct: test error, %"), link("papers")],
        [*paper_cells("One weird trick", "4 GPUs, batches (512, 512): speedup"), link("papers")],
        [*batch_cells(claims), link("batches")],
        [*pytorch_cells(), link("pytorch")],
        [*program_cells(), link("programs")],
    ]
    return markdown_table(["result", "compared with", "measured", "hardware", "page"], rows)


def link(name: str) -> str:
    """Return a link from README to a page of results/."""
    return f"[{name}](results/{name}.md)"


def accuracy_cells(runs: Sequence[dict]) -> list[str]:
    """Return the accuracy of our longest recipe on CIFAR-10."""
    best = [run for run in runs if run["experiment"] == "alexnet_cifar" and run["epochs"] == 100]
    seconds = sum(run["train_seconds"] for run in best) / len(best)
    accuracy = mean_and_deviation([100 * run["eval"]["accuracy"] for run in best], 2)
    name = f"AlexNet on CIFAR-10, {seconds:.0f} s of training: test accuracy, %"
    return [name, "", accuracy, compare.machine(best[0])]


def paper_cells(title: str, name: str) -> list[str]:
    """Return a published figure and the newest sweep's or run's beside it."""
    row = [row for row in measured.measured_tables()[title] if row.name == name][-1]
    return [f"{title}, {name}", f"{row.published} (paper)", row.measured, row.hardware]


def batch_cells(runs: Sequence[dict]) -> list[str]:
    """Return the error of a batch of 1024 with the variable batch beside that of 128."""

    def errors(experiment: str, batch: int) -> str:
        same = [
            100 * (1 - run["eval"]["accuracy"])
            for run in runs
            if (run["experiment"], run["batch_size"]) == (experiment, batch)
            and run["config"]["optimizer"]["scaling"] == 1.0
        ]
        return mean_and_deviation(same, 2)

    return [
        "CIFAR-10 at batch 1024, dense layers per 128: test error, %",
        f"{errors('owt_cifar', 128)} (batch 128)",
        errors("owt_cifar_variable", 1024),
        compare.machine(next(run for run in runs if run["experiment"] == "owt_cifar")),
    ]


def pytorch_cells() -> list[str]:
    """Return images/s on the most GPUs that PyTorch was measured on, at 128 per GPU."""
    run = runfiles.read_json(DATA / "speed" / "h200-x4.json")
    batch = next(row for row in run["batches"] if row["batch_per_gpu"] == 128)
    ours, peer = (tables.fastest(batch[side], run["gpus"]) for side in ("ours", "peer"))
    kind = compare.short_kind(run["hardware"]["device_kind"])
    return [
        "AlexNet at 224x224, 128 per GPU: images/s",
        f"{peer['images_per_second']:,} (PyTorch)",
        f"{ours['images_per_second']:,}",
        f"{run['gpus']} x {kind}",
    ]


def program_cells() -> list[str]:
    """Return the bytes of the largest compiled program beside the closed form."""
    programs = [run for run in tables.load_programs() if run["parallelism"] == "hybrid"]
    run = programs[-1]
    kind = compare.short_kind(run["compiler"]["device_kind"])
    return [
        f"hybrid on {tables.mesh_name(run)}: MB sent per device and step",
        f"{run['closed_form_ring_bytes'] / 1e6:.1f} (closed form)",
        f"{run['totals']['ring_bytes'] / 1e6:.1f}",
        f"compiled for {run['devices']} x {kind}",
    ]
