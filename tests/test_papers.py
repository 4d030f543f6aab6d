"""Published beside measured: tables of known runs, and the pages of results/."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from cnn_spmd.config import flat
from cnn_spmd.papers import __main__ as command
from cnn_spmd.papers import (
    beside,
    cifar10,
    depth,
    headline,
    large_batches,
    layout,
    measured,
    meshes,
    pages,
    pictures,
    predictions,
    programs,
    published,
    rates,
    summaries,
)
from cnn_spmd.report import compare
from cnn_spmd.sharding.table import TABLE
from experiments import owt_imagenet, resnet_cifar

FIGURES = [figure for figures in published.FIGURES.values() for figure in figures]


def write(folder, experiment, seed=0, accuracy=0.75, **more):
    run = dict(
        experiment=experiment,
        seed=seed,
        dataset="cifar10",
        device_kind="H100",
        devices=1,
        host_cores=4,
        steps=40,
        epochs=4.0,
        mesh=dict(data=1, model=1),
        eval=dict(accuracy=accuracy, top5=0.9),
        train_seconds=2.0,
        config=dict(seed=seed, batch_size=128),
    )
    (folder / f"{experiment}-{len(list(folder.glob('*')))}.json").write_text(json.dumps(run | more))


def figures(folder, name):
    """Return published, measured, n, difference and hardware of each row of a figure."""
    figure = next(figure for figure in FIGURES if figure.name == name)
    rows = measured.measured_rows(figure, summaries.load_results(folder))
    return [list(row[1:6]) for row in rows]


def test_errors_and_seconds_on_known_runs(tmp_path):
    write(tmp_path, "cuda_convnet_80sec", seed=0, accuracy=0.75)
    write(tmp_path, "cuda_convnet_80sec", seed=1, accuracy=0.77, train_seconds=4.0)
    # Other hardware has a row of its own.
    write(tmp_path, "cuda_convnet_80sec", accuracy=0.7, device_kind="cpu")
    # So has another recipe.
    write(tmp_path, "cuda_convnet_80sec", accuracy=0.6, config=dict(batch_size=512))
    write(tmp_path, "cuda_convnet_80sec", accuracy=0.99, dataset="digits")
    write(tmp_path, "cuda_convnet_11pct", accuracy=0.88)
    write(tmp_path, "cuda_convnet_11pct_no_lrn", accuracy=0.5)
    assert figures(tmp_path, "80sec: test error, %") == [
        ["26", "24.00 ± 1.41", "2", "-2.00", "1 x H100"],
        ["26", "40.00", "1", "+14.00", "1 x H100"],
        ["26", "30.00", "1", "+4.00", "CPU, 4 cores"],
    ]
    assert figures(tmp_path, "80sec: training, s")[0] == [
        "80",
        "3.0 ± 1.4",
        "2",
        "-77.0",
        "1 x H100",
    ]
    assert figures(tmp_path, "11pct: test error, %") == [["11", "12.00", "1", "+1.00", "1 x H100"]]
    assert figures(tmp_path, "18pct: test error, %") == [["18", "not measured", "0", "", ""]]
    rows = [row for rows in measured.measured_tables(tmp_path).values() for row in rows]
    assert [row.name for row in rows if row.measured != "not measured"] == [
        *["80sec: test error, %"] * 3,
        *["80sec: training, s"] * 3,
        "11pct: test error, %",
        "11pct: training, s",
        "11pct without response norms: added error, points",
    ]


def test_claims_on_known_runs(tmp_path):
    """A run counts beside its control of the same seed, epochs and hardware.

    What was not reached is said.
    """
    (tmp_path / "claims").mkdir()

    def reach(variant, seed, step):
        write(tmp_path / "claims", f"claims_2012_{variant}", seed)
        path = next(
            path
            for path in (tmp_path / "claims").glob("*.json")
            if not path.with_suffix(".jsonl").exists()
        )
        lines = [
            dict(step=at, split="train", steps=10, accuracy=float(at >= step))
            for at in (10, 20, 30, 40)
        ]
        path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    tanh = "tanh: epochs to 25% training error, times ReLU's"
    reach("relu", 0, 10)
    reach("relu", 1, 20)
    reach("tanh", 1, 100)  # not within this run
    assert figures(tmp_path, tanh) == [["6", "not reached", "0", "", "1 x H100"]]
    reach("tanh", 0, 40)
    assert figures(tmp_path, tanh) == [
        ["6", "4.0 (4.0 / 1.0); 1 not reached", "1", "-2.0", "1 x H100"]
    ]

    for experiment, seed, accuracy in (
        ("base", 0, 0.9),
        ("base", 1, 0.92),
        ("no_lrn", 0, 0.88),
        ("no_lrn", 1, 0.91),
        ("no_lrn", 2, 0.5),
        ("no_dropout", 0, 0.89),
    ):
        write(tmp_path / "claims", f"claims_2012_{experiment}", seed, accuracy)
    write(tmp_path / "claims", "claims_2012_plain_pool", 0, 0.5, epochs=2.0)
    write(tmp_path / "claims", "claims_2012_plain_pool", 1, 0.5, device_kind="H200")
    assert figures(tmp_path, "without response norms: added error, points") == [
        ["1.4", "1.50 ± 0.71 (10.50 - 9.00)", "2", "+0.10", "1 x H100"]
    ]
    assert figures(tmp_path, "without dropout: added error, points") == [
        ["overfits substantially", "1.00 (11.00 - 10.00)", "1", "", "1 x H100"]
    ]
    assert figures(tmp_path, "pools that do not overlap: added error, points") == [
        ["0.4", "not measured", "0", "", ""]
    ]


def test_imagenet_on_known_runs(tmp_path):
    """Only whole runs on ImageNet count."""
    whole = dict(dataset="imagenet2012", epochs=90.0, devices=2, batch_size=256)
    write(tmp_path, "owt_imagenet", accuracy=0.6, train_seconds=7200.0, **whole)
    write(tmp_path, "owt_imagenet", accuracy=0.1, **whole | dict(epochs=5.0))
    write(tmp_path, "owt_imagenet_variable", accuracy=0.58, **whole)
    write(tmp_path, "alexnet_2012_imagenet", **whole)
    plain, variable = "2 GPUs, batches (256, 256): ", "2 GPUs, batches (256, 128): "
    assert figures(tmp_path, plain + "top-1 error, %") == [
        ["42.63", "40.00", "1", "-2.63", "2 x H100"]
    ]
    assert figures(tmp_path, plain + "hours") == [["50.24", "2.00", "1", "-48.24", "2 x H100"]]
    assert figures(tmp_path, variable + "top-1 error, %") == [
        ["42.27", "42.00", "1", "-0.27", "2 x H100"]
    ]
    assert figures(tmp_path, "alexnet_2012: top-5 error, %") == [
        ["18.2", "10.00", "1", "-8.20", "2 x H100"]
    ]
    assert figures(tmp_path, "1 GPU, batches (128, 128): hours") == [
        ["98.05", "not measured", "0", "", ""]
    ]


def swept_run(devices, batch, rate, parallelism="hybrid", size=61_100_840, micro=0):
    """Return an entry of sweep.json; batch is per device."""
    figures = dict(
        model="alexnet",
        mesh=dict(data=1, model=devices),
        parallelism=parallelism,
        batch_size=batch * devices,
        param_count=size,
        images_per_second=rate,
        dense_microbatch=micro,
        device_kind="H100",
        seed=0,
    )
    return dict(
        name=f"{parallelism}-{devices}x{batch}-{size}",
        status="completed",
        settings=dict(batch_per_device=batch, size=size, micro=micro),
        figures=figures,
        command=f"{parallelism} --mesh=1x{devices} --config.batch_size={batch * devices}",
    )


def test_speedups_on_known_runs(tmp_path):
    """A speedup is that of the scheme, the batch per GPU, and the size of the network."""
    sweeps = dict(
        a=[
            swept_run(1, 128, 100.0),
            swept_run(2, 128, 180.0),
            swept_run(2, 128, 500.0, "model"),
            swept_run(2, 256, 900.0),
            swept_run(4, 128, 300.0),
            swept_run(1, 128, 1.0, size=5),
            swept_run(2, 128, 9.0, size=5),
        ],
        b=[swept_run(1, 128, 100.0, micro=128), swept_run(2, 128, 150.0, micro=128)],
    )
    (tmp_path / "sweeps").mkdir()
    for name, runs in sweeps.items():
        sweep = dict(experiment="owt", hardware=dict(host_cores=4), runs=runs)
        (tmp_path / "sweeps" / f"{name}.json").write_text(json.dumps(sweep))
    plain, variable = "2 GPUs, batches (256, 256): ", "2 GPUs, batches (256, 128): "
    assert figures(tmp_path, plain + "speedup") == [["1.95", "1.80", "1", "-0.15", "2 x H100"]]
    assert figures(tmp_path, variable + "speedup") == [["1.93", "1.50", "1", "-0.43", "2 x H100"]]
    assert figures(tmp_path, "4 GPUs, batches (512, 512): speedup") == [
        ["3.74", "3.00", "1", "-0.74", "4 x H100"]
    ]
    # Its panel has no one-device run.
    (row,) = figures(tmp_path, "one weird trick, batch 256 per GPU, 2 GPUs")
    assert row[1] == "not measured"
    rows = measured.measured_tables(tmp_path)["One weird trick"]
    row = next(row for row in rows if row.name == plain + "speedup")
    # The command of the run and of the one-device run.
    assert row.command == "hybrid --mesh=1x1,1x2 --batch_per_device=128"
    assert row.source.startswith("Krizhevsky 2014")


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_commands_make_the_runs_that_a_figure_is_of(figure):
    made = []
    for arguments in figure.configs:
        file, *settings = arguments.split(" ")
        name, _, variant = file.partition(".py")
        config = importlib.import_module(f"experiments.{name}").get_config(
            *filter(None, [variant.removeprefix(":")])
        )
        made.append(config.experiment)
        fields = [
            text.removeprefix("--config.").split("=")[0]
            for text in settings
            if text.startswith("--config.")
        ]
        assert {*fields} <= {*flat(config.to_dict())}
        assert config.data.name == figure.where.get("dataset", "imagenet2012")
    if "experiment" in figure.where:
        assert made == [
            figure.where["experiment"],
            *([(figure.where | figure.control)["experiment"]] if figure.control else []),
        ]


def test_one_weird_tricks_table_is_in_its_experiment():
    text = re.sub(" +", " ", owt_imagenet.__doc__)
    for gpus, dense, error, hours, speedup in published.ONE_WEIRD_TRICK:
        assert f"{gpus} ({128 * gpus}, {dense}) {error} {hours:.2f} {speedup}" in text


def test_table_6_of_residual_networks_is_in_its_experiment():
    for layers, (error, _) in published.RESIDUAL_NETWORKS.items():
        assert re.search(rf"\n  {layers}\b.* {error}\b", resnet_cifar.__doc__), layers


# ---- The pages of results/


@pytest.mark.parametrize(("name", "make"), pages.PAGES.items())
def test_pages_are_what_the_results_say(name, make):
    page = (ROOT / "results" / name).read_text()
    assert page == make(), f"out of date: {layout.COMMAND}"
    assert f"`{layout.COMMAND}`" in page.split("\n\n")[1]


def test_a_short_run_for_the_speed_has_no_row_of_its_own():
    assert list(summaries.DATA.glob(f"*{summaries.ALONE}-*.json"))
    assert summaries.ALONE not in cifar10.results_table("cifar10")


def test_no_page_is_left_over():
    assert {path.name for path in (ROOT / "results").glob("*.md")} == {*pages.PAGES}


@pytest.mark.parametrize("name", pages.PAGES)
def test_pages_fit_a_screen(name):
    """Rows of tables, about 100 characters; other lines and commands, 100 columns."""
    for line in (ROOT / "results" / name).read_text().splitlines():
        is_header = line.startswith(("| experiment", "| GPUs", "| mesh"))
        limit = 135 if is_header else 120 if line.startswith("|") else 100
        assert len(line) <= limit, line
        assert "launch.py" not in line or not line.startswith("|"), line


def test_every_published_figure_is_on_the_papers_page():
    page = beside.page()
    for title, rows in measured.measured_tables().items():
        assert f"## {title}\n" in page
        for row in rows:
            assert " | ".join(row[:6]) in page
            assert row.source in " ".join(page.split())
            for line in row.command.split("; "):
                assert line in " ".join(page.replace("\\\n", "").split())


def test_pictures_are_what_the_results_say():
    runs = summaries.load_single_runs()
    assert (ROOT / "results" / "depth.svg").read_text() == pictures.accuracy_by_depth(runs)
    picture = ROOT / "results" / large_batches.PICTURE
    if large_batches.errors_of(runs):
        assert picture.read_text() == pictures.error_by_batch(runs)
    else:
        assert not picture.exists()


def test_the_residual_table_with_some_runs_and_with_all(tmp_path):
    size = dict(param_count=269_722, images_per_second=1e4, steps=64_000, batch_size=128)
    write(tmp_path, "resnet_cifar_20", accuracy=0.91, **size)
    write(tmp_path, "resnet_cifar_20", seed=1, accuracy=0.93, **size)
    write(tmp_path, "resnet_20", **size)  # another experiment
    table = depth.residual_table(summaries.load_single_runs(tmp_path))
    first = (
        "| ResNet-20 | 269,722 | 0.27 | 1 x H100 | 2 | 8.75 | 8.00 ± 1.41 | 819 ± 0 | 10,000 ± 0 |"
    )
    assert table.splitlines()[2:] == [first]
    write(tmp_path, "resnet_cifar_20_alone", **size | dict(images_per_second=2e4, steps=3000))
    table = depth.residual_table(summaries.load_single_runs(tmp_path))
    first = "| ResNet-20 | 269,722 | 0.27 | 1 x H100 | 2 | 8.75 | 8.00 ± 1.41 | 410 | 20,000 |"
    assert table.splitlines()[2:] == [first]
    for layers in (110, 32, 44, 56):
        write(tmp_path, f"resnet_cifar_{layers}", **size)
    for layers in (56, 44, 32, 20):
        write(tmp_path, f"resnet_cifar_plain_{layers}", accuracy=0.9 - layers / 1e3, **size)
    rows = depth.residual_table(summaries.load_single_runs(tmp_path)).splitlines()[2:]
    assert rows[0] == first
    assert rows[4].startswith("| ResNet-110 | 269,722 | 1.7 | 1 x H100 | 1 | 6.61 | 25.00 |")
    assert rows[8].startswith("| plain-56 | 269,722 |  | 1 x H100 | 1 |  | 15.60 |")
    assert figures(tmp_path, "ResNet-20: test error, %") == [
        ["8.75", "8.00 ± 1.41", "2", "-0.75", "1 x H100"]
    ]
    assert figures(tmp_path, "plain-56: error added to plain-20's, points") == [
        ["grows with depth", "3.60 (15.60 - 12.00)", "1", "", "1 x H100"]
    ]


def test_the_large_batch_section_without_runs_with_some_and_with_all(tmp_path):
    assert not large_batches.section(summaries.load_single_runs(tmp_path), {}, set())

    def add(variant, batch, accuracy, rate=1, **more):
        config = dict(batch_size=batch, optimizer=dict(learning_rate=rate, scaling=1.0))
        fields = dict(epochs=100.0, batch_size=batch, config=config) | more
        write(tmp_path, f"large_batch_{variant}", accuracy=accuracy, **fields)

    add("cifar_linear", 128, 0.75)
    add("cifar_linear", 8192, 0.5, rate=0.5)
    runs = summaries.load_single_runs(tmp_path)
    best = rates.best_rates(runs)
    section = large_batches.section(runs, best, set()).split("\n\n")
    assert section[2].splitlines() == [
        "| data | network, rule | n | batch 128 | batch 8192 |",
        "|---|---|---|---|---|",
        "| CIFAR-10 | AlexNet, SGD | 1 | 25.00 (1) | 50.00 (.5) |",
    ]
    best_rates = "Learning rates are the best of [rates.md](rates.md#large-batches)"
    assert " ".join(section[3].split()) == f"Measured on 1 x H100. {best_rates}."
    absent = "Imagenette was not run with these rules."
    assert absent in " ".join("\n".join(section).split())
    for rule in ("larc", "lars"):
        add(f"cifar_{rule}_bn", 1024, 0.875)
    add("imagenette_lars", 512, 0.75, dataset="imagenette")
    # Two rates: each run is compared with the one of its own rate.
    add("cifar_linear", 128, 0.625, rate=0.5)
    config = dict(epochs=100, optimizer=dict(learning_rate=0.5, scaling=1.0))
    add("cifar_linear", 128, 0.5, seed=1)
    early = dict(seed=1, status="non-finite", eval=None, epochs=3.0, config=config)
    add("cifar_linear", 8192, 0.0, **early)
    runs = summaries.load_single_runs(tmp_path)
    add("cifar_lars", 4096, 0.1)
    runs = summaries.load_single_runs(tmp_path)
    edges = {("large_batch_cifar_lars", 4096), ("large_batch_cifar_lars", 8192)}
    config = dict(batch_size=4096, optimizer=dict(learning_rate=2, scaling=1.0))
    worse = [dict(experiment="large_batch_cifar_lars", batch_size=4096, seed=0, config=config)]
    worse[0] |= dict(status="completed", eval=dict(accuracy=0.05))
    section = large_batches.section(runs, best, edges, worse).split("\n\n")
    assert section[2].splitlines()[2:] == [
        "| CIFAR-10 | AlexNet, LARS | 1 |  |  |  | 90.00 (1) |  |",
        "| CIFAR-10 | AlexNet, SGD | 3/2 | 37.50 ± 12.50 (1) |  |  |  | 50.00; 1 diverged (.5) |",
        "| CIFAR-10 | AlexNet-BN, LARC | 1 |  |  | 12.50 (1) |  |  |",
        "| CIFAR-10 | AlexNet-BN, LARS | 1 |  |  | 12.50 (1) |  |  |",
        "| Imagenette | AlexNet, LARS | 1 |  | 25.00 (1) |  |  |  |",
    ]
    text, unsure = " ".join(section[3].split()), "CIFAR-10, AlexNet, LARS at batch 4,096"
    assert f"{best_rates}, except {unsure}; CIFAR-10, AlexNet, SGD at batch 128; " in text
    assert f"may lie beyond those tried for {unsure}. Whole runs at the search's best" in text
    assert "higher test error: AlexNet, LARS at batch 4,096: 95.00 (2). So test errors" in text
    assert absent not in " ".join("\n".join(section).split())
    assert figures(tmp_path, "linear, batch 8,192: added error, points") == [
        ["12.8", "diverged", "0", "", "1 x H100"],
        ["12.8", "12.50 (50.00 - 37.50)", "1", "", "1 x H100"],
    ]
    picture = pictures.error_by_batch(runs)
    for text in ("AlexNet-BN, LARC", "AlexNet, SGD", "Imagenette", "8,192"):
        assert f">{text}<" in picture


def test_what_is_claimed_of_large_batches_on_known_errors():
    """A claim holds or not by the mean; near the margin, and of one run, it is not certain."""
    errors = {
        ("CIFAR-10", setting, batch): own
        for setting, batch, own in (
            ("AlexNet, SGD", 128, [10.0, 10.2]),
            ("AlexNet, SGD", 4096, [10.4, 10.9]),
            ("AlexNet, SGD", 8192, [12.0, None]),  # 12 and 90
            ("AlexNet-BN, SGD", 128, [10.0]),
            ("AlexNet-BN, SGD", 8192, [60.0]),
            ("AlexNet, LARS", 128, [10.0, 10.0]),
            ("AlexNet, LARS", 4096, [10.09, 10.11]),
            ("AlexNet, LARS", 8192, [11.1, 11.1]),
            ("AlexNet-BN, LARS", 128, [9.0, 9.0]),
            ("AlexNet-BN, LARS", 8192, [10.0, 10.0]),
        )
    }
    edges = {("large_batch_cifar_linear", 4096), ("large_batch_cifar_larc", 8192)}
    table = large_batches.claims_table(errors, edges)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0].removeprefix("SGD: batch ") for row in rows[:3]] == [
        "4,096 costs accuracy",
        "8,192 costs accuracy",
        "8,192 costs less with batch norm",
    ]
    assert [row[1:] for row in rows] == [
        ["4.5", "+0.55 ± 0.15", "yes, not certain, rate at an edge"],
        ["12.8", "+40.90 ± 38.90", "yes, not certain"],
        ["2.2 instead of 14", "-48.00", "no, not certain"],
        ["no loss", "not measured", ""],
        ["no loss", "+0.10 ± 0.01", "yes"],
        ["no loss", "+1.10 ± 0.00", "no"],
        *[["no loss", "not measured", ""]] * 2,
        ["no loss", "+1.00 ± 0.00", "no"],  # with batch norm, compared with batch norm
    ]


def test_steps_to_a_target_of_large_batches():
    """Only with the metrics of runs of three batches; those of the fastest seed count."""
    runs = []
    for batch, steps in ((128, 40), (1024, 20), (4096, 20)):
        metrics = [dict(step=step, split="eval", accuracy=0.855 - 1 / step) for step in (20, 40)]
        metrics = [row for row in metrics if row["step"] <= steps]
        noise = dict(step=40, split="noise", trace=30.0, gradient_norm2=0.01, batches=5)
        run = dict(experiment="large_batch_cifar_lars", seed=0, model="a", dataset="cifar10")
        run |= dict(batch_size=batch, status="completed", eval=dict(accuracy=0.85))
        runs.append(run | dict(metrics=[*metrics, noise]))
    other = [*runs[0]["metrics"][:-1], runs[0]["metrics"][-1] | dict(trace=10.0)]
    runs.append(runs[0] | dict(seed=1, metrics=other))
    section = large_batches.steps_section(runs)
    assert section.splitlines()[-1] == (
        "| CIFAR-10, AlexNet, LARS | 20 | 20 | 20 | 20 | - | 0 | 1,000 to 3,000 (batch 128) |"
    )
    assert "from 5 batches; the range" in " ".join(section.split())
    without_noise = [run | dict(metrics=run["metrics"][:-1]) for run in runs[:3]]
    assert large_batches.steps_section(without_noise).splitlines()[-1].endswith("| 0 | - |")
    assert not large_batches.steps_section(runs[:2])
    runs[0].pop("metrics")
    runs[3].pop("metrics")
    assert not large_batches.steps_section(runs)


def test_the_search_of_rates_for_large_batches():
    """Rows are batches. The best is bold; a run that diverged is never the best."""

    def run(batch, rate, accuracy, **more):
        config = dict(optimizer=dict(learning_rate=rate), data=dict(validation=5000))
        run = dict(experiment="large_batch_cifar_lars_bn", batch_size=batch, config=config, seed=0)
        where = dict(device_kind="NVIDIA H200", devices=1, epochs=30.0)
        return run | where | dict(status="completed", eval=dict(accuracy=accuracy)) | more

    diverged = run(1024, 0.4, 0.9, status="non-finite", epochs=2.0)
    runs = [run(1024, 0.2, 0.5), run(1024, 0.1, 0.75), diverged, run(128, 0.2, 0.75)]
    runs += [run(128, 0.4, 0.8), run(128, 0.1, 0.7), run(8192, 0.1, 0.1, status="non-finite")]
    runs += [run(4096, 0.1, 0.4), run(4096, 0.2, 0.5), run(4096, 0.4, 0.5)]
    fields = rates.search_fields(runs)
    assert (fields["held_out"], fields["epochs"], fields["machines"]) == (5000, 30.0, "1 x H200")
    title, table = fields["searches"].split("\n\n")
    assert title == "### AlexNet-BN, LARS"
    assert table.splitlines() == [
        "| batch / rate | .1 | .2 | .4 | best |",
        "|---|---|---|---|---|",
        "| 128 | 30.00 | 25.00 | **20.00** | .4 (largest) |",
        "| 1,024 | **25.00** | 50.00 | diverged | .1 (smallest) |",
        "| 4,096 | 60.00 | **50.00** | **50.00** | .2 or .4 (largest) |",
        "| 8,192 | diverged |  |  | none |",
    ]
    at_edges = {(runs[0]["experiment"], batch) for batch in (128, 1024, 4096)}
    assert rates.edges(runs) == at_edges
    command = " ".join(fields["commands"].replace("\\\n", "").split())
    assert (
        ":lars_bn --config.epochs=30 --config.data.validation=5000 --sweep"
        " batch_size=128,1024,4096,8192 --sweep optimizer.learning_rate=.1,.2,.4 ```" in command
    )


def test_a_program_of_an_older_version_has_no_hidden_share():
    run = programs.load_programs()[0]
    run.pop("overlap", None)
    newer = run | dict(overlap=dict(hidden_share=0.125), closed_form_ring_bytes=None)
    in_flight = newer | dict(overlap=dict(hidden_share=0.5), in_flight=4)
    for compiled, closed_form, hidden in (
        ([run], run["closed_form_ring_bytes"] / 1e6, "-"),
        ([newer], None, "12"),
        ([newer, in_flight], None, "12 (50)"),
    ):
        ((_, table),) = programs.program_tables(compiled).items()
        (row,) = ([cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:])
        assert row[-3:-1] == ["-" if closed_form is None else f"{closed_form:.1f}", hidden]


def test_the_schemes_side_by_side(tmp_path):
    """Each has a row, on a mesh of two axes where there is one; sweeps on GPUs timed them."""
    runs = [("hybrid", "1x2", "H100"), ("hybrid", "2x2", "H100"), ("model", "1x2", "cpu")]
    sweep = [
        dict(mesh=mesh, figures=dict(parallelism=scheme, device_kind=kind))
        for scheme, mesh, kind in runs
    ]
    failed = dict(mesh="1x2", figures={})
    (tmp_path / "sweep.json").write_text(json.dumps(dict(runs=[*sweep, failed])))
    table = programs.schemes_table(programs.load_programs(), tmp_path)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(TABLE)
    on_one_axis = [row[0] for row in rows if row[2] == "8x1"]
    assert on_one_axis == ["data", "sharded_update", "fsdp"]
    assert {row[2] for row in rows} == {"8x1", "4x2"}
    assert {row[0]: row[-1] for row in rows if row[-1] != "-"} == {"hybrid": "4 GPUs"}


def test_the_headline_table_fits_readme():
    table = headline.headline_table()
    rows = re.sub(r"\(results/.*?\)", "", table).splitlines()
    assert len(rows) == 2 + 6
    assert max(map(len, rows)) <= 120
    for target in re.findall(r"\]\((.*?)\)", table):
        assert (ROOT / target).is_file(), target


def test_the_headline_goes_between_readmes_markers():
    readme = f"a\n{headline.BEGIN}old\ntable\n{headline.END}\nb\n"
    table = headline.headline_table()
    assert headline.with_headline(readme) == f"a\n{headline.BEGIN}{table}{headline.END}\nb\n"
    assert headline.with_headline("no markers") == "no markers"


def test_readmes_headline_is_what_the_results_say():
    readme = (ROOT / "README.md").read_text()
    assert headline.with_headline(readme) == readme, f"out of date: {layout.COMMAND}"


def test_writing_changes_only_what_is_out_of_date(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (tmp_path / "README.md").write_text(f"{headline.BEGIN}{headline.END}")
    monkeypatch.setattr(pages, "RESULTS", results)
    made = dict.fromkeys(pages.PAGES, lambda: "page")
    monkeypatch.setattr(pages, "PAGES", made)
    run = dict(eval=dict(accuracy=0.75), param_count=1000, batch_size=128, seed=0)
    runs = [run | dict(experiment="deeper_vgg_11")]
    monkeypatch.setattr(summaries, "load_single_runs", lambda folder=None: [*runs])
    assert command.main(["--write"]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written == [
        *(str(results / name) for name in made),
        str(results / "depth.svg"),
        str(results / predictions.DEVICES),
        str(tmp_path / "README.md"),
    ]
    assert headline.headline_table() in (tmp_path / "README.md").read_text()
    assert command.main(["--write"]) == 0
    assert not capsys.readouterr().out.strip()
    # There is a picture of large batches as soon as there is a run.
    runs.append(run | dict(experiment="large_batch_cifar_lars"))
    assert command.main(["--write"]) == 0
    assert capsys.readouterr().out.strip() == str(results / large_batches.PICTURE)


# ---- Any run


def make_run(folder, name="cuda_convnet_80sec-h100-seed0", **more):
    """Make a run's folder from a summary in results/data."""
    folder.mkdir(parents=True)
    run = json.loads((summaries.DATA / f"{name}.json").read_text())
    (folder / "summary.json").write_text(json.dumps(run | more))
    return str(folder)


