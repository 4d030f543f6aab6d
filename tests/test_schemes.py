"""Every scheme and mesh computes what one device does, and moves what theory says.

Tolerances against one device, in float64, where a difference is not rounding: the loss 1e-9
relative; each gradient, and each updated parameter and running average of the second step, 1e-6 of
the array's largest element (parameters and averages are float32). Dropout is on, and for simple_cnn
crops, flips and colour noise too. The compiled program's bytes are within 2% of the closed form,
plus 2 kB for scalars, labels and sums of the softmax.
"""

import functools
import math
import os
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest
from flax import nnx
from setups import (
    BATCH,
    BY_HAND,
    CONV,
    FC1,
    FC2,
    FC3,
    FILE_NETWORK,
    FILE_SCHEMES,
    IMAGE_SIZE,
    INPUTS,
    OWN_ROWS,
    assert_close,
    computed,
    narrow,  # noqa: F401  (a fixture)
    setup_of,
)

from cnn_spmd.config import MESH_AXES
from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.layers.fast_conv import IMAGE_CHANNELS
from cnn_spmd.layers.local import Local
from cnn_spmd.sharding.table import LOGICAL_AXES, TABLE

LOSS_TOLERANCE = 1e-9
FLOAT = 8  # bytes of a float64
ALL_MESHES = "ALL_MESHES" in os.environ  # test every scheme on every mesh
MESHES = [(4, 2), (2, 4), (1, 8), (8, 1)]
# Meshes of 4 and 2 devices. Unless ALL_MESHES is set, only two schemes are tested on the first two.
SMALLER = [(2, 2), (1, 2), (4, 1), (1, 4), (2, 1)]
ALWAYS_SMALLER = {"hybrid": 2, "two_tower": 2}
ROWS = {**TABLE, **OWN_ROWS}


def meshes_of(model: str, parallelism: str) -> list[tuple[int, int]]:
    """Return the meshes on which to test a scheme."""
    row = ROWS[parallelism]
    if parallelism in OWN_ROWS:
        return (MESHES + SMALLER if ALL_MESHES else [(4, 2)]) if model == "alexnet" else []
    if parallelism == "two_tower" and model not in ("alexnet_2012", "alexnet_bn"):
        return []
    if not ALL_MESHES:
        if model == "alexnet_2012" and parallelism == "sharded_update":
            return []  # fsdp rests alike
        if model == "alexnet_2012" and not row.keys() & {"conv_out", "image_height"}:
            return [(4, 2)]  # its convolutions lie as under `data`, its dense layers as alexnet's
        if model == "simple_cnn":
            return [] if "at_rest" in row else [(4, 2)]
        if model == "alexnet_2012" and parallelism == "spatial":
            return [(2, 4)]  # its rows do not divide by 4
    count = len(SMALLER) if ALL_MESHES else ALWAYS_SMALLER.get(parallelism, 0)
    towers = 2 if parallelism == "two_tower" else 8
    return [shape for shape in MESHES + SMALLER[:count] if shape[1] <= towers]


def splits(parallelism: str, shape: tuple[int, int]) -> tuple:
    """Return what a scheme splits on a mesh, and how: equal where the compiled programs are equal.

    A mesh axis of one device splits nothing. Where each split is over all devices, these count
    alone: `data` on 4x2 is `data` on 8x1, and `hybrid` on 8x1.
    """
    row = ROWS[parallelism]
    used = [name for name, size in zip(MESH_AXES, shape, strict=True) if size > 1]
    found = [
        (at_rest, axis, tuple(name for name in np.ravel(names) if name in used))
        for at_rest, axes in enumerate((row, row.get("at_rest", {})))
        for axis, names in axes.items()
        if axis in LOGICAL_AXES
    ]
    found = {split for split in found if split[-1]}
    if all(names == tuple(used) for *_, names in found):
        shape = math.prod(shape)
        found = {split[:-1] for split in found}
    # The towers of two_tower are computed in a shard_map, even where one device holds both.
    return shape, frozenset(found), row.get("gather_again"), "group_in" in row


