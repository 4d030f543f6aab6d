"""Whole runs, and their configs.

A resumed run equals an uninterrupted one, every test image counts once, and bad input is refused
before anything is compiled.
"""

import concurrent.futures
import dataclasses
import json
import re
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT
from jax.experimental.compilation_cache import compilation_cache
from run_helpers import lines, rows, saved_state, stop_after

from cnn_spmd import config as configs
from cnn_spmd import experiment
from cnn_spmd.data import order, registry, statistics
from cnn_spmd.data.digits import load_digits
from cnn_spmd.errors import UserError
from cnn_spmd.training import (
    build,
    checkpoint,
    clock,
    evaluate,
    interrupt,
    log,
    loop,
    one_checkpoint,
    optim,
    provenance,
    resume,
    runfiles,
    startup,
)
from cnn_spmd.training.dry_run import dry_run


def test_a_prediction_that_fails_ends_no_run(config, tmp_path, monkeypatch, capsys):
    """Such as for a network that works with one size of batch only."""

    def fail(setup, estimate=True):
        if estimate:
            raise TypeError("cannot reshape")

    monkeypatch.setattr(loop.prediction, "of_devices", fail)
    config.card = "h200"
    summary = loop.train(config, tmp_path)
    assert summary["status"] == "completed"
    assert "no step time is predicted: TypeError: cannot reshape" in capsys.readouterr().out


def test_files_of_a_run(config, tmp_path):
    startup.take_stages()  # of other tests
    config.card = "h200"  # which has rates, and no step of this network
    summary = loop.train(config, tmp_path / "run")
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "program.json", "metrics.jsonl", "summary.json", "checkpoints"} <= files
    assert any(name.startswith("events.out.tfevents") for name in files)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == summary
    assert summary.keys() >= {
        "experiment",
        "dataset",
        "fallback",
        "model",
        "parallelism",
        "mesh",
        "devices",
        "device_kind",
        "processes",
        "batch_size",
        "steps",
        "epochs",
        "seed",
        "dtype",
        "param_count",
        "startup_seconds",
        "compile_seconds",
        "train_seconds",
        "images_per_second",
        "step_milliseconds",
        "eval",
        "bytes_per_device",
        "collectives",
        "versions",
        "commit",
        "started",
        "status",
    }
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", summary["commit"])
    assert summary["step_milliseconds"].keys() == {"median", "p10", "p90"}
    assert summary["compile_seconds"] < summary["startup_seconds"] < startup.process_seconds()
    stages = {stage["stage"] for stage in summary["startup"]}
    programs = ("the train step", "init", "the evaluation", "the test for NaN")
    assert stages == {
        *("memory", "data", "network", "moving the images", "learning rates"),
        *("imports for later", "report"),
        *(f"{verb} {program}" for verb in ("tracing", "compiling") for program in programs),
        "the first chunk",
    }
    assert all(
        0 < stage["begin"] <= stage["end"] <= summary["startup_seconds"]
        for stage in summary["startup"]
    )
    assert (summary["status"], summary["steps"], summary["epochs"]) == ("completed", 8, 2.0)
    assert summary["eval"]["examples"] == 40
    prediction = json.loads((tmp_path / "run/program.json").read_text())["prediction"]
    assert (prediction["card"], prediction["estimated"]) == ("h200", True)
    assert prediction["predicted_milliseconds"] == summary["predicted_milliseconds"] > 0


