"""A config's Setup creates a state, trains it from Python, and reports."""

import types

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from setups import (
    BATCH,
    BY_HAND,
    NETWORKS,
    gather,
    narrow,  # noqa: F401  (a fixture)
    setup_of,
    small_config,
)

from cnn_spmd.data import order
from cnn_spmd.errors import UserError
from cnn_spmd.layers import dense
from cnn_spmd.training import build


def test_the_memory_of_each_device_is_taken_in_a_thread_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(
        build.startup, "background", lambda name, *args: taken.append((name, *args))
    )
    build.prepare(small_config("alexnet", mesh=dict(data=2, model=4), dtype="float32"))
    memory = [arguments for name, *arguments in taken if name == "memory"]
    assert memory == [[build.reserve_memory, device] for device in jax.devices()]


def test_the_state_is_created_sharded_and_the_same_on_every_mesh():
    one, many = setup_of("alexnet", "data", (1, 1)), setup_of("alexnet", "hybrid", (2, 4))
    state = many.init()
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {many.place.mesh}
    momentum = optax.tree_utils.tree_get(state.optimizer, "trace")["fc1"]["kernel"]
    # A momentum lies where its weight does.
    assert momentum.sharding.shard_shape(momentum.shape) == (256, 16)
    assert momentum.sharding == state.params["fc1"]["kernel"].sharding
    expected = gather(one.init())
    for (name, got), value in zip(gather(state).items(), expected.values(), strict=True):
        np.testing.assert_array_equal(got, value, err_msg=name)
    other = setup_of("alexnet", "data", (1, 1), seed=1).init()
    kernels = (each.params["fc1"]["kernel"][...] for each in (other, state))
    assert not np.array_equal(*kernels)


@pytest.mark.parametrize("resident", ["yes", "no"])
def test_training_in_two_calls_equals_one_call(resident):
    """To the last bit, with the same chunks; the second call crosses an epoch's end."""
    setup = setup_of(
        "simple_cnn",
        "hybrid",
        (4, 2),
        dtype="float32",
        steps_per_call=2,
        data=dict(resident=resident),
    )
    whole, metrics = setup.train(setup.init(), 6)
    half, first = setup.train(setup.init(), 2)
    assert int(half.step) == 2
    resumed, second = setup.train(half, 4)
    assert int(whole.step) == int(resumed.step) == 6
    expected = gather(whole)
    for name, value in gather(resumed).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    for name, value in metrics.items():
        both = np.concatenate([first[name], second[name]])
        np.testing.assert_array_equal(both, value, err_msg=name)


def test_metrics_are_numpy_arrays_with_a_value_per_step():
    setup = setup_of("simple_cnn", "data", (2, 1), dtype="float32", steps_per_call=2)
    for steps in (1, 3):
        _, metrics = setup.train(setup.init(), steps)
        assert metrics.keys() == {"loss", "accuracy"}
        for values in metrics.values():
            assert isinstance(values, np.ndarray)
            assert values.shape == (steps,)
            assert np.isfinite(values).all()


def test_training_takes_the_images_of_its_steps(monkeypatch):
    """A call continues where the state's step is, whatever was trained before."""
    setup = setup_of("simple_cnn", "data", (1, 1), dtype="float32")
    seen = []

    def spy(seed, start, steps, *args):
        seen.append((start, steps))
        return indices(seed, start, steps, *args)

    indices = order.train_indices
    monkeypatch.setattr(order, "train_indices", spy)
    state, _ = setup.train(setup.init(), 2)
    setup.train(state, 1)
    assert seen == [(0, 1), (1, 1), (2, 1)]


def test_the_report_is_that_of_the_compiled_step():
    """It can be had before training, and training then compiles nothing again."""
    setup = setup_of("alexnet", "hybrid", (4, 2), dtype="float32")
    report = setup.report()
    assert report["compiler_options"] == {}
    assert "error" not in report
    assert (report["parallelism"], report["mesh"]) == ("hybrid", dict(data=4, model=2))
    moved = {
        (row["kind"], "+".join(row["axes"])): row["compiled_bytes"] / 4
        for row in report["communication"]
    }
    assert moved == {
        move: pytest.approx(numbers, rel=0.01, abs=100)
        for move, numbers in BY_HAND["hybrid"].items()
    }
    held = {row["name"]: row["bytes_per_device"] for row in report["placement"]}
    assert held["fc1.kernel"] == 256 * 64 * 4 // 2
    assert report["bytes_per_device"]["parameters"] == sum(held.values())
    compiled = setup.train_program(1)
    setup.train(setup.init(), 1)
    assert setup.train_program(1) is compiled
    assert report["batch_size"] == BATCH
    assert report["streamed_bytes_per_device"] == 0


def test_the_report_says_what_is_streamed():
    setup = setup_of("simple_cnn", "model", (2, 4), data=dict(resident="no"))
    # The four devices along the model axis receive the same half of the batch.
    assert setup.streamed_bytes_per_device == BATCH // 2 * 32 * 32 * 3


class Head(nnx.Module):
    """A network whose classify has a layer `last`, and what else a test gives it."""

    def __init__(self, *, image_size, classes, width, dropout, dtype, rngs, fast_forms):
        self.fc1 = dense.dense("fc1", 3, 8, dtype=dtype, rngs=rngs)
        self.last = self.make(classes, dtype, rngs)

    def make(self, classes, dtype, rngs):
        return nnx.Linear(8, classes, dtype=dtype, rngs=rngs)

    def features(self, images_BHWC, place=None, train=False):
        return images_BHWC.mean((1, 2))

    def classify(self, x_BF, place=None, dropout_key=None):
        return self.last(nnx.relu(self.fc1(x_BF)))


