"""Plans: what is predicted, chosen and refused, with a card of round numbers."""

import dataclasses
import json

import jax
import pytest
from setups import narrow  # noqa: F401  (a fixture)

import cnn_spmd
from cnn_spmd import plan
from cnn_spmd.analysis.cost import Card, Links
from cnn_spmd.errors import UserError
from cnn_spmd.papers.summaries import DATA
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import prediction

STEP = dict(
    model="alexnet",
    width=16,
    image_size=32,
    classes=10,
    dtype="float32",
    fast=True,
    optimizer="sgd",
    points=[(2, 2.0), (4, 3.0), (8, 7.0)],
)
# A collective takes a second per MB and no time besides.
LINKS = Links({name: [(0, 0.0), (1e6, 1.0)] for name in ("all-reduce", "all-gather")})
CARD = Card(
    name="test",
    device_kind="card",
    memory=1e9,
    copy_rate=1e12,
    gap=0.0,
    hidden_share=0.0,
    spans=dict(host=LINKS, cluster=LINKS),
    steps=[STEP],
    sources={},
)


def config_of(**changes) -> cnn_spmd.load_config:
    """Return a small config; the networks are narrow."""
    return cnn_spmd.load_config(
        "experiments/alexnet_cifar.py",
        {
            "data.name": "synthetic",
            "data.fallback": "",
            "data.synthetic.train_examples": 64,
            "model.width": 16,
            "batch_size": 16,
            "dtype": "float32",
            "parallelism": "auto",
            **changes,
        },
    )


@pytest.fixture(scope="module")
def data():
    """Return the data set once."""
    from cnn_spmd.data import registry

    return registry.find(config_of().data)


@pytest.fixture(autouse=True)
def four_devices(monkeypatch):
    """Plan for 4 of the simulated devices."""
    devices = jax.devices()[:4]
    monkeypatch.setattr(jax, "devices", lambda: devices)


@pytest.mark.parametrize(
    ("batch", "seconds"), [(2, 2), (3, 2.5), (6, 5), (8, 7), (12, 11), (1, 1.5)]
)
def test_a_step_between_and_beyond_the_measured_batches(batch, seconds):
    setup = cnn_spmd.prepare(config_of(parallelism="data", **{"mesh.model": 1}), jax.devices()[:1])
    found = prediction.measured_step(CARD, setup, batch)
    assert found.seconds == pytest.approx(seconds)
    is_extrapolated = (
        found.origin == "extrapolated from steps measured on 2 to 8 images on one device"
    )
    assert is_extrapolated is not (2 <= batch <= 8)
    card = dataclasses.replace(CARD, steps=[STEP | dict(points=[(3, 1.5)])])
    found = prediction.measured_step(card, setup, batch)
    assert found.seconds == pytest.approx(batch / 2)
    is_scaled = found.origin == "scaled from a step measured on 3 images on one device"
    assert is_scaled is (batch != 3)


