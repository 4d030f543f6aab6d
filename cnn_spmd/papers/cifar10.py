"""Make results/cifar10.md: our own networks and recipes."""

import collections
import pathlib
from collections.abc import Sequence

from cnn_spmd.papers.layout import HEAD, SEEDS, about_data, commands, joined
from cnn_spmd.papers.measured import is_beside_a_paper
from cnn_spmd.papers.summaries import ALONE, DATA, load_summaries
from cnn_spmd.report import compare
from cnn_spmd.report.text import markdown_table, mean_and_deviation
from cnn_spmd.training import runfiles


def page() -> str:
    """Return the page on our own networks and recipes."""
    runs = {path.stem: runfiles.read_json(path) for path in DATA.glob("alexnet_cifar-*.json")}
    digits = runs["alexnet_cifar-cpu-make_train"]
    launch = "python launch.py --config experiments/alexnet_"
    return joined(
        "# CIFAR-10",
        HEAD,
        """AlexNet's layers with 3x3 windows, for 32x32 images, and a recipe of today. No paper has
        published this network. AlexNet's paper reports 11% test error for a CIFAR-10 network of
        four layers with response norms (section 3.3); [papers.md](papers.md) has that and more.""",
        results_table("cifar10"),
        f"""{SEEDS} Accuracy is on all 10,000 test images and their mirrors, in bfloat16. The
        training time leaves out compilation, evaluation and checkpoints. The compile time is
        that of the slowest seed: the other seeds found the program in the compilation cache. On
        H200s other runs used the same host. {about_data()}""",
        "[startup.md](startup.md) says how long a user waits, from the command to the result.",
        commands(
            "Epochs 40, 25 and 100; --config.seed=N for the seeds.",
            f"{launch}cifar.py --mesh 1x1",
            f"{launch}cifar.py --mesh 2x1 --config.parallelism=data",
            f"{launch}cifar.py --mesh 1x2",
            f"{launch}cifar.py:fast --mesh 1x1",
            f"{launch}cifar.py:best --mesh 1x1",
        ),
        "## Digits, on a CPU without a network",
        """`make train` trains on the handwritten digits of scikit-learn where it cannot download
        CIFAR-10.""",
        results_table("digits"),
        f"""From a fresh clone `make train` took {digits["make_train_seconds"]:.0f} s in all,
        installation included. The first steps ended {digits["startup_seconds"]:.1f} s after
        `launch.py` was started, with empty caches.""",
        *imagenette_section(),
    )


def imagenette_section() -> list[str]:
    """Return the section on AlexNet as published, on ten of ImageNet's classes."""
    launch = "python launch.py --config experiments/alexnet_2012_imagenet.py:imagenette"
    return [
        "## Imagenette, ten of ImageNet's classes",
        """AlexNet as published in 2012, with two towers; ten crops of each of the 3,925 test
        images. ImageNet itself is not measured.""",
        results_table("imagenette"),
        commands(
            "The data are class folders of files whose shorter side is 224.",
            f"{launch} --config.data.dir=imagenette2 --mesh 1x1",
        ),
    ]


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
    header = ["experiment", "hardware", "mesh, scheme", "epochs", "n"]
    header += ["test accuracy, %", "train, s", "compile, s", "images/s"]
    return markdown_table(header, [results_row(runs) for _, runs in sorted(groups.items())])


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


def results_row(runs: Sequence[dict]) -> list[str]:
    """Return the cells of runs that differ in nothing but their seed."""
    run = runs[0]
    return [
        run["experiment"].removesuffix(f"_{run['dataset']}"),
        compare.machine(run),
        f"{compare.mesh_name(run['mesh'].values())} {run['parallelism']}",
        f"{run['epochs']:g}",
        str(len(runs)),
        mean_and_deviation([100 * run["eval"]["accuracy"] for run in runs], 2),
        mean_and_deviation([run["train_seconds"] for run in runs], 1),
        # The first seed compiles; the others may find its program in the cache.
        f"{max(run['compile_seconds'] for run in runs):.1f}",
        mean_and_deviation([run["images_per_second"] for run in runs], 0),
    ]