class RandomHead(Head):
    def make(self, classes, dtype, rngs):
        return nnx.Sequential(nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, classes, rngs=rngs))


class StatefulHead(Head):
    def make(self, classes, dtype, rngs):
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        return nnx.Linear(8, classes, dtype=dtype, rngs=rngs)

    def classify(self, x_BF, place=None, dropout_key=None):
        return self.last(self.norm(nnx.relu(self.fc1(x_BF)), use_running_average=False))


class WideHead(Head):
    def make(self, classes, dtype, rngs):
        return nnx.Linear(8, classes + 1, dtype=dtype, rngs=rngs)


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        (RandomHead, {}, r"model\.name=head: last\.layers\.0\.rngs.* holds random numbers"),
        (StatefulHead, {}, r"norm\.mean: is changed by the network's classify"),
        (WideHead, {}, r"classify: returns the shape \(16, 17\), expected .* \(16, 16\)"),
        (Head, dict(dense_microbatch=8), r"dense_microbatch=8: last\.bias is used by .* classify"),
    ],
)
def test_networks_that_would_train_wrongly_are_refused(monkeypatch, network, changes, message):
    monkeypatch.setitem(NETWORKS, "head", network)
    with pytest.raises(UserError, match=message):
        prepared = build.prepare(small_config("head", dtype="float32", **changes))
        prepared.train_program(1)


def test_at_least_one_step(monkeypatch):
    with pytest.raises(UserError, match="steps=0: expected at least 1"):
        setup_of("simple_cnn", "data", (1, 1), dtype="float32").train(None, 0)


def on(platform, devices, in_flight, dense_microbatch=0):
    """Return what a Setup's options depend on."""
    found = np.array([types.SimpleNamespace(platform=platform)] * devices)
    return types.SimpleNamespace(
        config=types.SimpleNamespace(
            collectives_in_flight=in_flight, dense_microbatch=dense_microbatch
        ),
        place=types.SimpleNamespace(mesh=types.SimpleNamespace(devices=found, size=devices)),
    )


def test_entries_at_rest_without_effect_are_said(capsys):
    """fc1 is no layer of this network; fc3's columns are split in use already."""
    at_rest = dict(conv_out="ALL", fc1_in="data", fc3_in="data", fc3_out="model")
    row = dict(base="hybrid", fc3_in=None, fc3_out="model", at_rest=at_rest)
    config = small_config("simple_cnn", dtype="float32", parallelism="mine")
    config.update(dict(mesh=dict(data=4, model=2), placement=dict(mine=row)))
    build.prepare(config)
    assert [line for line in capsys.readouterr().out.splitlines() if "no effect" in line] == [
        f"placement.mine.at_rest.{entry} has no effect: on mesh 4x2 it splits no weight of "
        "simple_cnn beyond its use."
        for entry in ("fc1_in=data", "fc3_out=model")
    ]
    config.mesh.update(dict(data=8, model=1))
    build.prepare(config)
    assert "at_rest.fc3_out" not in capsys.readouterr().out


def test_entries_of_ones_own_row_without_effect_are_said(capsys):
    """This network has one dense layer, fc3, and no towers."""
    mine = dict.fromkeys(("conv_out", "fc2_out", "tower_in"), "model")
    row = dict(base="model", fc1_out=None, **mine)
    config = small_config("simple_cnn", dtype="float32", parallelism="mine")
    config.update(dict(mesh=dict(data=2, model=4), placement=dict(mine=row)))
    build.prepare(config)
    assert [line for line in capsys.readouterr().out.splitlines() if "no effect" in line] == [
        f"placement.mine.{entry}=model has no effect: on mesh 2x4 it splits no array of simple_cnn."
        for entry in ("fc2_out", "tower_in")
    ]
    config.mesh.update(dict(data=8, model=1))
    build.prepare(config)
    assert "no effect" not in capsys.readouterr().out


def test_gathers_of_micro_batches_stay_apart_on_several_gpus():
    options = build.Setup.compiler_options.fget
    assert options(on("gpu", 4, 1, 8)) == {"xla_gpu_all_gather_combine_threshold_bytes": 1}
    assert not any(map(options, (on("gpu", 1, 1, 8), on("cpu", 4, 1, 8), on("gpu", 4, 1))))


def test_collectives_in_flight_is_an_option_of_the_compiler_for_several_gpus(monkeypatch, capsys):
    options = build.Setup.compiler_options.fget
    limit = {"xla_gpu_experimental_parallel_collective_overlap_limit": 4}
    assert options(on("gpu", 8, 4)) == limit
    assert not any(map(options, (on("gpu", 8, 1), on("gpu", 1, 4), on("cpu", 8, 4))))

    setup = build.prepare(small_config("simple_cnn", dtype="float32", collectives_in_flight=4))
    assert "collectives_in_flight=4 has no effect" in capsys.readouterr().out
    monkeypatch.setattr(build.Setup, "compiler_options", limit)
    given = []
    lowered = types.SimpleNamespace(compile=lambda compiler_options: given.append(compiler_options))
    monkeypatch.setattr(build.Setup, "lower_train", lambda *_: lowered)
    setup.train_program(3)
    assert given == [limit]
