"""Build Setups for tests, and compute with them.

Networks are narrow and images few and random; the mesh is any.

A test file that imports `narrow` builds AlexNet with few channels. What is tested there does not
depend on the widths.
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd import experiment, models
from cnn_spmd.data import feed, order, registry
from cnn_spmd.data.feed import DeviceData
from cnn_spmd.models import alexnet, alexnet_2012, resnet, stack
from cnn_spmd.sharding import mesh, own_rows
from cnn_spmd.sharding.placement import Placement, name_of
from cnn_spmd.sharding.table import KERNELS, TABLE
from cnn_spmd.training import build, program_report
from cnn_spmd.training.step import StepFunctions, TrainState
from experiments import alexnet_cifar

NETWORKS = models.NETWORKS  # networks of a test's own are added here

BATCH = 16
TRAIN_EXAMPLES = 64
TEST_EXAMPLES = 8
CLASSES = 16
IMAGE_SIZE = {"alexnet": 32, "alexnet_2012": 68, "simple_cnn": 32}  # others: 16

# A network by models/stack.py with each kind of layer.
STACK = (
    stack.Conv(8, 3),
    stack.MaxPool(3, 2, ceil=True),
    stack.ResponseNorm(5, 0.1, 0.75, 1.0),
    stack.Conv(16, 5, groups=2),
    stack.ResponseNorm(3, 0.1, 0.75, 1.0, within_map=True),
    stack.AveragePool(3, 2),
    stack.Local(8, 3, activation=jnp.tanh),
    stack.Hidden(),
    stack.Output(),
)

# AlexNet's dense layers after one convolution.
SHALLOW = (
    stack.Conv(8, 3),
    stack.MaxPool(2, 2),
    stack.Hidden(),
    stack.Hidden(),
    stack.Output(),
)

# A convolution of images with strides, and dense layers.
STRIDED = (stack.Conv(8, 3, strides=2), stack.Hidden(), stack.Output())

# Two convolutions with batch norm.
NORMED = (
    stack.Conv(8, 3),
    stack.MaxPool(2, 2),
    stack.BatchNorm(1e-4, 0.9),
    stack.Conv(8, 3),
    stack.BatchNorm(1e-4, 0.9),
    stack.Output(),
)

# Rows of a config's own.
OWN_ROWS = {
    # All weights at rest on all devices: convolutions beside their use on each device, dense layers
    # beside their split over `model`.
    "hybrid_at_rest": {**TABLE["hybrid"], "at_rest": KERNELS, "gather_again": False},
    "mine": dict(
        conv_batch=("data", "model"),
        dense_batch="data",
        output_batch="data",
        fc1_out="model",
        fc2_in="model",
    ),
}

# SCHEMES=FILE: test_schemes.py proves that experiment's rows of the placement table or, if it has
# none, all rows of TABLE, on its network. Of such networks `narrow` knows only some.
FILE_SCHEMES, FILE_NETWORK = (), ""
if "SCHEMES" in os.environ:
    of_file = experiment.load_file(os.environ["SCHEMES"])
    rows = of_file.placement.to_dict()
    OWN_ROWS |= {scheme: own_rows.read(scheme, row) for scheme, row in rows.items()}
    FILE_SCHEMES, FILE_NETWORK = tuple(rows or TABLE), of_file.model.name
    side = of_file.data.crop or of_file.data.image_size or of_file.data.synthetic.image_size
    IMAGE_SIZE.setdefault(FILE_NETWORK, side)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Build networks with few channels, and know those of this file."""
    monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
    monkeypatch.setattr(alexnet_2012, "CHANNELS", (16, 32, 24, 32, 16))
    monkeypatch.setattr(resnet, "CHANNELS", (8, 16, 24))
    stacks = dict(stack=STACK, shallow=SHALLOW, strided=STRIDED, normed=NORMED)
    for name, layers in stacks.items():
        monkeypatch.setitem(NETWORKS, name, functools.partial(stack.Stack, name, layers))
    monkeypatch.setitem(models.USES, "normed", stack.uses(NORMED))
    for name in ("resnet_8", "plain_8"):
        shortcuts = name == "resnet_8"
        network = functools.partial(resnet.ResNet, name, 8, shortcuts=shortcuts)
        monkeypatch.setitem(NETWORKS, name, network)
        monkeypatch.setitem(models.USES, name, ("model.batch_norm",))


def shipped_config() -> ml_collections.ConfigDict:
    """Return the config of the shipped experiment."""
    return alexnet_cifar.get_config()


