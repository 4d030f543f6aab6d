"""Make the blocks of a report: facts, charts, tables and pictures of each sweep."""

import base64
import html
import statistics
from collections.abc import Callable, Sequence

from cnn_spmd.report import batch_scaling, compare, text
from cnn_spmd.report.text import Block, Chart, Heading, Paragraph, Table
from cnn_spmd.training import runfiles

KERNELS = 10  # rows per run in the table of kernels
LEGEND = (
    "n is the number of runs that differ in nothing but their seed; mean ± one sample standard"
    " deviation. Speedup is the throughput relative to the run on mesh 1x1 with the same batch and"
    " settings, of the same scheme where there is one. Efficiency is the speedup divided by the"
    " number of devices. Ring MB is what a device sends per step if each collective runs as a ring;"
    " theory is its closed form (Gholami et al. 2018). Where theory has a reduce-scatter, XLA for"
    " CPUs makes an all-reduce, which sends twice as much. Hidden is the share of the"
    " communication's estimated time that the compiled schedule can hide behind computing, on GPUs."
    " MB are 1e6 bytes."
)
PROFILE_LEGEND = (
    "Mean over the devices. Overlapped communication runs while the device computes, exposed"
    " communication while it does not: a step is computing, exposed communication and idle time. "
)


def report_blocks(
    sweeps: Sequence[dict], notes: Sequence[str], target_error: float | None = None
) -> list[Block]:
    """Return the report on sweeps (load.load_sweeps); notes are its warnings.

    target_error: as batch_scaling.measure takes it.
    """
    experiments = dict.fromkeys(sweep["experiment"] for sweep in sweeps)
    blocks: list[Block] = [Heading(1, f"cnn_spmd: {', '.join(experiments)}")]
    if notes:
        blocks.append(Table(["warnings"], [[note] for note in notes]))
    return blocks + [block for sweep in sweeps for block in sweep_blocks(sweep, target_error)]


def sweep_blocks(sweep: dict, target_error: float | None) -> list[Block]:
    """Return the blocks of one sweep."""
    # The import loads matplotlib, which takes a second and can fail (canvas.py).
    from cnn_spmd.report import charts

    runs = sweep["runs"]
    groups = compare.groups_of(runs)
    scaling = batch_scaling.measure(sweep, target_error)
    shares, kernels = profile_blocks(runs)
    return [
        Heading(2, sweep["title"]),
        facts_table(sweep),
        *charts.all_charts(sweep, groups, scaling),
        *comparison_blocks(groups),
        *(batch_scaling.blocks(scaling) if scaling else []),
        *shares,
        Heading(3, "All runs"),
        runs_table(runs),
        *kernels,
        *(block for run in runs for block in picture_blocks(run)),
    ]


def facts_table(sweep: dict) -> Table:
    """Return what a sweep's runs share: network, data, hardware, command, ..."""
    hardware = sweep["hardware"] or {}
    versions = (f"{name} {version}" for name, version in hardware.get("versions", {}).items())
    facts = {
        "network": distinct_texts(sweep["runs"], network_text),
        "data": distinct_texts(sweep["runs"], data_text),
        "hardware": compare.hardware_of(sweep),
        "command": sweep.get("command"),
        "started": sweep.get("started"),
        "versions": ", ".join(versions),
        "commit": hardware.get("commit"),
    }
    return Table(["", ""], [[name, fact] for name, fact in facts.items() if fact])


def distinct_texts(runs: Sequence[dict], text_of: Callable[[dict], str]) -> str:
    """Return the distinct texts that text_of makes of the runs' figures, joined."""
    texts = dict.fromkeys(text_of(run["figures"]) for run in runs if run["figures"])
    return "; ".join(filter(None, texts))


def network_text(figures: dict) -> str:
    """Return the network's name and size."""
    return f"{figures['model']}, {figures['param_count']:,} parameters"


def data_text(figures: dict) -> str:
    """Return the data set's name, and that of the data set that it stands in for."""
    fallback = figures.get("fallback")  # older sweeps lack it
    return figures["dataset"] + (f", which stands in for {fallback}" if fallback else "")


