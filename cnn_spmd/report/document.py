"""Make the blocks of a report: what varied, best runs, facts, charts, tables."""

import base64
import collections
import html
import re
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cnn_spmd.report import batch_scaling, compare, load, settings, text
from cnn_spmd.report.settings import Overview
from cnn_spmd.report.text import Block, Chart, Commands, Heading, Paragraph, Table
from cnn_spmd.training import runfiles

KERNELS = 10  # rows per run in the table of kernels
BEST = 5  # combinations at the top of the page
MOST_VALUES = 12  # of a setting, or of a fact, that are named
# Column of a table -> what it means.
LEGEND = {
    "n": "n is the number of runs that differ in nothing but their seed; mean ± one sample standard"
    " deviation.",
    "speedup": "Speedup is the throughput relative to the run on mesh 1x1 with the same batch and"
    " settings, of the same scheme where there is one. Efficiency is the speedup divided by the"
    " number of devices.",
    "ring MB per step": "Ring MB is what a device sends per step if each collective is a ring.",
    "theory": "Theory is the closed form of these bytes (Gholami et al. 2018). Where theory has a"
    " reduce-scatter, XLA for CPUs makes an all-reduce, which sends twice as much.",
    "hidden, %": "Hidden is the share of the communication's estimated time that the compiled"
    " schedule can hide behind computing, on GPUs.",
    "parameters and optimizer, MB per device": "MB are 1e6 bytes.",
}
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
    experiments = dict.fromkeys(name for sweep in sweeps for name in names_of_experiments(sweep))
    blocks: list[Block] = [Heading(1, f"cnn_spmd: {', '.join(experiments)}")]
    if notes:
        blocks.append(Table(["warnings"], [[note] for note in notes]))
    blocks += all_given_blocks(sweeps)
    return blocks + [block for sweep in sweeps for block in sweep_blocks(sweep, target_error)]


def names_of_experiments(sweep: dict) -> list[str]:
    """Return the names of a sweep's experiments; lone runs can have several."""
    return sweep["experiment"].split(", ")


def sweep_blocks(sweep: dict, target_error: float | None) -> list[Block]:
    """Return the blocks of one sweep: what was asked, the best runs, charts, tables."""
    # The import loads matplotlib, which takes a second and can fail (canvas.py).
    from cnn_spmd.report import charts, plots, setting_charts

    runs = sweep["runs"]
    overview = settings.overview(runs, target_error)
    groups = compare.groups_of(runs)
    scaling = batch_scaling.measure(sweep, target_error)
    with plots.style():
        learned = setting_charts.metric_charts(runs, overview)
        placed = charts.mesh_charts(sweep)
        curves = setting_charts.curve_charts(runs, overview)
        steps = [charts.steps_chart(sweep, scaling)] if scaling and scaling.steps else []
    shares, kernels = profile_blocks(runs)
    return [
        Heading(2, sweep["title"]),
        *asked_blocks(runs, overview),
        *best_blocks(overview),
        Heading(3, "Settings"),
        facts_table(sweep, overview),
        *learned,
        *placed,
        *curves,
        *comparison_blocks(groups, overview),
        *steps,
        *(batch_scaling.blocks(scaling) if scaling else []),
        *shares,
        Heading(3, "All runs"),
        runs_table(runs, overview),
        *kernels,
        *(block for run in runs for block in picture_blocks(run)),
    ]


# ---- What was asked, and the answer


def asked_blocks(runs: Sequence[dict], overview: Overview) -> list[Block]:
    """Return how the runs ended, and the values of each setting that varies."""
    counts = collections.Counter(run["status"] for run in runs)
    ended = ", ".join(f"{count} {status}" for status, count in counts.items())
    said = f"{len(runs)} run{'s' * (len(runs) != 1)}: {ended}."
    if not overview.settings:
        return [Paragraph(said)]
    rows = [[setting_text(each), values_text(each.values)] for each in overview.settings]
    blocks = [Paragraph(f"{said} What varies:"), Table(["setting", "values"], rows)]
    if best := answer(overview):
        blocks.append(Paragraph(f"{best}."))
    return blocks


