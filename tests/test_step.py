"""Every scheme on every mesh computes what one device computes, and moves what theory says, to the byte or nearly.

Tolerances against one device, computing in float64, where a difference is not rounding: loss 1e-9 relative; each gradient
and each updated parameter in the second step, 1e-6 of the array's largest element (parameters are float32). Dropout is on,
and for simple_cnn crops, flips and colour noise. The compiled program's bytes are within 2% of the closed form (and 2 kB:
scalars, labels, softmax sums).
"""

import dataclasses
import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd import models
from cnn_spmd.analysis import program
from cnn_spmd.data import feed, order, registry, statistics
from cnn_spmd.data.feed import DeviceData
from cnn_spmd.errors import UserError
from cnn_spmd.layers import dense
from cnn_spmd.models import alexnet, alexnet_2012, stack
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import Placement, name_of
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import build, microbatch, program_report
from cnn_spmd.training.dry_run import dry_run
from cnn_spmd.training.packing import pack_bf16, unpack_f32
from cnn_spmd.training.step import StepFunctions, TrainState
from experiments.alexnet_cifar import get_config

BATCH = 16
LOSS_TOLERANCE, TOLERANCE = 1e-9, 1e-6
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
FEWER = [(2, 2), (1, 2), (4, 1), (1, 4), (2, 1)]  # of 4 and 2 devices
IMAGE_SIZE = {"alexnet": 32, "alexnet_2012": 68, "simple_cnn": 32}
# A network by models/stack.py that has each kind of layer.
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
OWN = {
    "mine": dict(
        conv_batch=("data", "model"),
        dense_batch="data",
        output_batch="data",
        fc1_out="model",
        fc2_in="model",
    )
}
CASES = [
    (model, parallelism, shape)
    for model in IMAGE_SIZE
    for parallelism in (*TABLE, "mine")
    for shape in MESHES
    + FEWER[
        : None if "ALL_MESHES" in os.environ else dict(hybrid=2, two_tower=2).get(parallelism, 0)
    ]
    if parallelism != "two_tower" or (model == "alexnet_2012" and shape[1] <= 2)
    if parallelism != "mine" or (model == "alexnet" and shape == (4, 2))
]
CASES += [("stack", "data", (4, 1)), ("stack", "hybrid", (2, 2)), ("stack", "model", (2, 2))]


@pytest.fixture(autouse=True)
def narrow(request, monkeypatch):
    """Networks of few channels, but for the tests of what ships: what is tested does not depend on the widths."""
    if not request.node.name.startswith("test_shipped"):
        monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
        monkeypatch.setattr(alexnet_2012, "CHANNELS", (16, 32, 24, 32, 16))
    monkeypatch.setitem(models.NETWORKS, "stack", functools.partial(stack.Stack, "stack", STACK))


def setup_of(
    name: str, parallelism: str, shape: tuple[int, int], levers=None, **changes
) -> build.Setup:
    """The shipped experiment with narrow dense layers and few random images, in float64."""
    config = get_config()
    config.update(
        dict(
            batch_size=BATCH,
            steps=10,
            dtype="float64",
            parallelism=parallelism,
            mesh=dict(data=shape[0], model=shape[1]),
            model=dict(name=name, width=64),
            optimizer=dict(warmup=0.0, learning_rate=0.02),
        )
    )
    if name == "simple_cnn":  # crops, flips and noise are the same for all networks
        config.data.colour_noise = 0.1
    else:
        config.data.update(dict(crop_pad=0, flip=False))
    config.data.update(
        dict(
            name="synthetic",
            synthetic=dict(
                image_size=IMAGE_SIZE.get(name, 16), classes=16, train_examples=64, test_examples=8
            ),
        )
    )
    config.update(changes)
    data = registry.load(config.data)
    place = Placement(mesh.make(*shape), parallelism, OWN)
    config = configs.resolve(config, data, "cpu")
    functions = build.make_functions(config, data, place, levers)
    return build.Setup(config, data, place, functions)


@functools.cache
def computed(model: str, parallelism: str, shape: tuple[int, int]) -> dict:
    """Loss, gradients and parameters of a second step, the first being one device's; the report of the compiled program."""
    with jax.enable_x64(True):
        setup = setup_of(model, parallelism, shape)
        place, functions = setup.place, setup.functions

        def step(state, data, indices):
            gradients, metrics, model_state = functions.gradients(state, data, indices)
            params, optimizer = functions.update(
                functions.optimizer, gradients, state.optimizer, state.params
            )
            state = state._replace(params=params, model_state=model_state, optimizer=optimizer)
            return state, metrics, gradients

        shardings = place.of_state(functions.abstract_state)
        train_data = DeviceData(
            *(
                feed.put(x, place.replicated)
                for x in (setup.data.train_images, setup.data.train_labels)
            )
        )
        indices = [
            feed.put(x, place.sharding(("conv_batch",), (BATCH,)))
            for x in order.train_indices(0, 0, 2, BATCH, 64)
        ]
        compiled = (
            jax.jit(step, out_shardings=(shardings, place.replicated, shardings.params))
            .lower(functions.abstract_state, train_data, indices[0])
            .compile()
        )
        if shape == (1, 1):  # the first step, which gives all meshes momenta to go on from
            begun, _, _ = compiled(functions.jit_init()(), train_data, indices[0])
        else:
            begun = jax.device_put(computed(model, "data", (1, 1))["begun"], shardings)
        state, metrics, gradients = compiled(begun, train_data, indices[1])
        held = {
            name_of(path).removesuffix(".value"): leaf.addressable_shards[0].data.nbytes
            for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)
        }
        return dict(
            begun=begun,
            loss=float(metrics["loss"]),
            accuracy=float(metrics["accuracy"]),
            held=held,
            gradients=gather(gradients),
            params=gather(state.params),
            report=program_report.report_of(setup, compiled, 1, 0.0),
        )


def gather(tree) -> dict[str, np.ndarray]:
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def assert_close(got: dict, expected: dict, tolerance: float = TOLERANCE) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 0, name
        error = np.abs(got[name] - value).max() / np.abs(value).max()
        assert error < tolerance, f"{name}: {error:.2e} of the largest element"


