"""Make the tables of runs: those that compare by mesh and scheme, all runs, and profiles."""

import statistics
from collections.abc import Sequence

from cnn_spmd.report import compare, settings, text
from cnn_spmd.report.compare import Group
from cnn_spmd.report.settings import Overview
from cnn_spmd.report.text import Block, Heading, Paragraph
from cnn_spmd.training import runfiles

# Column of comparison_row -> what it means.
LEGEND = {
    "n": "n is the number of runs that differ in nothing but their seed; a seed counts once.",
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
# The columns that say nothing where each run has one device.
OF_MESHES = ("speedup", "efficiency, %", "ring MB per step", "theory", "hidden, %")
KERNELS = 10  # per run
PROFILE_LEGEND = (
    "Mean over the devices. Overlapped communication runs while the device computes, exposed"
    " communication while it does not: a step is computing, exposed communication and idle time. "
)


# ---- Cells


def result_cells(
    runs: Sequence[dict], metrics: Sequence[str], split: str, target: float | None = None
) -> dict[str, str]:
    """Return the runs' metrics, seconds to the target and images/s, as cells by column.

    split, target: those of settings.Overview.
    """
    cells = {
        compare.metric_label(name, split): metric_text(name, compare.numbers(runs, name))
        for name in metrics
    }
    if target is not None:
        found = [settings.seconds_to(run, target) for run in runs]
        reached = [seconds for seconds in found if seconds is not None]
        some = f" ({len(reached)} of {len(found)})" if 0 < len(reached) < len(found) else ""
        cells[f"training to {100 * target:.4g} %, s"] = text.mean_and_deviation(reached, 1) + some
    return cells | {"images/s": metric_text(compare.SPEED, compare.numbers(runs, compare.SPEED))}


def metric_text(name: str, numbers: Sequence[float]) -> str:
    """Return mean and deviation of a metric, in % where it is a share."""
    if name == compare.SPEED:
        digits = 0 if max(numbers, default=0) >= 100 else 1
    else:
        digits = 2 if name in runfiles.SHARES else 4
    return text.mean_and_deviation([compare.factor_of(name) * n for n in numbers], digits)


# ---- Runs compared


def comparison_blocks(groups: Sequence[Group], overview: Overview) -> list[Block]:
    """Return the table of groups, and the panels that have no one-device run."""
    if not groups:
        return []
    metrics = runfiles.registered_metrics(run["figures"] for each in groups for run in each.runs)
    rows = [comparison_row(group, overview.split, metrics, overview.target) for group in groups]
    one_device = all(group.devices == 1 for group in groups)
    if one_device:
        rows = [row | dict.fromkeys(OF_MESHES, "") for row in rows]
    table = text.table_of(rows)
    legend = " ".join(said for column, said in LEGEND.items() if column in table.header)
    blocks = [Heading(3, "Runs compared"), table, Paragraph(legend)]
    alone = dict.fromkeys(group.panel for group in groups if group.base is None)
    if alone and not one_device:
        blocks.append(Paragraph(f"No one-device run, so no speedup: {'; '.join(alone)}."))
    return blocks


def comparison_row(
    group: Group, split: str = "test", metrics: Sequence[str] = (), target: float | None = None
) -> dict[str, str]:
    """Return a group's cells by column.

    split, target: as of settings.Overview. metrics: the names of the registered ones.
    """
    gains = group.speedups()
    ring, theory = moved_bytes(group)
    held = sum(size or 0 for size in group.figures["bytes_per_device"].values())
    return {
        "mesh": compare.mesh_name(group.mesh),
        "parallelism": group.parallelism,
        "batch and settings": group.panel,
        "n": str(len(group.runs)),
        **result_cells(group.runs, ["accuracy", *metrics], split, target),
        "step, ms (p10 to p90)": step_text(group),
        "predicted, ms": text.optional(group.average("predicted_milliseconds"), 3),
        "speedup": text.mean_and_deviation(gains, 2),
        "efficiency, %": f"{100 * statistics.mean(gains) / group.devices:.1f}" if gains else "",
        "parameters and optimizer, MB per device": f"{held / 1e6:,.1f}",
        "ring MB per step": text.optional(ring, 1, 1e-6),
        "theory": text.optional(theory, 1, 1e-6),
        "hidden, %": text.optional(group.average("hidden_share"), 0, 100),
    }


def step_text(group: Group) -> str:
    """Return the median, 10th and 90th percentile of a step in ms, each a mean over runs."""
    names = ("median", "p10", "p90")
    times = {name: group.average("step_milliseconds", name) for name in names}
    if None in times.values():
        return ""
    return "{median:,.3f} ({p10:,.3f} to {p90:,.3f})".format(**times)


def moved_bytes(group: Group) -> tuple[float | None, float | None]:
    """Return the ring bytes per device and step, as compiled and by the closed form."""
    ring, theory = (group.average(name) for name in ("ring_bytes", "closed_form_ring_bytes"))
    micro_batches = any(run["figures"].get("dense_microbatch", 1) for run in group.runs)
    # Older runs have no closed form for the variable batch, and counted one micro-batch's bytes
    # only. Some do not say whether they had it.
    return (None if theory is None and micro_batches else ring), theory


# ---- All runs


def runs_blocks(runs: Sequence[dict], overview: Overview) -> list[Block]:
    """Return the table of all runs."""
    metrics = runfiles.registered_metrics(run["figures"] for run in runs)
    rows = [run_row(run, metrics, overview) for run in runs]
    return [Heading(3, "All runs"), text.table_of(rows)]


def run_row(run: dict, metrics: Sequence[str], overview: Overview) -> dict[str, str]:
    """Return a run's cells by column; metrics: the names of the registered ones."""
    figures = run["figures"]
    times = figures.get("step_milliseconds") or {}
    return {
        "run": run["name"],
        "status": run["status"],
        **result_cells([run], ["accuracy", "loss", *metrics], overview.split, overview.target),
        "step, ms: p10": text.optional(times.get("p10"), 3),
        "median": text.optional(times.get("median"), 3),
        "p90": text.optional(times.get("p90"), 3),
        "train, s": text.optional(figures.get("train_seconds"), 1),
        "compile, s": text.optional(figures.get("compile_seconds"), 1),
        "seed": str(figures.get("seed", "")),
        "reason": run["reason"],
    }


# ---- Profiles


def share_blocks(runs: Sequence[dict]) -> list[Block]:
    """Return the table of the parts of a profiled step; [] where no run was profiled."""
    profiled = list(filter(is_profiled, runs))
    if not profiled:
        return []
    table = text.table_of(list(map(share_row, profiled)))
    notes = dict.fromkeys(run["figures"]["profile"].get("note") or "" for run in profiled)
    legend = PROFILE_LEGEND + "; ".join(filter(None, notes))
    heading = Heading(3, "Computing and communicating, by profile")
    return [heading, table, Paragraph(legend.strip())]


def is_profiled(run: dict) -> bool:
    """Return whether a run has a profile."""
    return bool(run["figures"].get("profile"))


def share_row(run: dict) -> dict[str, str]:
    """Return the parts of a profiled run's step by column."""
    profile = run["figures"]["profile"]
    step, communication, exposed = (
        profile[f"{part}_milliseconds"] for part in ("step", "communication", "exposed")
    )
    times = {
        "step, ms": step,
        "computing, ms": profile["compute_milliseconds"],
        "communicating, ms": communication,
        "of which overlapped": communication - exposed,
        "exposed": exposed,
        "idle, ms": profile["idle_milliseconds"],
    }
    return {
        "run": run["name"],
        "steps": str(profile["steps"]),
        **{column: f"{time:,.3f}" for column, time in times.items()},
        "communication, % of the step": f"{100 * communication / step:.1f}",
        "exposed, %": f"{100 * exposed / step:.1f}",
    }


def kernel_blocks(runs: Sequence[dict]) -> list[Block]:
    """Return the table of the slowest kernels; [] where no run was profiled."""
    rows = [row for run in filter(is_profiled, runs) for row in kernel_rows(run)]
    if not rows:
        return []
    legend = f"The {KERNELS} that take longest in each run; profile.json has more."
    return [Heading(3, "Top kernels, by profile"), text.table_of(rows), Paragraph(legend)]


def kernel_rows(run: dict) -> list[dict[str, str]]:
    """Return the slowest kernels of a profiled run by column, the slowest first."""
    profile = run["figures"]["profile"]
    return [
        {
            "run": "" if number else run["name"],
            "kernel": kernel["name"],
            "ms per step": f"{kernel['milliseconds']:,.3f}",
            "% of the step": f"{100 * kernel['milliseconds'] / profile['step_milliseconds']:.1f}",
            "times per step": f"{kernel['count']:,g}",
            "communication": "yes" if kernel["communication"] else "",
        }
        for number, kernel in enumerate(profile.get("top", [])[:KERNELS])
    ]
