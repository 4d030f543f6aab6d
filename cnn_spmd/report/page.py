"""A report's pages: one list of blocks, written as Markdown (tables only) and as one HTML file with the charts in it.

A block is ("heading", level, text), ("text", text), ("table", header, rows) or ("chart", title, pictures, caption), a picture
being an element of HTML.
"""

import base64
import csv
import html
import io
import re
from collections.abc import Callable

from cnn_spmd.config import flat
from cnn_spmd.report import compare

RUN_COLUMNS = [
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
KERNELS = 10  # rows a run in the table of kernels
LEGEND = (
    "n is the number of runs that differ in nothing but their seed; mean ± one sample standard deviation. Speedup is the"
    " throughput relative to the run on mesh 1x1 with the same batch and settings, of the same scheme where there is "
    "one, efficiency that over the number of devices. Ring MB is what a device sends in a step if each collective runs "
    "as a ring, theory its closed form (Gholami et al. 2018); MB of 1e6 bytes."
)
CSS = """
:root { color-scheme: light }
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1180px; margin: 0 auto; padding: 1rem;
  overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.2 } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .25rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
th { border-bottom: 2px solid #888; vertical-align: bottom } td { white-space: nowrap } td.n { text-align: right }
td.long { min-width: 20rem; white-space: normal; overflow-wrap: anywhere }
.facts { overflow-wrap: anywhere } .facts td + td { white-space: normal; min-width: 0 }
.one { display: flex; flex-wrap: wrap; gap: 1rem 2rem }
.one .pictures { flex: 1 1 22rem } .one figcaption { flex: 1 1 20rem }
figure { margin: 0 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: .5rem 1.5rem }
.pictures svg, .pictures img { width: 100%; max-width: 34rem; height: auto }
figcaption { font-size: .84rem; color: #444; max-width: 75em }
@media print { body { max-width: none; font-size: 10pt; padding: 0 } svg, img, tr { break-inside: avoid }
  h2, h3 { break-after: avoid } .pictures { grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)) }
  .scroll { overflow: visible } table { font-size: 6.5pt } th, td { padding: .1rem .25rem }
  td, td.long { white-space: normal; min-width: 0 } td.n, .facts td:first-child { white-space: nowrap }
  td:first-child { overflow-wrap: anywhere } }
"""


def document(sweeps: list[dict], notes: list[str]) -> list[tuple]:
    """The report on sweeps (report.load) as blocks."""
    from cnn_spmd.report import charts

    blocks: list[tuple] = [
        (
            "heading",
            1,
            "cnn_spmd: " + ", ".join(dict.fromkeys(sweep["experiment"] for sweep in sweeps)),
        )
    ]
    if notes:
        blocks.append(("table", ["warnings"], [[note] for note in notes]))
    for sweep in sweeps:
        groups, hardware = compare.groups_of(sweep["runs"]), sweep["hardware"] or {}
        versions = ", ".join(
            f"{name} {version}" for name, version in hardware.get("versions", {}).items()
        )
        facts = {
            "network": told(sweep["runs"], network_of),
            "data": told(sweep["runs"], data_of),
            "hardware": compare.hardware_of(sweep),
            "command": sweep.get("command"),
            "started": sweep.get("started"),
            "versions": versions,
            "commit": hardware.get("commit"),
        }
        blocks += [
            ("heading", 2, sweep["title"]),
            ("table", ["", ""], [[name, text] for name, text in facts.items() if text]),
        ]
        blocks += [("chart", *chart) for chart in charts.charts(sweep, groups)]
        blocks += [
            ("heading", 3, "Runs compared"),
            ("table", compare.COLUMNS, [compare.cells(group) for group in groups]),
            ("text", LEGEND),
        ]
        alone = list(dict.fromkeys(group["panel"] for group in groups if group["base"] is None))
        if alone:
            blocks.append(("text", f"No one-device run, so no speedup: {'; '.join(alone)}."))
        shares, kernels = profile_tables(sweep["runs"])
        blocks += [
            *shares,
            ("heading", 3, "All runs"),
            ("table", RUN_COLUMNS, list(map(run_cells, sweep["runs"]))),
            *kernels,
        ]
        blocks += [block for run in sweep["runs"] for block in learned(run)]
    return blocks


def told(runs: list[dict], what: Callable[[dict], str]) -> str:
    """What the runs have, as `what` says it of a run's figures; once where it is the same."""
    return "; ".join(
        filter(None, dict.fromkeys(what(run["figures"]) for run in runs if run["figures"]))
    )


def network_of(figures: dict) -> str:
    return f"{figures['model']}, {figures['param_count']:,} parameters"


def data_of(figures: dict) -> str:
    fallback = figures.get("fallback")  # older sweeps do not say it
    return figures["dataset"] + (f", which stands in for {fallback}" if fallback else "")


def learned(run: dict) -> list[tuple]:
    """Blocks of the pictures of what a run learned."""
    return [
        (
            "chart",
            f"{title}: {run['name']}",
            [
                f'<img alt="{html.escape(title)}" src="data:image/png;base64,'
                f'{base64.b64encode(png).decode()}">'
            ],
            caption,
        )
        for title, png, caption in run["pictures"]
    ]


def run_cells(run: dict) -> list[str]:
    """A run's row under RUN_COLUMNS."""

    def text(value: float | None, digits: int, factor: float = 1.0) -> str:
        return "" if value is None else f"{factor * value:,.{digits}f}"

    figures = run["figures"]
    times, speed = figures.get("step_milliseconds") or {}, figures.get("images_per_second")
    return [
        run["name"],
        run["status"],
        "" if speed is None else compare.rate([speed]),
        *(text(times.get(name), 3) for name in ("p10", "median", "p90")),
        text(figures.get("accuracy"), 2, 100),
        text(figures.get("loss"), 4),
        text(figures.get("train_seconds"), 1),
        text(figures.get("compile_seconds"), 1),
        str(figures.get("seed", "")),
        run["reason"],
    ]


def profile_tables(runs: list[dict]) -> tuple[list[tuple], list[tuple]]:
    """Blocks on the share of communication, and on the kernels that take longest, of the runs that were profiled."""
    shares, kernels = [], []
    for run in runs:
        if profile := run["figures"].get("profile"):
            step, communication, exposed = (
                profile[f"{name}_milliseconds"] for name in ("step", "communication", "exposed")
            )
            shares.append(
                [
                    run["name"],
                    f"{profile['steps']}",
                    f"{step:,.3f}",
                    f"{profile['compute_milliseconds']:,.3f}",
                    f"{communication:,.3f}",
                    f"{communication - exposed:,.3f}",
                    f"{exposed:,.3f}",
                    f"{profile['idle_milliseconds']:,.3f}",
                    f"{100 * communication / step:.1f}",
                    f"{100 * exposed / step:.1f}",
                ]
            )
            kernels += [
                [
                    "" if number else run["name"],
                    row["name"],
                    f"{row['milliseconds']:,.3f}",
                    f"{100 * row['milliseconds'] / step:.1f}",
                    f"{row['count']:,g}",
                    "yes" if row["communication"] else "",
                ]
                for number, row in enumerate(profile["top"][:KERNELS])
            ]
    if not shares:
        return [], []
    return (
        [
            ("heading", 3, "Computing and communicating, by profile"),
            (
                "table",
                [
                    "run",
                    "steps",
                    "step, ms",
                    "computing, ms",
                    "communicating, ms",
                    "of it overlapped",
                    "exposed",
                    "idle, ms",
                    "communication, % of the step",
                    "exposed, %",
                ],
                shares,
            ),
            (
                "text",
                (
                    "Mean over the devices. Overlapped communication runs while the device computes, exposed communication "
                    "while it does not: a step is computing, exposed communication and idle time. "
                    + told(runs, lambda figures: (figures.get("profile") or {}).get("note", ""))
                ).strip(),
            ),
        ],
        [
            ("heading", 3, "Top kernels, by profile"),
            (
                "table",
                ["run", "kernel", "ms a step", "% of the step", "times a step", "communication"],
                kernels,
            ),
            ("text", f"The {KERNELS} that take longest in each run; profile.json has more."),
        ],
    )


# ---- As text


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str]) -> str:
        return (
            "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
        )

    return "\n".join([line(header), "|" + "---|" * len(header), *map(line, rows)])


