"""Make results/startup.md: what a user waits for."""

import statistics
from collections.abc import Iterable, Sequence

from cnn_spmd.papers.layout import filled_in, table
from cnn_spmd.papers.summaries import DATA, load_folder
from cnn_spmd.training import runfiles

# What each kind of measurement of benchmarks/startup.py waits for, by the fields of a repeat.
WAITED_FOR = dict(
    cold="first step, empty caches",
    warm="first step, programs in the cache",
    result="the result, {accuracy:.2%} test accuracy",
    processes="the same, one process per GPU",
    sweep="a sweep of {runs} runs of 100 steps",
)
BOTH = ("b", "c")  # the hosts that measured one GPU and two; "a" measured empty caches


def page() -> str:
    """Return the page on what a user waits for."""
    of_two, of_four = (
        runfiles.read_json(DATA / "streaming" / f"nvidia-h200-x{count}.json")["streaming"]
        for count in (2, 4)
    )
    return filled_in(
        "startup.md",
        waiting=waiting_table(),
        hosts={host: host_fields(host) for host in BOTH},
        stages=stages_table(load("a")["repeats"]["cold"], load("b")["repeats"]["warm"]),
        streaming=streaming_table(),
        two_gb=streamed_range(of_two),
        four_gb=streamed_range(of_four),
        rates={
            name.removesuffix("_bytes_per_second"): in_gigabytes(row[name] for row in of_two)
            for name in of_two[0]
            if name.endswith("_bytes_per_second")
        },
    )


def load(host: str, devices: str = "") -> dict:
    """Return what was measured on a host; devices: "" for one GPU, "-x2" for two."""
    return runfiles.read_json(DATA / "startup" / f"nvidia-h200-{host}{devices}.json")


def host_fields(host: str) -> dict[str, float]:
    """Return what the page says of a host that measured one GPU and two."""
    one, two = load(host), load(host, "-x2")
    own, joint = images_per_second(two, "processes"), images_per_second(two, "result")
    imports = stage_spans(one["repeats"]["warm"] + two["repeats"]["warm"])["imports"]
    return dict(
        imports=imports[1],
        run_overhead=run_overhead(one),
        two_overhead=run_overhead(two),
        one_step=median_step(one, "result"),
        two_step=median_step(two, "result"),
        own_step=median_step(two, "processes"),
        slower=100 * (1 - own / joint),
        first_later=first_step(two, "processes") - first_step(two, "result"),
        later=two["processes_result_seconds"] - two["warm_result_seconds"],
    )


def waiting_table() -> str:
    """Return what a user waits for, one row per host, device and measurement; seconds."""
    rows = []
    for path in sorted((DATA / "startup").glob("*.json")):
        measured, host = runfiles.read_json(path), path.stem.split("-")[2]
        for kind, runs in measured["repeats"].items():
            field = "first_step_seconds" if kind in ("cold", "warm") else "seconds"
            seconds = [run[field] for run in runs]
            rows.append(
                {
                    "host": host.upper(),
                    "device": device(measured),
                    "from the command to": WAITED_FOR[kind].format(**runs[0]),
                    "seconds, median": f"{statistics.median(seconds):.1f}",
                    "repeats": ", ".join(f"{each:.1f}" for each in seconds),
                }
            )
    return table(rows)


def median_step(measured: dict, kind: str) -> float:
    """Return the milliseconds of a step, the median of the repeats."""
    return statistics.median(
        run["step_milliseconds"]["median"] for run in measured["repeats"][kind]
    )


def images_per_second(measured: dict, kind: str) -> float:
    """Return the images/s of training, the median of the repeats."""
    return statistics.median(run["images_per_second"] for run in measured["repeats"][kind])


def first_step(measured: dict, kind: str) -> float:
    """Return when the first step ended, in seconds; the median of the repeats."""
    return statistics.median(run["first_step_seconds"] for run in measured["repeats"][kind])


def streamed_range(rows: Sequence[dict]) -> str:
    """Return how many GB of images the host streamed per second, to all devices."""
    return in_gigabytes(
        row["streamed_images_per_second"] * row["image_size"] ** 2 * 3 for row in rows
    )


def in_gigabytes(values: Iterable[float]) -> str:
    """Return the least and the most of some bytes, in GB."""
    values = list(values)
    ends = (f"{end / 1e9:.0f}" for end in (min(values), max(values)))
    return " to ".join(dict.fromkeys(ends))


def device(measured: dict) -> str:
    """Return the kind of device, and of several their number."""
    hardware = measured["hardware"]
    count = hardware.get("count", 1)
    return f"{count} x " * (count > 1) + hardware["device_kind"]


def stages_table(cold_runs: Sequence[dict], warm_runs: Sequence[dict]) -> str:
    """Return when the stages before the first step begin and end; medians, in seconds."""
    cold, warm = stage_spans(cold_runs), stage_spans(warm_runs)
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
    """Return images per second, by where the images lie."""
    rows = []
    for measured in load_folder(DATA / "streaming"):
        for row in measured["streaming"]:
            resident, sharded, streamed = (
                row.get(f"{side}_images_per_second") for side in ("resident", "sharded", "streamed")
            )
            rows.append(
                {
                    "device": device(measured),
                    "batch per device": str(row["batch_size"] // measured["hardware"]["count"]),
                    "mesh, scheme": " ".join(filter(None, map(row.get, ("mesh", "parallelism")))),
                    "resident images/s": f"{resident:,}",
                    "sharded": f"{sharded:,} ({sharded / resident:.1%})" if sharded else "",
                    "streamed": f"{streamed:,} ({streamed / resident:.1%})",
                }
            )
    return table(rows)
