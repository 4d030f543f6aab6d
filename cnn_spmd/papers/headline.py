"""Make README's headline table: at most six results to know first, with links."""

import re
from collections.abc import Sequence

from cnn_spmd.papers import measured, programs, pytorch, summaries
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare
from cnn_spmd.report.text import markdown_table, mean_and_deviation
from cnn_spmd.training import runfiles

BEGIN = "<!-- headline: begin -->\n"
END = "<!-- headline: end -->"
NETWORKS = ("13pct", "ResNet-20", "ResNet-110")


def with_headline(readme: str) -> str:
    """Return README's text with the table between its markers, if it has them."""
    between = f"(?<={BEGIN}).*?(?={END})"
    return re.sub(between, lambda _: f"{headline_table()}\n", readme, count=1, flags=re.DOTALL)


def headline_table() -> str:
    """Return the table as Markdown, six rows."""
    figures = {row.name: row for rows in measured.measured_tables().values() for row in rows}
    hybrid, data = (
        figures[f"{scheme}, batch 32 per GPU, 4 GPUs"].measured
        for scheme in ("one weird trick", "data")
    )
    rows = [
        ["CIFAR-10 test accuracy, 40 epochs, one H100", accuracy_text(), "cifar10"],
        ["The same on one H200, once compiled", waiting_text(), "startup"],
        errors_row([figures[f"{name}: test error, %"] for name in NETWORKS]),
        ["AlexNet at 224x224, batch 128, one H100", speed_text(), "pytorch"],
        [
            "Speed-up of four H200s, 32 images per GPU",
            f"`hybrid` {hybrid} (each updates 1/4 of fc1 to fc3), `data` {data}",
            "meshes",
        ],
        bytes_row(),
    ]
    linked = [[*cells, f"[{page}](results/{page}.md)"] for *cells, page in rows]
    return markdown_table(["what", "measured", "page"], linked)


def accuracy_text() -> str:
    """Return accuracy and training time of AlexNet's recipe on one H100."""
    runs = [
        run
        for run in summaries.load_summaries(DATA)
        if (run["experiment"], run["epochs"]) == ("alexnet_cifar", 40)
    ]
    runs = [run for run in runs if compare.machine(run) == "1 x H100"]
    accuracy = mean_and_deviation([100 * run["eval"]["accuracy"] for run in runs], 2)
    seconds = sum(run["train_seconds"] for run in runs) / len(runs)
    return f"{accuracy} % (n = {len(runs)}) in {seconds:.1f} s of training"


def errors_row(figures: Sequence[measured.MeasuredRow]) -> list[str]:
    """Return the mean errors of NETWORKS on CIFAR-10 beside the published ones."""
    ours = ", ".join(figure.measured.split(" ±")[0] for figure in figures)
    published = ", ".join(figure.published for figure in figures)
    what = 'cuda-convnet\'s "13%", ResNet-20 and -110: error'
    return [what, f"{ours} % (published: {published} %)", "papers"]


def waiting_text() -> str:
    """Return the seconds from the command to the first step and to the result."""
    measured = runfiles.read_json(DATA / "startup" / "nvidia-h200.json")
    return (
        f"{measured['warm_first_step_seconds']:.1f} s to the first step, "
        f"{measured['warm_result_seconds']:.1f} s to the result"
    )


def speed_text() -> str:
    """Return images/s at batch 128 on one H100, and the ratio to PyTorch's."""
    timings = runfiles.read_json(DATA / "speed" / "h100-x1.json")["batches"]
    batch = next(row for row in timings if row["batch_per_gpu"] == 128)
    ours, peer = (pytorch.fastest(batch[side], 1)["images_per_second"] for side in ("ours", "peer"))
    return f"{ours:,} images/s, {ours / peer:.2f} times PyTorch"


def bytes_row() -> list[str]:
    """Return how far hybrid's bytes are from theory, and on how many GPUs."""
    compiled = [run for run in programs.load_programs() if run["parallelism"] == "hybrid"]
    compiled = [run for run in compiled if run["compiler"]["platform"] != "cpu"]
    away = max(
        abs(run["totals"]["ring_bytes"] / run["closed_form_ring_bytes"] - 1) for run in compiled
    )
    devices = [run["devices"] for run in compiled]
    return [
        f"`hybrid` compiled for {min(devices)} to {max(devices)} H100s: bytes sent",
        f"within {100 * away:.1f} % of the closed form",
        "programs",
    ]
