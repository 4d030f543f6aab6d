"""ruff is clean; results/data says where it comes from; and other promises."""

import itertools
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from cnn_spmd.papers import cifar10
from cnn_spmd.papers.summaries import DATA


@pytest.mark.parametrize(
    "command", [("check", "--output-format=concise"), ("format", "--check")], ids=" ".join
)
def test_ruff_is_clean(command):
    result = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_programs_move_what_theory_says():
    """Within 2% with the GPU's compiler, too, up to 512 GPUs.

    2 MB are allowed where activations are small beside the softmax's sums.
    """
    files = sorted((DATA / "programs").glob("*.json"))
    assert len(files) > 20
    for path in files:
        run = json.loads(path.read_text())
        assert run["compiler"]["device_kind"], path
        for row in run["communication"]:
            assert row["compiled_bytes"] == pytest.approx(
                row["closed_form_bytes"], rel=0.02, abs=2e6
            ), (path.name, row)
        if run["compiler"]["platform"] != "cpu" and run["parallelism"].startswith(
            "hybrid"
        ):  # what is summed is scattered
            assert run["totals"]["ring_bytes"] == pytest.approx(
                run["closed_form_ring_bytes"], rel=0.005
            ), path.name


def test_waiting_times_are_medians_of_three_and_say_where_they_come_from():
    """results/startup.md and results/cifar10.md, which names two cores."""
    for path in (DATA / "startup").glob("*.json"):
        measured = json.loads(path.read_text())
        assert re.fullmatch("[0-9a-f]{40}", measured["commit"]), path
        for runs in measured["repeats"].values():  # a sweep is of 12 runs
            assert sum(run.get("runs", 1) for run in runs) >= 3, path
        for name, runs in measured["repeats"].items():
            cached = [run.get("programs_from_cache") for run in runs]  # a sweep does not say
            assert name == "sweep" or min(cached) >= 3 or (name == "cold" and max(cached) == 0), (
                path
            )
    assert json.loads((DATA / "alexnet_cifar-cpu-make_train.json").read_text())["host_cores"] == 2


def test_results_say_where_they_come_from():
    """Runs that papers.md and others show, and those by which learning rates were chosen."""
    files = [path for folder in (".", "claims") for path in sorted((DATA / folder).glob("*.json"))]
    runs = [json.loads(path.read_text()) for path in files]
    for path in (DATA / "rates").glob("*.json"):
        runs += json.loads(path.read_text())["runs"]
    assert files
    examples = dict(cifar10=10_000, cifar10_validation=5000, digits=360, imagenette=3925)
    for run in runs:
        named = run["experiment"], run["started"]
        assert run["status"] in ("completed", "non-finite"), named
        assert run["device_kind"], named
        assert re.fullmatch("[0-9a-f]{40}", run["commit"]), named
        if run["status"] == "completed":
            assert run["eval"]["examples"] == examples[run["dataset"]], named
        assert run["config"]["seed"] == run["seed"], named


def sources(file):
    """Return what says where a file's numbers come from: a card's `measured`, or each step."""
    if "commit" in file:
        return [file]
    return [file["measured"]] if "measured" in file else file["steps"]


def test_sweeps_speeds_and_predictions_say_where_they_come_from():
    folders = ("sweeps", "speed", "predictions")
    files = [sorted((DATA / name).glob("*.json")) for name in folders]
    assert all(files)
    sweeps, *others = ([json.loads(path.read_text()) for path in paths] for paths in files)
    found = [*(sweep["hardware"] for sweep in sweeps), *itertools.chain(*others)]
    for run in itertools.chain(*map(sources, found)):
        assert re.fullmatch("[0-9a-f]{40}", run["commit"])
        assert run["versions"].keys() >= {"jax", "flax", "python"}


def test_table_on_known_runs(tmp_path):
    def write(name, **changes):
        run = dict(
            experiment="e",
            dataset="d",
            device_kind="GPU",
            devices=2,
            host_cores=4,
            mesh=dict(data=1, model=2),
            parallelism="hybrid",
            eval=dict(accuracy=0.9),
            train_seconds=10.0,
            images_per_second=1000.0,
            epochs=60.0,
            config=dict(seed=0, optimizer=dict(learning_rate=0.1)),
        )
        (tmp_path / name).write_text(json.dumps(run | changes))

    write("a.json")
    write("b.json", eval=dict(accuracy=0.92), train_seconds=12.0)
    write("c.json", device_kind="cpu", parallelism="data")
    write("d.json", epochs=7.5)
    write("e.json", epochs=100.0, config=dict(seed=0, optimizer=dict(learning_rate=0.1)))
    write(
        "f.json",
        epochs=100.0,
        config=dict(seed=1, optimizer=dict(learning_rate=0.1), model=dict(fast_forms=["fast"])),
    )
    write("g.json", epochs=100.0, config=dict(seed=0, optimizer=dict(learning_rate=0.2)))
    write("h.json", mesh=dict(data=2, model=1))
    write(
        "i.json", experiment="cuda_convnet_80sec", dataset="cifar10"
    )  # in the papers' table instead
    write("j.json", experiment="cuda_convnet_80sec", dataset="digits")
    assert cifar10.results_table("digits", tmp_path).splitlines()[2:] == [
        "| cuda_convnet_80sec | 2 x GPU | 1x2 hybrid | 60 | 1 | 90.00 | 10.0 | 1,000 |",
    ]
    assert cifar10.results_table("d", tmp_path).splitlines()[2:] == [
        "| e | 2 x GPU | 2x1 hybrid | 60 | 1 | 90.00 | 10.0 | 1,000 |",
        "| e | 2 x GPU | 1x2 hybrid | 7.5 | 1 | 90.00 | 10.0 | 1,000 |",
        "| e | 2 x GPU | 1x2 hybrid | 60 | 2 | 91.00 ± 1.41 | 11.0 ± 1.4 | 1,000 ± 0 |",
        "| e | 2 x GPU | 1x2 hybrid | 100 | 2 | 90.00 ± 0.00 | 10.0 ± 0.0 | 1,000 ± 0 |",
        "| e | 2 x GPU | 1x2 hybrid | 100 | 1 | 90.00 | 10.0 | 1,000 |",
        "| e | CPU, 4 cores | 1x2 data | 60 | 1 | 90.00 | 10.0 | 1,000 |",
    ]