def small_config(name: str, **changes) -> ml_collections.ConfigDict:
    """Return the shipped config with narrow layers and few random images, in float64.

    simple_cnn alone has crops, flips and colour noise: these are the same for all networks.
    """
    config = shipped_config()
    config.update(
        dict(
            batch_size=BATCH,
            steps=10,
            dtype="float64",
            model=dict(name=name, width=64),
            optimizer=dict(warmup=0.0, learning_rate=0.02),
        )
    )
    if name == "simple_cnn":
        config.data.colour_noise = 0.1
    else:
        config.data.update(dict(crop_pad=0, flip=False))
    images = dict(
        image_size=IMAGE_SIZE.get(name, 16),
        classes=CLASSES,
        train_examples=TRAIN_EXAMPLES,
        test_examples=TEST_EXAMPLES,
    )
    config.data.update(dict(name="synthetic", synthetic=images))
    config.update(changes)
    return config


def setup_of(
    name: str, parallelism: str, shape: tuple[int, int], fast_forms=None, **changes
) -> build.Setup:
    """Return the Setup of a small config for a network on a mesh; it knows OWN_ROWS."""
    axes = dict(zip(mesh.MESH_AXES, shape, strict=True))
    config = small_config(name, parallelism=parallelism, mesh=axes, **changes)
    data = registry.load(config.data)
    place = Placement(mesh.make(*shape), parallelism, OWN_ROWS)
    config = configs.resolve(config, data, "cpu")
    return build.Setup(config, data, place, build.make_functions(config, data, place, fast_forms))


def on_one(name: str, **changes) -> tuple[build.Setup, DeviceData]:
    """Return a Setup on one device in float32, and its training images there."""
    setup = setup_of(name, "data", (1, 1), dtype="float32", **changes)
    return setup, on_devices(setup)


def on_devices(setup: build.Setup) -> DeviceData:
    """Return the training split, whole on every device."""
    split = setup.data.train_images, setup.data.train_labels
    return DeviceData(*(feed.put(array, setup.place.replicated) for array in split))


def indices_of(setup: build.Setup, step: int) -> jax.Array:
    """Return which training images a step sees, on the devices, int32 [B]."""
    (indices,) = order.train_indices(setup.config.seed, step, 1, BATCH, TRAIN_EXAMPLES)
    return feed.put(indices, setup.place.sharding(("conv_batch",), indices.shape))


# A state for functions of a network without arrays.
NO_STATE = TrainState(0, 0, None, None, None)


def network(setup: build.Setup, state: TrainState) -> nnx.Module:
    """Return the network with the arrays of a state."""
    return setup.functions.model(state.params, state.model_state)


def preprocessed(setup: build.Setup, **changes) -> StepFunctions:
    """Return the step functions with other settings of the preprocessing."""
    preprocessing = dataclasses.replace(setup.functions.preprocessing, **changes)
    return dataclasses.replace(setup.functions, preprocessing=preprocessing)


def begin(setup: build.Setup) -> TrainState:
    """Return the state at step 0, which one device makes.

    So its program is compiled once for all meshes. test_build.py compares it with what each makes.
    """
    functions = setup.functions
    device = mesh.make(*(1 for _ in mesh.MESH_AXES))
    one = dataclasses.replace(functions, place=Placement(device, "data", OWN_ROWS))
    state = one.jit_init()(np.uint32(setup.config.seed))
    return jax.device_put(state, setup.place.of_state(functions.abstract_state))