def test_a_plan_for_other_machines_needs_the_sizes_alone(data):
    """On the digits in place of CIFAR-10, heading and rows are of the fallback's batch."""
    config = config_of(parallelism="data", **{"mesh.model": 1})
    config.data.update(dict(name="cifar10", fallback="digits", fallback_batch_size=8))
    black = plan.stand_in(config.data)
    assert (black.train_images.shape, len(black.class_names)) == ((50_000, 32, 32, 3), 10)
    assert plan.stand_in(config_of().data) is None
    digits = dataclasses.replace(data, name="digits", fallback="cifar10")
    for found_data, images in ((black, "16 images of cifar10"), (digits, "8 images of digits")):
        found = plan.plan(config, found_data, CARD, 4, "4x1")
        lines = "\n".join(plan.as_text(found)).splitlines()
        title = f"Predicted steps of alexnet at 32x32 with {images} on 1 x 4 card, float32, "
        assert lines[0].startswith(title)
        (row,) = found.predictions
        assert row.batch_size == int(images.split()[0])
        assert max(map(len, lines)) <= plan.COLUMNS
    # CIFAR-10 takes 184 MB; the devices exchange the images of a data set that they share.
    sent = []
    for memory, where in (
        (1e9, "a copy on every device, 0.18 GB per device"),
        (3e8, "split over all devices, 0.05 GB per device"),
        (6e7, "streamed from the host"),
    ):
        found = plan.plan(config, black, dataclasses.replace(CARD, memory=memory), 4, "4x1")
        assert f"Images: {where}" in found.title.splitlines()
        sent.append(found.predictions[0].ring_bytes)
    assert sent[0] == sent[2] < sent[1]
    at_once = Links({name: [(0, 0.0), (1e6, 0.0)] for name in ("all-reduce", "all-gather")})
    quick = dataclasses.replace(
        CARD,
        memory=6e7,
        spans=dict(host=at_once, cluster=at_once),
        steps=[STEP | dict(points=[(4, 1e-6)])],
    )
    found = plan.plan(config, black, quick, 2, "4x1")  # two hosts
    (row,) = found.predictions
    rate = row.batch_size / row.terms.step * 32 * 32 * 3 / 2 / 1e9
    assert rate > 1
    title = " ".join(found.title.split())
    assert f"The fastest step needs {rate:.2f} GB/s of images from each host" in title
    least = row.batch_size * 32 * 32 * 3 / 2 / plan.STREAMED[1]
    assert f"at 30 GB/s, no step is shorter than {1e3 * least:.3f} ms" in title
    assert "With data.resident=sharded each device holds 0.05 GB of images" in title
    for resident, held, others in (("yes", "0.2", "auto or no"), ("sharded", "0.0", "no")):
        config.data.resident = resident
        message = (
            rf"nothing fits in .*: data\.resident={resident} puts {held} GB of images on each "
            rf"device, beside 0\.0 GB or more for a step \(4x1 data\), expected data\.resident="
            rf"{others}$"
        )
        with pytest.raises(UserError, match=message):
            plan.plan(config, black, quick, 2, "4x1")


def test_what_a_host_streamed_is_that_of_the_stored_file():
    def rates(gpus):
        stored = json.loads((DATA / "streaming" / f"nvidia-h200-x{gpus}.json").read_text())
        return [
            row["streamed_images_per_second"] * row["image_size"] ** 2 * 3 / 1e9
            for row in stored["streaming"]
        ]

    to_two, to_four = rates(2), rates(4)
    of_two, of_four = (f"{min(each):.0f} to {max(each):.0f} GB/s" for each in (to_two, to_four))
    text = f"Hosts streamed {of_two} to two H200s and {of_four} to four"
    assert (text, 1e9 * round(max(to_two + to_four))) == plan.STREAMED


def test_a_plan_puts_the_fastest_first(data, capsys, monkeypatch):
    monkeypatch.setattr(plan, "MOST_ROWS", 3)
    config = config_of(collectives_in_flight=2)
    found = plan.plan(config, dataclasses.replace(data, mirror=False), CARD, 4)
    said = capsys.readouterr().out
    assert said.count("collectives_in_flight=2 has no effect") == 1
    assert "data.flip" not in said
    steps = [each.terms.step for each in found.predictions]
    assert steps == sorted(steps)
    assert {each.mesh for each in found.predictions} == {"4x1", "2x2", "1x4"}
    assert any("two_tower" in name for name in found.refused)
    by_name = {(each.mesh, each.parallelism): each for each in found.predictions}
    data_parallel = by_name["4x1", "data"]
    # 4 examples per device; all gradients are summed over all devices.
    assert data_parallel.terms.computing == pytest.approx(3.0, rel=1e-3)
    assert data_parallel.terms.exposed == pytest.approx(data_parallel.ring_bytes / 1e6)
    assert data_parallel.speedup == pytest.approx(4 * 3.0 / data_parallel.terms.step)
    text = "\n".join(plan.as_text(found))
    assert text.startswith(
        "Predicted steps of alexnet at 32x32 with 16 images of synthetic on 1 x "
    )
    assert "\nComputing: from measured steps of this network on one device\n" in text
    assert " slower rows; --config.parallelism=NAME shows those of one scheme\n" in text
    best = found.predictions[0]
    assert f"Fastest: {best.mesh} {best.parallelism}" in text
    assert f"\n  --mesh={best.mesh} --config.parallelism={best.parallelism}\nLeft out: " in text
    assert text.count("\n  4x1 ") <= 1
    assert (
        "\nShown once: 4x1 data, the same program as model, hybrid, hybrid_alternating, spatial\n"
        in text
    )
    assert "Left out: 4x1 two_tower and 2 more: splits towers" in text


