"""The terms of a predicted step, with answers by hand."""

import dataclasses

import pytest

from cnn_spmd.analysis import cost
from cnn_spmd.analysis.cost import Card, Links, Weights
from cnn_spmd.errors import UserError

MB = 1e6
US = 1e-6
# Inside a host 10 us and 100 GB/s, across hosts 50 us and 10 GB/s. An all-gather has its own time.
INSIDE = {"all-reduce": [(0, 10 * US), (1 * MB, 20 * US)], "all-gather": [(0, 1 * US), (MB, US)]}
ACROSS = {"all-reduce": [(0, 50 * US), (1 * MB, 150 * US)]}
CARD = Card(
    name="by hand",
    device_kind="",
    memory=0,
    copy_rate=1e12,
    gap=0,
    hidden_share=0,
    spans=dict(host=Links(INSIDE), cluster=Links(ACROSS)),
    sources={},
)


def move(what, ring_bytes, axes=("model",), operation="all-reduce", phase="backward"):
    """A row of the closed form; here a device's payload is as large as what it sends."""
    row = dict(what=what, operation=operation, axes=list(axes), phase=phase, count=1)
    return row | dict(bytes=ring_bytes, ring_bytes=ring_bytes)


def predict(*moves, card=CARD, mesh=(1, 4), weights=(0, 0, 0), gpus_per_host=8, in_turn=False):
    """The terms of a step of 1 s on one device; an update moves 20 bytes per weight."""
    sizes = dict(zip(("data", "model"), mesh, strict=True))
    weights = Weights(*weights, update_bytes=20, in_turn=in_turn)
    return cost.predict(card, 1.0, weights, moves, sizes, gpus_per_host)


def microseconds(seconds):
    return pytest.approx(seconds * US, rel=1e-9)


def test_update_and_computing():
    """Momentum is a number of 4 bytes per weight, AdamW keeps two; at 1e12 bytes/s."""
    for itemsize, state_bytes, expected in ((2, 4, 20), (4, 4, 20), (2, 8, 28), (4, 0, 12)):
        assert cost.update_bytes(itemsize, state_bytes) == expected
    terms = predict(weights=(50e6, 5e6, 0))
    assert terms == pytest.approx((1 - 1000 * US, 100 * US, 0, 0))
    assert terms.step == pytest.approx(1 - 900 * US)
    slow = dataclasses.replace(CARD, copy_rate=9e8)
    message = (
        r"^card by hand: at copy_rate=9e\+08 bytes per second the update of all weights takes "
        r"1111\.111 ms, more than the whole step of one device, 1000\.000 ms: correct copy_rate or "
    )
    with pytest.raises(UserError, match=message):
        predict(card=slow, weights=(50e6, 5e6, 0))


def test_joined_maps_are_computing():
    """1 MB at 1e12 bytes/s, read or written 13 times: 13 us."""
    assert cost.JOIN_PASSES == 13
    terms = cost.predict(CARD, 1.0, Weights(50e6, 5e6, 0, 20, False), [], {}, 8, joined_bytes=MB)
    assert terms == pytest.approx((1 - 1000 * US + 13 * US, 100 * US, 0, 0), rel=1e-12)


def test_a_collective_inside_a_host():
    """Between the points, and beyond the last of them on the same line."""
    for ring_bytes, expected in ((0, 10), (MB / 2, 15), (MB, 20), (10 * MB, 110)):
        terms = predict(move("fc1 input", ring_bytes))
        assert terms.communication == terms.exposed == microseconds(expected)
        assert terms.step == pytest.approx(1 + expected * US)


def test_each_operation_has_its_time():
    """Without one of its own, it takes that of the operation that is most like it."""
    for operation in ("all-gather", "reduce-scatter", "all-to-all", "collective-permute"):
        terms = predict(move("fc1 input", MB, operation=operation))
        assert terms.communication == microseconds(1)


@pytest.mark.parametrize(
    ("axes", "mesh", "expected"),
    [
        (["model"], (2, 4), 20),  # the four of one host
        (["data"], (2, 4), 150),  # one of each host: all bytes through its link
        (["data", "model"], (2, 4), 75),  # four links at once: 50 us, and a quarter of the bytes
        (["model"], (1, 8), 75),
        (["data"], (4, 2), 100),  # two of each host: 50 us, and half of the bytes
        (["model"], (4, 2), 20),
    ],
)
def test_a_collective_across_hosts(axes, mesh, expected):
    """Two hosts of four devices. Devices of one host send through links of their own."""
    terms = predict(move("fc1 input", MB, axes), mesh=mesh, gpus_per_host=4)
    assert terms.communication == microseconds(expected)


def test_a_slow_link_inside_the_host_decides_across_hosts_too():
    """Eight devices of two hosts: 75 us across hosts, 1 ms inside a host. Not so with one each."""
    pcie = Links({"all-reduce": [(0, 0), (MB, 1000 * US)], "all-gather": [(0, 0), (MB, US)]})
    card = dataclasses.replace(CARD, spans=CARD.spans | dict(host=pcie))
    for axes, expected in ((["data", "model"], 1000), (["data"], 150)):
        terms = predict(move("fc1 input", MB, axes), card=card, mesh=(2, 4), gpus_per_host=4)
        assert terms.communication == microseconds(expected)