def test_lines_of_a_run(config, tmp_path):
    """Each step, each evaluation and the final one have one line, with the data set's name."""
    loop.train(config, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", "train")] == list(range(1, 9))
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [4]
    assert [row["step"] for row in rows(tmp_path / "run", "final")] == [8]
    for line in runfiles.read_metrics_rows(tmp_path / "run/metrics.jsonl"):
        assert (line["dataset"], line["fallback"]) == ("synthetic", None)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_evaluation_counts_every_image_once(config, tmp_path, shape):
    """The padding of the last batch, 40 images in batches of 16, does not count."""
    config.update(
        dict(steps=1, batch_size=40, parallelism="hybrid", mesh=dict(data=shape[0], model=shape[1]))
    )
    config.optimizer.learning_rate = 0.0
    whole = loop.train(config, tmp_path / "a")
    config.batch_size = 16
    padded = loop.train(config, tmp_path / "b")
    assert whole["eval"]["examples"] == padded["eval"]["examples"] == 40
    assert padded["eval"]["accuracy"] == whole["eval"]["accuracy"]
    assert padded["eval"]["loss"] == pytest.approx(whole["eval"]["loss"], rel=1e-6)


ON_ONE = ("data", 1, 1, "yes")
ON_4X2 = ("hybrid", 4, 2, "yes")
ON_2X4 = ("dense_2d", 2, 4, "sharded")
STREAMED = ("data", 1, 1, "no")


@pytest.mark.parametrize(
    ("begun_on", "resumed_on"),
    [(ON_ONE, ON_ONE), (ON_2X4, ON_4X2), (ON_ONE, ON_2X4), (ON_ONE, STREAMED)],
)
def test_resumed_equals_uninterrupted(config, tmp_path, begun_on, resumed_on):
    """A run killed after step 4 of 8 ends as one that was not killed.

    They are equal bit for bit on the same mesh, and within 1e-5 on another mesh.
    """

    def put_on(parallelism, data, model, resident):
        config.update(
            dict(
                parallelism=parallelism,
                mesh=dict(data=data, model=model),
                data=dict(resident=resident),
            )
        )

    config.model.fast = True  # as the experiment ships
    loop.train(config, tmp_path / "whole")
    put_on(*begun_on)
    stop_after(4, config, tmp_path / "parts")
    put_on(*resumed_on)
    summary = loop.train(config, tmp_path / "parts")
    assert (summary["status"], summary["steps"]) == ("completed", 8)
    assert summary["data_on_device"] is (resumed_on[3] != "no")
    assert summary["page_locked"] is None  # a CPU reads all memory alike
    whole, parts = saved_state(tmp_path / "whole", 8), saved_state(tmp_path / "parts", 8)
    assert whole.keys() == parts.keys()
    same_mesh = resumed_on[1:3] == begun_on[1:3]
    for name, value in whole.items():
        tolerance = 0 if same_mesh else 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(parts[name], value, rtol=0, atol=tolerance, err_msg=name)
    for split in ("train", "eval", "final"):
        assert len(rows(tmp_path / "parts", split)) == len(rows(tmp_path / "whole", split))
        for got, expected in zip(
            rows(tmp_path / "parts", split), rows(tmp_path / "whole", split), strict=True
        ):
            assert got == expected if same_mesh else got == pytest.approx(expected, rel=1e-5)


def test_a_run_resumes_where_weights_rest_elsewhere(config, tmp_path, capsys):
    """A run goes from whole weights to split ones and back, a step each, and loses nothing.

    It says where it goes on, and from which scheme and number of steps to which.
    """
    config.optimizer.update(dict(decay="constant", warmup=0.0))
    config.update(dict(steps=4, epochs=0))
    loop.train(config, tmp_path / "whole")
    homes = [("data", 8, 1), ("sharded_update", 4, 2), ("fsdp", 2, 4), ("data", 1, 1)]
    for steps, (parallelism, data, model) in enumerate(homes, 1):
        mesh = dict(data=data, model=model)
        config.update(dict(steps=steps, parallelism=parallelism, mesh=mesh))
        summary = loop.train(config, tmp_path / "parts")
        assert (summary["status"], summary["steps"]) == ("completed", steps)
    assert [(part["step"], part["mesh"], part["parallelism"]) for part in summary["parts"]] == [
        (step, f"{data}x{model}", parallelism)
        for step, (parallelism, data, model) in enumerate(homes)
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("Compiling ...") == 5
    said = [line for line in lines if line.startswith("Resumed")]
    assert [line.partition(" at ")[2] for line in said] == [
        "step 1 on mesh 8x1 -> 4x2, parallelism data -> sharded_update, steps 1 -> 2.",
        "step 2 on mesh 4x2 -> 2x4, parallelism sharded_update -> fsdp, steps 2 -> 3.",
        "step 3 on mesh 2x4 -> 1x1, parallelism fsdp -> data, steps 3 -> 4.",
    ]
    whole, parts = saved_state(tmp_path / "whole", 4), saved_state(tmp_path / "parts", 4)
    for name, value in whole.items():
        tolerance = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(parts[name], value, rtol=0, atol=tolerance, err_msg=name)


def test_a_run_of_two_stages_and_crops_resumes(config, tmp_path):
    """A small form of cuda-convnet's recipe resumes after step 4.

    It sees crops of 40 of the 64 images for 6 steps, 2 per epoch, and then all images.
    """
    config.data.update(
        dict(crop=24, crop_pad=0, normalise="pixel_mean", held_out=24, held_out_steps=6)
    )
    config.optimizer.update(dict(bias_rate=2.0, weight_decays=dict(fc3=0.1), learning_rate=1e-6))
    config.update(dict(steps=8, eval=dict(views="ten")))
    whole = loop.train(config, tmp_path / "whole")
    stop_after(4, config, tmp_path / "parts")
    assert loop.train(config, tmp_path / "parts")["eval"] == whole["eval"]
    for name, value in saved_state(tmp_path / "whole", 8).items():
        np.testing.assert_array_equal(saved_state(tmp_path / "parts", 8)[name], value, err_msg=name)
    assert whole["param_count"] == 3 * 9 * 32 + 32 + 12 * 12 * 32 * 10 + 10  # a network for 24x24


def test_a_checkpoint_is_not_changed_by_the_steps_after_it(config, tmp_path):
    """A checkpoint holds the state of its own step.

    Orbax saves in the background, while the next step takes over the memory of the state.
    """
    config.checkpoint.keep = 10
    loop.train(config, tmp_path / "long")
    config.epochs = 1
    config.optimizer.update(dict(decay="constant", warmup=0.0))
    config.optimizer.warmup = 0.0
    loop.train(config, tmp_path / "short")
    config.epochs = 4
    loop.train(config, tmp_path / "longer")
    for name, value in saved_state(tmp_path / "short", 4).items():
        np.testing.assert_array_equal(
            saved_state(tmp_path / "longer", 4)[name], value, err_msg=name
        )


def test_a_finished_run_is_left_alone_and_can_grow(config, tmp_path, capsys):
    first = loop.train(config, tmp_path)
    assert loop.train(config, tmp_path) == first
    assert "Nothing to do" in capsys.readouterr().out
    config.epochs = 3
    assert loop.train(config, tmp_path)["steps"] == 12
    assert [row["step"] for row in rows(tmp_path, "final")] == [12]
    assert [row["step"] for row in rows(tmp_path, "eval")] == [4, 8]
    config.epochs = 1
    with pytest.raises(UserError, match=r"steps=4: .* is at step 12 already"):
        loop.train(config, tmp_path)


def test_a_run_that_goes_on_by_other_code_says_so(config, tmp_path, monkeypatch):
    """The commit and the experiment's file are those of summary.json, or are named."""
    said = []
    monkeypatch.setattr(resume.logging, "warning", lambda text, *rest: said.append(text % rest))
    monkeypatch.setitem(provenance.experiment_files, "own.py", "a")
    monkeypatch.setenv("COMMIT", "a" * 40)
    loop.train(config, tmp_path)
    config.epochs = 3
    loop.train(config, tmp_path)
    assert not said
    monkeypatch.setitem(provenance.experiment_files, "own.py", "b")
    monkeypatch.setenv("COMMIT", "b" * 40 + "-dirty")
    config.epochs = 4
    loop.train(config, tmp_path)
    edited = f"own.py was edited, commit {'a' * 10} -> {'b' * 10}-dirty"
    assert said == [f"Other code trained the steps before: {edited}."]


def test_a_run_in_another_thread_leaves_signals_alone(config, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        assert thread.submit(loop.train, config, tmp_path).result()["status"] == "completed"
    assert signal.getsignal(signal.SIGTERM) is handler


def test_a_signal_where_a_run_evaluates_costs_no_evaluation(config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(interrupt.Interrupt, "requested", lambda _: len(lines(tmp_path, "train")) > 2)
        assert loop.train(config, tmp_path)["status"] == "interrupted"
    assert lines(tmp_path, "eval") == []
    assert loop.train(config, tmp_path)["steps"] == 8
    (row,) = rows(tmp_path, "eval")
    saved = one_checkpoint.Checkpoint(tmp_path / "checkpoints/4")
    assert (row["step"], row["accuracy"]) == (4, saved.accuracy())


def test_a_complete_run_whose_last_checkpoint_is_broken_makes_it_again(config, tmp_path):
    first = loop.train(config, tmp_path)
    (tmp_path / "checkpoints/8").rename(tmp_path / "checkpoints/broken-8")
    assert loop.train(config, tmp_path)["eval"] == first["eval"]
    assert saved_steps(tmp_path) == {4, 8}


def test_metrics_without_their_seconds_do_not_end_a_run(config, tmp_path):
    stop_after(4, config, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[0] = '{"step": 1, "split": "train"}'
    lines[1] = '{"step": 2, "split": "train", "train_seconds": "many"}'
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert loop.train(config, tmp_path)["steps"] == 8


def test_metrics_cut_by_a_kill(config, tmp_path):
    """A cut last line is dropped; steps after the checkpoint are logged once."""
    stop_after(4, config, tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 5, "split": "train", "loss": 1.0, "train_seconds": 9}\n{"step": 6, "spl'
        )
    loop.train(config, tmp_path)
    assert [row["step"] for row in rows(tmp_path, "train")] == list(range(1, 9))


def test_a_run_killed_after_its_last_save_is_only_evaluated(config, tmp_path):
    stop_after(8, config, tmp_path)
    manifest = tmp_path / "checkpoints/8" / checkpoint.MANIFEST
    before = manifest.stat().st_mtime_ns
    assert loop.train(config, tmp_path)["eval"]["examples"] == 40
    assert manifest.stat().st_mtime_ns == before
    assert saved_steps(tmp_path) == {4, 8}
    assert [row["step"] for row in rows(tmp_path, "final")] == [8]


def overflow_in_step(step, monkeypatch):
    """Make the update of `step` infinite, so that it ruins the parameters."""
    make = optim.make_optimizer
    ruin = optax.scale_by_schedule(lambda at: jnp.where(at == step - 1, jnp.inf, 1.0))
    monkeypatch.setattr(
        optim, "make_optimizer", lambda *settings: optax.chain(make(*settings), ruin)
    )


def test_non_finite_loss_stops_and_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    overflow_in_step(5, monkeypatch)
    with pytest.raises(
        loop.NonFinite,
        match=r"loss is nan at step 6 .*the last good checkpoint is .*checkpoints.4$",
    ):
        loop.train(config, tmp_path)
    assert saved_steps(tmp_path) == {4}
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("non-finite", 6)


def test_parameters_that_overflow_are_not_saved(config, tmp_path, monkeypatch):
    overflow_in_step(4, monkeypatch)  # the loss of step 4 is still finite, and a checkpoint is due
    config.eval.every_epochs = 0
    with pytest.raises(
        loop.NonFinite, match=r"parameters are not finite after step 4.*no checkpoint was saved"
    ):
        loop.train(config, tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(experiment="../x"), r"experiment=\.\./x: expected letters, digits"),
        (dict(experiment=".."), r"experiment=\.\.: expected letters, digits"),
        (
            dict(parallelism="pipeline"),
            "parallelism=pipeline: unknown, expected one of data, model, hybrid",
        ),
        (dict(model=dict(name="lenet")), r"model\.name=lenet: unknown"),
        (dict(data=dict(name="mnist")), r"data\.name=mnist"),
        (
            dict(batch_size=12, mesh=dict(data=8)),
            "batch_size=12 does not divide by the 8 devices",
        ),
        (
            dict(
                model=dict(name="alexnet"), parallelism="hybrid", batch_size=15, mesh=dict(model=3)
            ),
            r"fc1 output \(15, 4096\): fc1_out=4096 does not divide by the 3 devices of mesh axis "
            "model",
        ),
        (
            dict(mesh=dict(data=3, model=5)),
            "mesh.data=3, mesh.model=5: needs 15 devices, but there are 8",
        ),
        (dict(batch_size=65), "batch_size=65: synthetic has 64 training images"),
        (dict(batch_size=0), "batch_size=0: expected at least 1"),
        (dict(epochs=0), "epochs=0, steps=0"),
        (dict(dtype="float16"), "dtype=float16: unknown"),
        (dict(steps=10**12), r"steps=1000000000000: expected from 0 to 10000000"),
        (
            dict(parallelism="two_tower"),
            r"parallelism=two_tower: splits towers, but model\.name=simple_cnn has one: .* "
            r"\(a network of your own has towers = 2 in its class\)",
        ),
        (dict(dense_updates="twice"), "dense_updates=twice: unknown, expected one of each, sum"),
        (dict(dense_microbatch=3), "dense_microbatch=3: does not divide batch_size=16"),
        (
            dict(dense_microbatch=4, mesh=dict(data=8)),
            "dense_microbatch=4 does not divide by the 8 devices of .*, such as 8, or another mesh",
        ),
        (  # the devices of the output layer; those of the other layers are two
            dict(
                dense_microbatch=4,
                mesh=dict(data=2, model=4),
                parallelism="own",
                placement=dict(own=dict(conv_batch="data", output_batch="ALL")),
            ),
            "dense_microbatch=4 does not divide by the 8 devices of .*, such as 8, or another mesh",
        ),
        (dict(model=dict(dropout=1.0)), r"model\.dropout=1\.0: expected from 0\.0 to below 1\.0"),
        (
            dict(optimizer=dict(learning_rate=float("nan"))),
            r"optimizer\.learning_rate=nan: expected at least",
        ),
        (
            dict(optimizer=dict(learning_rate=1e39)),
            r"optimizer\.learning_rate=1e\+39: expected at least 0\.0 and at most 3e\+38",
        ),
        (dict(optimizer=dict(decay="steps")), r"optimizer\.decay=steps: unknown"),
        (
            dict(data=dict(resident="maybe")),
            r"data\.resident=maybe: unknown, expected one of auto, yes, sharded, no",
        ),
        (dict(data=dict(crop_pad=32)), r"data\.crop_pad=32: images are 32 pixels wide"),
        (dict(data=dict(crop=33)), r"data\.crop=33: images are 32 pixels wide"),
        (dict(data=dict(crop=-1)), r"data\.crop=-1: expected at least 0"),
        (dict(eval=dict(views="ten")), r"eval\.views=ten: data\.crop=0 leaves no corners"),
        (
            dict(eval=dict(views="two")),
            r"eval\.views=two: unknown, expected one of one, mirrored, ten",
        ),
        (
            dict(data=dict(normalise="unit")),
            r"data\.normalise=unit: unknown, expected one of channel, pixel_mean",
        ),
        (
            dict(data=dict(held_out=49, held_out_steps=1)),
            r"data\.held_out=49: leaves 15 of 64 training images",
        ),
        (
            dict(steps=8, data=dict(held_out=49, held_out_steps=1)),
            r"data\.held_out=49: .*; steps=8 is fixed too: --config\.steps=0 --config\.epochs=N",
        ),
        (dict(data=dict(held_out=-1)), r"data\.held_out=-1: expected at least 0"),
        (dict(data=dict(held_out_steps=-1)), r"data\.held_out_steps=-1: expected at least 0"),
        (dict(optimizer=dict(bias_rate=-1.0)), r"optimizer\.bias_rate=-1\.0: expected at least"),
        (dict(optimizer=dict(scaling=2.0)), r"optimizer\.scaling=2\.0: expected from 0\.0 to 1\.0"),
        (
            dict(optimizer=dict(weight_decays=dict(conv1=-1.0))),
            r"optimizer\.weight_decays\.conv1=-1\.0: expected at least",
        ),
        (
            dict(optimizer=dict(weight_decays=dict(conv1="much"))),
            r"optimizer\.weight_decays\.conv1='much': expected a number",
        ),
        (dict(batch_size=True), "batch_size=True: expected an integer"),
        (dict(optimizer=dict(stages=None)), r"optimizer\.stages=None: expected a tuple"),
        (
            dict(eval=dict(every_epochs=2**70)),
            r"eval\.every_epochs=1180591620717411303424: expected at least 0 and at most "
            "2147483647",
        ),
        (
            dict(mesh=dict(data=2**70)),
            r"mesh\.data=1180591620717411303424: expected from -1 to 65536",
        ),
        (dict(steps_per_call=10**9), r"steps_per_call=1000000000: expected from 0 to 100000"),
        (dict(profile=10**6), r"profile=1000000: expected from 0 to 1000"),
        (
            dict(data=dict(dir="~nosuchuser/x")),
            r"data\.dir=~nosuchuser/x: has no such home folder, expected the path of a folder",
        ),
        (
            dict(data=dict(synthetic=dict(image_size=4096, train_examples=10**7))),
            r"data\.synthetic\.image_size=4096, data\.synthetic\.test_examples=40, "
            r"data\.synthetic\.train_examples=10000000: needs 503,318\.5 GB, expected at most the "
            ".* GB of memory that there are",
        ),
        (
            dict(model=dict(name="alexnet", width=10**6)),
            r"model\.name=alexnet, model\.width=1000000, per device: needs 8,032\.9 GB",
        ),
        (
            dict(
                steps_per_call=10**5,
                steps=10**7,
                data=dict(resident="no", crop=8, synthetic=dict(image_size=1024)),
            ),
            r"steps_per_call=100000, batch_size=16: needs 10,066\.3 GB",
        ),
        (
            dict(optimizer=dict(weight_decays=dict(fc9=1.0))),
            r"optimizer\.weight_decays\.fc9: model\.name=simple_cnn has no such layer, expected "
            "some of conv1, fc3",
        ),
        (
            dict(optimizer=dict(layer_rates=dict(conv2=1.0))),
            r"optimizer\.layer_rates\.conv2: .* has no such layer",
        ),
        (dict(checkpoint=dict(keep=0)), r"checkpoint\.keep=0: expected at least 1"),
    ],
)
def test_refused_before_anything_is_compiled(config, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    config.update(changes)
    with pytest.raises(UserError, match=message) as error:
        loop.train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_refusals_and_dry_runs_leave_a_run_as_it_is(config, tmp_path, monkeypatch):
    loop.train(config, tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(build.Setup, "train_program", lambda *_: pytest.fail("compiled"))
    config.mesh.data = 2
    with pytest.raises(UserError, match="holds a run"):
        dry_run(config, tmp_path)
    loop.train(config, tmp_path)  # complete: nothing to do
    config.epochs = 1
    with pytest.raises(
        UserError, match="at step 8 already: give at least these steps or another --"
    ):
        loop.train(config, tmp_path)
    config.eval.views = "one"
    with pytest.raises(UserError, match=r"eval\.views: mirrored -> one"):
        loop.train(config, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_dry_run_writes_its_report_where_a_run_may_follow(config, tmp_path):
    report = dry_run(config, tmp_path)
    assert json.loads((tmp_path / "program.json").read_text())["placement"] == report["placement"]
    assert loop.train(config, tmp_path)["status"] == "completed"


def test_starting_again_without_checkpoints_keeps_all_old_metrics(config, tmp_path, capsys):
    for suffix in ("", ".old", ".old-2"):
        loop.train(config, tmp_path)
        assert (
            "has no checkpoint to go on from: starting again at step 0; the old metrics are kept "
            f"as metrics.jsonl{suffix}." in capsys.readouterr().out
        ) == bool(suffix)
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "summary.json").unlink()
        (tmp_path / "metrics.jsonl").write_text(
            (tmp_path / "metrics.jsonl").read_text() + f'{{"n": "{suffix}"}}\n'
        )
    for suffix in ("", ".old", ".old-2"):
        lines = (tmp_path / f"metrics.jsonl{suffix}").read_text().splitlines()
        assert len(lines) == 8 + 1 + 1 + 1


def test_a_run_never_starts_over_where_its_checkpoints_are_broken(config, tmp_path):
    stop_after(4, config, tmp_path)
    (tmp_path / "checkpoints/4" / checkpoint.MANIFEST).write_text("{")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds no checkpoint that can be used"):
        loop.train(config, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_run_whose_saved_checkpoints_are_gone_stops(config, tmp_path):
    loop.train(config, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    config.epochs = 3
    with pytest.raises(
        UserError, match=r"summary\.json says that step 8 was saved, but checkpoints/ holds none"
    ):
        loop.train(config, tmp_path)


def test_a_run_that_a_kill_ended_does_not_start_over_without_its_checkpoints(config, tmp_path):
    """It had gone on from a checkpoint, so there was one."""
    stop_after(4, config, tmp_path)
    loop.train(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | dict(status="running")))
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"says that step 4 was saved, but checkpoints/ holds none"):
        loop.train(config, tmp_path)


def test_metrics_that_are_lost_are_named(config, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(log.logging, "warning", lambda text, *rest: said.append(text % rest))
    stop_after(4, config, tmp_path)
    loop.train(config, tmp_path)
    assert not said
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    config.epochs = 3
    loop.train(config, tmp_path)
    assert said == [f"{path} has lost what was logged of the steps 4 to 8."]


def test_a_file_of_metrics_that_cannot_be_written_leaves_a_summary(config, tmp_path, monkeypatch):
    def refused(self, *_, **__):
        raise OSError(27, "File too large")

    close = log.MetricsFile.close
    monkeypatch.setattr(log.MetricsFile, "write", refused)
    monkeypatch.setattr(log.MetricsFile, "close", lambda self: (close(self), refused(self)))
    with pytest.raises(OSError, match="File too large"):
        loop.train(config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("moved", [True, False])
def test_a_folder_that_goes_while_the_run_uses_it_ends_the_run(
    config, tmp_path, monkeypatch, moved
):
    save = checkpoint.Checkpoints.save

    def save_and_go(self, step, *rest):
        save(self, step, *rest)
        self.wait()
        (tmp_path / "run").rename(tmp_path / "new")
        if not moved:
            shutil.rmtree(tmp_path / "new")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "save", save_and_go)
        with pytest.raises(
            checkpoint.SaveError,
            match="run: was moved or removed while the run used it; step 8 is not saved",
        ):
            loop.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    if moved:
        assert loop.train(config, tmp_path / "new")["steps"] == 8


def test_a_step_of_another_run_is_not_taken(config, tmp_path):
    stop_after(4, config, tmp_path / "a")
    config.seed = 1
    loop.train(config, tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints")
    shutil.copytree(tmp_path / "a/checkpoints", tmp_path / "b/checkpoints")
    (tmp_path / "b/summary.json").unlink()
    with pytest.raises(UserError, match="4 is of another run"):
        loop.train(config, tmp_path / "b")


def test_a_network_that_gives_nan_is_never_right(config, tmp_path, monkeypatch):
    # Only the final evaluation meets what the last step did.
    overflow_in_step(8, monkeypatch)
    with pytest.raises(loop.NonFinite, match="test loss is nan after step 8"):
        loop.train(config, tmp_path)


def test_fallback_is_named_in_every_file(config, tmp_path, monkeypatch, capsys):
    from cnn_spmd.data import cifar10

    def unreachable(*_):
        raise cifar10.Unreachable("no way out")

    monkeypatch.setattr(cifar10, "find", unreachable)
    config.data.update(
        dict(name="cifar10", fallback="digits", fallback_epochs=1, fallback_batch_size=512)
    )
    summary = loop.train(config, tmp_path)
    assert (summary["batch_size"], summary["steps"], summary["eval"]["examples"]) == (512, 2, 360)
    assert (
        "For digits: batch_size=512, steps=2, optimizer.learning_rate=0.1, from data.fallback_*.\n"
        in capsys.readouterr().out
    )
    for name in ("config.json", "program.json", "summary.json"):
        content = json.loads((tmp_path / name).read_text())
        assert (content["dataset"], content["fallback"]) == ("digits", "cifar10"), name
    for line in runfiles.read_metrics_rows(tmp_path / "metrics.jsonl"):
        assert (line["dataset"], line["fallback"]) == ("digits", "cifar10")


def on_the_fallback(*arguments):
    """Resolve the shipped experiment where the digits stand in for CIFAR-10."""
    digits = dataclasses.replace(load_digits(None), fallback="cifar10")
    path = str(ROOT / "experiments/alexnet_cifar.py")
    config, _ = experiment.parse_arguments(["--config", path, *arguments])
    return configs.resolve(config, digits, "cpu")


@pytest.mark.parametrize(
    ("arguments", "batch_size", "rate", "steps", "says"),
    [
        (
            [],
            64,
            0.1,
            88,
            "batch_size=64, steps=88, optimizer.learning_rate=0.1, from data.fallback_*",
        ),
        (
            ["steps=40"],
            64,
            0.1,
            40,
            "batch_size=64, optimizer.learning_rate=0.1, from data.fallback_*; steps=40, as given",
        ),
        (
            ["epochs=2"],
            64,
            0.1,
            44,
            "batch_size=64, optimizer.learning_rate=0.1, from data.fallback_*; steps=44, as given",
        ),
        (
            ["batch_size=32", "optimizer.learning_rate=0.01"],
            32,
            0.01,
            4 * 44,
            "batch_size=32, optimizer.learning_rate=0.01, as given; steps=176, from "
            "data.fallback_*",
        ),
        (
            ["batch_size=512", "data.fallback_batch_size=128"],
            128,
            0.1,
            44,
            "batch_size=128, steps=44, ",
        ),
        (["data.fallback_epochs=0"], 64, 0.1, 40 * 22, "steps=880, as given"),
    ],
)
def test_what_is_given_wins_over_the_fallback(arguments, batch_size, rate, steps, says):
    got = on_the_fallback(*(f"--config.{argument}" for argument in arguments))
    assert (got.batch_size, got.optimizer.learning_rate, got.steps) == (batch_size, rate, steps)
    assert says in configs.values_on_fallback(got)


def test_what_a_file_of_flags_gives_wins_over_the_fallback(tmp_path):
    (tmp_path / "flags").write_text("--config.steps=40\n")
    assert on_the_fallback(f"--flagfile={tmp_path / 'flags'}").steps == 40


def test_a_run_on_the_fallback_resumes_by_the_same_command():
    given, not_given = (
        configs.as_json(on_the_fallback(*arguments))
        for arguments in (["--config.batch_size=32"], [])
    )
    configs.refuse_changes("a", given, given)
    with pytest.raises(UserError, match=r"\(batch_size: 32 -> 64\)"):
        configs.refuse_changes("a", given, not_given)


def saved_steps(workdir):
    """Return the steps that a run has a checkpoint of."""
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()}


def test_a_run_keeps_its_last_and_its_best(config, tmp_path, monkeypatch):
    accuracy = iter([0.9, 0.2, 0.1])
    monkeypatch.setattr(
        evaluate,
        "means_of",
        lambda *_: dict(accuracy=next(accuracy), top5=0.0, loss=0.0, examples=40),
    )
    config.update(dict(epochs=3, checkpoint=dict(keep=1)))
    loop.train(config, tmp_path)
    assert saved_steps(tmp_path) == {4, 12}


def test_checkpoints_and_evaluations_have_intervals_of_their_own(config, tmp_path):
    config.update(
        dict(epochs=4, checkpoint=dict(every_epochs=3, keep=9), eval=dict(every_epochs=2))
    )
    loop.train(config, tmp_path)
    assert saved_steps(tmp_path) == {12, 16}
    assert [row["step"] for row in rows(tmp_path, "eval")] == [8]


def test_programs_from_the_cache_are_counted(config, tmp_path, capsys):
    """The second of two equal runs does not compile its steps, and says so."""
    changes = dict(
        jax_compilation_cache_dir=str(tmp_path / "cache"),
        jax_persistent_cache_min_compile_time_secs=0.0,
    )
    before = {name: getattr(jax.config, name) for name in changes}
    try:
        for name, value in changes.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        first, second = (
            loop.train(config, tmp_path / name)["programs_from_cache"] for name in ("a", "b")
        )
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert first == 0
    assert second >= 2  # the train and the evaluation step
    assert f"{second} programs from the cache" in capsys.readouterr().out


def test_a_run_stopped_while_it_compiles_can_be_started_again(config, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(build.Setup, "train_program", stop)
        loop.train(config, tmp_path / "run")
    assert loop.train(config, tmp_path / "run")["status"] == "completed"


def test_several_steps_per_call_log_the_same_run(config, tmp_path, monkeypatch):
    config.data.synthetic.image_size = 8  # XLA's loops are slow on a CPU
    config.steps_per_call = 3
    loop.train(config, tmp_path / "a")
    assert [row["step"] for row in rows(tmp_path / "a", "train")] == [3, 4, 7, 8]
    config.steps_per_call = 4
    overflow_in_step(2, monkeypatch)
    with pytest.raises(loop.NonFinite, match="loss is nan at step 3 "):
        loop.train(config, tmp_path / "b")


def test_seconds_and_rates(config, tmp_path, monkeypatch):
    """16 images take half a second; a resumed run adds to the seconds before it."""
    monkeypatch.setattr(
        clock.Clock, "finish", lambda self, n, _: self.chunks.append((n, 0.5)) or 0.5
    )
    stop_after(4, config, tmp_path)
    summary = loop.train(config, tmp_path)
    assert (summary["images_per_second"], summary["train_seconds"]) == (32.0, 4.0)
    logged = lines(tmp_path, "train")
    assert [line["train_seconds"] for line in logged] == [0.5 * i for i in range(1, 9)]
    assert {line["images_per_second"] for line in logged} == {32.0}


def test_the_clock_stands_still_during_evaluation(config, tmp_path, monkeypatch):
    events = []
    for name in ("start", "finish"):
        old = getattr(clock.Clock, name)
        monkeypatch.setattr(
            clock.Clock, name, lambda *a, old=old, name=name: events.append(name) or old(*a)
        )
    monkeypatch.setattr(
        evaluate, "means_of", lambda *a, old=evaluate.means_of: events.append("eval") or old(*a)
    )
    loop.train(config, tmp_path)
    assert events == ["start", *["finish"] * 4, "eval", "start", *["finish"] * 4, "eval"]


def before_each_chunk(action, monkeypatch):
    """Make each train program do `action` before it is launched."""

    class Program:
        def __init__(self, *arguments, compiled=build.Setup.train_program):
            self.program = compiled(*arguments)

        def __call__(self, *inputs):
            action()
            return self.program(*inputs)

        def __getattr__(self, name):
            return getattr(self.program, name)

    monkeypatch.setattr(build.Setup, "train_program", lambda *a: Program(*a))


def test_a_chunk_begins_before_the_one_before_it_is_read(config, tmp_path, monkeypatch):
    """The devices wait for the host only before an evaluation."""
    events, finish = [], clock.Clock.finish
    monkeypatch.setattr(clock.Clock, "finish", lambda *a: events.append("read") or finish(*a))
    before_each_chunk(lambda: events.append("begin"), monkeypatch)
    loop.train(config, tmp_path)
    assert events == ["begin", *["begin", "read"] * 3, "read"] * 2


def test_a_launch_that_takes_as_long_as_its_chunk_is_not_counted_twice(
    config, tmp_path, monkeypatch
):
    """On a GPU, the host returns from a launch when the chunk before has long ended."""
    before_each_chunk(lambda: time.sleep(0.4), monkeypatch)
    loop.train(config, tmp_path)
    seconds = [16 / line["images_per_second"] for line in lines(tmp_path, "train")]
    assert len(seconds) == 8
    # Without a thread that waits for its end, the last chunk before an evaluation had some 0.01 s.
    assert min(seconds) > 0.1


def test_statistics_and_evaluation_use_their_own_split(config, tmp_path, monkeypatch):
    data = registry.load(config.data)
    data = dataclasses.replace(
        data,
        train_labels=data.train_labels * 0 + 1,
        test_labels=data.test_labels * 0,
        test_images=data.test_images // 4,
    )
    monkeypatch.setattr(registry, "find", lambda *_: data)
    seen = []
    monkeypatch.setattr(
        statistics,
        "channel_statistics",
        lambda x, old=statistics.channel_statistics: seen.append(x) or old(x),
    )
    assert loop.train(config, tmp_path)["eval"]["accuracy"] == 0
    assert [x is data.train_images for x in seen] == [True]


def test_the_batches_and_the_rates_are_those_of_the_config(config, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        order,
        "train_indices",
        lambda *a, old=order.train_indices, **k: calls.append((*a, *k.values())) or old(*a, **k),
    )
    config.seed = 7
    loop.train(config, tmp_path)
    assert {(call[0], *call[3:]) for call in calls} == {(7, 16, 64, 0, 0)}
    schedule = optim.make_schedule(config.optimizer, 8)
    assert [row["learning_rate"] for row in rows(tmp_path, "train")] == pytest.approx(
        [float(schedule(i)) for i in range(8)]
    )


@pytest.mark.parametrize("mirror", [True, False])
def test_augmentation_is_what_config_and_data_allow(config, mirror):
    data = dataclasses.replace(registry.load(config.data), mirror=mirror)
    got = build.make_preprocessing(configs.resolve(config, data, "cpu"), data)
    assert (got.crop, got.crop_pad, got.views) == (0, 4, "mirrored")
    assert (got.flip, got.mirror) == (mirror, mirror)


@pytest.mark.parametrize(
    ("platform", "dtype", "steps"), [("cpu", "float32", 1), ("gpu", "bfloat16", 4)]
)
def test_what_auto_means(config, platform, dtype, steps):
    data = dataclasses.replace(registry.load(config.data), fallback="cifar10")
    config.data.fallback_batch_size = 16
    got = configs.resolve(config, data, platform)
    assert (got.dtype, got.steps_per_call, got.optimizer.learning_rate) == (
        dtype,
        steps,
        config.data.fallback_learning_rate,
    )


def test_a_profile_is_of_the_last_command(config, tmp_path):
    config.profile = 1
    loop.train(config, tmp_path)
    assert (tmp_path / "profile.json").exists()
    config.profile, config.steps, config.epochs = 0, 10, 0
    loop.train(config, tmp_path)
    assert not (tmp_path / "profile.json").exists()


def test_fields_that_are_unknown_or_missing(config):
    with config.unlocked():
        config.optimizer.rate = 3
    with pytest.raises(
        UserError,
        match=r"optimizer\.rate=3: no such field, expected one of docs/config\.md",
    ):
        configs.validate(config)
    del config.optimizer["rate"], config.optimizer["clip_norm"]
    with pytest.raises(UserError, match=r"optimizer\.clip_norm: missing"):
        configs.validate(config)


@pytest.mark.parametrize(
    ("steps", "evaluate", "save", "per_call"),
    [
        (3, 1, 0, 3),  # fewer than an epoch's 4
        (1000, 1, 0, 4),  # to the next evaluation, which is short
        (1000, 40, 60, 80),  # 20 epochs between stops
        (1000, 0, 0, 100),
        (1000, 25, 25, 100),
        (101, 0, 0, 51),  # a prime number of steps: chunks of 51 and 50
    ],
)
def test_chunks_end_where_evaluations_and_checkpoints_are(config, steps, evaluate, save, per_call):
    config.steps, config.eval.every_epochs, config.checkpoint.every_epochs = steps, evaluate, save
    assert configs.resolve(config, registry.load(config.data), "gpu").steps_per_call == per_call


@pytest.mark.parametrize(
    ("memory", "resident", "steps"), [(None, "yes", 2), (1e6, "yes", 2), (0.7e6, "no", 1)]
)
def test_what_does_not_fit_is_streamed(config, memory, resident, steps, monkeypatch):
    """Images are streamed if they need more than 0.4 of the memory, or RESIDENT_BYTES.

    104 images of 3,072 bytes are 319,488 bytes. A chunk then gets at most CHUNK_BYTES of images.
    """
    monkeypatch.setattr(configs, "CHUNK_BYTES", 2 * 32 * 3072 - 1)
    config.batch_size = 32
    got = configs.resolve(config, registry.load(config.data), "gpu", memory)
    assert (got.data.resident, got.steps_per_call) == (resident, steps)
    monkeypatch.setattr(configs, "RESIDENT_BYTES", 319_487)
    got = configs.resolve(config, registry.load(config.data), "gpu")
    assert (got.data.resident, got.steps_per_call) == ("no", 1)


def test_what_a_resumed_run_may_change(config):
    free = {
        "mesh.data",
        "mesh.model",
        "parallelism",
        "steps_per_call",
        "eval.every_epochs",
        "checkpoint.every_epochs",
        "checkpoint.keep",
        "data.dir",
        "data.resident",
        "data.fallback",
        "data.fallback_epochs",
        "data.fallback_batch_size",
        "data.fallback_learning_rate",
        "epochs",
        "steps",
        "profile",
        "noise_scale",
        "model.fast",
        "collectives_in_flight",
        "data.skip_bad",
        "card",
    }
    old = configs.as_json(config)
    for field in configs.flat(old):
        new = json.loads(json.dumps(old))
        *parents, last = field.split(".")
        inner = new
        for name in parents:
            inner = inner[name]
        inner[last] = "other"
        if field in free:
            configs.refuse_changes("a", old, new)
        else:
            with pytest.raises(UserError, match=field):
                configs.refuse_changes("a", old, new)