def distinct(cases: list[tuple]) -> list[tuple]:
    """Leave out cases with the network and the splits of an earlier one, unless ALL_MESHES."""
    if ALL_MESHES:
        return cases
    first = {}
    for model, parallelism, shape in cases:
        first.setdefault((model, splits(parallelism, shape)), (model, parallelism, shape))
    return list(first.values())


CASES = distinct(
    [
        (model, parallelism, shape)
        for model in IMAGE_SIZE
        for parallelism in ROWS
        for shape in meshes_of(model, parallelism)
    ]
)
# Networks with batch norm, on all meshes if ALL_MESHES is set.
BATCH_NORM = [
    ("resnet_8", "data", (4, 2)),
    ("resnet_8", "hybrid", (2, 4)),
    ("resnet_8", "model", (2, 2)),
    ("plain_8", "model", (4, 2)),
    ("alexnet_bn", "two_tower", (4, 2)),
    ("resnet_8", "spatial", (2, 4)),
]
if ALL_MESHES:
    BATCH_NORM = [
        (model, parallelism, shape)
        for model in ("resnet_8", "plain_8", "alexnet_bn")
        for parallelism in TABLE
        for shape in meshes_of(model, parallelism)
    ]
CASES += BATCH_NORM
CASES += [("stack", "data", (4, 1)), ("stack", "hybrid", (2, 2)), ("stack", "model", (2, 2))]
CASES += [("stack", "spatial", (2, 2)), ("stack", "fsdp", (2, 2))]
if FILE_SCHEMES:  # those of an experiment instead; none of its own rows is left out
    CASES = [(FILE_NETWORK, row, shape) for row in FILE_SCHEMES for shape in MESHES + SMALLER]
    CASES = CASES if FILE_SCHEMES[0] in OWN_ROWS else distinct(CASES)
    # Warnings of its code are no failures.
    pytestmark = pytest.mark.filterwarnings("ignore", "default:bytes not compared")


@functools.cache
def refusal(model: str, parallelism: str, shape: tuple[int, int]) -> str:
    """Return why a network cannot be trained under a scheme on a mesh, or nothing."""
    try:
        with jax.enable_x64(True):
            setup = setup_of(model, parallelism, shape)
            _ = setup.activations, setup.functions.abstract_state
    except UserError as error:
        return str(error)
    return ""


def skip_what_is_refused(model: str, parallelism: str, shape: tuple[int, int]) -> None:
    """Skip a case that a UserError refuses.

    Fail once, on 4x2, where no mesh allows an own row, or `data`, which suits every network.
    """
    reason = refusal(model, parallelism, shape)
    if not reason:
        return
    is_needed = parallelism in ("data", *OWN_ROWS) and shape == MESHES[0]
    if is_needed and all(refusal(model, parallelism, each) for each in MESHES + SMALLER):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def not_covered(model: str, parallelism: str, shape: tuple[int, int]) -> str:
    """Return why the closed form does not hold, or nothing."""
    if (model, parallelism) == ("stack", "spatial"):
        return "local3: the height of its maps is split"
    # The shortcuts move split channels, or lead from maps of 8 rows to one of 4.
    moves = (parallelism == "model" and shape[1] > 1) or (parallelism, *shape) == ("spatial", 1, 8)
    return "a path leads around" if model == "resnet_8" and moves else ""


def name_case(value) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


@pytest.mark.parametrize(("model", "parallelism", "shape"), CASES, ids=name_case)
def test_scheme(model, parallelism, shape):
    """Numbers of one device; bytes of theory; arrays where the report says."""
    if FILE_SCHEMES:
        skip_what_is_refused(model, parallelism, shape)
    one = computed(model, "data", (1, 1))
    many = computed(model, parallelism, shape)
    report = many["report"]
    assert one["report"]["collectives"] == []
    loss = pytest.approx(one["loss"], rel=LOSS_TOLERANCE)
    assert many["loss"] == loss, "differs: do all layers compute in the dtype given?"
    assert many["accuracy"] == one["accuracy"]
    assert_close(many["gradients"], one["gradients"])
    assert_close(many["params"], one["params"])
    assert_close(many["model_state"], one["model_state"])
    expected, reason = not_covered(model, parallelism, shape), report["closed_form_not_covered"]
    if FILE_SCHEMES and reason:
        warnings.warn(f"bytes not compared: {reason}", stacklevel=1)
    elif expected:
        assert expected in reason
    else:
        check_communication(report, extra_bytes(ROWS[parallelism], shape, many))
    check_placement(report, many["held"], ROWS[parallelism], shape)