def trained(setup: build.Setup, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the losses [steps] of a new state, and the parameters after these steps."""
    state, metrics = setup.train(begin(setup), steps)
    assert int(state.step) == steps
    return metrics["loss"], gather(state.params)


@functools.cache
def computed(name: str, parallelism: str, shape: tuple[int, int], fast_forms=None) -> dict:
    """Return loss, gradients and state of a second step, and its program's report.

    The first step is that of one device: it gives all meshes momenta to continue from. Its state is
    on the host, because JAX compiles how it cuts an array of a device. `held` maps each variable's
    name to the bytes that the first device holds of it.
    """
    with jax.enable_x64(True):
        setup = setup_of(name, parallelism, shape, fast_forms)
        place, functions = setup.place, setup.functions

        def step(state, data, indices_B):
            gradients, metrics, model_state = functions.gradients(state, data, indices_B)
            optimizer = functions.make_optimizer(setup.schedule)
            params, optimizer = functions.update(
                optimizer, gradients, state.optimizer, state.params
            )
            state = state._replace(params=params, model_state=model_state, optimizer=optimizer)
            return state, metrics, gradients

        shardings = place.of_state(functions.abstract_state)
        jitted = jax.jit(step, out_shardings=(shardings, place.replicated, shardings.params))
        data, indices = on_devices(setup), [indices_of(setup, at) for at in range(2)]
        compiled = jitted.lower(functions.abstract_state, data, indices[0]).compile()
        if shape == (1, 1):
            first = jax.device_get(compiled(setup.init(), data, indices[0])[0])
        else:
            first = computed(name, "data", (1, 1))["first"]
        first = jax.device_put(first, shardings)
        state, metrics, gradients = compiled(first, data, indices[1])
        return dict(
            first=jax.device_get(first) if shape == (1, 1) else None,
            network=functions.abstract_model,
            loss=float(metrics["loss"]),
            accuracy=float(metrics["accuracy"]),
            held={
                name_of(path[1:]).removesuffix(".value"): leaf.addressable_shards[0].data.nbytes
                for path, leaf in jax.tree_util.tree_leaves_with_path(
                    (state.params, state.model_state)
                )
            },
            gradients=gather(gradients),
            params=gather(state.params),
            model_state=gather(state.model_state),
            report=program_report.report_of(setup, compiled, 1),
        )


def gather(tree) -> dict[str, np.ndarray]:
    """Return the arrays of a tree, whole and on the host, by name."""
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_close(got: dict, expected: dict, tolerance: float = 1e-6) -> None:
    """Compare arrays by name; tolerance: a share of the largest element of each array.

    In an experiment's network, an array may be nothing except rounding, such as the gradient of a
    bias before a batch norm: one that is 1e-8 of the largest array is compared with that.
    """
    assert got.keys() == expected.keys()
    sizes = {name: np.abs(value).max() for name, value in expected.items()}
    least = 1e-8 * max(sizes.values(), default=0) if FILE_NETWORK else 0
    for name, value in expected.items():
        size = max(sizes[name], least)
        assert size > 0, name
        error = np.abs(got[name] - value).max() / size
        assert error < tolerance, f"{name}: {error:.2e} of the largest element"


# The numbers of the narrow AlexNet, by hand: the weights of its convolutions and dense layers, and
# what conv2 ... fc3 take in per example.
CONV = sum(
    9 * rows * columns + columns
    for rows, columns in [(3, 8), (8, 16), (16, 24), (24, 16), (16, 16)]
)
FC1 = 256 * 64 + 64
FC2 = 64 * 64 + 64
FC3 = 64 * 16 + 16
ROWS = [8 * 16, 16 * 8, 24 * 8, 16 * 8]  # of one row of the inputs of conv2 ... conv5
BIASES = 8 + 16 + 24 + 16 + 16 + 64 + 64 + 16
INPUTS = [8 * 16 * 16, 16 * 8 * 8, 24 * 8 * 8, 16 * 8 * 8, 256, 64, 64]

# How many numbers each paper's scheme reduces (an all-reduce or a reduce-scatter) and gathers on
# 4x2, and over which mesh axes.
BY_HAND = {
    "data": {("reduce", "data+model"): CONV + FC1 + FC2 + FC3},
    "model": {
        ("reduce", "data"): (CONV + FC1 + FC2 + FC3) / 2,
        ("reduce", "model"): BATCH / 4 * sum(INPUTS),
        ("gather", "model"): BATCH / 4 * sum(INPUTS),
    },
    "hybrid": {
        ("reduce", "data+model"): CONV,
        ("reduce", "data"): (FC1 + FC2 + 64 * 16) / 2 + 16,
        ("reduce", "model"): BATCH / 4 * (256 + 64 + 16),
        ("gather", "model"): BATCH / 4 * (256 + 64),
    },
    "hybrid_alternating": {
        ("reduce", "data+model"): CONV + FC3,
        ("reduce", "data"): (FC1 + 64 * 64) / 2 + 64,
        ("reduce", "model"): BATCH / 4 * (256 + 64),
        ("gather", "model"): BATCH / 4 * (256 + 64),
    },
    "sharded_update": {
        ("reduce", "data+model"): CONV + FC1 + FC2 + FC3,
        ("gather", "data+model"): CONV + FC1 + FC2 + FC3 - BIASES,
    },
    "fsdp": {
        ("reduce", "data+model"): CONV + FC1 + FC2 + FC3,
        # conv1's kernel, 3x3x3x8, is not gathered again.
        ("gather", "data+model"): 2 * (CONV + FC1 + FC2 + FC3 - BIASES) - 27 * 8,
    },
    "dense_2d": {
        ("reduce", "data+model"): CONV,
        ("reduce", "data"): BATCH / 2 * (64 + 64 + 16),
        ("reduce", "model"): BATCH / 4 * (256 + 64 + 64),
        ("gather", "model"): BATCH / 4 * 256,
        ("all-to-all", "data"): 2 * BATCH / 8 * 256,
    },
    "spatial": {
        ("reduce", "data+model"): CONV + FC1 + FC2 + FC3,
        # A row above and one below, of the images and of each map forward, of each map backward.
        ("collective-permute", "model"): BATCH / 4 * 2 * (32 * 3 + 2 * sum(ROWS)),
        ("all-to-all", "model"): 2 * BATCH / 8 * 256,
    },
}