def answer(overview: Overview) -> str:
    """Return "Best test accuracy: learning_rate=0.1, 96.11 ± 0.39 % (n = 2)"; "" for no answer.

    It also says which numbers are at the edge of what was tried.
    """
    best = settings.ranked(overview)[:1]
    if not best or not best[0].values:
        return ""
    labels = {each.name: each.label for each in overview.settings}
    where = [
        f"{labels[name]}={compare.value_text(value)}" for name, value in best[0].values.items()
    ]
    numbers = best[0].numbers(overview.metric)
    if overview.metric == settings.SPEED:
        metric, shown = "images/s", text.throughput(numbers)
    else:
        metric, shown = f"{overview.split} accuracy", f"{metric_text('accuracy', numbers)} %"
    edges = settings.at_edges(best[0], overview)
    said = f"Best {metric}: {', '.join(where)}, {shown} (n = {len(numbers)})"
    return said + (f"; {edges}" if edges else "")


def setting_text(setting: settings.Setting) -> str:
    """Return a setting's name, and the settings that change with it."""
    return setting.name + (f" (with it: {values_text(setting.along)})" if setting.along else "")


def values_text(values: Sequence) -> str:
    """Return values joined by commas; of many, the first and the last."""
    texts = list(map(compare.value_text, values))
    if len(texts) > MOST_VALUES:
        texts = [*texts[: MOST_VALUES - 1], f"... {texts[-1]} ({len(texts)} values)"]
    return ", ".join(texts)


def best_blocks(overview: Overview) -> list[Block]:
    """Return the best combinations with their commands; [] where none has a metric."""
    best = settings.ranked(overview)[:BEST]
    if not best:
        return []
    title = "The run"
    if overview.settings:
        by = "images/s" if overview.metric == settings.SPEED else f"{overview.split} accuracy"
        title = f"Best runs, by {by}"
    rows = [best_row(combination, overview) for combination in best]
    header, cells = list(rows[0]), [list(row.values()) for row in rows]
    blocks = [Heading(3, title), Table(*without_empty(header, cells))]
    commands = [best_run(combination, overview.metric)["command"] for combination in best]
    if any(commands):
        said = "The commands of these rows, in the same order"
        if any(len(combination.runs) > 1 for combination in best):
            said += ", each that of the best of the seeds"
        blocks += [Paragraph(f"{said}:"), Commands(list(filter(None, commands)))]
    return blocks


def best_run(combination: settings.Combination, metric: str) -> dict:
    """Return the run of a combination that is best by a metric."""
    return max(combination.having(metric), key=lambda run: settings.metric_of(run, metric))


def best_row(combination: settings.Combination, overview: Overview) -> dict[str, str]:
    """Return a combination's cells by their columns."""
    best = best_run(combination, overview.metric)
    labels = {each.name: each.label for each in overview.settings}
    row = {labels[name]: compare.value_text(value) for name, value in combination.values.items()}
    row["n"] = str(len(combination.having(overview.metric)))
    if overview.metric != settings.SPEED:
        for name in ("accuracy", "loss"):
            label = compare.metric_label(name, overview.split)
            row[label] = metric_text(name, combination.numbers(name))
    row[target_label(overview.target)] = target_text(combination.runs, overview.target)
    row["images/s"] = text.throughput(combination.numbers(settings.SPEED))
    # Older runs outside a sweep have no command.
    return row | dict(run="" if best["command"] else best["name"])


class Given(NamedTuple):
    """A combination, and where it is from: the name of a sweep, or those of lone runs."""

    origin: str
    overview: Overview
    combination: settings.Combination


def all_given_blocks(sweeps: Sequence[dict]) -> list[Block]:
    """Return a table of the best combinations for each data set that several sweeps share."""
    by_data: dict[str, list[Given]] = {}
    sections: dict[str, set[int]] = {}
    for number, sweep in enumerate(sweeps):
        overview = settings.overview(sweep["runs"], None)
        for combination in overview.combinations:
            done = [run for run in combination.runs if run["status"] == "completed"]
            if done:
                names = ", ".join(run["name"] for run in combination.runs)
                origin = names if sweep.get("is_of_lone_runs") else sweep["title"]
                data = done[0]["figures"]["dataset"]
                by_data.setdefault(data, []).append(Given(origin, overview, combination))
                sections.setdefault(data, set()).add(number)
    blocks: list[Block] = []
    for data, given in by_data.items():
        if len(sections[data]) > 1:
            blocks += [Heading(2, f"All given, on {data}"), all_given_table(given)]
    return blocks