def as_markdown(blocks: list[tuple]) -> str:
    parts = []
    for kind, *content in blocks:
        if kind == "heading":
            parts.append("#" * content[0] + " " + content[1])
        elif kind == "text":
            parts.append(content[0])
        elif kind == "table":
            parts.append(markdown_table(*content))
    return "\n\n".join([*parts, "The charts are in [report.html](report.html).\n"])


def as_html(blocks: list[tuple]) -> str:
    """One file that needs no other and no network."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><title>{html.escape(blocks[0][2])}</title><style>{CSS}</style></head><body>'
    ]
    for kind, *content in blocks:
        if kind == "heading":
            parts.append(f"<h{content[0]}>{html.escape(content[1])}</h{content[0]}>")
        elif kind == "text":
            parts.append(f"<p>{html.escape(content[0])}</p>")
        elif kind == "table":
            header, rows = content
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "\n".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
            start = (
                f"<table><thead><tr>{head}</tr></thead>" if any(header) else '<table class="facts">'
            )
            parts.append(f'<div class="scroll">{start}\n<tbody>{body}</tbody></table></div>')
        else:
            title, pictures, caption = content
            alone = ' class="one"' if len(pictures) == 1 else ""
            parts.append(
                f'<h3>{html.escape(title)}</h3>\n<figure{alone}><div class="pictures">{"".join(pictures)}</div>'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    return "\n".join([*parts, "</body></html>\n"])


def _cell(text: str) -> str:
    kind = "n" if re.match(r"-?[\d,.]+( [(±]|$)", text) else "long" if len(text) > 50 else ""
    return (
        f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"
    )


def as_csv(sweeps: list[dict]) -> str:
    """A row a run: plain numbers in full, bytes by operation, speedup and efficiency where there is a one-device run."""
    rows = []
    for sweep in sweeps:
        bases = {
            compare.key_of(group["runs"][0]): group["base"]
            for group in compare.groups_of(sweep["runs"])
        }
        for run in sweep["runs"]:
            figures = dict(run["figures"])
            for operation in figures.pop("collectives", None) or ():
                name = f"ring_bytes.{operation['operation']}"
                figures[name] = figures.get(name, 0) + operation["ring_bytes"]
            figures["profile"] = {
                name: value
                for name, value in (figures.get("profile") or {}).items()
                if name != "top"
            }
            row = {name: run[name] for name in ("name", "status", "reason", "seconds", "command")}
            row = dict(folder=sweep["title"]) | row | flat(dict(settings=run["settings"]) | figures)
            if (
                run["status"] == "completed"
                and figures.get("images_per_second")
                and (base := bases[compare.key_of(run)])
            ):
                row["speedup"] = figures["images_per_second"] / compare.average(
                    base, "images_per_second"
                )
                row["efficiency"] = row["speedup"] / (
                    figures["mesh"]["data"] * figures["mesh"]["model"]
                )
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(
        text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
