"""The calibration of a machine: what is measured on two simulated devices, and bad files."""

import dataclasses
import json

import jax
import pytest
from conftest import ROOT

from cnn_spmd import calibrate
from cnn_spmd.analysis import cost, hlo, rates
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh as meshes

TINY = rates.Sizes(
    matrix=64,
    copied=2**16,
    ring_bytes=(2**14, 2**20),
    repeats=50,
    work=2**8,
    widths=(4,),
    elements=2**12,
)


@pytest.fixture
def two_devices(monkeypatch):
    """Let the command measure tiny things on two devices, in this process as it is."""
    two = jax.local_devices()[:2]
    monkeypatch.setattr(jax, "local_devices", lambda: two)
    monkeypatch.setattr(calibrate.environment, "prepare", lambda: None)
    monkeypatch.setattr(rates, "sizes_for", lambda platform: TINY)


def test_two_devices_are_measured(two_devices, tmp_path, capsys):
    """The command's file is a card, and replaces an older one."""
    out = tmp_path / "mine.json"
    out.write_text((cost.CARDS / "h200.json").read_text())
    deeper = f"--config {ROOT}/experiments/deeper_cifar.py:"
    fields = "--config.data.crop=24 --config.data.name=synthetic --config.model.width=64"
    command = f"{out} --batches 8,4 {deeper}one_convolution {deeper}fully_connected {fields}"
    assert calibrate.main(command.split()) == 0, capsys.readouterr().err
    card = cost.load(str(out))
    assert (card.name, card.device_kind, card.gap) == ("mine", "cpu", 0)
    assert min(card.copy_rate, card.matrix_rate, card.memory, card.kernel_seconds) > 0
    ((width, rate),) = card.product_rates
    assert (width, rate > 0) == (4, True)
    assert card.spans.keys() == {"host"}
    links = card.spans["host"]
    assert links.collectives.keys() == cost.LIKE.keys()
    total_short = total_long = 0.0
    for operation, points in links.collectives.items():
        (_, short), (_, long) = points
        assert min(short, long) >= 0
        assert links.seconds(operation, points[1][0]) == long
        total_short, total_long = total_short + short, total_long + long
    # Of all five together: a busy machine may turn one of them around.
    assert total_short < total_long
    step, other = card.steps
    assert other["model"] == "fully_connected"
    points = step.pop("points")
    assert [batch for batch, _ in points] == [4, 8]
    assert min(seconds for _, seconds in points) > 0
    assert step == dict(
        model="one_convolution",
        width=64,
        image_size=24,
        classes=10,
        dtype="float32",
        fast=True,
        optimizer="sgd",
    )
    assert card.sources["host"] == card.sources["steps"] == "measured on 2 x cpu"
    assert "taken as 0" in card.sources["gap"]
    assert card.measured["devices"] == 2
    assert {"versions", "host_cores", "commit"} <= card.measured.keys()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[5:10]] == [f"{name}:" for name in rates.OPERATIONS]


def test_one_device_of_a_known_kind_takes_what_its_card_has(monkeypatch):
    """Collectives, gap, and the steps of other networks come from the shipped card."""
    shipped = cost.load("h200")
    step = dict(model="alexnet", points=[[32, 1e-3]])
    other = dict(model="vgg_16", points=[[32, 2e-3]])
    known = dataclasses.replace(
        shipped, steps=[step | dict(points=[[1, 1.0]]), other], sources={"gap": "a", "steps": "b"}
    )
    monkeypatch.setattr(cost, "of_device", lambda kind: known)
    monkeypatch.setattr(calibrate.one_device, "measure", lambda setups: step)
    card = calibrate.measure(jax.devices()[:1], TINY, [[]])
    assert card["spans"] == {name: links.collectives for name, links in shipped.spans.items()}
    assert (card["gap"], card["steps"]) == (shipped.gap, [step, other])
    assert card["sources"]["gap"] == "card h200: a"
    assert card["sources"]["steps"] == "measured on 1 x cpu; other networks: card h200: b"


@pytest.mark.parametrize("older", [{}, {"all-reduce": [[0, 7.0], [1, 8.0]]}], ids=["", "older"])
def test_a_time_that_is_not_positive_never_reaches_a_card(older, monkeypatch, capsys):
    """The older times stay; without them only the good points count."""
    good = [(2, 1e-5), (3, 2e-5)]
    measured = {"all-reduce": [(0, 0.0), (1, -1e-6), *good], "all-gather": good}
    monkeypatch.setattr(rates, "collectives", lambda devices, sizes: measured.items())
    links, kept = calibrate.host_links([], TINY, older)
    as_lists = [[2, 1e-5], [3, 2e-5]]
    assert links == {"all-gather": as_lists, "all-reduce": older.get("all-reduce", as_lists)}
    assert kept == list(older)
    warning = capsys.readouterr().out.splitlines()[0]
    then = "the older times stay" if older else "left out"
    assert warning == f"warning: all-reduce: no positive time for 0, 1 ring bytes: {then}"