def test_small_collectives_of_weights_are_joined():
    """Up to 30 MiB, of one operation, phase and mesh axes; activations never."""
    half = cost.COMBINED_BYTES / 2
    of_half = half / MB * 10
    for moves, expected in (
        ([move("fc1.kernel", half), move("fc1.bias", half)], 10 + 2 * of_half),
        ([move("fc1.kernel", half), move("fc1.bias", half + 1)], 20 + 2 * of_half + 1e-5),
        ([move("fc1.kernel", half), move("fc2.kernel", half, ["data"])], 20 + 2 * of_half),
        ([move("fc1.kernel", half), move("fc1.kernel", half, phase="forward")], 20 + 2 * of_half),
        ([move("fc1 input", half), move("fc2 input", half)], 20 + 2 * of_half),
        ([move("fc1.kernel", 4 * half)], 10 + 4 * of_half),
    ):
        assert predict(*moves, mesh=(2, 2)).communication == microseconds(expected)


def test_a_share_of_the_collectives_of_weights_is_hidden():
    """A quarter of a sum, half of a gather; nothing of activations, nor where layers take turns."""
    card = dataclasses.replace(CARD, hidden_share=0.25, hidden_gathers=0.5)
    for what, operation, in_turn, exposed in (
        ("fc1.kernel", "all-reduce", False, 15),
        ("fc1.kernel", "all-reduce", True, 20),
        ("fc1.kernel", "all-gather", False, 0.5),
        ("fc1.kernel", "all-gather", True, 1),
        ("fc1 input", "all-reduce", False, 20),
    ):
        terms = predict(move(what, MB, operation=operation), card=card, in_turn=in_turn)
        assert terms.communication == microseconds(20 if operation == "all-reduce" else 1)
        assert terms.exposed == microseconds(exposed)


def test_sums_run_beside_the_update_of_weights_that_need_none():
    """At 20 bytes per weight and 1e12 bytes/s, 400,000 weights take 8 us of a sum's 20."""
    card = dataclasses.replace(CARD, hidden_share=0.25)
    for ready, exposed in ((0, 15), (400_000, 9), (4_000_000, 0)):
        terms = predict(move("conv1.kernel", MB), card=card, weights=(0, 0, ready))
        assert terms.exposed == microseconds(exposed)
    assert predict(move("fc1 input", MB), weights=(0, 0, 4e6)).exposed == microseconds(20)


def test_the_gap_delays_the_step_once_per_collective():
    """What is hidden of a collective is hidden of its gap too."""
    card = dataclasses.replace(CARD, gap=8 * US, hidden_share=0.25)
    terms = predict(move("fc1 input", MB), move("fc2 input", MB), card=card)
    assert terms.communication == microseconds(40)
    assert terms.exposed == microseconds(56)
    assert predict(move("fc1.kernel", MB), card=card).exposed == microseconds(21)


def test_a_row_of_several_collectives_takes_the_time_of_each():
    """Of four with 250 kB each: 12.5 us and a gap of 8 us. Weights are joined within each."""
    card = dataclasses.replace(CARD, gap=8 * US)
    terms = predict(move("fc1 input", MB) | dict(count=4), card=card)
    assert terms.communication == microseconds(4 * 12.5)
    assert terms.exposed == microseconds(4 * 20.5)
    half = cost.COMBINED_BYTES / 2
    moves = [move(name, 4 * half) | dict(count=4) for name in ("fc1.kernel", "fc2.kernel")]
    joined = 4 * (10 + 2 * half / MB * 10)
    assert predict(*moves).communication == microseconds(joined)


def test_a_card_of_one_device_has_no_times_between_devices():
    card = dataclasses.replace(CARD, spans={})
    assert predict(card=card).step == 1
    with pytest.raises(UserError, match=r"card by hand: has no times of .* spans\.host, expected"):
        predict(move("fc1 input", MB), card=card)


# ---- The cards that ship


@pytest.mark.parametrize("path", sorted(cost.CARDS.glob("*.json")), ids=lambda path: path.stem)
def test_each_number_of_a_card_has_a_source(path):
    card = cost.load(path.stem)
    numbers = ("memory", "copy_rate", "matrix_rate", "kernel_seconds", "product_rates", "gap")
    numbers += ("hidden_share", "hidden_gathers")
    assert {*card.sources} >= {name for name in numbers if getattr(card, name)} | {*card.spans}
    assert {*card.spans} == {"host", "cluster"}
    assert cost.of_device(card.device_kind) == card
    for links in card.spans.values():
        for operation in cost.LIKE:
            assert 0 < links.seconds(operation, 0) < links.seconds(operation, 1e9) < 2
    assert card.spans["host"].seconds("all-reduce", 1e8) < card.spans["cluster"].seconds(
        "all-reduce", 1e8
    )


def test_an_unknown_card_is_refused():
    with pytest.raises(UserError) as error:
        cost.load("h10")
    assert str(error.value) == (
        "--card=h10: no calibration, expected one of a100, h100, h200, k20, p100, v100 or a file "
        "of python -m cnn_spmd.calibrate"
    )
    assert cost.of_device("cpu") is None