def test_a_network_without_a_measured_step_is_estimated(data):
    """The estimate takes the place of the measured step, and the plan says so."""
    card = dataclasses.replace(CARD, kernel_seconds=1e-3, product_rates=[(1, 1e12)])
    for width, is_estimated in ((16, False), (32, True)):
        config = config_of(parallelism="data", **{"model.width": width, "optimizer.name": "adamw"})
        step = STEP | dict(optimizer="adamw")
        card = dataclasses.replace(card, steps=[step])
        found = plan.plan(config, data, card, 4, "4x1")
        (row,) = found.predictions
        assert row.as_json()["estimated"] is is_estimated
        assert ("ESTIMATED" in next(plan.as_text(found))) is is_estimated
        assert row.speedup == pytest.approx(4 * row.alone.seconds / row.terms.step)
        setup = cnn_spmd.prepare(config, jax.devices())
        # Of AdamW: weight and two numbers of state, read and written; a gradient in float32.
        assert row.terms.update == pytest.approx(
            28 * prediction.weights_of(setup, []).updated / 1e12
        )
    # A millisecond for each of some 80 kernels, on 4 of the 16 images.
    assert 0.05 < row.alone.seconds / prediction.roofline.EFFICIENCY.kernel < 0.15
    program = prediction.trace_step(setup, 4)
    assert row.alone.seconds == prediction.roofline.seconds(
        prediction.roofline.kernels_of(program), card
    )


def test_rows_of_the_planners_own(data):
    """The letters of a name are fc1, fc2, fc3; `hybrid` and `dense_2d` have twins among them."""
    rows = plan.rows_of_dense_layers()
    assert len(rows) == 125
    assert rows["dense_ccr"] == dict(
        conv_batch="ALL",
        dense_batch=["data"],
        output_batch=["data"],
        fc1_out="model",
        fc2_out="model",
        fc3_in="model",
    )
    for twin, scheme in (("dense_ccr", "hybrid"), ("dense_dmd", "dense_2d")):
        config = config_of(parallelism=twin, placement={twin: rows[twin]})
        (own,) = plan.plan(config, data, CARD, 4, "2x2").predictions
        (ours,) = plan.plan(config_of(parallelism=scheme), data, CARD, 4, "2x2").predictions
        assert own.terms == ours.terms
        text = "\n".join(plan.as_text(plan.Plan("title", [own], {})))
        assert "--plan_rows" not in text
        assert f"--mesh=2x2 --config.parallelism={twin}" in text
        assert f"""--config.placement="{{'{twin}'""" in text


def test_rows_of_the_planner_in_which_devices_repeat_work_are_left_out(data):
    """On 8x1, `c` splits nothing: all devices compute fc2 and fc3 of all examples."""
    rows = plan.rows_of_dense_layers()
    config = config_of(parallelism="dense_dcc", placement=dict(dense_dcc=rows["dense_dcc"]))
    message = "nothing works on 4 devices: several devices compute the same part of a dense layer"
    with pytest.raises(UserError, match=message):
        plan.plan(config, data, CARD, 4, "4x1")
    for scheme in TABLE:
        if scheme != "two_tower":
            config = config_of(parallelism=scheme, **{"mesh.data": 4, "mesh.model": 1})
            setup = cnn_spmd.prepare(config, devices=jax.devices()[:4], data=data)
            assert not prediction.repeats_work(setup)


