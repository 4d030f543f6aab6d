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
        repeats = measured["repeats"]
        for what, median, values in (
            (
                "first step, empty caches",
                measured["cold_first_step_seconds"],
                column(repeats["cold"], "first_step_seconds"),
            ),
            (
                "first step, programs in the cache",
                measured["warm_first_step_seconds"],
                column(repeats["warm"], "first_step_seconds"),
            ),
            (
                f"the result, {100 * repeats['result'][0]['accuracy']:.2f}% test accuracy",
                measured["warm_result_seconds"],
                column(repeats["result"], "seconds"),
            ),
            (
                f"a sweep of {repeats['sweep'][0]['runs']} runs of 100 steps",
                measured["sweep_12_runs_seconds"],
                column(repeats["sweep"], "seconds"),
            ),
        ):
            device = measured["hardware"]["device_kind"]
            rows.append([device, what, f"{median:.1f}", ", ".join(f"{v:.1f}" for v in values)])
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
    """Return the median begin and end of each stage; one that recurs ends with its last part."""
    names = dict.fromkeys(stage["stage"] for run in runs for stage in run["stages"])
    spans = {}
    for name in names:
        parts = [[s for s in run["stages"] if s["stage"] == name] for run in runs]
        begin = statistics.median(min(column(part, "begin")) for part in parts)
        end = statistics.median(max(column(part, "end")) for part in parts)
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
        for row in measured["streaming"]:
            resident, streamed = (
                row[f"{side}_images_per_second"] for side in ("resident", "streamed")
            )
            rows.append(
                [
                    measured["hardware"]["device_kind"],
                    str(row["batch_size"]),
                    f"{resident:,}",
                    f"{streamed:,}",
                    f"{100 * streamed / resident:.1f}",
                ]
            )
    header = ["device", "batch", "resident images/s", "streamed images/s", "%"]
    return markdown_table(header, rows)


def column(rows: Sequence[dict], field: str) -> list[float]:
    """Return a field of each row."""
    return [row[field] for row in rows]
