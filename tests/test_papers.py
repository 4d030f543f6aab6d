"""Published beside measured: the tables' numbers, from runs that are known, and that what is published can be run."""

import importlib
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from cnn_spmd.config import flat
from cnn_spmd.papers import __main__, measured
from cnn_spmd.papers import published as papers
from cnn_spmd.report import compare
from experiments import owt_imagenet

FIGURES = [figure for figures in papers.FIGURES.values() for figure in figures]


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
    """Published, measured, n, difference and hardware of each row of the figure of that name."""
    figure = next(figure for figure in FIGURES if figure["name"] == name)
    return [row[1:6] for row in measured.rows(figure, measured.read(folder))]


def test_errors_and_seconds_on_known_runs(tmp_path):
    write(tmp_path, "cuda_convnet_80sec", seed=0, accuracy=0.75)
    write(tmp_path, "cuda_convnet_80sec", seed=1, accuracy=0.77, train_seconds=4.0)
    write(tmp_path, "cuda_convnet_80sec", accuracy=0.7, device_kind="cpu")  # a row of its own
    write(
        tmp_path, "cuda_convnet_80sec", accuracy=0.6, config=dict(batch_size=512)
    )  # and so has another recipe
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
    names = [line.split(" | ")[0] for line in measured.measured_table(tmp_path).splitlines()[2:]]
    assert names == ["| 80sec: test error, %"] * 3 + ["| 80sec: training, s"] * 3 + [
        "| 11pct: test error, %",
        "| 11pct: training, s",
        "| 11pct without response norms: test error, points more",
    ]


def test_claims_on_known_runs(tmp_path):
    """A run counts beside its control of the same seed, epochs and hardware; what was not reached is told."""
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
        ["6", "4.0 (4.0, not 1.0); 1 not reached", "1", "-2.0", "1 x H100"]
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
    assert figures(tmp_path, "without response norms: test error, points more") == [
        ["1.4", "1.50 ± 0.71 (10.50, not 9.00)", "2", "+0.10", "1 x H100"]
    ]
    assert figures(tmp_path, "without dropout: test error, points more") == [
        ["overfits substantially", "1.00 (11.00, not 10.00)", "1", "", "1 x H100"]
    ]
    assert figures(tmp_path, "pools that do not overlap: test error, points more") == [
        ["0.4", "not measured", "0", "", ""]
    ]


def test_imagenet_and_speedups_on_known_runs(tmp_path):
    """Only whole runs on ImageNet count; a speedup is that of the scheme, the batch a GPU and the size of network."""
    whole = dict(
        dataset="imagenet2012", epochs=90.0, devices=2, batch_size=256, train_seconds=7200.0
    )
    write(tmp_path, "owt_imagenet", accuracy=0.6, **whole)
    write(tmp_path, "owt_imagenet", accuracy=0.1, **whole | dict(epochs=5.0))
    write(tmp_path, "owt_imagenet_variable", accuracy=0.58, **whole)
    write(tmp_path, "alexnet_2012_imagenet", **whole)
    (tmp_path / "sweeps").mkdir()

    def run(devices, batch, rate, parallelism="hybrid", size=61_100_840, micro=0):
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
            status="completed",
            settings=dict(batch_per_device=batch, size=size, micro=micro),
            figures=figures,
            command=f"{parallelism} --mesh=1x{devices} --config.batch_size={batch * devices}",
        )

    for name, runs in dict(
        a=[
            run(1, 128, 100.0),
            run(2, 128, 180.0),
            run(2, 128, 500.0, "model"),
            run(2, 256, 900.0),
            run(4, 128, 300.0),
            run(1, 128, 1.0, size=5),
            run(2, 128, 9.0, size=5),
        ],
        b=[run(1, 128, 100.0, micro=128), run(2, 128, 150.0, micro=128)],
    ).items():
        sweep = dict(experiment="owt", hardware=dict(host_cores=4), runs=runs)
        (tmp_path / "sweeps" / f"{name}.json").write_text(json.dumps(sweep))
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
    assert figures(tmp_path, plain + "speedup") == [["1.95", "1.80", "1", "-0.15", "2 x H100"]]
    assert figures(tmp_path, variable + "speedup") == [["1.93", "1.50", "1", "-0.43", "2 x H100"]]
    assert figures(tmp_path, "4 GPUs, batches (512, 512): speedup") == [
        ["3.74", "3.00", "1", "-0.74", "4 x H100"]
    ]
    assert figures(tmp_path, "1 GPU, batches (128, 128): hours") == [
        ["98.05", "not measured", "0", "", ""]
    ]
    assert (
        figures(tmp_path, "one weird trick, batch 256 a GPU, 2 GPUs: speedup")[0][1]
        == "not measured"
    )  # there is no base
    command = (
        "| hybrid --mesh=1x1,1x2 --batch_per_device=128 | Krizhevsky 2014"  # the run, and its base
    )
    assert command in measured.measured_table(tmp_path)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure["name"])
def test_commands_make_the_runs_that_a_figure_is_of(figure):
    made = []
    for command in figure["configs"]:
        file, *settings = command.split(" ")
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
        assert config.data.name == figure["where"].get("dataset", "imagenet2012")
    if "experiment" in figure["where"]:
        assert made == [
            figure["where"]["experiment"],
            *([figure["control"]] if "control" in figure else []),
        ]


def test_one_weird_tricks_table_is_in_its_experiment():
    text = re.sub(" +", " ", owt_imagenet.__doc__)
    for gpus, dense, error, hours, speedup in papers.ONE_WEIRD_TRICK:
        assert f"{gpus} ({128 * gpus}, {dense}) {error} {hours:.2f} {speedup}" in text


def test_it_prints_every_table(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "cnn_spmd.papers", "--depth_plot", str(tmp_path / "depth.svg")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    for title, rows in measured.tables().items():
        assert f"{title}\n\n| figure | published | measured | n | difference" in result.stdout
        for row in rows:
            assert " | ".join(row) in result.stdout
    assert "3,072 weights at 32x32x3, 120,000 at 200x200x3" in result.stdout
    assert "<svg" in (tmp_path / "depth.svg").read_text()


def test_a_plot_that_cannot_be_written(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["--depth_plot", "/no/where/depth.svg"])
    assert (
        "error: --depth_plot=/no/where/depth.svg: cannot be written (No such file or directory)"
        in capsys.readouterr().err
    )


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