def test_the_planners_rows_of_a_network_that_theory_does_not_cover_are_left_out(data, monkeypatch):
    """With the reason, before anybody asks for its layers."""
    monkeypatch.setattr(prediction.program_report, "theory_of", lambda setup: (None, "a loop"))
    monkeypatch.setattr(prediction.layout, "layers_of", None)
    row = plan.rows_of_dense_layers()["dense_ccr"]
    config = config_of(parallelism="dense_ccr", placement=dict(dense_ccr=row))
    with pytest.raises(UserError, match="parallelism=dense_ccr: has no prediction: a loop"):
        plan.plan(config, data, CARD, 4, "2x2")


def test_what_does_not_fit_is_no_yardstick():
    """Here `data` would be faster, and takes more memory than there is."""
    terms = dataclasses.make_dataclass("Terms", ["step", "exposed", "update"])
    row = dataclasses.make_dataclass("Row", ["mesh", "parallelism", "terms", "fits", "alone"])
    alone = dataclasses.make_dataclass("Alone", ["is_estimated"])(False)
    rows = [
        row("4x1", "fsdp", terms(2.0, 1.0, 0.0), True, alone),
        row("4x1", "data", terms(1.0, 0.5, 0.5), False, alone),
    ]
    assert plan.why(plan.Plan("title", rows, {})).startswith("Fastest: 4x1 fsdp, 2000.000 ms. ")


def test_one_mesh_and_one_scheme(data):
    found = plan.plan(config_of(parallelism="hybrid"), data, CARD, 4, "2x2")
    assert [(each.mesh, each.parallelism) for each in found.predictions] == [("2x2", "hybrid")]
    assert plan.why(found).startswith("Fastest: 2x2 hybrid, ")


def test_several_meshes(data):
    found = plan.plan(config_of(), data, CARD, 4, "2x2,1x4")
    assert {each.mesh for each in found.predictions} == {"2x2", "1x4"}


def test_what_cannot_be_planned_is_refused(data):
    with pytest.raises(UserError, match="has no calibration"):
        plan.plan(config_of(), data, None, 4)
    small = dataclasses.replace(CARD, memory=1e3)
    message = (
        r"nothing fits in the 0\.0 GB of card that JAX .*: the least .*, expected more devices,"
    )
    with pytest.raises(UserError, match=message):
        plan.plan(config_of(parallelism="data"), data, small, 4, "4x1")
    message = "has no measured step of model=alexnet, width=32, .* and neither kernel_seconds nor"
    with pytest.raises(UserError, match=message):
        plan.plan(config_of(parallelism="data", **{"model.width": 32}), data, CARD, 4, "4x1")
    with pytest.raises(
        UserError, match=r"4 devices: batch_size=18: does not divide by 4 devices; 16 or 20 would$"
    ):
        plan.plan(config_of(parallelism="data", batch_size=18), data, CARD, 4, "4x1")


# The inputs of an example: of conv2, conv3 to conv5 and fc1, whose channels are gathered; and of
# conv1, conv2 and conv3 to conv5, whose rows are split by two, with their halo.
CHANNELS = 16 * 16 * 8 + 8 * 8 * (16 + 24 + 16) + 4 * 4 * 16
ROWS = (16 + 2) * 32 * 3 + (8 + 2) * 16 * 8 + (4 + 2) * 8 * (16 + 24 + 16)


