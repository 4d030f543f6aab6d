"""Make README's headline table: at most six results to know first, with links."""

import re
import statistics

from cnn_spmd.papers import (
    layout,
    measured,
    meshes,
    predictions,
    programs,
    pytorch,
    startup,
    summaries,
)
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report import compare
from cnn_spmd.report.text import mean_and_deviation
from cnn_spmd.training import runfiles

BEGIN = "<!-- headline: begin -->\n"
END = "<!-- headline: end -->"
NETWORKS = ("13pct", "ResNet-20", "ResNet-110")


def with_headline(readme: str) -> str:
    """Return README's text with the table between its markers, if it has them."""
    between = f"(?<={BEGIN}).*?(?={END})"
    return re.sub(between, lambda _: headline_table(), readme, count=1, flags=re.DOTALL)


def headline_table() -> str:
    """Return the table as Markdown, six rows."""
    template = (layout.TEMPLATES / "headline.md").read_text()
    fields = (
        accuracy_fields() | startup_fields() | papers_fields() | speed_fields() | bytes_fields()
    )
    return template.format(speedups=speedups(), **fields)


def accuracy_fields() -> dict[str, object]:
    """Return accuracy and training time of AlexNet's recipe on one H200."""
    runs = [
        run
        for run in summaries.load_summaries(DATA)
        if (run["experiment"], run["epochs"]) == ("alexnet_cifar", 40)
        and compare.machine(run) == "1 x H200"
    ]
    return dict(
        accuracy=mean_and_deviation([100 * run["eval"]["accuracy"] for run in runs], 2),
        seeds=len(runs),
        seconds=statistics.mean(run["train_seconds"] for run in runs),
    )


def startup_fields() -> dict[str, str]:
    """Return the seconds to the first step and to the result, on the hosts that measured both."""
    hosts = [startup.load(host) for host in startup.BOTH]
    return {
        name: " to ".join(f"{host[f'warm_{name}_seconds']:.1f}" for host in hosts)
        for name in ("first_step", "result")
    }


def papers_fields() -> dict[str, str]:
    """Return the mean errors of NETWORKS beside the published ones."""
    figures = {row.name: row for rows in measured.measured_tables().values() for row in rows}
    own = [figures[f"{name}: test error, %"] for name in NETWORKS]
    return dict(
        errors=", ".join(figure.measured.split(" ±")[0] for figure in own),
        published_errors=", ".join(figure.published for figure in own),
    )


def speedups() -> dict[str, str]:
    """Return how many times as fast four H200s are, by scheme, each at its best mesh.

    That is at the smallest batch, and at the largest in parentheses.
    """
    sweep = runfiles.read_json(DATA / "sweeps" / f"{predictions.ALL_SCHEMES[4]}.json")
    panels = meshes.sweep_panels(sweep)
    found: dict[str, list[str]] = {}
    for own in (panels[0], panels[-1]):
        for scheme in {group.parallelism for group in own if group.devices > 1}:
            best = max(
                speedup
                for group in own
                for speedup in group.speedups()
                if (group.parallelism, group.devices) == (scheme, 4)
            )
            found.setdefault(scheme, []).append(f"{best:.2f}")
    return {scheme: f"{smallest} ({largest})" for scheme, (smallest, largest) in found.items()}


def speed_fields() -> dict[str, object]:
    """Return the ratios to PyTorch's images/s: on one H100 at batch 128, and on four H200s."""
    timings = runfiles.read_json(DATA / "speed" / "h100-x1.json")["batches"]
    batch = next(row for row in timings if row["batch_per_gpu"] == 128)
    ours, peer = (pytorch.fastest(batch[side], 1)["images_per_second"] for side in ("ours", "peer"))
    on_four = [
        f"{batch['ratio']:.2f} ({batch['batch_per_gpu']})" for batch in pytorch.batches_on_four()
    ]
    return dict(ratio=ours / peer, on_four=", ".join(on_four))


def bytes_fields() -> dict[str, float]:
    """Return how far hybrid's bytes are from theory, and on how many GPUs."""
    compiled = [
        run
        for run in programs.load_programs()
        if run["parallelism"] == "hybrid" and run["compiler"]["platform"] != "cpu"
    ]
    shares = (run["totals"]["ring_bytes"] / run["closed_form_ring_bytes"] for run in compiled)
    devices = [run["devices"] for run in compiled]
    away = 100 * max(abs(share - 1) for share in shares)
    return dict(fewest=min(devices), most=max(devices), away=away)
