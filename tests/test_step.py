"""Every mesh of eight devices under every placement computes what one device computes, with the collectives it should.

Tolerances, against one device: loss 1e-6 relative; each gradient and each parameter after the update, 1e-5 of the
array's largest element (float32; only the order of summation differs). Dropout, crops and flips are on.
"""

import collections
import functools

import jax
import numpy as np
import pytest

from cnn_spmd import config as configs
from cnn_spmd import mesh, program, train
from cnn_spmd.data import batches, sources
from cnn_spmd.placement import Placement, name_of
from cnn_spmd.step import DeviceData
from experiments.alexnet_cifar import get_config

MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
BATCH = 16
LOSS_TOLERANCE, TOLERANCE = 1e-6, 1e-5
CLASSES = {"alexnet": 10, "simple_cnn": 8}  # of 10 classes, 4 and 8 devices cannot take even shares; of 8 they can


def make(model: str, shape: tuple[int, int], parallelism: str):
    """Data, placement and step functions of the shipped experiment, on a few random images."""
    config = get_config()
    config.update(dict(batch_size=BATCH, steps=10, model=dict(name=model)))
    config.data.update(dict(name="synthetic", synthetic=dict(classes=CLASSES[model], train_examples=64, test_examples=8)))
    data = sources.load(config.data)
    place = Placement(mesh.make(*shape), parallelism)
    steps = train.make_steps(configs.resolve(config, data), data, place)
    return data, place, steps


@functools.cache
def initial(model: str):
    """The state at step 0, on one device."""
    return make(model, (1, 1), "data")[2].jit_init()()


@functools.cache
def computed(model: str, shape: tuple[int, int], parallelism: str) -> dict:
    """Loss, gradients and parameters of the second of two steps, and the report of the compiled program."""
    data, place, steps = make(model, shape, parallelism)

    def step(state, data, indices):
        metrics, gradients = steps.gradients(data, state, indices)
        return steps.update(state, gradients), metrics, gradients

    shardings = place.of_state(steps.abstract_state)
    step = jax.jit(step, out_shardings=(shardings, place.replicated, shardings.params))
    state = jax.device_put(initial(model), shardings)
    train_data = DeviceData(*(train.put(x, place.replicated) for x in (data.train_images, data.train_labels)))
    indices = [train.put(x, place.sharding(("conv_batch",), (BATCH,))) for x in batches.train_indices(0, 0, 2, BATCH, 64)]
    compiled = step.lower(steps.abstract_state, train_data, indices[0]).compile()
    state, _, _ = compiled(state, train_data, indices[0])
    state, metrics, gradients = compiled(state, train_data, indices[1])
    return dict(loss=float(metrics["loss"]), accuracy=float(metrics["accuracy"]), gradients=gather(gradients),
                params=gather(state.params), report=program.report(compiled, place.mesh),
                placement=place.report(steps.abstract_state.params),
                held={name_of(path).removesuffix(".value"): leaf.addressable_shards[0].data.nbytes / leaf.nbytes
                      for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)},
                bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(state.params)))