def name_case(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("model", "parallelism", "shape"), CASES, ids=name_case)
def test_scheme(model, parallelism, shape):
    """The numbers of one device; the bytes of theory, by mesh axes and kind; the arrays where the report says."""
    one, many = computed(model, "data", (1, 1)), computed(model, parallelism, shape)
    assert one["report"]["collectives"] == []
    assert many["loss"] == pytest.approx(one["loss"], rel=LOSS_TOLERANCE)
    assert many["accuracy"] == one["accuracy"]
    assert_close(many["gradients"], one["gradients"])
    assert_close(many["params"], one["params"])

    assert many["report"]["communication"]
    # The gradient of AlexNet 2012's conv1 is reduced as that of two 12x16 kernels ("column_groups"; one of 12x12 where channels
    # are split), and then cut to 11x11.
    padded = (2 * 12 * 16 - 11**2) * 3 * 16 * 8 if model == "alexnet_2012" else 0
    # That of a local layer's input is summed over devices before its 3x3 windows are, where columns are split.
    taps = (
        (3 * 3 - 1) * BATCH // shape[0] * 4 * 4 * 16 * 8
        if (model, parallelism) == ("stack", "model")
        else 0
    )
    for row in many["report"][
        "communication"
    ]:  # a kind that theory does not have may not be there at all
        assert row["compiled_bytes"] == pytest.approx(
            row["closed_form_bytes"], rel=0.02, abs=2000 + padded + taps
        ), row

    assert {row["name"]: row["bytes_per_device"] for row in many["report"]["placement"]} == many[
        "held"
    ]
    row, (data, columns) = {**TABLE, **OWN}[parallelism], shape
    for array in many["report"]["placement"]:
        split = [axis for axis in array["logical_axes"] if row.get(axis) == "model"]
        assert array["bytes_per_device"] * (columns if split else 1) == array["bytes"], array
    images = next(
        array for array in many["report"]["activations"] if array["name"] == "conv1 input"
    )
    assert images["bytes_per_device"] == images["bytes"] // (
        data * (columns if row["conv_batch"] != "data" else 1)
    )


CONV = (
    3 * 9 * 8 + 8 + 8 * 9 * 16 + 16 + 16 * 9 * 24 + 24 + 24 * 9 * 16 + 16 + 16 * 9 * 16 + 16
)  # weights of the narrow net
FC1, FC2, FC3 = 256 * 64 + 64, 64 * 64 + 64, 64 * 16 + 16
INPUTS = [
    8 * 16 * 16,
    16 * 8 * 8,
    24 * 8 * 8,
    16 * 8 * 8,
    256,
    64,
    64,
]  # numbers an example that conv2 ... fc3 take in
BY_HAND = {  # on 4x2, in numbers: what each paper's scheme reduces (any all-reduce or reduce-scatter) and gathers, and where
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
}
SPLIT = {
    "data": "",
    "model": "conv1 conv2 conv3 conv4 conv5 fc1 fc2 fc3",
    "hybrid": "fc1 fc2 fc3",
    "hybrid_alternating": "fc1 fc2",
}  # the kernels of which a device holds half


@pytest.mark.parametrize("parallelism", BY_HAND)
def test_scheme_by_hand(parallelism):
    """The compiled program against sums written out here, which know nothing of the table; to 1% and 100 numbers."""
    report = computed("alexnet", parallelism, (4, 2))["report"]
    compiled = {
        (row["kind"], "+".join(row["axes"])): row["compiled_bytes"] / 8
        for row in report["communication"]
    }
    expected = BY_HAND[parallelism]
    for what in compiled.keys() | expected.keys():
        assert compiled.get(what, 0) == pytest.approx(expected.get(what, 0), rel=0.01, abs=100), (
            what
        )
    assert split_kernels("alexnet", parallelism) == SPLIT[parallelism]


@pytest.mark.parametrize("parallelism", ["model", "two_tower"])
def test_grouped_kernels_are_split(parallelism):
    assert split_kernels("alexnet_2012", parallelism) == SPLIT["model"]


def split_kernels(model: str, parallelism: str) -> str:
    """The layers of whose kernel a device holds half, on 4x2."""
    got = computed(model, parallelism, (4, 2))
    return " ".join(
        row["name"].removesuffix(".kernel")
        for row in got["report"]["placement"]
        if row["name"].endswith(".kernel") and got["held"][row["name"]] * 2 == row["bytes"]
    )


def test_data_parallel_formula():
    """Gholami et al., equation 4: 2 (P-1)/P |W|, for all weights."""
    report = computed("alexnet", "data", (8, 1))["report"]
    weights = (CONV + FC1 + FC2 + FC3) * 8  # float64 gradients
    assert report["closed_form_ring_bytes"] == pytest.approx(2 * 7 / 8 * weights, abs=20)


def test_model_parallel_formula():
    """Gholami et al., equation 3: 3 (P-1)/P B d_i a layer but the first, less what a reduce-scatter saves: 2."""
    report = computed("alexnet", "model", (1, 8))["report"]
    assert report["closed_form_ring_bytes"] == pytest.approx(
        2 * 7 / 8 * 8 * BATCH * sum(INPUTS), abs=20
    )


def test_towers_move_nothing_between_them_but_for_conv3_and_the_dense_layers():
    report = computed("alexnet_2012", "two_tower", (4, 2))["report"]
    crossing = {row["what"] for row in report["closed_form"] if "model" in row["axes"]}
    assert crossing == {"conv3 input", "fc1 input", "fc2 input", "fc3 input"}
    compiled = {
        row["kind"]: row["compiled_bytes"]
        for row in report["communication"]
        if row["axes"] == ["model"]
    }
    conv3, fc1 = (
        row for row in report["activations"] if row["name"] in ("conv3 input", "fc1 input")
    )
    assert (conv3["bytes"], fc1["bytes"]) == (BATCH * 3 * 3 * 32 * 8, BATCH * 16 * 8)
    expected = conv3["bytes"] // 4 + fc1["bytes"] // 4 + 2 * BATCH // 4 * 64 * 8
    assert compiled["gather"] == pytest.approx(expected, rel=0.02, abs=500)
    assert compiled.keys() == {"gather", "reduce"}