def test_any_run_beside_the_figures_that_it_is_about(tmp_path, capsys):
    """No file is copied; a run counts once; each run is shown or named."""
    paper = [make_run(tmp_path / f"{seed}", seed=seed, eval=dict(accuracy=0.75)) for seed in (0, 1)]
    digits = make_run(tmp_path / "digits", dataset="digits")
    stopped = make_run(tmp_path / "stopped", status="interrupted", eval=None)
    # Without its control.
    no_lrn = make_run(tmp_path / "no_lrn", experiment="claims_2012_no_lrn")
    again = f"{paper[0]}/summary.json"
    assert command.main([*paper, again, digits, stopped, no_lrn]) == 0
    out = capsys.readouterr().out
    assert "| 1 | 80sec: test error, % | 26 | 25.00 ± 0.00 | 2 | -1.00 | 1 x H100 |" in out
    assert "| 1 | without response norms: added error, points | 1.4 | not measured | 0 |" in out
    assert out.count("\n| ") == 2 + 3  # two headers
    text = " ".join(out.split())
    assert text.endswith(
        "About no published figure (the data set is digits, the published errors are of cifar10 "
        f"and imagenet2012): {digits}. Not completed, so left out: {stopped}: interrupted."
    )


def test_any_sweep_beside_the_figures_that_it_is_about(tmp_path, capsys):
    """The one-device run that a speedup is relative to counts as used."""
    runs = [swept_run(1, 128, 100.0), swept_run(2, 128, 180.0), swept_run(2, 128, 90.0, "model")]
    folders = [
        make_run(tmp_path / run["name"], experiment="owt", dataset="synthetic") for run in runs
    ]
    # Also given by itself, it counts once, as does the sweep that is given twice.
    runs.append(swept_run(2, 128, 90.0, "two_tower"))
    folders.append(make_run(tmp_path / runs[3]["name"], eval=dict(accuracy=0.75)))
    sweep = dict(experiment="owt", hardware=dict(host_cores=4), devices=2, runs=runs)
    (tmp_path / "sweep.json").write_text(json.dumps(sweep))
    assert command.main([str(tmp_path), str(tmp_path), folders[3]]) == 0
    out = capsys.readouterr().out
    assert "| 1 | 80sec: test error, % | 26 | 25.00 | 1 | -1.00 | 1 x H100 |" in out
    assert "| 1 | 2 GPUs, batches (256, 256): speedup | 1.95 | 1.80 | 1 | -0.15 | 2 x H100 |" in out
    assert f"imagenet2012): {folders[2]}." in " ".join(out.split())