def prove(experiment, *arguments: str) -> str:
    """Return what pytest says of an experiment's schemes: SCHEMES=FILE, as in docs/extending.md."""
    command = [sys.executable, "-m", "pytest", "-n0", *arguments, f"{__file__}::test_scheme"]
    environment = {**os.environ, "SCHEMES": str(experiment)}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True).stdout


def test_rows_of_an_experiment_are_proved_on_its_network():
    found = prove("experiments/owt_imagenet.py", "--collect-only")
    assert found.count("test_scheme[") == len(MESHES + SMALLER)
    assert found.count("test_scheme[alexnet-one_sum-") == len(MESHES + SMALLER)


OWN_NETWORK = """
import functools
from ml_collections import ConfigDict
from cnn_spmd import models
from cnn_spmd.models.stack import BatchNorm, Conv, Hidden, Output, Stack

# Before the norm, the gradient of a bias is nothing except rounding.
FIRST = Conv(8, 3, strides=2, activation=lambda x: x), BatchNorm(1e-4, 0.9)
LAYERS = *FIRST, Conv(8, 3, groups={towers}), Hidden(), Output()
models.NETWORKS["own"] = functools.partial(Stack, "own", LAYERS)

def get_config():
    return ConfigDict(dict(model=dict(name="{name}"), data=dict(crop=24), placement={placement}))
"""
MINE = dict(mine=dict(base="two_tower"))


@pytest.mark.parametrize(
    ("changes", "cases", "expected"),
    [
        # Its own row is proved although it equals a built-in one.
        (dict(), "mine and (4x2 or 2x4)", ["1 passed, 1 skipped", ": conv2: its 2 towers do not"]),
        # No mesh allows it.
        (
            dict(towers=1),
            "mine",
            [
                "1 failed, 8 skipped",
                "\nparallelism=mine: splits towers, but model.name=own has one",
            ],
        ),
        # Without own rows, those of TABLE are. Theory does not cover dense_2d here.
        (
            dict(towers=1, placement={}),
            "4x2 and (hybrid or dense_2d or two_tower)",
            [
                "3 passed, 1 skipped",
                ": parallelism=two_tower: splits towers, but",
                "UserWarning: bytes not compared: XLA splits a mesh axis",
            ],
        ),
        (
            dict(name="owm", placement={}),
            "4x2",
            ["1 failed, 8 skipped", '\nmodel.name=owm: unknown; did you mean "own"?'],
        ),
    ],
    ids=["own row", "refused row", "no own row", "no such network"],
)
def test_a_network_of_an_experiment_is_proved(changes, cases, expected, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN_NETWORK.format(**dict(towers=2, name="own", placement=MINE) | changes))
    found = prove(file, "-k", cases)
    assert all(text in found for text in expected), found


def extra_bytes(row: dict, shape: tuple[int, int], many: dict) -> int:
    """Return the bytes beyond the closed form: of two forms of layers, and of split logits."""
    numbers = 0
    for _, layer in nnx.iter_modules(many["network"]):
        if isinstance(layer, nnx.Conv):
            numbers += larger_gradient(layer)
        if isinstance(layer, Local) and "conv_out" in row:
            # Where columns are split, the gradient of a local layer's input is summed over devices
            # before its windows are.
            side, _, taps, channels, _ = layer.kernel.shape
            numbers += (taps - 1) * BATCH // shape[0] * side**2 * channels
    if "fc3_out" in row and "output_batch" not in row:
        # Of the whole batch, the metrics gather each device's largest logit and its class.
        numbers += BATCH * shape[1] * 2
    if "image_height" in row:
        # The CPU's compiler sums biases, and statistics (forward and backward), along one mesh axis
        # after the other.
        for array in many["report"]["placement"]:
            times = {"bias": 1, "mean": 2, "variance": 2}.get(array["name"].rpartition(".")[2], 0)
            numbers += times * math.prod(array["shape"])
    return numbers * FLOAT