def gather(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def assert_close(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 0, name
        error = np.abs(got[name] - value).max() / np.abs(value).max()
        assert error < TOLERANCE, f"{name}: {error:.2e} of the largest element"


@pytest.mark.parametrize("parallelism", ["data", "hybrid"])
@pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("model", ["alexnet", "simple_cnn"])
def test_equals_one_device(model, shape, parallelism):
    one, many = computed(model, (1, 1), "data"), computed(model, shape, parallelism)
    assert one["report"]["collectives"] == []
    assert many["loss"] == pytest.approx(one["loss"], rel=LOSS_TOLERANCE)
    assert many["accuracy"] == one["accuracy"]
    assert_close(many["gradients"], one["gradients"])
    assert_close(many["params"], one["params"])


@pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("model", ["alexnet", "simple_cnn"])
def test_data_parallel_only_reduces_gradients(model, shape):
    """Pure data parallelism: all gradients are all-reduced over all devices, once; nothing else but scalars moves."""
    result = computed(model, shape, "data")
    used = [axis for axis, size in zip(("data", "model"), shape, strict=True) if size > 1]
    assert {row["operation"] for row in result["report"]["collectives"]} == {"all-reduce"}
    assert all(row["axes"] == used for row in result["report"]["collectives"])
    moved = result["report"]["totals"]["bytes"]
    assert result["bytes"] <= moved < result["bytes"] + 100


@pytest.mark.parametrize("shape", MESHES, ids=lambda shape: "x".join(map(str, shape)))
def test_hybrid_moves_what_one_weird_trick_moves(shape):
    """One weird trick, scheme (a): dense weights never cross the model axis, the activations before them do.

    A device reduces the convolutions' gradients over all devices and its 1/model of the dense ones over `data`; over
    `model` it gathers the inputs of the dense layers (4096 wide each, a data row's share of the batch) going forward,
    and reduces their gradients going back. The CPU compiler spells a reduce-scatter as an all-reduce.
    """
    result, (data, model) = computed("alexnet", shape, "hybrid"), shape
    conv, fc1, fc2, fc3 = (sum(value.nbytes for name, value in result["params"].items() if layer in name)
                           for layer in ("conv", "fc1", "fc2", "fc3"))
    splits_fc3 = CLASSES["alexnet"] % model == 0
    activation = BATCH // data * 4096 * 4
    expected = collections.Counter()
    for kind, axes, size in (("reduce", ("data", "model"), conv),
                             ("reduce", ("data",), (fc1 + fc2) // model + (fc3 // model if splits_fc3 else fc3)),
                             ("gather", ("model",), 3 * activation),
                             ("reduce", ("model",), (2 + splits_fc3) * activation)):
        expected[kind, tuple(axis for axis in axes if dict(data=data, model=model)[axis] > 1)] += size
    moved = collections.Counter()
    for row in result["report"]["collectives"]:
        moved[row["operation"].split("-")[-1], tuple(row["axes"])] += row["bytes"]
    moved["reduce", ("model",)] += moved.pop(("scatter", ("model",)), 0)
    del expected["reduce", ()], expected["gather", ()]
    for key in expected | moved:
        assert moved[key] == pytest.approx(expected[key], rel=0.005, abs=5000), key


def test_hybrid_splits_the_dense_layers():
    for shape in MESHES:
        placement = computed("alexnet", shape, "hybrid")["placement"]
        held = {row["name"]: row["bytes_per_device"] / row["bytes"] for row in placement}
        for name, share in held.items():
            splits = name.startswith(("fc1", "fc2")) or (name.startswith("fc3") and CLASSES["alexnet"] % shape[1] == 0)
            assert share == (1 / shape[1] if splits else 1), (shape, name)
        assert computed("alexnet", shape, "hybrid")["held"] == held


def test_state_is_created_sharded_and_the_same_on_every_mesh():
    _, place, steps = make("alexnet", (2, 4), "hybrid")
    state = steps.jit_init()()
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {place.mesh}
    kernel = state.optimizer[1][0].trace["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (4096, 1024)  # a momentum lives where its weight does
    assert_equal(gather(state), gather(initial("alexnet")))


def assert_equal(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_several_steps_a_call_equal_single_steps():
    """steps_per_call is a matter of speed: a scan of three steps ends where three calls end."""
    data, place, steps = make("simple_cnn", (4, 2), "hybrid")
    train_data = DeviceData(*(train.put(x, place.replicated) for x in (data.train_images, data.train_labels)))
    indices = batches.train_indices(0, 0, 3, BATCH, 64)
    jitted, state, losses = steps.jit_train(), steps.jit_init()(), []
    for step in range(3):
        state, metrics = jitted(state, train_data, indices[step:step + 1])
        losses += metrics["loss"].tolist()
    scanned, metrics = jitted(steps.jit_init()(), train_data, indices)
    np.testing.assert_allclose(metrics["loss"], losses, rtol=LOSS_TOLERANCE)
    assert int(scanned.step) == 3
    assert_close(gather(scanned.params), gather(state.params))