# ---- Runs compared

COMPARISON_HEADER = [
    "mesh",
    "parallelism",
    "batch and settings",
    "n",
    "images/s",
    "step, ms (p10 to p90)",
    "predicted, ms",
    "speedup",
    "efficiency, %",
    "parameters and optimizer, MB per device",
    "ring MB per step",
    "theory",
    "hidden, %",
    "test accuracy, %",
]


def comparison_blocks(groups: Sequence[dict]) -> list[Block]:
    """Return the table of groups, and the panels that have no one-device run."""
    runs = [run for group in groups for run in group["runs"]]
    metrics = runfiles.registered_metrics(run["figures"] for run in runs)
    header = [*COMPARISON_HEADER, *map(compare.metric_label, metrics)]
    rows = []
    for group in groups:
        further = [metric_text(name, compare.values(group, "eval", name)) for name in metrics]
        rows.append([*comparison_row(group), *further])
    blocks = [Heading(3, "Runs compared"), Table(header, rows), Paragraph(LEGEND)]
    alone = dict.fromkeys(group["panel"] for group in groups if group["base"] is None)
    if alone:
        blocks.append(Paragraph(f"No one-device run, so no speedup: {'; '.join(alone)}."))
    return blocks


def comparison_row(group: dict) -> list[str]:
    """Return a group's cells under COMPARISON_HEADER."""
    gains = compare.group_speedups(group)
    return [
        compare.mesh_name(group["mesh"]),
        group["parallelism"],
        group["panel"],
        str(len(group["runs"])),
        text.throughput(compare.values(group, "images_per_second")),
        step_text(group),
        text.optional(compare.average(group, "predicted_milliseconds"), 3),
        text.mean_and_deviation(gains, 2),
        f"{100 * statistics.mean(gains) / group['devices']:.1f}" if gains else "",
        f"{held_bytes(group) / 1e6:,.1f}",
        *(text.optional(moved, 1, 1e-6) for moved in moved_bytes(group)),
        text.optional(compare.average(group, "hidden_share"), 0, 100),
        metric_text("accuracy", compare.values(group, "accuracy")),
    ]


def step_text(group: dict) -> str:
    """Return the median, 10th and 90th percentile of a group's step time, in ms."""
    names = ("median", "p10", "p90")
    times = {name: compare.average(group, "step_milliseconds", name) for name in names}
    if None in times.values():
        return ""
    return "{median:,.3f} ({p10:,.3f} to {p90:,.3f})".format(**times)


def held_bytes(group: dict) -> float:
    """Return the bytes of parameters and optimizer state per device."""
    sizes = [run["figures"]["bytes_per_device"].values() for run in group["runs"]]
    return statistics.mean(sum(size or 0 for size in row) for row in sizes)


def moved_bytes(group: dict) -> tuple[float | None, float | None]:
    """Return the ring bytes per device and step, as compiled and by the closed form."""
    ring, theory = (
        compare.average(group, name) for name in ("ring_bytes", "closed_form_ring_bytes")
    )
    micro_batches = any(run["figures"].get("dense_microbatch", 1) for run in group["runs"])
    # Older runs, which have no closed form for the variable batch, counted one micro-batch only.
    return (None if theory is None and micro_batches else ring), theory


def metric_text(name: str, values: Sequence[float]) -> str:
    """Return mean and deviation of a metric, in % where it is a share."""
    if name in compare.SHARES:
        return text.mean_and_deviation([100 * value for value in values], 2)
    return text.mean_and_deviation(values, 4)


# ---- All runs

RUNS_HEADER = [
    "run",
    "status",
    "images/s",
    "step, ms: p10",
    "median",
    "p90",
    "test accuracy, %",
    "loss",
    "train, s",
    "compile, s",
    "seed",
    "reason",
]