def test_runs_that_no_paper_has(tmp_path, capsys):
    """There is no header without a table; a recipe that differs is named."""
    own = make_run(tmp_path / "own", experiment="mine")
    control = make_run(tmp_path / "base", experiment="claims_2012_base")
    short = make_run(tmp_path / "short", experiment="resnet_cifar_20", batch_size=128, steps=10)
    assert command.main([own, control, short]) == 0
    assert " ".join(capsys.readouterr().out.split()) == (
        "About no published figure (no figure is of the experiment mine; --beside NAME chooses "
        f"one): {own}. About no published figure (a figure compares another run with it, which is "
        "not given): "
        f"{control}. About no published figure (steps=10, published 64000; --beside NAME "
        f"shows it anyway): {short}."
    )


def test_any_network_beside_a_chosen_figure(tmp_path, capsys):
    own = make_run(tmp_path / "own", experiment="mine", model="mine", eval=dict(accuracy=0.75))
    digits = make_run(tmp_path / "digits", dataset="digits")
    for name in ("ResNet-20", "20"):  # the figure, and its experiment's variant
        assert command.main([own, "--beside", name]) == 0
        row = "ResNet-20: test error, %; measured of mine, 10 epochs | 8.75 | 25.00 | 1 | +16.25 |"
        assert row in capsys.readouterr().out
    # Runs of the same network and length are labelled by what differs, except the seed.
    config = json.loads((tmp_path / "own" / "summary.json").read_text())["config"]
    slow = config | dict(optimizer=config["optimizer"] | dict(learning_rate=0.5), seed=1)
    mesh = dict(data=2, model=1)
    others = [
        make_run(tmp_path / "slow", experiment="mine", model="mine", config=slow),
        make_run(tmp_path / "two", experiment="mine", model="mine", mesh=mesh),
        make_run(tmp_path / "seed", experiment="mine", model="mine", config=config | dict(seed=1)),
    ]
    assert command.main([own, *others, "--beside", "20"]) == 0
    labels = re.findall(r"measured of mine, 10 epochs, (.*?) \| 8.75 ", capsys.readouterr().out)
    rate = f"learning_rate {config['optimizer']['learning_rate']:g}"
    two = f"mesh 2x1, {rate}"
    assert labels == [f"mesh 1x1, {rate}", "mesh 1x1, learning_rate 0.5", two]
    assert command.main([own, "--beside", "11pc"]) == 2
    assert re.search('no such figure, .*13pct; .* mean "11pct"', capsys.readouterr().err)
    assert command.main([own, "--beside", "12pct"]) == 2  # a letter from each of four
    error = capsys.readouterr().err
    assert 'mean "19pct" or "18pct" or "13pct" or "11pct"?' in error
    assert command.main([digits, "--beside", "11pct"]) == 2
    error = (
        f"error: --beside=11pct: is an error on cifar10, but {digits} is on digits, expected runs"
    )
    assert capsys.readouterr().err.startswith(error)


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}: expected the folder of a run or of a sweep, or a summary.json; "
        "found neither summary.json nor sweep.json\n"
    )


