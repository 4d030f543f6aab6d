"""The benchmarks as far as they go without a GPU, and the table of speeds."""

import importlib
import json
import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from cnn_spmd.analysis import cost
from cnn_spmd.data import registry
from cnn_spmd.models import alexnet
from cnn_spmd.papers import predictions, published, pytorch
from cnn_spmd.sharding.table import ALL, TABLE

NARROW = (8, 16, 24, 16, 16)  # channels of an AlexNet that compiles quickly


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus=0: expected at least 1"),
        (
            ["--meshes", "1x1:nope"],
            "--meshes: 1x1:nope: expected DATAxMODEL:PARALLELISM with a product of --gpus=1 or 1",
        ),
        (["--gpus", "4", "--meshes", "1x3:data"], "--meshes: 1x3:data: expected"),
        (
            ["--gpus", "4", "--meshes", "1x1:hybrid"],
            "--meshes=1x1:hybrid: expected one of --gpus=4",
        ),
        (["--peer_modes", "compile-bf16"], "--peer_modes: compile-bf16: expected eager"),
        (["--batches", "32,x"], "--batches=32,x: expected positive numbers"),
        (["--output", "."], "--output=.: is a folder"),
        ([], "no GPU here: JAX runs on cpu"),
    ],
)
def test_bad_input_is_one_line(arguments, message, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    done = subprocess.run(
        [sys.executable, "benchmarks/speed.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_an_unknown_fast_form_is_refused():
    command = [sys.executable, "benchmarks/ours.py", "--batch=4", "--fast_forms=pool_index,faster"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--fast_forms: faster: expected some of space_to_depth, " in done.stderr


def test_our_side_times_its_steps(monkeypatch, capsys):
    """On one simulated device, a narrow network, 32x32 images and a few steps."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    ours = importlib.import_module("ours")
    config = ours.get_config()
    config.model.width = 64
    monkeypatch.setattr(ours, "get_config", lambda: config)
    monkeypatch.setattr(alexnet, "CHANNELS", NARROW)
    flags = "--batch 4 --steps 2 --image_size 32"
    monkeypatch.setattr(sys, "argv", ["ours.py", *flags.split()])
    ours.main()
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["steps"], row["steps_per_call"], row["gpus"], len(row["step_milliseconds"])) == (
        2,
        1,
        1,
        3,
    )
    assert min(row["step_milliseconds"]) > 0


def test_resident_and_streamed_images_in_turn(monkeypatch):
    """On one simulated device, a narrow network and some steps each."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    streaming = importlib.import_module("streaming")
    monkeypatch.setattr(alexnet, "CHANNELS", NARROW)
    monkeypatch.setattr(
        sys,
        "argv",
        ["_", "--image_size=40", "--crop=32", "--examples=16", "--seconds=0.01", "--repeats=2"],
    )
    args = streaming.parse_arguments()
    config = streaming.make_config(args)
    config.update(dict(batch_size=4, model=dict(width=64)))
    row = streaming.compare(args, config, registry.load(config.data))
    for side in streaming.sides_on(1):
        low, high = sorted(row[f"{side}_repeats"])
        assert 0 < low <= row[f"{side}_images_per_second"] <= high
    assert all(row[name] > 0 for name in row if name.endswith("_bytes_per_second"))
    assert {*streaming.sides_on(2)} - {*streaming.sides_on(1)} == {"sharded"}


def test_stored_predictions_of_one_weird_trick_are_what_the_model_says(monkeypatch):
    """A row of each batch. As the paper sends, by turns, each is within 5% of what it measured."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    history = importlib.import_module("history")
    stored = json.loads((history.FOLDER / "owt.json").read_text())
    by_turns = [row for row in stored["predictions"] if row["schedule"] == "by turns"]
    assert [row["devices"] for row in by_turns] == [2, 2, 4, 4, 8, 8]
    for row in by_turns:
        measured = row["measured_milliseconds"]
        assert row["predicted_milliseconds"] == pytest.approx(measured, rel=0.05)
    table = published.ONE_WEIRD_TRICK
    monkeypatch.setattr(published, "ONE_WEIRD_TRICK", [table[0], table[2], table[5]])
    made = json.loads(json.dumps(history.one_weird_trick()))
    predictions = made.pop("predictions")
    assert [row["devices"] for row in predictions] == [2, 2, 8, 8]
    assert all(row in stored["predictions"] for row in predictions), "run benchmarks/history.py"
    assert made == {name: stored[name] for name in made}


@pytest.mark.parametrize("name", ["optcnn", "flexflow", "tensorflow"])
def test_more_gpus_cost_these_systems_over_twice_what_their_links_need(name):
    """The claim of results/predictions.md and docs/planning.md."""
    stored = json.loads((ROOT / f"results/data/predictions/{name}.json").read_text())
    alone = stored["one_device_milliseconds"]
    for row in stored["predictions"]:
        added = row["measured_milliseconds"] - alone
        assert added > 2 * (row["predicted_milliseconds"] - alone)


def test_the_table_of_speeds():
    """A batch without a time of one side is left out; the peer's best mode counts."""

    def row(rate, gpus=2, **more):
        return (
            dict(name="compile", gpus=gpus, images_per_second=rate, matrix_share=rate / 1000) | more
        )

    ours = [
        row(100, mesh="1x2", parallelism="hybrid"),
        row(80, mesh="2x1", parallelism="data"),
        row(50, 1, mesh="1x1", parallelism="hybrid"),
        dict(name="1x2:model", error="exit code 1"),
    ]
    batches = [
        dict(batch_per_gpu=8, ours=ours, peer=[row(20), row(40, name="max")], ratio=2.5),
        dict(batch_per_gpu=16, ours=ours, peer=[dict(name="compile", error="no")], ratio=None),
        dict(batch_per_gpu=32, ours=ours[2:], peer=[row(20)], ratio=None),
        dict(batch_per_gpu=64, ours=ours, peer=[]),
    ]
    run = dict(gpus=2, hardware=dict(device_kind="X"), batches=batches)
    assert pytorch.speed_table([run]).splitlines()[2:] == [
        "| 2 x X | 8 | 1x2 hybrid | 100 | 40 (max) | 2.50 | 10 | 4 | 2.00 | 1.25 |"
    ]


def test_programs_are_compiled_for_every_row_of_the_table(monkeypatch):
    """Each row on 2 to 512 devices; what splits over all devices at once on Nx1 only."""
    # The module sets both for itself; this test undoes it.
    monkeypatch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.syspath_prepend(ROOT)
    programs = importlib.import_module("benchmarks.programs")
    cases = list(programs.cases())
    assert len({case.name for case in cases}) == len(cases)
    for scheme in TABLE:
        devices = {math.prod(case.mesh) for case in cases if case.parallelism == scheme}
        assert devices == {2, 4, 8, 64, 512}
    assert {case.mesh for case in cases if case.parallelism == "data"} == {
        (count, 1) for count in (2, 4, 8, 64, 512)
    }
    assert {case.mesh[1] for case in cases if case.parallelism == "hybrid"} == {2, 8}
    assert not programs.uses_one_axis(dict(conv_batch=ALL, at_rest=dict(fc1_in=ALL), again=True))
    assert programs.uses_one_axis(dict(conv_batch=ALL, at_rest=dict(fc1_in="model")))
    config = programs.config_of(next(case for case in cases if case.in_flight > 1))
    assert config.collectives_in_flight == programs.IN_FLIGHT


def test_stored_estimates_are_what_the_model_says():
    """Their errors, like those of the sweeps' predictions, are within what a plan says."""
    from benchmarks import estimates

    path = ROOT / "results/data/predictions/estimates.json"
    rows = json.loads(path.read_text())["predictions"]
    fitted = {(row.experiment, row.batch, row.card) for row in estimates.FITTED}
    for row in rows:
        key = row["experiment"], row["batch_per_device"], row["card"]
        assert row["fitted"] == (key in fitted)
    (within,) = re.findall(r"9 of 10 .* within (\d+) %", cost.ESTIMATES_WITHIN)
    errors = predictions.errors_of([row for row in rows if not row["fitted"]])
    assert sum(error <= int(within) / 100 for error in errors) >= 0.9 * len(errors)
    most, of_fsdp, of_2x2, of_split, of_variable = map(int, re.findall(r"(\d+) %", cost.ERRORS))
    limits = dict(fsdp=of_fsdp, model=of_split, spatial=of_split)
    sweeps = *predictions.ALL_SCHEMES.values(), predictions.MORE, *predictions.OLDER.values()
    for name in sweeps:
        for row in predictions.load_predictions(name):
            limit = limits.get(row["parallelism"], most)
            if predictions.place_of(row) == ("2x2", "dense_2d"):
                limit = of_2x2
            for key in ("predicted_milliseconds", "by_shipped_card_milliseconds"):
                error = abs(row[key] / row["measured_milliseconds"] - 1)
                assert error <= limit / 100, (name, row)
    errors = predictions.errors_of(predictions.load_predictions("variable"))
    assert 0.8 * of_variable < 100 * max(errors) <= of_variable
    (row,) = [row for row in estimates.FITTED if row.experiment == "claims_2012_cifar:relu"]
    kernels = estimates.roofline.kernels_of(estimates.program_of(row))
    seconds = estimates.roofline.seconds(kernels, cost.load(row.card))
    (stored,) = [each for each in rows if each["experiment"] == row.experiment]
    assert stored["predicted_milliseconds"] == round(1e3 * seconds, 4), (
        "run benchmarks/estimates.py"
    )
    assert stored["measured_milliseconds"] == estimates.measured(row)
