"""Make results/startup.md: what a user waits for."""

import statistics
from collections.abc import Sequence

from cnn_spmd.papers.layout import HEAD, about_data, commands, joined
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.report.text import markdown_table
from cnn_spmd.training import runfiles


def page() -> str:
    """Return the page on what a user waits for."""
    measured = runfiles.read_json(DATA / "startup" / "nvidia-h200.json")
    return joined(
        "# From the command to the result",
        HEAD,
        """`python launch.py --config experiments/alexnet_cifar.py` on CIFAR-10, which is unpacked
        already. The first step is the end of the first chunk (97 steps), after the start of the
        process. Caches are those of XLA's programs and kernels; result and sweep found theirs
        filled. All commands ran one after another on one machine.""",
        waiting_table(),
        f"""A run of the sweep took {run_overhead(measured):.1f} s beyond its
        steps (median). The 12 runs are 4 learning rates x 3 seeds. {about_data()}""",
        "## Where the time goes",
        """Seconds after the command. Stages overlap: threads read the data, start the device, take
        its memory, compile and copy, while Python imports and traces.
        [running](../docs/running.md) says what each stage is.""",
        stages_table(measured),
        "## Streamed images",
        """AlexNet in bfloat16 on images of 256x256, cropped to 224x224: either all images are on
        the device, or the host streams those of each chunk. Medians of three.""",
        streaming_table(),
        commands(
            "DIR holds the folder cifar-10-batches-bin.",
            "python benchmarks/startup.py --data_dir DIR",
            "python benchmarks/streaming.py",
        ),
    )


def load(kind: str) -> list[dict]:
    """Return the files of a folder of results/data, in the order of their names."""
    return [runfiles.read_json(path) for path in sorted((DATA / kind).glob("*.json"))]


def waiting_table() -> str:
    """Return what a user waits for, one row per device and measurement; seconds."""
    rows = []
    for measured in load("startup"):
        repeats, device = measured["repeats"], measured["hardware"]["device_kind"]
        result = f"the result, {100 * repeats['result'][0]['accuracy']:.2f}% test accuracy"
        sweep = f"a sweep of {repeats['sweep'][0]['runs']} runs of 100 steps"
        cached = "first step, programs in the cache"
        for what, median, kind, field in (
            ("first step, empty caches", "cold_first_step_seconds", "cold", "first_step_seconds"),
            (cached, "warm_first_step_seconds", "warm", "first_step_seconds"),
            (result, "warm_result_seconds", "result", "seconds"),
            (sweep, "sweep_12_runs_seconds", "sweep", "seconds"),
        ):
            values = ", ".join(f"{run[field]:.1f}" for run in repeats[kind])
            rows.append([device, what, f"{measured[median]:.1f}", values])
    return markdown_table(["device", "from the command to", "seconds, median", "repeats"], rows)


def stages_table(measured: dict) -> str:
    """Return when the stages before the first step begin and end; medians, in seconds."""
    spans = {name: stage_spans(measured["repeats"][name]) for name in ("cold", "warm")}
    rows = [
        [stage, *(f"{begin:.1f} to {end:.1f}" for begin, end in (cold, spans["warm"][stage]))]
        for stage, cold in spans["cold"].items()
    ]
    return markdown_table(["stage", "empty caches", "programs in the cache"], rows)


def stage_spans(runs: Sequence[dict]) -> dict[str, tuple[float, float]]:
    """Return the median begin and end of each stage.

    A stage that recurs ends with its last part.
    """
    spans = {}
    for name in dict.fromkeys(stage["stage"] for run in runs for stage in run["stages"]):
        parts = [[part for part in run["stages"] if part["stage"] == name] for run in runs]
        begin = statistics.median(min(part["begin"] for part in own) for own in parts)
        end = statistics.median(max(part["end"] for part in own) for own in parts)
        spans[name] = (begin, end)
    return spans


def run_overhead(measured: dict) -> float:
    """Return the median seconds of a sweep's run beyond its steps."""
    return statistics.median(
        seconds - steps
        for sweep in measured["repeats"]["sweep"]
        for seconds, steps in zip(sweep["run_seconds"], sweep["train_seconds"], strict=True)
    )


def streaming_table() -> str:
    """Return images per second, resident and streamed."""
    rows = []
    for measured in load("streaming"):
        device = measured["hardware"]["device_kind"]
        for row in measured["streaming"]:
            resident, streamed = (
                row["resident_images_per_second"],
                row["streamed_images_per_second"],
            )
            cells = [device, str(row["batch_size"]), f"{resident:,}", f"{streamed:,}"]
            rows.append([*cells, f"{100 * streamed / resident:.1f}"])
    header = ["device", "batch", "resident images/s", "streamed images/s", "%"]
    return markdown_table(header, rows)
