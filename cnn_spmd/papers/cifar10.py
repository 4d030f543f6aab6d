"""Make results/cifar10.md: our own networks and recipes."""

import collections
import pathlib
from collections.abc import Sequence

from cnn_spmd.papers.layout import filled_in, table
from cnn_spmd.papers.measured import is_beside_a_paper
from cnn_spmd.papers.summaries import ALONE, DATA, load_summaries
from cnn_spmd.report import compare
from cnn_spmd.report.text import mean_and_deviation
from cnn_spmd.training import runfiles


def page() -> str:
    """Return the page on our own networks and recipes."""
    tables = {dataset: results_table(dataset) for dataset in ("cifar10", "digits", "imagenette")}
    make_train = runfiles.read_json(DATA / "alexnet_cifar-cpu-make_train.json")
    return filled_in("cifar10.md", **tables, make_train=make_train, **scheme_fields())


def results_table(dataset: str, folder: pathlib.Path = DATA) -> str:
    """Return the runs on a data set; runs that differ only in their seed share a row.

    Runs that stand beside a paper's figure are left out: the papers' tables have them. So are short
    runs that measure only a speed.
    """
    groups = collections.defaultdict(list)
    for run in load_summaries(folder):
        for_speed = run["experiment"].endswith(ALONE)
        if run["dataset"] == dataset and not for_speed and not is_beside_a_paper(run):
            groups[results_key(run)].append(run)
    return table([results_row(runs) for _, runs in sorted(groups.items())])


def results_key(run: dict) -> tuple:
    """Return what runs in one row share, in the order of the rows."""
    return (
        run["experiment"],
        run["device_kind"],
        run["devices"],
        -run["mesh"]["data"],
        run["parallelism"],
        run["epochs"],
        compare.machine(run),
        compare.recipe(run),
    )


def results_row(runs: Sequence[dict]) -> dict[str, str]:
    """Return the cells of runs that differ in nothing but their seed."""
    run = runs[0]
    return {
        "experiment": run["experiment"].removesuffix(f"_{run['dataset']}"),
        "hardware": compare.machine(run),
        "mesh, scheme": f"{compare.mesh_name(run['mesh'].values())} {run['parallelism']}",
        "epochs": f"{run['epochs']:g}",
        "n": str(len(runs)),
        "test accuracy, %": mean_and_deviation([100 * run["eval"]["accuracy"] for run in runs], 2),
        "train, s": mean_and_deviation([run["train_seconds"] for run in runs], 1),
        "images/s": mean_and_deviation([run["images_per_second"] for run in runs], 0),
    }


def scheme_fields(folder: pathlib.Path = DATA) -> dict[str, object]:
    """Return what the page's template names of the runs of one seed under each scheme."""
    runs = load_summaries(folder / "schemes")
    rows = [
        {
            "experiment": run["experiment"],
            "mesh, scheme": f"{compare.mesh_name(run['mesh'].values())} {run['parallelism']}",
            "epochs": f"{run['epochs']:g}",
            "test accuracy, %": f"{100 * run['eval']['accuracy']:.2f}",
        }
        for run in sorted(runs, key=results_key)
    ]
    fields, outside = dict(schemes=table(rows)), []
    others = load_summaries(folder) + load_summaries(folder / "claims")
    for name, epochs in {(run["experiment"], run["epochs"]) for run in runs}:
        found = [
            100 * run["eval"]["accuracy"]
            for run in others
            if (run["experiment"], run["epochs"]) == (name, epochs)
        ]
        own = [100 * run["eval"]["accuracy"] for run in runs if run["experiment"] == name]
        outside += [min(found) - min(own), max(own) - max(found)]
        fields[name] = f"{min(found):.2f} to {max(found):.2f} (n = {len(found)})"
    return fields | dict(outside=max(0, *outside))
