"""Make results/startup.md: what a user waits for."""

import statistics
from collections.abc import Sequence

from cnn_spmd.papers.layout import filled_in, table
from cnn_spmd.papers.summaries import DATA, load_folder
from cnn_spmd.training import runfiles


def page() -> str:
    """Return the page on what a user waits for."""
    h200 = runfiles.read_json(DATA / "startup" / "nvidia-h200.json")
    return filled_in(
        "startup.md",
        waiting=waiting_table(),
        run_overhead=run_overhead(h200),
        stages=stages_table(h200),
        streaming=streaming_table(),
    )


def waiting_table() -> str:
    """Return what a user waits for, one row per device and measurement; seconds."""
    rows = []
    for measured in load_folder(DATA / "startup"):
        repeats = measured["repeats"]
        result = f"the result, {100 * repeats['result'][0]['accuracy']:.2f}% test accuracy"
        sweep = f"a sweep of {repeats['sweep'][0]['runs']} runs of 100 steps"
        cached = "first step, programs in the cache"
        for what, median, kind, field in (
            ("first step, empty caches", "cold_first_step_seconds", "cold", "first_step_seconds"),
            (cached, "warm_first_step_seconds", "warm", "first_step_seconds"),
            (result, "warm_result_seconds", "result", "seconds"),
            (sweep, "sweep_12_runs_seconds", "sweep", "seconds"),
        ):
            rows.append(
                {
                    "device": measured["hardware"]["device_kind"],
                    "from the command to": what,
                    "seconds, median": f"{measured[median]:.1f}",
                    "repeats": ", ".join(f"{run[field]:.1f}" for run in repeats[kind]),
                }
            )
    return table(rows)


def stages_table(measured: dict) -> str:
    """Return when the stages before the first step begin and end; medians, in seconds."""
    cold, warm = (stage_spans(measured["repeats"][name]) for name in ("cold", "warm"))
    return table(
        [
            {
                "stage": stage,
                "empty caches": "{:.1f} to {:.1f}".format(*cold[stage]),
                "programs in the cache": "{:.1f} to {:.1f}".format(*warm[stage]),
            }
            for stage in cold
        ]
    )


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
    for measured in load_folder(DATA / "streaming"):
        for row in measured["streaming"]:
            resident, streamed = (
                row[f"{side}_images_per_second"] for side in ("resident", "streamed")
            )
            rows.append(
                {
                    "device": measured["hardware"]["device_kind"],
                    "batch": str(row["batch_size"]),
                    "resident images/s": f"{resident:,}",
                    "streamed images/s": f"{streamed:,}",
                    "%": f"{100 * streamed / resident:.1f}",
                }
            )
    return table(rows)