def all_given_table(given: Sequence[Given]) -> Table:
    """Return the table of the best combinations of several sweeps, best first.

    They are ranked by accuracy, or by images/s where the images are random or no run has an
    accuracy. Settings are the fields that were swept or set by flags, where they differ.
    """
    runs = [run for each in given for run in each.combination.runs]
    metric = settings.main_metric(runs, [])
    split = compare.split_of(run["config"] for run in runs)
    ranked = [each for each in given if each.combination.numbers(metric)]
    ranked.sort(key=lambda each: -statistics.mean(each.combination.numbers(metric)))
    shown = ranked[: 2 * BEST]
    names = given_settings(shown)
    rows = []
    for each in shown:
        run, combination = each.combination.runs[0], each.combination
        values = {name: settings.value_of(run, name) for name in names}
        known = [
            f"{name}={compare.value_text(value)}"
            for name, value in values.items()
            if value is not None
        ]
        accuracies = [] if metric == settings.SPEED else combination.numbers("accuracy")
        cells = [
            each.origin,
            run["config"].get("experiment", ""),
            ", ".join(known),
            str(len(combination.having(metric))),
            metric_text("accuracy", accuracies),
            text.throughput(combination.numbers(settings.SPEED)),
        ]
        rows.append(cells)
    header = ["from", "experiment", "settings", "n"]
    header += [compare.metric_label("accuracy", split), "images/s"]
    return Table(*without_empty(header, rows))


def given_settings(given: Sequence[Given]) -> list[str]:
    """Return the fields that were swept or set by flags, where they differ."""
    names: dict[str, None] = {}
    for each in given:
        names |= dict.fromkeys(setting.name for setting in each.overview.settings)
        names |= dict.fromkeys(load.set_by_hand(each.combination.runs[0]["command"]))
    hidden = ("seed", "experiment", *compare.NOT_COMPARED)
    runs = [each.combination.runs[0] for each in given]
    return [
        name
        for name in names
        if not name.startswith(hidden)
        and len({str(settings.value_of(run, name)) for run in runs}) > 1
    ]


def without_empty(
    header: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[list[str], list[list[str]]]:
    """Return a table without the columns in which every cell is empty."""
    kept = [at for at in range(len(header)) if any(row[at] for row in rows)]
    return [header[at] for at in kept], [[row[at] for at in kept] for row in rows]


def target_label(target: float | None) -> str:
    """Return the header of the column of target_text."""
    return "" if target is None else f"training to {100 * target:.4g} %, s"


def target_text(runs: Sequence[dict], target: float | None) -> str:
    """Return the seconds of training to an accuracy, and how many runs reached it."""
    if target is None:
        return ""
    found = [settings.seconds_to(run, target) for run in runs]
    reached = [seconds for seconds in found if seconds is not None]
    some = f" ({len(reached)} of {len(found)})" if 0 < len(reached) < len(found) else ""
    return text.mean_and_deviation(reached, 1) + some


def facts_table(sweep: dict, overview: Overview) -> Table:
    """Return network, data, recipe, hardware, command, ... of a sweep's runs."""
    runs = sweep["runs"]
    hardware = sweep["hardware"] or {}
    versions = (f"{name} {version}" for name, version in hardware.get("versions", {}).items())
    facts = {
        "network": distinct_texts(runs, network_text),
        "data": distinct_texts(runs, data_text),
        **recipe_facts(runs, overview),
        "hardware": compare.hardware_of(sweep),
        "command": sweep.get("command"),
        "started": sweep.get("started"),
        "versions": ", ".join(versions),
        "commit": hardware.get("commit"),
    }
    return Table(["", ""], [[name, fact] for name, fact in facts.items() if fact])


def recipe_facts(runs: Sequence[dict], overview: Overview) -> dict[str, str]:
    """Return mesh, scheme, learning rate, batch and length, except what varies."""
    varied = {name for each in overview.settings for name in (each.name, *each.along)}
    fields = {
        "mesh": "mesh",
        "parallelism": "parallelism",
        "learning rate": "optimizer.learning_rate",
        "batch size": "batch_size",
        "steps": "steps",
        "epochs": "epochs",
        "label smoothing": "label_smoothing",
    }
    facts = {}
    for label, name in fields.items():
        values = [settings.value_of(run, name) for run in runs]
        known = settings.ordered(dict.fromkeys(value for value in values if value))
        if known and name not in varied:
            facts[label] = values_text(known)
    return facts


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
    "test accuracy, %",
    "images/s",
    "step, ms (p10 to p90)",
    "predicted, ms",
    "speedup",
    "efficiency, %",
    "parameters and optimizer, MB per device",
    "ring MB per step",
    "theory",
    "hidden, %",
]
# The columns that say nothing where each run has one device.
OF_MESHES = ("speedup", "efficiency, %", "ring MB per step", "theory", "hidden, %")