def test_shipped_ordering_of_the_schemes():
    """CIFAR-size AlexNet, batch 1024: hybrid at most half of data's bytes at 4x2 and a third at 2x4 and 1x8;
    alternating no more than hybrid. Compiled for the CPU, whose all-reduces count here as the reduce-scatters that they
    are on GPUs: the closed form, to which the compiled payload is held.
    """
    ring = {}
    for parallelism, shape in [("data", (8, 1))] + [
        (parallelism, shape)
        for parallelism in ("hybrid", "hybrid_alternating")
        for shape in ((4, 2), (2, 4), (1, 8))
    ]:
        config = get_config()
        config.update(
            dict(batch_size=1024, parallelism=parallelism, mesh=dict(data=shape[0], model=shape[1]))
        )
        config.data.update(dict(name="synthetic"))
        report = dry_run(config, None)
        for row in report["communication"]:
            assert row["compiled_bytes"] == pytest.approx(
                row["closed_form_bytes"], rel=0.02, abs=200_000
            ), row
        ring[parallelism, shape] = report["closed_form_ring_bytes"]
    for shape, share in (((4, 2), 1 / 2), ((2, 4), 1 / 3), ((1, 8), 1 / 3)):
        assert ring["hybrid", shape] <= share * ring["data", (8, 1)]
        # The replicated output layer's gradient, 0.3 MB, is all that alternating has on top.
        assert ring["hybrid_alternating", shape] <= ring["hybrid", shape] + 0.3e6


def test_shipped_size_on_a_mesh():
    """The network as it ships, 4096 wide and in float32, on 4x2: loss and every gradient against one device."""
    got, state = {}, None
    for parallelism, shape in (("data", (1, 1)), ("hybrid", (4, 2))):
        setup = setup_of("alexnet", parallelism, shape, dtype="float32", model=dict(width=4096))
        place, functions = setup.place, setup.functions
        data = DeviceData(
            *(
                feed.put(x, place.replicated)
                for x in (setup.data.train_images, setup.data.train_labels)
            )
        )
        indices = feed.put(
            order.train_indices(0, 0, 1, BATCH, 64)[0], place.sharding(("conv_batch",), (BATCH,))
        )
        state = (
            functions.jit_init()()
            if state is None
            else jax.device_put(state, place.of_state(functions.abstract_state))
        )
        gradients, metrics, _ = jax.jit(functions.gradients)(state, data, indices)
        got[shape] = float(metrics["loss"]), gather(gradients)
    assert got[4, 2][0] == pytest.approx(got[1, 1][0], rel=1e-6)
    assert_close(got[4, 2][1], got[1, 1][1], 1e-4)  # rounding that turns a ReLU is 1e-5 of a bias


