"""Make the tables of profiled runs: computing and communicating, and the slowest kernels."""

from collections.abc import Sequence

from cnn_spmd.report import facts
from cnn_spmd.report.text import Block, Heading, Paragraph, Table

KERNELS = 10  # per run
LEGEND = (
    "Mean over the devices. Overlapped communication runs while the device computes, exposed"
    " communication while it does not: a step is computing, exposed communication and idle time. "
)


def share_blocks(runs: Sequence[dict]) -> list[Block]:
    """Return the table of the parts of a step; [] where no run was profiled."""
    rows = [share_row(run) for run in profiled(runs)]
    if not rows:
        return []
    notes = facts.distinct_texts(
        profiled(runs), lambda run: run["figures"]["profile"].get("note") or ""
    )
    return [
        Heading(3, "Computing and communicating, by profile"),
        whole_table(rows),
        Paragraph((LEGEND + "; ".join(notes)).strip()),
    ]


def kernel_blocks(runs: Sequence[dict]) -> list[Block]:
    """Return the table of the slowest kernels; [] where no run was profiled."""
    rows = [row for run in profiled(runs) for row in kernel_rows(run)]
    if not rows:
        return []
    legend = f"The {KERNELS} that take longest in each run; profile.json has more."
    return [Heading(3, "Top kernels, by profile"), whole_table(rows), Paragraph(legend)]


def profiled(runs: Sequence[dict]) -> list[dict]:
    """Return the runs that have a profile."""
    return [run for run in runs if run["figures"].get("profile")]


def whole_table(rows: Sequence[dict[str, str]]) -> Table:
    """Return a table of rows by column, with its empty columns."""
    return Table(list(rows[0]), [list(row.values()) for row in rows])


def share_row(run: dict) -> dict[str, str]:
    """Return the parts of a profiled run's step by column."""
    profile = run["figures"]["profile"]
    step = profile["step_milliseconds"]
    communication = profile["communication_milliseconds"]
    exposed = profile["exposed_milliseconds"]
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
        **{name: f"{time:,.3f}" for name, time in times.items()},
        "communication, % of the step": f"{100 * communication / step:.1f}",
        "exposed, %": f"{100 * exposed / step:.1f}",
    }


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
        for number, kernel in enumerate(profile["top"][:KERNELS])
    ]