def comparison_blocks(groups: Sequence[dict], overview: Overview) -> list[Block]:
    """Return the table of groups, and the panels that have no one-device run."""
    if not groups:
        return []
    runs = [run for group in groups for run in group["runs"]]
    metrics = runfiles.registered_metrics(run["figures"] for run in runs)
    after = COMPARISON_HEADER.index("test accuracy, %") + 1
    header = header_of(COMPARISON_HEADER, after, metrics, overview)
    rows = []
    for group in groups:
        further = [metric_text(name, compare.values(group, "eval", name)) for name in metrics]
        row = comparison_row(group)
        row[after:after] = [*further, target_text(group["runs"], overview.target)]
        rows.append(row)
    if all(group["devices"] == 1 for group in groups):
        rows = [
            [cell if name not in OF_MESHES else "" for name, cell in zip(header, row, strict=True)]
            for row in rows
        ]
    header, rows = without_empty(header, rows)
    legend = " ".join(said for column, said in LEGEND.items() if column in header)
    blocks = [Heading(3, "Runs compared"), Table(header, rows), Paragraph(legend)]
    alone = dict.fromkeys(group["panel"] for group in groups if group["base"] is None)
    if alone and any(group["devices"] > 1 for group in groups):
        blocks.append(Paragraph(f"No one-device run, so no speedup: {'; '.join(alone)}."))
    return blocks


def header_of(
    header: Sequence[str], after: int, metrics: Sequence[str], overview: Overview
) -> list[str]:
    """Return a header with the split of the evaluations, registered metrics and the target.

    after: how many columns stand before those of the registered metrics.
    """
    named = [re.sub("^test ", f"{overview.split} ", name) for name in header]
    further = [compare.metric_label(name, overview.split) for name in metrics]
    return [*named[:after], *further, target_label(overview.target), *named[after:]]


def comparison_row(group: dict) -> list[str]:
    """Return a group's cells under COMPARISON_HEADER."""
    gains = compare.group_speedups(group)
    return [
        compare.mesh_name(group["mesh"]),
        group["parallelism"],
        group["panel"],
        str(len(group["runs"])),
        metric_text("accuracy", compare.values(group, "accuracy")),
        text.throughput(compare.values(group, "images_per_second")),
        step_text(group),
        text.optional(compare.average(group, "predicted_milliseconds"), 3),
        text.mean_and_deviation(gains, 2),
        f"{100 * statistics.mean(gains) / group['devices']:.1f}" if gains else "",
        f"{held_bytes(group) / 1e6:,.1f}",
        *(text.optional(moved, 1, 1e-6) for moved in moved_bytes(group)),
        text.optional(compare.average(group, "hidden_share"), 0, 100),
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
    "test accuracy, %",
    "test loss",
    "images/s",
    "step, ms: p10",
    "median",
    "p90",
    "train, s",
    "compile, s",
    "seed",
    "reason",
]


def runs_table(runs: Sequence[dict], overview: Overview) -> Table:
    """Return the table of all runs; registered metrics have columns after the loss."""
    metrics = runfiles.registered_metrics(run["figures"] for run in runs)
    after_loss = RUNS_HEADER.index("test loss") + 1
    header, rows = header_of(RUNS_HEADER, after_loss, metrics, overview), []
    for run in runs:
        evaluation = run["figures"].get("eval") or {}
        row = run_row(run)
        row[after_loss:after_loss] = [
            *(
                metric_text(name, [evaluation[name]] if name in evaluation else [])
                for name in metrics
            ),
            target_text([run], overview.target),
        ]
        rows.append(row)
    return Table(*without_empty(header, rows))


def run_row(run: dict) -> list[str]:
    """Return a run's cells under RUNS_HEADER."""
    figures = run["figures"]
    times = figures.get("step_milliseconds") or {}
    speed = figures.get("images_per_second")
    return [
        run["name"],
        run["status"],
        text.optional(figures.get("accuracy"), 2, 100),
        text.optional(figures.get("loss"), 4),
        "" if speed is None else text.throughput([speed]),
        *(text.optional(times.get(name), 3) for name in ("p10", "median", "p90")),
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