def test_state_is_created_sharded_and_the_same_on_every_mesh():
    one, many = setup_of("alexnet", "data", (1, 1)), setup_of("alexnet", "hybrid", (2, 4))
    state = many.functions.jit_init()()
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(state)} == {many.place.mesh}
    kernel = state.optimizer[2][0].trace["fc1"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (
        256,
        16,
    )  # a momentum lives where its weight does
    for (name, got), expected in zip(
        gather(state).items(), gather(one.functions.jit_init()()).values(), strict=True
    ):
        np.testing.assert_array_equal(got, expected, err_msg=name)
    other = setup_of("alexnet", "data", (1, 1), seed=1).init()
    assert not np.array_equal(
        other.params["fc1"]["kernel"][...], state.params["fc1"]["kernel"][...]
    )


def trained(setup: build.Setup, calls: list[int]) -> tuple[list[float], dict]:
    """Losses and parameters after calls of so many steps each."""
    train_feed, _ = setup.feeds
    train_feed.load()
    state, jitted, losses = setup.init(), setup.functions.jit_train(), []
    indices = order.train_indices(0, 0, sum(calls), BATCH, 64)
    for inputs in train_feed.calls(np.split(indices, np.cumsum(calls)[:-1])):
        state, metrics = jitted(state, *inputs)
        losses += metrics["loss"].tolist()
    assert int(state.step) == sum(calls)
    return losses, gather(state.params)


def test_several_steps_a_call_equal_single_steps():
    """steps_per_call is a matter of speed: a scan of three steps ends where three calls end."""
    with jax.enable_x64(True):
        setup = setup_of("simple_cnn", "hybrid", (4, 2))
        losses, params = trained(setup, [1, 1, 1])
        scanned_losses, scanned = trained(setup, [3])
    np.testing.assert_allclose(scanned_losses, losses, rtol=1e-6)
    assert_close(scanned, params)
    assert losses[0] != losses[1] != losses[2]


def test_a_weight_is_its_two_halves():
    """To the last bit; the first is the nearest bfloat16, as a cast has it but for ties."""
    rng = np.random.default_rng(0)
    special = [0.0, -0.0, np.inf, -np.inf, 3e38]
    weights = np.concatenate([rng.normal(size=5000), 10.0 ** rng.uniform(-38, 38, 500), special])
    bits = weights.astype(np.float32).view(np.int32)
    bits = np.concatenate(
        [bits, bits & -(2**16) | 2**15, bits & -(2**16)]
    )  # ties, and what is bfloat16 already
    nans = np.array([0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0xFFC00000], np.uint32).view(
        np.float32
    )  # CUDA's first
    for half in (jax.jit(pack_bf16)(nans)[0], unpack_f32(*pack_bf16(nans))):
        assert np.isnan(np.asarray(half, np.float32)).all()
    bits = bits[~np.isnan(bits.view(np.float32))]
    weights = bits.view(np.float32)
    near, rest = jax.jit(pack_bf16)(weights)
    assert (near.dtype, rest.dtype) == (jnp.bfloat16, jnp.int16)
    np.testing.assert_array_equal(np.asarray(jax.jit(unpack_f32)(near, rest)).view(np.int32), bits)
    ties = bits & (2**16 - 1) == 2**15
    np.testing.assert_array_equal(
        near[~ties].astype(np.float32), weights[~ties].astype(jnp.bfloat16).astype(np.float32)
    )
    finite = np.isfinite(weights)
    assert (np.abs(near[finite] - weights[finite]) <= np.abs(weights[finite]) * 2**-8 + 1e-38).all()


@pytest.mark.parametrize("changes", [{}, dict(dense_microbatch=8)])
def test_a_copy_of_the_weights_changes_nothing(changes):
    """The steps of a call that hand on bfloat16 weights ("cast_once") are those that cast them again; on a mesh."""
    got = []
    for levers in (("own_gradients",), ("own_gradients", "cast_once")):
        setup = setup_of(
            "alexnet",
            "hybrid",
            (2, 2),
            dtype="bfloat16",
            levers=levers,
            model=dict(width=64),
            **changes,
        )
        assert setup.functions.packed == ("cast_once" in levers)
        compiled, train_feed = setup.train_program(2), setup.feeds[0]
        train_feed.load()
        (inputs,) = train_feed.calls([order.train_indices(0, 0, 2, BATCH, 64)])
        state, metrics = compiled(setup.init(), *inputs)
        got.append(
            (
                metrics["loss"],
                gather(state.params),
                program.report(compiled, setup.place.mesh, 2)["totals"]["bytes"],
            )
        )
    np.testing.assert_allclose(
        got[0][0], got[1][0], rtol=1e-5
    )  # of equally near bfloat16s it takes another
    assert_close(got[1][1], got[0][1], 1e-3)  # a bias is the sum of few bfloat16 steps
    assert got[1][2] <= got[0][2]


def test_streamed_images_give_the_same_numbers_and_move_nothing_more():
    """To the last bit, of training (crops, flips and dropout included) and of evaluation."""
    got = {}
    for resident in ("yes", "no"):
        setup = setup_of(
            "simple_cnn", "hybrid", (4, 2), dtype="float32", data=dict(resident=resident)
        )
        report = program.report(setup.train_program(2), setup.place.mesh, 2)
        moved = [
            (row["operation"], row["axes"], row["count"], row["bytes"])
            for row in report["collectives"]
        ]
        _, test_feed = setup.feeds
        test_feed.load()
        indices, mask = (x[0] for x in order.eval_indices(BATCH, 8))
        (inputs,) = test_feed.calls([indices])
        mask = feed.put(mask, setup.place.sharding(("conv_batch",), mask.shape))
        sums = setup.functions.jit_eval()(setup.init(), *inputs, mask)
        losses, params = trained(setup, [2])
        got[resident] = params | gather(sums) | dict(losses=np.array(losses)), moved
    (expected, moved), (streamed, streamed_moved) = got["yes"], got["no"]
    assert expected["['examples']"] == 8
    assert streamed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(streamed[name], value, err_msg=name)
    assert streamed_moved
    assert all(row in moved for row in streamed_moved), (streamed_moved, moved)


def test_colour_noise_against_numpy():
    """Each image's pixels get alpha_i sigma_i v_i, of its own alpha ~ N(0, .1) and the training pixels' covariance."""
    with jax.enable_x64(True):
        noisy, plain = (
            setup_of("simple_cnn", "data", (1, 1), data=dict(colour_noise=noise))
            for noise in (0.1, 0.0)
        )
        data = DeviceData(
            noisy.data.train_images * np.uint8([1, 0, 0]) + noisy.data.train_images[..., ::-1] // 2,
            noisy.data.train_labels,
        )
        axes = statistics.colour_axes(data.images)
        functions = preprocessed(noisy, colour_CC=0.1 * axes)
        indices = jnp.arange(BATCH)
        added = []
        for state in (TrainState(step, 0, None, None, None) for step in range(2)):
            images, _, _ = functions.batch(state, data, indices)
            without, _, _ = plain.functions.batch(state, data, indices)
            added.append((images - without) * functions.preprocessing.std)
        alpha = np.asarray(
            jax.random.normal(
                jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 2), (BATCH, 3, 1)
            )
        )
    variances, vectors = np.linalg.eigh(
        np.cov(data.images.reshape(-1, 3).astype(float), rowvar=False)
    )
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
    expected = vectors @ (0.1 * alpha * np.sqrt(variances)[:, None])  # [B, 3, 1]
    assert np.abs(expected).max(1).min() > 1
    np.testing.assert_allclose(
        added[1], np.broadcast_to(expected[:, None, None, :, 0], added[1].shape), atol=1e-3
    )
    assert np.abs(added[0] - added[1]).max() > 1  # other steps, other noise
    np.testing.assert_allclose(
        noisy.functions.preprocessing.colour_CC,
        0.1 * statistics.colour_axes(noisy.data.train_images),
    )


def test_variable_batch():
    """Summed updates of the parts are plain SGD; updates after each part are other numbers, the same on every mesh."""
    with jax.enable_x64(True):

        def run(shape, **changes):
            changes = dict(changes, model=dict(width=64, dropout=0.0))
            return trained(setup_of("alexnet", "hybrid", shape, **changes), [1, 1])

        plain, summed = run((1, 1)), run((2, 2), dense_microbatch=4, dense_updates="sum")
        each_on_one, each = (run(shape, dense_microbatch=4) for shape in ((1, 1), (2, 2)))
    for got, expected in ((summed, plain), (each, each_on_one)):
        np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
        assert_close(got[1], expected[1])
    assert abs(each[0][1] - plain[0][1]) > 1e-4


@pytest.mark.parametrize("n", [1, 3])
def test_what_a_variable_batch_moves(n):
    """In two parts: the activations of one batch; the dense gradients, over `data`, once a part. Compiled and in theory."""
    setup = setup_of("alexnet", "hybrid", (4, 2), dense_microbatch=8, dtype="float32")
    report = program_report.report_of(setup, setup.train_program(n), n, 0.0)
    moved = {
        (row["kind"], "+".join(row["axes"])): (row["compiled_bytes"], row["closed_form_bytes"])
        for row in report["communication"]
    }
    expected = BY_HAND["hybrid"] | {("reduce", "data"): 2 * BY_HAND["hybrid"]["reduce", "data"]}
    assert moved.keys() == expected.keys()
    for what, (compiled, theory) in moved.items():
        assert compiled / 4 == pytest.approx(expected[what], rel=0.01, abs=100), what
        assert theory / 4 == pytest.approx(expected[what], rel=0.01, abs=100), what