# ---- The command line


def test_it_prints_every_page(tmp_path):
    """From any folder, and with the depth plot beside."""
    result = subprocess.run(
        [sys.executable, "-m", "cnn_spmd.papers", "--depth_plot", str(tmp_path / "depth.svg")],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for name in pages.PAGES:
        assert (ROOT / "results" / name).read_text() in result.stdout
    printed = " ".join(result.stdout.split())
    assert "3,072 weights at 32x32x3 and 120,000 at 200x200x3" in printed
    assert "<svg" in (tmp_path / "depth.svg").read_text()


def test_a_plot_that_cannot_be_written(capsys):
    assert command.main(["--depth_plot", "/no/where/depth.svg"]) == 2
    assert capsys.readouterr().err == (
        "error: --depth_plot=/no/where/depth.svg: cannot be written (No such file or directory)\n"
    )


def test_a_copy_without_results_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pages, "DATA", tmp_path / "data")
    assert command.main([]) == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path / 'data'}: does not exist: use a checkout, or give the folders of runs\n"
    )


def test_the_command_of_an_older_sweep():
    """Older files hold the arguments that all runs share, without what was swept."""
    run = dict(mesh="1x1", settings=dict(batch_per_device=32, parallelism="data"))
    other = dict(mesh="2x1", settings=dict(batch_per_device=64, parallelism="data"))
    sweep = dict(arguments=["--config", "e.py"], runs=[run, other])
    assert meshes.sweep_command(sweep) == (
        "python launch.py --config e.py --mesh 1x1,2x1 --batch_per_device 32,64"
        " --sweep parallelism=data"
    )
    assert meshes.sweep_command(sweep | dict(command="c")) == "c"


