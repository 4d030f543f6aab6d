"""Put a report together from its blocks.

The import loads matplotlib, which takes a second and can fail (canvas.py).
"""

import base64
import html
from collections.abc import Sequence

from cnn_spmd.report import (
    batch_scaling_section,
    best_runs,
    captions,
    compare,
    curve_charts,
    facts,
    mesh_charts,
    plots,
    run_tables,
    setting_charts,
    settings,
)
from cnn_spmd.report.text import Block, Chart, Heading, Paragraph, Table


def report_blocks(
    sweeps: Sequence[dict], notes: Sequence[str], target_error: float | None = None
) -> list[Block]:
    """Return the report on sweeps (load.load_sweeps); notes are its warnings.

    target_error: as batch_scaling.measure takes it.
    """
    runs = [run for sweep in sweeps for run in sweep["runs"]]
    networks = [run["figures"].get("model") or run["config"].get("model.name") for run in runs]
    data = map(compare.data_name, runs)
    named = [
        captions.names_text(list(dict.fromkeys(filter(None, names)))) for names in (networks, data)
    ]
    blocks: list[Block] = [Heading(1, f"cnn_spmd: {' on '.join(filter(None, named))}")]
    if notes:
        blocks.append(Table(["warnings"], [[note] for note in notes]))
    blocks += best_runs.all_given_blocks(sweeps)
    blocks += [block for sweep in sweeps for block in sweep_blocks(sweep, target_error)]
    first = next((i for i, block in enumerate(blocks, 1) if "±" in str(block)), None)
    if first:
        blocks.insert(first, Paragraph(best_runs.DEVIATION))
    return blocks


def sweep_blocks(sweep: dict, target_error: float | None) -> list[Block]:
    """Return the blocks of one sweep: what was asked, the best runs, charts, tables."""
    runs = sweep["runs"]
    overview = settings.overview(sweep, target_error)
    with plots.style():
        return [
            Heading(2, sweep["title"]),
            *best_runs.asked_blocks(runs, overview),
            *best_runs.best_blocks(overview),
            Heading(3, "Settings"),
            facts.facts_table(sweep, overview),
            *setting_charts.metric_charts(runs, overview),
            *mesh_charts.mesh_charts(sweep, overview),
            *curve_charts.curve_charts(runs, overview),
            *run_tables.comparison_blocks(compare.groups_of(runs), overview),
            *batch_scaling_section.section(sweep, target_error),
            *run_tables.share_blocks(runs),
            *run_tables.runs_blocks(runs, overview),
            *run_tables.kernel_blocks(runs),
            *(chart for run in runs for chart in picture_charts(run)),
        ]


def picture_charts(run: dict) -> list[Chart]:
    """Return the pictures of what a run learned (pictures.py)."""
    charts = []
    for title, png, caption in run["pictures"]:
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        image = f'<img alt="{html.escape(title)}" src="{source}">'
        charts.append(Chart(f"{title}: {run['name']}", [image], caption))
    return charts