def test_variable_batch_against_a_plain_loop():
    """Updates after each part, written out: four dense updates at a quarter of the rate, then one of the convolutions."""
    with jax.enable_x64(True):
        setup = setup_of(
            "alexnet",
            "data",
            (1, 1),
            dense_microbatch=4,
            model=dict(width=64, dropout=0.0),
            optimizer=dict(clip_norm=0.0),
        )
        functions, rate = setup.functions, setup.config.optimizer.learning_rate
        decay, momentum = setup.config.optimizer.weight_decay, setup.config.optimizer.momentum
        state = setup.init()
        data = DeviceData(
            jnp.asarray(setup.data.train_images), jnp.asarray(setup.data.train_labels)
        )
        indices = jnp.asarray(order.train_indices(0, 0, 1, BATCH, 64)[0])
        images, labels, _ = jax.jit(functions.batch)(state, data, indices)
        params = jax.tree.map(jnp.asarray, state.params)
        momenta = jax.tree.map(jnp.zeros_like, params)

        def update(params, momenta, grads, rate, layers):
            for path in [
                path for path, _ in nnx.to_flat_state(params) if path[0].startswith(layers)
            ]:
                weight = params[path[0]][path[1]][...]
                g = grads[path[0]][path[1]][...] + (decay * weight if weight.ndim > 1 else 0)
                momenta[path[0]][path[1]][...] = momentum * momenta[path[0]][path[1]][...] + g
                params[path[0]][path[1]][...] = weight - rate * (
                    g + momentum * momenta[path[0]][path[1]][...]
                )

        conv_grads = []

        @jax.jit
        @jax.grad
        def gradient(params, images, labels):
            x_BF, model_state = functions.features(params, state.model_state, images)
            return functions.loss(params, model_state, x_BF, labels, None)[0]

        for part in range(4):
            mine = slice(
                part, None, 4
            )  # each device gives every part its share: examples part, part + 4, ...
            grads = gradient(params, images[mine], labels[mine])
            conv_grads.append(grads)
            update(params, momenta, grads, rate / 4, "fc")
        mean = jax.tree.map(lambda *g: sum(g) / 4, *conv_grads)
        update(params, momenta, mean, rate, "conv")
        _, got = trained(setup, [1])
    assert_close(got, gather(params))


@pytest.mark.parametrize(
    ("model", "parallelism", "shape", "message"),
    [
        (
            "alexnet_2012",
            "two_tower",
            (2, 4),
            r"its 2 towers do not divide by the 4 devices of mesh axis model",
        ),
        ("alexnet_2012", "model", (1, 3), r"batch|conv\d.* does not divide by the 3 devices"),
        ("alexnet", "hybrid", (1, 3), "does not divide by the 3 devices"),
    ],
)
def test_what_does_not_divide(model, parallelism, shape, message):
    with jax.enable_x64(True), pytest.raises(UserError, match=message):
        setup = setup_of(model, parallelism, shape, batch_size=math.prod(shape) * 2)
        setup.functions.activations(setup.config.batch_size, IMAGE_SIZE[model])
        setup.functions.abstract_state  # noqa: B018


def test_a_row_for_which_xla_splits_an_axis(monkeypatch):
    """It trains as on one device, and its report names groups that are no whole axes; the closed form does not cover them."""
    row = dict(conv_batch="data", dense_batch="model", output_batch="data", fc2_out="data")
    monkeypatch.setitem(OWN, "crossed", row)
    one, many = (computed("alexnet", *where) for where in (("data", (1, 1)), ("crossed", (4, 2))))
    assert many["loss"] == pytest.approx(one["loss"], rel=LOSS_TOLERANCE)
    report = many["report"]
    assert "error" not in report
    # The features of 4 images, of which a device holds 4 and needs 8: from one other along `data`.
    (gather,) = (
        row
        for row in report["collectives"]
        if row["axes"] == ["data (2 of 4)"]
        and row["operation"] == "all-gather"
        and row["phase"] == "forward"
    )
    assert gather["bytes"] == 2 * gather["ring_bytes"] > 0
    assert report["closed_form"] is report["closed_form_ring_bytes"] is None
    assert {row["closed_form_bytes"] for row in report["communication"]} == {None}
    assert report["closed_form_not_covered"] == "XLA splits a mesh axis: data (2 of 4)"


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (dict(mine=dict(fc9_out="model")), r"placement\.mine\.fc9_out=model: no such logical axis"),
        (
            dict(mine=dict(fc1_out="rows")),
            r"placement\.mine\.fc1_out=rows: expected 'data', 'model'",
        ),
        (dict(mine=dict(conv_batch=("data", "data"))), r"placement\.mine\.conv_batch="),
        (dict(mine=dict(conv_batch=3)), r"placement\.mine\.conv_batch=3: expected 'data', 'model'"),
        (dict(mine=3), r"placement\.mine=3: expected a row such as"),
        (dict(data=dict(fc1_out="model")), r"placement\.data: is a built-in row"),
        (dict(other={}), "parallelism=mine: unknown, expected one of .*two_tower, other"),
    ],
)
def test_own_rows_that_are_refused(own, message):
    with pytest.raises(UserError, match=message):
        Placement(mesh.make(4, 2), "mine" if "data" not in own else "data", own)


def test_two_dimensions_on_one_mesh_axis():
    place = Placement(mesh.make(4, 2), "mine", dict(mine=dict(fc1_in="model", fc1_out="model")))
    with pytest.raises(
        UserError,
        match=r"fc1\.kernel \(8, 8\): two of its axes .* are split over the same mesh axis",
    ):
        place.spec(("fc1_in", "fc1_out"), (8, 8), "fc1.kernel")
    with pytest.raises(KeyError, match="fc4_in"):
        place.spec(("fc4_in",), (8,), "fc4.kernel")


def test_what_may_be_replicated_is_said():
    place = Placement(mesh.make(2, 4), "model")
    assert (
        place.report("fc3.bias", ("fc3_out",), (10,), 4)["note"]
        == "fc3_out=10 does not divide by model=4: replicated"
    )
    assert place.report("fc3.bias", ("fc3_out",), (12,), 4)["note"] == ""


def preprocessed(setup, **changes) -> StepFunctions:
    """Return the step functions with other settings of the preprocessing."""
    preprocessing = dataclasses.replace(setup.functions.preprocessing, **changes)
    return dataclasses.replace(setup.functions, preprocessing=preprocessing)


def normal(data, images):
    pixels = data.train_images.astype(np.float64)
    return jnp.asarray((images - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2)), jnp.float32)


def logits_of(setup, images):
    model = network(initial_f32(setup), setup)
    return np.asarray(model.classify(model.features(images)))