def runs_table(runs: Sequence[dict]) -> Table:
    """Return the table of all runs; registered metrics have columns after the loss."""
    metrics = runfiles.registered_metrics(run["figures"] for run in runs)
    after_loss = RUNS_HEADER.index("loss") + 1
    header, rows = list(RUNS_HEADER), []
    header[after_loss:after_loss] = map(compare.metric_label, metrics)
    for run in runs:
        evaluation = run["figures"].get("eval") or {}
        row = run_row(run)
        row[after_loss:after_loss] = [
            metric_text(name, [evaluation[name]] if name in evaluation else []) for name in metrics
        ]
        rows.append(row)
    return Table(header, rows)


def run_row(run: dict) -> list[str]:
    """Return a run's cells under RUNS_HEADER."""
    figures = run["figures"]
    times = figures.get("step_milliseconds") or {}
    speed = figures.get("images_per_second")
    return [
        run["name"],
        run["status"],
        "" if speed is None else text.throughput([speed]),
        *(text.optional(times.get(name), 3) for name in ("p10", "median", "p90")),
        text.optional(figures.get("accuracy"), 2, 100),
        text.optional(figures.get("loss"), 4),
        text.optional(figures.get("train_seconds"), 1),
        text.optional(figures.get("compile_seconds"), 1),
        str(figures.get("seed", "")),
        run["reason"],
    ]


# ---- Profiles and pictures

PROFILE_HEADER = [
    "run",
    "steps",
    "step, ms",
    "computing, ms",
    "communicating, ms",
    "of which overlapped",
    "exposed",
    "idle, ms",
    "communication, % of the step",
    "exposed, %",
]
KERNELS_HEADER = [
    "run",
    "kernel",
    "ms per step",
    "% of the step",
    "times per step",
    "communication",
]


def profile_blocks(runs: Sequence[dict]) -> tuple[list[Block], list[Block]]:
    """Return the blocks on communication, and those on kernels, of profiled runs."""
    profiled = [run for run in runs if run["figures"].get("profile")]
    if not profiled:
        return [], []
    note = distinct_texts(profiled, lambda figures: figures["profile"].get("note") or "")
    shares = [
        Heading(3, "Computing and communicating, by profile"),
        Table(PROFILE_HEADER, list(map(profile_row, profiled))),
        Paragraph((PROFILE_LEGEND + note).strip()),
    ]
    rows = [row for run in profiled for row in kernel_rows(run)]
    legend = f"The {KERNELS} that take longest in each run; profile.json has more."
    kernels = [
        Heading(3, "Top kernels, by profile"),
        Table(KERNELS_HEADER, rows),
        Paragraph(legend),
    ]
    return shares, kernels


def profile_row(run: dict) -> list[str]:
    """Return the cells of a profiled run under PROFILE_HEADER."""
    profile = run["figures"]["profile"]
    step = profile["step_milliseconds"]
    communication = profile["communication_milliseconds"]
    exposed = profile["exposed_milliseconds"]
    times = [
        step,
        profile["compute_milliseconds"],
        communication,
        communication - exposed,
        exposed,
        profile["idle_milliseconds"],
    ]
    shares = [100 * communication / step, 100 * exposed / step]
    return [
        run["name"],
        str(profile["steps"]),
        *(f"{time:,.3f}" for time in times),
        *(f"{share:.1f}" for share in shares),
    ]


def kernel_rows(run: dict) -> list[list[str]]:
    """Return a row under KERNELS_HEADER for each of a run's slowest kernels."""
    profile = run["figures"]["profile"]
    return [
        [
            "" if number else run["name"],
            kernel["name"],
            f"{kernel['milliseconds']:,.3f}",
            f"{100 * kernel['milliseconds'] / profile['step_milliseconds']:.1f}",
            f"{kernel['count']:,g}",
            "yes" if kernel["communication"] else "",
        ]
        for number, kernel in enumerate(profile["top"][:KERNELS])
    ]


def picture_blocks(run: dict) -> list[Block]:
    """Return the pictures of what a run learned (pictures.py)."""
    blocks = []
    for title, png, caption in run["pictures"]:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        image = f'<img alt="{html.escape(title)}" src="{source}">'
        blocks.append(Chart(f"{title}: {run['name']}", [image], caption))
    return blocks