def test_each_loop_repeats_the_collective_that_it_measures():
    """XLA neither merges nor drops repetitions, and the ring bytes are those of the program."""
    mesh = meshes.make(4, 1, devices=jax.devices()[:4])
    for operation in rates.OPERATIONS:
        elements, ring_bytes = rates.elements_for(operation, 10_000, 4)
        program = rates.compile_loop(mesh, operation, elements, TINY._replace(repeats=7))
        (found,) = hlo.Module(program.as_text(), dict(mesh.shape)).collectives()
        assert (found.operation, found.count, found.group_size) == (operation, 7, 4)
        assert found.ring_bytes == ring_bytes
        assert 10_000 <= ring_bytes < 12_000
    assert rates.OPERATIONS.keys() == cost.LIKE.keys()


CHANGES = {
    "copy_rate: missing": dict(copy_rate=None),
    "memory=-1: expected a number above 0": dict(memory=-1),
    "gap=NaN: expected seconds, from 0 to 1": dict(gap=float("nan")),
    "colour: unknown, expected one of device_kind, ": dict(colour="red"),
    "spans.rack: unknown, expected one of host, cluster": dict(spans=dict(rack={})),
    "spans.host.all-reduce: missing": dict(spans=dict(host={"all-gather": [[0, 1], [1, 2]]})),
    "spans.host.all-reduce=[[1, 2]]: expected at least two": dict(
        spans=dict(host={"all-reduce": [[1, 2]]})
    ),
    "spans.host.all-gather=[[2, 1], [1, 2]]: expected": dict(
        spans=dict(host={"all-reduce": [[0, 1], [1, 2]], "all-gather": [[2, 1], [1, 2]]})
    ),
    "gap=1000000000.0: expected seconds, from 0 to 1": dict(gap=1e9),
    "kernel_seconds=2: expected seconds, above 0": dict(kernel_seconds=2),
    "hidden_share=1.5: expected a share from 0 to 1": dict(hidden_share=1.5),
    "hidden_gathers=2: expected a share from 0 to 1": dict(hidden_gathers=2),
    "copy_rate=2915: expected bytes per second, at least 1e+06": dict(copy_rate=2915),
    "matrix_rate=720: expected FLOPs per second, at least 1e+06": dict(matrix_rate=720),
    "product_rates=[[16, 35]]: expected pairs of a width": dict(product_rates=[[16, 35]]),
    "steps[0]: is no object": dict(steps=[3]),
    "steps[0].model: missing, expected a text": dict(steps=[{}]),
}


@pytest.mark.parametrize(("message", "changes"), CHANGES.items(), ids=list(CHANGES))
def test_a_file_that_is_no_card_is_refused_by_name_and_field(message, changes, tmp_path):
    fields = json.loads((cost.CARDS / "h200.json").read_text()) | changes
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))
    with pytest.raises(UserError) as error:
        cost.load(str(path))
    assert str(error.value).startswith(f"{path}: {message}")


BAD = {
    "error: the following arguments are required: OUT.json": "",
    "error: DIR/a.txt: expected the name of a file that ends in .json": "DIR/a.txt",
    "error: DIR/none/a.json: expected a folder that is there": "DIR/none/a.json",
    "error: DIR/run.json: device_kind: missing, expected a text; give another": "DIR/run.json",
    "error: DIR/text.json: damaged JSON": "DIR/text.json",
    "error: --batches=8,x: expected positive numbers": "DIR/a.json --batches 8,x",
    "error: --cpu_devices=0: expected from 1 to 2048": "DIR/a.json --cpu_devices=0",
    "error: --config=none.py: no such experiment": "DIR/a.json --config none.py",
    "error: --config.model.widht=8: no such field": "DIR/a.json --config.model.widht=8",
    "error: unexpected argument 'b'": "DIR/a.json b",
    "error: Unknown command line flag 'mesh'": "DIR/a.json --mesh=1x1",
}


@pytest.mark.parametrize(("message", "command"), BAD.items(), ids=list(BAD))
def test_bad_input_is_one_line(message, command, tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "text.json").write_text("text")
    assert calibrate.main(command.replace("DIR", str(tmp_path)).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith(message.replace("DIR", str(tmp_path)))
    assert error.count("\n") == 1
    assert (tmp_path / "run.json").read_text() == "{}"