def network(state, setup) -> nnx.Module:
    return setup.functions.model(state.params, state.model_state)


def initial_f32(setup):
    return setup.functions.init(jnp.uint32(0))


NO_STATE = TrainState(None, None, None, None, None)


def on_one(name: str, **changes) -> tuple[build.Setup, DeviceData]:
    setup = setup_of(name, "data", (1, 1), dtype="float32", **changes)
    return setup, DeviceData(
        jnp.asarray(setup.data.train_images), jnp.asarray(setup.data.train_labels)
    )


def test_train_loss_against_numpy():
    setup, data = on_one("simple_cnn")
    plain = preprocessed(setup, crop_pad=0, flip=False, colour_CC=None)
    _, got, _ = plain.gradients(initial_f32(setup), data, jnp.arange(BATCH))
    logits = logits_of(setup, normal(setup.data, setup.data.train_images[:BATCH]))
    targets = 0.9 * np.eye(16)[setup.data.train_labels[:BATCH]] + 0.1 / 16
    assert float(got["loss"]) == pytest.approx(
        float(-(targets * jax.nn.log_softmax(logits)).sum(1).mean()), rel=1e-5
    )
    assert float(got["accuracy"]) == (logits.argmax(1) == setup.data.train_labels[:BATCH]).mean()


def test_eval_step_against_numpy():
    setup, _ = on_one("alexnet")
    mask, labels, images = np.arange(8) < 5, setup.data.test_labels, setup.data.test_images
    got = setup.functions.jit_eval()(
        initial_f32(setup), DeviceData(images, labels), np.arange(8), mask
    )
    x = normal(setup.data, images)
    chances = (
        jax.nn.softmax(logits_of(setup, x)) + jax.nn.softmax(logits_of(setup, x[:, :, ::-1]))
    ) / 2
    rank = (chances > chances[np.arange(8), labels][:, None]).sum(1)
    loss = -np.log(chances)[np.arange(8), labels]
    assert got["loss"] == pytest.approx(loss[mask].sum(), rel=1e-4)
    assert [got["accuracy"], got["top5"], got["examples"]] == [
        (rank[mask] == 0).sum(),
        (rank[mask] < 5).sum(),
        5,
    ]


def test_ten_views_of_a_crop_against_numpy():
    """cuda-convnet's testing: crops less the middle of the mean image, and the mean of the ten softmax outputs."""
    setup, data = on_one(
        "simple_cnn",
        eval=dict(views="ten"),
        data=dict(crop=24, crop_pad=0, normalise="pixel_mean", colour_noise=0.0),
    )
    labels, images = setup.data.test_labels, setup.data.test_images.astype(np.float32)
    state = initial_f32(setup)
    state.params["fc3"]["kernel"][...] *= 0.01  # pixels are large, and so would the logits be
    model = network(state, setup)
    got = setup.functions.jit_eval()(
        state, DeviceData(setup.data.test_images, labels), np.arange(8), np.ones(8, bool)
    )
    mean = setup.data.train_images.astype(np.float64).mean(0)[4:28, 4:28].astype(np.float32)
    views = [images[:, i : i + 24, j : j + 24] for i, j in ((4, 4), (0, 0), (0, 8), (8, 0), (8, 8))]
    views += [view[:, :, ::-1] for view in views]
    chances = np.mean(
        [jax.nn.softmax(model.classify(model.features(view - mean))) for view in views], 0
    )
    rank = (chances > chances[np.arange(8), labels][:, None]).sum(1)
    assert got["loss"] == pytest.approx(-np.log(chances)[np.arange(8), labels].sum(), rel=1e-4)
    assert [got["accuracy"], got["top5"], got["examples"]] == [
        (rank == 0).sum(),
        (rank < 5).sum(),
        8,
    ]
    batch, _, _ = setup.functions.batch(TrainState(0, 0, None, None, None), data, jnp.arange(BATCH))
    assert batch.shape == (BATCH, 24, 24, 3)
    pixels = np.asarray(batch + mean)
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-4)  # neither scaled nor off centre


@pytest.mark.parametrize("label", range(10))
@pytest.mark.parametrize("scores", ["falling", "equal", "nan"])
def test_what_counts_as_right(label, scores, monkeypatch):
    """Of equal scores the first counts, of NaN none; padding never does."""

    class Fake:
        def features(self, x, place, train=False):
            return x

        def classify(self, x, place):
            row = dict(falling=-jnp.arange(10.0), equal=jnp.zeros(10), nan=jnp.full(10, jnp.nan))[
                scores
            ]
            return jnp.tile(row, (len(x), 1))

    setup, _ = on_one("simple_cnn")
    monkeypatch.setattr(nnx, "merge", lambda *_, **__: Fake())
    sums = setup.functions.eval_step(
        NO_STATE,
        DeviceData(jnp.asarray(setup.data.test_images), jnp.full(8, label)),
        jnp.arange(8),
        jnp.arange(8) < 5,
    )
    right = scores != "nan"
    assert (sums["accuracy"], sums["top5"], sums["examples"]) == (
        5 * (right and label < 1),
        5 * (right and label < 5),
        5,
    )


@pytest.mark.parametrize("name", ["alexnet", "simple_cnn"])
def test_randomness_is_a_function_of_seed_and_step(name):
    setup, data = on_one(name)
    changes = dict(crop_pad=0, flip=False) if name == "alexnet" else {}  # what is left is dropout

    def loss(seed, step):
        functions = preprocessed(setup, **changes)
        state = initial_f32(setup)._replace(step=jnp.int32(step), seed=jnp.uint32(seed))
        return float(
            jax.jit(lambda state: functions.gradients(state, data, jnp.arange(BATCH))[1]["loss"])(
                state
            )
        )

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3


def test_another_seed_is_the_same_program():
    """It starts from other parameters, but nothing is compiled again."""
    setups_ = [
        setup_of("simple_cnn", "data", (2, 2), seed=seed, dtype="float32") for seed in (0, 1)
    ]
    texts = {
        setup.functions.jit_train()
        .lower(setup.functions.abstract_state, *setup.feeds[0].shapes(2, BATCH))
        .as_text()
        for setup in setups_
    }
    assert len(texts) == 1
    first, second = (setup.init().params["fc3"]["kernel"][...] for setup in setups_)
    assert not np.array_equal(first, second)


