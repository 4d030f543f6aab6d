"""What was measured here, beside what papers published.

Measured figures come from results/*.json and results/claims/*.json, each the summary.json of a run, copied there; speedups from
results/sweeps/*.json. The README's table of papers has the rows that were measured.
"""

import json
import pathlib
import statistics
from collections.abc import Sequence

from cnn_spmd.papers import claims
from cnn_spmd.papers.published import FIGURES, ONE_WEIRD_TRICK
from cnn_spmd.report import compare, page

RESULTS = pathlib.Path(__file__).parents[2] / "results"

# Measure: decimals, and its value in a run. Of a run and its control: the ratio of epochs, else the difference.
MEASURES = {
    "error": (2, lambda run: 100 * (1 - run["eval"]["accuracy"])),
    "top-5 error": (2, lambda run: 100 * (1 - run["eval"]["top5"])),
    "seconds": (1, lambda run: run["train_seconds"]),
    "hours": (2, lambda run: run["train_seconds"] / 3600),
    "speedup": (2, lambda run: run["speedup"]),
    "epochs": (1, lambda run: run["epochs_to_error"]),
}

HEADER = ["figure", "published", "measured", "n", "difference", "hardware", "command", "source"]

LEGEND = """\
Difference: measured less published. n: runs that differ in nothing but their seed; mean ± one sample standard deviation.
"Points more" and "times" are of a run and its control of the same seed, whose two means are in brackets. Speedups are measured
on random images; their n is of sweeps, whose learning rates and warm-ups differ; their command is that of the run
and of the one that it is held against. A command takes seed 0 (--config.seed) and downloads the data, or finds it in
--config.data.dir."""


def read(folder: pathlib.Path) -> list[dict]:
    """Every run in results/ and results/claims, as its summary.json has it, and every run of a sweep that has a speedup."""
    runs = claims.read(folder) + claims.read(folder / "claims")
    for path in sorted((folder / "sweeps").glob("*.json")):
        sweep = json.loads(path.read_text())
        for group in compare.groups_of(sweep["runs"]):
            for run, speedup in zip(
                group["runs"], compare.speedups(group), strict=False
            ):  # none where there is no base
                runs.append(
                    run["figures"]
                    | dict(
                        devices=group["devices"],
                        host_cores=sweep["hardware"]["host_cores"],
                        speedup=speedup,
                        command=with_base(
                            run["command"], run["figures"]["batch_size"], group["devices"]
                        ),
                        config=dict(run["settings"], experiment=sweep["experiment"]),
                        # Of older sweeps only the experiment's name says it.
                        variable=bool(
                            run["figures"].get(
                                "dense_microbatch", "variable" in sweep["experiment"]
                            )
                        ),
                    )
                )
    return runs


def with_base(command: str, batch_size: int, devices: int) -> str:
    """The sweep of a run and the one on a single device that its speedup is over."""
    return command.replace("--mesh=", "--mesh=1x1,").replace(
        f"--config.batch_size={batch_size}", f"--batch_per_device={batch_size // devices}"
    )


def matches(where: dict, run: dict) -> bool:
    return all(run.get(name) == value for name, value in where.items())


def shows(run: dict) -> bool:
    """Whether one of the tables is about a run, or holds others against it."""
    return any(
        matches(where, run)
        for figures in FIGURES.values()
        for figure in figures
        for where in (figure["where"], figure["where"] | dict(experiment=figure.get("control")))
    )


def rows(figure: dict, runs: Sequence[dict]) -> list[list[str]]:
    """A figure's rows under HEADER: one for the runs that differ in nothing but their seed; or one that says "not measured"."""
    groups: dict[tuple, list[list[dict]]] = {}
    for run in runs:
        if not matches(figure["where"], run):
            continue
        pair = [run]
        if "control" in figure:
            same = {
                name: run[name] for name in ("seed", "dataset", "epochs", "devices", "device_kind")
            }
            pair += [
                other for other in runs if matches(same | dict(experiment=figure["control"]), other)
            ][:1]
        if len(pair) == 1 + ("control" in figure):
            key = (compare.machine(run), str(run["mesh"]), compare.recipe(run))
            groups.setdefault(key, []).append(pair)
    published = (
        figure["published"]
        if isinstance(figure["published"], str)
        else f"{figure['published']:,.10g}"
    )
    command = "; ".join(
        f"python launch.py --config experiments/{config}" for config in figure["configs"]
    )
    if not groups:
        return [[figure["name"], published, "not measured", "0", "", "", command, figure["source"]]]
    return [
        [
            figure["name"],
            published,
            *cells(figure, pairs),
            machine,
            pairs[0][0].get("command", command),
            figure["source"],
        ]
        for (machine, *_), pairs in sorted(groups.items())
    ]


def cells(figure: dict, pairs: Sequence[list[dict]]) -> list[str]:
    """Measured, n, and measured less published; of runs [run], or of runs and their controls [run, control]."""
    digits, measure = MEASURES[figure["measure"]]
    values = [value for pair in pairs if None not in (value := tuple(map(measure, pair)))]
    missed, note, published = len(pairs) - len(values), "", figure["published"]
    if not values:
        return ["not reached", "0", ""]
    numbers = [value for value, *_ in values]
    if "control" in figure:
        first, second = map(statistics.mean, zip(*values, strict=True))
        note = f" ({first:.{digits}f}, not {second:.{digits}f})"
        numbers = [
            value / other if figure["measure"] == "epochs" else value - other
            for value, other in values
        ]
    difference = (
        "" if isinstance(published, str) else f"{statistics.mean(numbers) - published:+,.{digits}f}"
    )
    return [
        compare.mean(numbers, digits) + note + (f"; {missed} not reached" if missed else ""),
        str(len(numbers)),
        difference,
    ]


def tables(folder: pathlib.Path = RESULTS) -> dict[str, list[list[str]]]:
    """The rows of each table of FIGURES by its title."""
    runs = read(folder)
    return {
        title: [row for figure in figures for row in rows(figure, runs)]
        for title, figures in FIGURES.items()
    }


def measured_table(folder: pathlib.Path = RESULTS) -> str:
    """A Markdown table of the figures that were measured."""
    return page.markdown_table(
        HEADER,
        [row for found in tables(folder).values() for row in found if row[2] != "not measured"],
    )


def batch_table(runs: Sequence[dict]) -> str:
    """claims.batch_table beside the errors of ONE_WEIRD_TRICK."""
    published = {
        ("128" if dense == 128 and gpus > 1 else "as large", 128 * gpus): error
        for gpus, dense, error, *_ in ONE_WEIRD_TRICK
    }
    return claims.batch_table(runs, published)