def test_learning_rates_on_known_runs():
    def run(rate, accuracy):
        config = dict(optimizer=dict(learning_rate=rate))
        return dict(experiment="deeper_a", config=config, eval=dict(accuracy=accuracy))

    runs = [run(0.1, 0.5), run(0.02, 0.6), run(0.1, 0.7)]
    made = rates.rates_table(runs, "deeper_", lambda run: f"{run['eval']['accuracy']}")
    assert made.splitlines()[0] == "| variant | rate 0.02 | rate 0.1 |"
    assert made.splitlines()[2:] == ["| a | 0.6 | 0.5; 0.7 |"]


# ---- Recipes


def test_what_makes_another_recipe():
    def of(**config):
        return compare.recipe(dict(config=config))

    assert (
        of(optimizer=dict(rate=1))
        == of(optimizer=dict(rate=1, clip_norm=0.0))
        != of(optimizer=dict(rate=1, clip_norm=5.0))
    )
    assert of(data=dict(dir="a"), eval=dict(every_epochs=1)) == of()
    for field in (dict(data=dict(crop=24)), dict(eval=dict(views="ten"))):
        assert of(**field) != of()


def test_runs_with_rounded_weights_are_those_that_the_pages_name():
    """`cast_once` kept small weights in bfloat16 between steps. Those runs were made again."""
    paths = (ROOT / "results/data").rglob("*.json")
    faulty = [
        path
        for path in paths
        if {'"cast_once"', '"bfloat16"'} <= {*re.findall(r'"\w+"', path.read_text())}
    ]
    named = {path for path in faulty if "imagenette" in path.name or path.parent.name == "rates"}
    assert named == {*faulty}
    for page in ("batches.md", "cifar10.md", "rates.md"):
        assert "in bfloat16 between steps" in " ".join(
            (ROOT / "results" / page).read_text().split()
        )