def test_each_dense_layer_has_a_dropout_mask_of_its_own(monkeypatch):
    setup, _ = on_one("alexnet")
    keys = []
    monkeypatch.setattr(dense, "dropout", lambda x, rate, key: keys.append((rate, key)) or x)
    model = network(initial_f32(setup), setup)
    x_BF = jnp.zeros((2, 16 * 4 * 4))
    model.classify(x_BF, dropout_key=jax.random.key(0))
    assert [rate for rate, _ in keys] == [setup.config.model.dropout] * 2 != [0, 0]
    assert not np.array_equal(*(jax.random.key_data(key) for _, key in keys))
    model.classify(x_BF)
    assert [key for _, key in keys[2:]] == [None, None]


def test_alexnet_forward_against_lax():
    setup, _ = on_one("alexnet")
    model = network(initial_f32(setup), setup)
    x = h = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    for i, pooled in enumerate((True, True, False, False, True), 1):
        layer = getattr(model, f"conv{i}")
        h = jax.lax.conv_general_dilated(
            h, layer.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jnp.maximum(h + layer.bias[...], 0)
        h = nnx.max_pool(h, (2, 2), (2, 2)) if pooled else h
    h = h.reshape(2, -1)
    for layer in (model.fc1, model.fc2):
        h = jnp.maximum(h @ layer.kernel[...] + layer.bias[...], 0)
    np.testing.assert_allclose(
        model.classify(model.features(x)),
        h @ model.fc3.kernel[...] + model.fc3.bias[...],
        rtol=1e-4,
        atol=1e-5,
    )
    assert float(model.fc3.kernel[...].std()) == pytest.approx(0.01, rel=0.1)


def dtypes_of_products(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield equation.outvars[0].aval.dtype
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from dtypes_of_products(value.jaxpr)


def test_bfloat16_computes_on_float32_parameters():
    setup = setup_of("simple_cnn", "data", (1, 1), dtype="bfloat16")
    data = DeviceData(jnp.asarray(setup.data.train_images), jnp.asarray(setup.data.train_labels))
    abstract = setup.functions.abstract_state
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract.params)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(lambda state: setup.functions.gradients(state, data, jnp.arange(4)))(
        initial_f32(setup)
    )
    assert set(dtypes_of_products(jaxpr.jaxpr)) == {jnp.dtype("bfloat16")}
    grads, metrics, _ = jax.eval_shape(
        lambda state: setup.functions.gradients(state, data, jnp.arange(4)), abstract
    )
    assert {x.dtype for x in jax.tree.leaves((metrics, grads))} == {jnp.dtype("float32")}


def test_the_state_is_donated_and_stays_where_it_is():
    setup = setup_of("simple_cnn", "hybrid", (4, 2), dtype="float32")
    compiled = setup.train_program(1)
    assert program.memory(compiled)["alias_bytes"] >= program.bytes_per_device(
        setup.functions.abstract_state
    )
    placed = jax.tree.map(
        lambda got, leaf: got.is_equivalent_to(leaf.sharding, leaf.ndim),
        compiled.output_shardings[0],
        setup.functions.abstract_state,
    )
    assert jax.tree.all(placed)


@pytest.mark.parametrize(("axis", "what"), [("conv_batch", "batch"), ("fc1_out", "parallelism")])
def test_what_to_change_where_it_does_not_divide(axis, what):
    with pytest.raises(UserError, match=f"change the mesh or the {what}$"):
        Placement(mesh.make(4, 2), "hybrid").spec((axis,), (9,))


def test_towers_that_do_not_divide():
    with pytest.raises(UserError, match="conv2: its 2 towers do not divide by the 3 devices"):
        Placement(mesh.make(1, 3), "model").towers(
            lambda part, x: x,
            2,
            (jnp.zeros((1, 4, 4, 12)), ("conv_batch", None, None, None)),
            out=("conv_batch", None, None, "group_out"),
            name="conv2",
        )


def test_towers_of_a_row_that_splits_two_axes_on_the_same_devices():
    place = Placement(
        mesh.make(2, 2), "mine", dict(mine=dict(conv_batch=("data", "model"), group_out="model"))
    )
    with pytest.raises(
        UserError, match=r"conv2 .*: two of its axes .* are split over the same mesh axis"
    ):
        place.towers(
            lambda part, x: x,
            2,
            (jnp.zeros((4, 4, 4, 12)), ("conv_batch", None, None, None)),
            out=("conv_batch", None, None, "group_out"),
            name="conv2",
        )


def test_towers_that_come_from_another_axis_than_they_go_to():
    place = Placement(mesh.make(2, 2), "mine", dict(mine=dict(group_in="model", group_out="data")))
    with pytest.raises(
        UserError, match=r"conv2: group_in=model and group_out=data .*: expected the same"
    ):
        place.towers(
            lambda part, x: x,
            2,
            (jnp.zeros((4, 4, 4, 12)), ("conv_batch", None, None, "group_in")),
            out=("conv_batch", None, None, "group_out"),
            name="conv2",
        )


def test_a_row_from_json_and_its_report():
    place = Placement(mesh.make(4, 2), "mine", dict(mine=dict(conv_batch=["data", "model"])))
    assert place.report("x", ("conv_batch", "fc1_out"), (8, 4), 4)["mesh_axes"] == [
        ["data", "model"],
        None,
    ]


@pytest.mark.parametrize(
    "changes", [{}, dict(dense_microbatch=4), dict(dense_microbatch=4, dense_updates="sum")]
)
def test_the_bfloat16_halves_are_what_the_layers_read(monkeypatch, changes):
    seen, features, loss = [], StepFunctions.features, StepFunctions.loss
    monkeypatch.setattr(
        StepFunctions,
        "features",
        lambda self, params, *args: seen.append(params) or features(self, params, *args),
    )
    monkeypatch.setattr(
        StepFunctions,
        "loss",
        lambda self, params, *args: seen.append(params) or loss(self, params, *args),
    )
    setup_of("alexnet", "data", (1, 1), dtype="bfloat16", **changes).train_program(2)
    assert {leaf.dtype for params in seen for leaf in jax.tree.leaves(params)} == {
        jnp.dtype("bfloat16")
    }


def test_the_softmax_is_in_float32(monkeypatch):
    class Constant:
        def features(self, x, place, train=False):
            return x

        def classify(self, x, place, key=None):
            return jnp.tile(jnp.arange(10, dtype=jnp.bfloat16) / 3, (len(x), 1))

    setup, data = on_one("simple_cnn", label_smoothing=0.0)
    monkeypatch.setattr(nnx, "merge", lambda *_, **__: Constant())
    scores, expected = (
        setup.functions.scores(NO_STATE, data.images[:2]),
        np.arange(10, dtype=jnp.bfloat16) / jnp.bfloat16(3),
    )
    expected = jax.nn.log_softmax(expected.astype(np.float32))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5)
    loss, _ = setup.functions.loss(None, None, data.images[:2], jnp.zeros(2, int), None)
    assert float(loss) == pytest.approx(-float(expected[0]), rel=1e-5)