@pytest.mark.parametrize(
    ("scheme", "mesh", "numbers"),
    [
        ("model", (1, 4), CHANNELS * 16 * (1 + 1 / 4)),  # what a device gets, and what it gives
        ("model", (2, 2), CHANNELS * 8 * (1 + 1 / 2)),
        ("model", (4, 1), 0),
        ("spatial", (1, 2), ROWS * 16),  # pools of 2x2 pixels need no halo
        ("spatial", (2, 2), ROWS * 8),
        *((scheme, (2, 2), 0) for scheme in TABLE if scheme not in ("model", "spatial")),
    ],
)
def test_maps_that_devices_join(data, scheme, mesh, numbers):
    """Where convolutions are split by channels or by rows, computing takes longer."""
    changes = {"mesh.data": mesh[0], "mesh.model": mesh[1], "parallelism": scheme}
    if scheme == "two_tower":
        changes |= {"model.name": "alexnet_2012", "data.synthetic.image_size": 68}
    setup = cnn_spmd.prepare(config_of(**changes), jax.devices()[: mesh[0] * mesh[1]])
    assert prediction.joined_bytes(setup) == 4 * numbers
    step = prediction.OneDeviceStep(1.0, False, "")
    terms = prediction.predict(setup, dataclasses.replace(CARD, copy_rate=1e9), 4, step).terms
    weights = prediction.weights_of(setup, [])
    update = weights.network * weights.update_bytes / 1e9
    assert terms.computing == pytest.approx(1 - update + 13 * 4 * numbers / 1e9, rel=1e-9)


def test_a_plan_and_a_report_count_with_the_memory_that_jax_takes(data, monkeypatch):
    """It is three quarters of a card's, for the step and the images."""
    config = config_of(parallelism="data", **{"mesh.data": 4, "mesh.model": 1})
    (row,) = plan.plan(config, data, CARD, 4, "4x1").predictions
    setup = cnn_spmd.prepare(config, jax.devices())
    for share, fits in ((0.74, True), (0.76, False)):
        needed = row.memory + setup.image_bytes_per_device
        card = dataclasses.replace(CARD, memory=needed / share)
        assert prediction.predict(setup, card, 4).fits is fits
        monkeypatch.setattr(prediction.cost, "of_device", lambda kind, card=card: card)
        assert setup.report()["device_memory_bytes"] == 0.75 * card.memory


def test_a_batch_that_does_not_divide_is_named_once_before_the_table(data):
    found = plan.plan(config_of(batch_size=18), data, CARD, 4)
    lines = [*plan.as_text(found)]
    uneven = "batch_size=18: does not divide by 4 devices; 16 or 20 would"
    assert lines[0].startswith(f"{uneven}\n")
    assert [line for line in lines[1:] if uneven in line] == [
        f"Left out: 4x1 data and 22 more: {uneven}"
    ]
    assert plan.why(found).startswith("Fastest of the 2 choices that batch_size=18 leaves: ")


def test_a_report_has_a_prediction_where_the_card_is_known(monkeypatch):
    setup = cnn_spmd.prepare(config_of(parallelism="data", **{"mesh.model": 1}), jax.devices()[:1])
    assert prediction.of_devices(setup) is None  # nobody calibrated this CPU
    monkeypatch.setattr(prediction.cost, "of_device", lambda kind: CARD)
    found = prediction.of_devices(setup)
    assert (found["card"], found["mesh"], found["speedup"]) == ("test", "1x1", 1.0)


def test_a_report_takes_the_card_of_the_config():
    """Also on devices that have none of their own."""
    changes = {"parallelism": "data", "mesh.model": 1, "card": "h200"}
    setup = cnn_spmd.prepare(config_of(**changes), jax.devices()[:1])
    found = prediction.of_devices(setup)
    assert (found["card"], found["estimated"]) == ("h200", True)
    setup.config.card = "h3"
    with pytest.raises(UserError, match="--card=h3: no calibration"):
        prediction.of_devices(setup)