def larger_gradient(layer: nnx.Conv) -> int:
    """Return by how many numbers the gradient that devices sum exceeds that of the kernel.

    A convolution of images with strides sums that of two kernels of whole blocks ("column_groups";
    one where channels are split), and cuts it to its window afterwards.
    """
    window, stride = layer.kernel_size[0], int(np.max(layer.strides))
    if stride == 1 or layer.in_features > IMAGE_CHANNELS:
        return 0
    rows = -(-window // stride) * stride
    columns = -(-(window + stride) // (2 * stride)) * 2 * stride
    return (2 * rows * columns - window**2) * layer.in_features * layer.out_features


def check_communication(report: dict, extra: int) -> None:
    """Compare compiled bytes with the closed form; no other kind may be there."""
    assert report["communication"]
    for row in report["communication"]:
        expected = pytest.approx(row["closed_form_bytes"], rel=0.02, abs=2000 + extra)
        assert row["compiled_bytes"] == expected, row


def check_placement(report: dict, held: dict, row: dict, shape: tuple[int, int]) -> None:
    """Compare the report with the bytes that a device holds, and with the table."""
    assert {array["name"]: array["bytes_per_device"] for array in report["placement"]} == held
    images = [array for array in report["activations"] if array["name"] == "conv1 input"]
    assert images or FILE_SCHEMES
    for array in images:
        rows = array["shape"][1]
        columns = shape[1] if "image_height" in {*row} & {*array["logical_axes"]} else 1
        # The last devices may hold fewer rows than the others; each has room for as many.
        array["bytes"] = array["bytes"] // rows * -(-rows // columns) * columns
    for array in [*report["placement"], *images]:
        rows_of_table = [row]
        if array not in images and len(array["shape"]) > 1:
            rows_of_table.append(row.get("at_rest", {}))
        split = {
            name
            for axis in array["logical_axes"]
            for each in rows_of_table
            for name in np.ravel(each.get(axis, []))
        }
        devices = math.prod(
            size for name, size in zip(MESH_AXES, shape, strict=True) if name in split
        )
        shares = array["bytes"] // array["bytes_per_device"]
        if "at_rest" in row and array["note"]:  # fewer devices split the 12 rows of a tower
            assert shares < devices, array
        else:
            assert shares == devices, array


# The kernels that are split on 4x2: a device holds half of each, or 1/8 where both mesh axes split
# it, in use or at rest.
SPLIT = {
    "data": "",
    "model": "conv1 conv2 conv3 conv4 conv5 fc1 fc2 fc3",
    "hybrid": "fc1 fc2 fc3",
    "hybrid_alternating": "fc1 fc2",
    "sharded_update": "conv1 conv2 conv3 conv4 conv5 fc1 fc2 fc3",
    "fsdp": "conv1 conv2 conv3 conv4 conv5 fc1 fc2 fc3",
    "dense_2d": "fc1 fc2 fc3",
    "spatial": "",
}


@pytest.mark.parametrize("parallelism", BY_HAND)
def test_scheme_by_hand(parallelism):
    """Sums that do not read the table, within 1% and 100 numbers of the program."""
    report = computed("alexnet", parallelism, (4, 2))["report"]
    compiled = {
        (row["kind"], "+".join(row["axes"])): row["compiled_bytes"] / FLOAT
        for row in report["communication"]
    }
    expected = BY_HAND[parallelism]
    for move in compiled.keys() | expected.keys():
        by_hand = pytest.approx(expected.get(move, 0), rel=0.01, abs=100)
        assert compiled.get(move, 0) == by_hand, move
    assert split_kernels("alexnet", parallelism) == SPLIT[parallelism]


@pytest.mark.parametrize("parallelism", ["model", "two_tower"])
def test_grouped_kernels_are_split(parallelism):
    assert split_kernels("alexnet_2012", parallelism) == SPLIT["model"]


def split_kernels(model: str, parallelism: str) -> str:
    """Return the layers with a kernel that is split as SPLIT says."""
    found = computed(model, parallelism, (4, 2))
    parts = 8 if parallelism in ("sharded_update", "fsdp", "dense_2d") else 2
    kernels = [row for row in found["report"]["placement"] if row["name"].endswith(".kernel")]
    split = [row["name"] for row in kernels if found["held"][row["name"]] * parts == row["bytes"]]
    return " ".join(name.removesuffix(".kernel") for name in split)


def test_a_strided_convolution_of_images_sums_a_larger_gradient():
    """docs/parallelism.md: for 3x3 windows with stride 2, of 64 pixels per channel, not of 9."""
    plain, fast = (computed("strided", "data", (4, 2), forms) for forms in ((), FAST_FORMS))
    ((plain,), (fast,)) = plain["report"]["communication"], fast["report"]["communication"]
    assert plain["compiled_bytes"] == pytest.approx(plain["closed_form_bytes"], abs=20)
    more = fast["compiled_bytes"] - fast["closed_form_bytes"]
    assert more == pytest.approx((64 - 9) * 3 * 8 * FLOAT, abs=20)


def test_data_parallel_formula():
    """Gholami et al., equation 4: 2 (P-1)/P |W|, for all weights."""
    report = computed("alexnet", "data", (4, 2))["report"]
    gradients = (CONV + FC1 + FC2 + FC3) * FLOAT
    assert report["closed_form_ring_bytes"] == pytest.approx(2 * 7 / 8 * gradients, abs=20)


def test_model_parallel_formula():
    """Gholami et al., equation 3: 3 (P-1)/P B d_i per layer, except the first.

    A reduce-scatter where they count an all-reduce makes it 2.
    """
    report = computed("alexnet", "model", (1, 8))["report"]
    expected = 2 * 7 / 8 * FLOAT * BATCH * sum(INPUTS)
    assert report["closed_form_ring_bytes"] == pytest.approx(expected, abs=20)


def test_towers_meet_only_in_conv3_and_in_the_dense_layers():
    report = computed("alexnet_2012", "two_tower", (4, 2))["report"]
    crossing = {row["what"] for row in report["closed_form"] if "model" in row["axes"]}
    assert crossing == {"conv3 input", "fc1 input", "fc2 input", "fc3 input"}
    compiled = {
        row["kind"]: row["compiled_bytes"]
        for row in report["communication"]
        if row["axes"] == ["model"]
    }
    sizes = {row["name"]: row["bytes"] for row in report["activations"]}
    conv3, fc1 = sizes["conv3 input"], sizes["fc1 input"]
    assert (conv3, fc1) == (BATCH * 3 * 3 * 32 * FLOAT, BATCH * 16 * FLOAT)
    expected = conv3 // 4 + fc1 // 4 + 2 * BATCH // 4 * 64 * FLOAT
    assert compiled["gather"] == pytest.approx(expected, rel=0.02, abs=500)
    assert compiled.keys() == {"gather", "reduce"}


def test_a_row_for_which_xla_splits_an_axis(monkeypatch):
    """It trains as on one device; the report names groups within a mesh axis.

    The closed form does not cover them.
    """
    row = dict(conv_batch="data", dense_batch="model", output_batch="data", fc2_out="data")
    monkeypatch.setitem(OWN_ROWS, "crossed", row)
    one, many = computed("alexnet", "data", (1, 1)), computed("alexnet", "crossed", (4, 2))
    assert many["loss"] == pytest.approx(one["loss"], rel=LOSS_TOLERANCE)
    report = many["report"]
    assert "error" not in report
    # The features: a device holds those of 4 images and needs 8. It gets them from one other device
    # along `data`.
    found = [
        row
        for row in report["collectives"]
        if (row["operation"], row["phase"]) == ("all-gather", "forward")
    ]
    (gather,) = (row for row in found if row["axes"] == ["data (2 of 4)"])
    assert gather["bytes"] == 2 * gather["ring_bytes"] > 0
    assert report["closed_form"] is report["closed_form_ring_bytes"] is None
    assert {row["closed_form_bytes"] for row in report["communication"]} == {None}
    assert report["closed_form_not_covered"] == "XLA splits a mesh axis: data (2 of 4)"