def test_each_part_of_a_variable_batch_has_its_own_dropout(monkeypatch):
    keys, old = [], StepFunctions.loss
    with jax.disable_jit():
        setup, data = on_one("alexnet", dense_microbatch=4)
        monkeypatch.setattr(
            StepFunctions,
            "loss",
            lambda *args: keys.append(jax.random.key_data(args[-1])) or old(*args),
        )
        microbatch.train_step(setup.functions, initial_f32(setup), data, jnp.arange(BATCH))
    assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 4


def test_the_accuracy_of_a_variable_batch_is_that_of_all_parts():
    setup, data = on_one(
        "alexnet",
        dense_microbatch=4,
        model=dict(width=64, dropout=0.0),
        optimizer=dict(learning_rate=0.0),
    )
    _, plain, _ = setup.functions.gradients(initial_f32(setup), data, jnp.arange(BATCH))
    _, got = microbatch.train_step(setup.functions, initial_f32(setup), data, jnp.arange(BATCH))
    assert float(got["accuracy"]) == pytest.approx(float(plain["accuracy"]))
    assert float(plain["accuracy"]) > 0


class Norm(nnx.Module):
    """Batch norm with running statistics in float32, whatever it computes in."""

    def __init__(self, channels):
        self.scale = nnx.Param(jnp.ones(channels, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(channels, jnp.float32))
        self.variance = nnx.BatchStat(jnp.ones(channels, jnp.float32))

    def __call__(self, x_NHWC, train):
        mean_C, variance_C = self.mean[...], self.variance[...]
        if train:
            mean_C, variance_C = x_NHWC.mean((0, 1, 2)), x_NHWC.var((0, 1, 2))
            for old, new in ((self.mean, mean_C), (self.variance, variance_C)):
                old[...] = (0.9 * old[...] + 0.1 * new).astype(jnp.float32)
        return (x_NHWC - mean_C) * jax.lax.rsqrt(variance_C + 1e-5) * self.scale[...]


class Residual(nnx.Module):
    """A residual block with batch norm: layers without bias, and arrays without logical axes."""

    def __init__(self, *, image_size, classes, width, dropout, dtype, rngs, levers):
        settings = dict(dtype=dtype, use_bias=False, padding="SAME", rngs=rngs)
        self.conv1 = nnx.Conv(3, 8, (3, 3), **settings)
        self.norm1 = Norm(8)
        self.conv2 = nnx.Conv(8, 8, (3, 3), **settings)
        self.norm2 = Norm(8)
        self.fc3 = dense.dense("fc3", 8, classes, dtype=dtype, rngs=rngs)

    def features(self, x_NHWC, place, train=False):
        x_NHWC = self.conv1(place(x_NHWC, "conv_batch", None, None, None, name="conv1 input"))
        x_NHWC = nnx.relu(self.norm1(x_NHWC, train))
        x_NHWC += nnx.relu(self.norm2(self.conv2(x_NHWC), train))
        return place(x_NHWC, "conv_batch", None, None, None).mean((1, 2))

    def classify(self, x_BF, place, dropout_key=None):
        return dense.logits(self.fc3, x_BF, place)


@pytest.mark.parametrize("changes", [{}, dict(dense_microbatch=8)])
def test_batch_statistics_are_those_of_the_whole_batch(monkeypatch, changes):
    """Model state is trained with, evaluated with, sharded and reported, the same on every mesh."""
    monkeypatch.setitem(models.NETWORKS, "residual", Residual)
    got = {}
    with jax.enable_x64(True):
        for parallelism, shape in (("data", (1, 1)), ("data", (4, 2)), ("hybrid", (2, 2))):
            setup = setup_of("residual", parallelism, shape, **changes)
            state, metrics = setup.train(setup.init(), 3)
            images = setup.data.test_images
            scores = jax.jit(setup.functions.scores)(state, images)
            fresh = state._replace(model_state=setup.init().model_state)
            without = jax.jit(setup.functions.scores)(fresh, images)
            assert np.abs(scores - without).max() > 1e-3  # evaluation uses the statistics
            got[shape] = gather((state, metrics["loss"], scores))
            report = setup.report()
            assert "error" not in report
            if shape != (1, 1):
                assert "is model state" in report["closed_form_not_covered"]
            assert {row["name"] for row in report["placement"]} >= {"norm1.mean", "fc3.kernel"}
    (mean,) = (value for name, value in got[1, 1].items() if "norm1']['mean" in name)
    assert np.abs(mean).max() > 1e-3
    for shape in ((4, 2), (2, 2)):
        for name, value in got[1, 1].items():
            np.testing.assert_allclose(got[shape][name], value, rtol=1e-5, atol=1e-6, err_msg=name)


def test_batch_statistics_against_numpy(monkeypatch):
    """One step moves the running mean a tenth of the way to the mean over the whole batch."""
    monkeypatch.setitem(models.NETWORKS, "residual", Residual)
    with jax.enable_x64(True):
        setup = setup_of("residual", "data", (4, 2))
        state = setup.init()
        data = DeviceData(setup.data.train_images, setup.data.train_labels)
        images, _, _ = setup.functions.batch(state, data, order.train_indices(0, 0, 1, 16, 64)[0])
        before = network(state, setup)
        mean_C = np.asarray(before.conv1(images)).mean((0, 1, 2))
        state, _ = setup.train(state, 1)
    running_C = state.model_state["norm1"]["mean"][...]
    np.testing.assert_allclose(running_C, 0.1 * mean_C, rtol=1e-5)
