"""Pictures of what a run learned: their numbers, and that the report shows them."""

import dataclasses
import errno
import html
import json
import os
import re

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from cnn_spmd import config as configs
from cnn_spmd.errors import UserError
from cnn_spmd.report import __main__ as report
from cnn_spmd.report import drawings, pictures
from cnn_spmd.training import build, loop, restore, workdir

NAMES = ("filters.png", "top5.png", "neighbours.png")


def network(run, params):
    return nnx.merge(run.functions.graph, params, run.init().model_state)


def features_of(run, params, images):
    """What the convolutions make of whole images, as normalised by NumPy."""
    return network(run, params).features(
        (images - run.functions.preprocessing.mean) / run.functions.preprocessing.std
    )


@pytest.fixture
def trained(config, tmp_path, monkeypatch):
    """Train a net with hidden layers of 48 on 1x2 and draw it; return its folder.

    There are 64 training images, looked through in batches of 24.
    """
    monkeypatch.setattr(pictures.plots, "svg", lambda fig, label: "<svg></svg>")  # other charts
    monkeypatch.setattr(pictures, "BATCH", 24)
    config.update(dict(steps=3, seed=5, parallelism="hybrid", mesh=dict(data=1, model=2)))
    config.model.update(dict(name="one_convolution", width=48))
    config.optimizer.learning_rate = 0.01
    config.eval.every_epochs = config.checkpoint.every_epochs = 0
    loop.train(config, tmp_path)
    assert report.main(["--pictures", str(tmp_path)]) == 0
    return tmp_path


def test_pictures_of_a_run(trained, monkeypatch, capsys):
    said = json.loads((trained / "pictures.json").read_text())
    assert (said["step"], said["filters"]) == (3, 64)
    assert [row["file"] for row in said["pictures"]] == list(NAMES)
    run, state, *_ = restore.on_one_device(trained)
    check_predictions(run, state, said["predictions"])
    check_neighbours(run, state, said["neighbours"])

    for name in NAMES:
        with Image.open(trained / name) as image:
            assert image.format == "PNG"
            assert np.asarray(image).std() > 10
    page = (trained / "report.html").read_text()
    titles = re.findall(r"<h3>([^<]*): ", page)[-3:]
    assert list(map(html.unescape, titles)) == [row["title"] for row in said["pictures"]]
    assert page.count('src="data:image/png;base64,iVBOR') == 3
    assert "after step 3, synthetic." in page
    capsys.readouterr()

    old = {name: (trained / name).read_bytes() for name in NAMES}

    def full(_, path, **__):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pictures.Figure, "savefig", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        pictures.draw_pictures(trained)
    assert {name: (trained / name).read_bytes() for name in NAMES} == old
    assert not list(trained.glob("*.tmp"))

    summary, saved = (
        json.loads((trained / f"{name}.json").read_text()) for name in ("summary", "config")
    )
    assert summary["data_digest"] == saved["data_digest"] == run.data.digest


def check_predictions(run, state, rows):
    """Check classes and probabilities of test images against NumPy's."""
    model = network(run, state.params)
    test, labels = run.data.test_images.astype(np.float32), run.data.test_labels
    logits = [
        np.asarray(model.classify(features_of(run, state.params, x)), np.float64)
        for x in (test, test[:, :, ::-1])
    ]
    # eval.views is mirrored: two views.
    odds = sum(np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in logits) / 2
    assert len({row["test_image"] for row in rows}) == 8
    for row in rows:
        own = odds[row["test_image"]]
        assert row["label"] == labels[row["test_image"]]
        assert row["classes"] == np.argsort(-own)[:5].tolist()
        np.testing.assert_allclose(row["probabilities"], np.sort(own)[::-1][:5], rtol=1e-4)


def check_neighbours(run, state, rows):
    """Check the nearest training images against NumPy's distances."""

    def hidden(images):
        x = np.asarray(features_of(run, state.params, images.astype(np.float32)), np.float64)
        for layer in (state.params["fc1"], state.params["fc2"]):
            x = np.maximum(x @ np.asarray(layer["kernel"][...]) + np.asarray(layer["bias"][...]), 0)
        return x

    hidden_TF, hidden_NF = hidden(run.data.test_images), hidden(run.data.train_images)
    assert len({row["test_image"] for row in rows}) == 5
    for row in rows:
        distances = np.linalg.norm(hidden_NF - hidden_TF[row["test_image"]], axis=-1)
        assert row["width"] == 48
        assert row["train_images"] == np.argsort(distances)[:6].tolist()
        assert row["labels"] == run.data.train_labels[row["train_images"]].tolist()
        np.testing.assert_allclose(row["distances"], np.sort(distances)[:6], rtol=1e-3)


def test_what_reaches_the_output_layer_where_none_is_hidden(config):
    run = build.prepare(config)
    state = run.init()
    params = state.params
    images = run.data.test_images[:4]
    np.testing.assert_allclose(
        pictures.activations(run.functions, state, images),
        features_of(run, params, images),
        atol=1e-5,
    )


def test_an_image_is_its_own_nearest_neighbour_and_none_is_named_twice(config, monkeypatch):
    """64 training images come in batches of 24; the last image fills up a batch."""
    monkeypatch.setattr(pictures, "BATCH", 24)
    run = build.prepare(config)
    run = dataclasses.replace(
        run, data=dataclasses.replace(run.data, test_images=run.data.train_images[::-1])
    )
    (near,) = pictures.neighbours(run, run.init(), np.array([0]))
    assert (near["train_images"][0], near["distances"][0]) == (63, pytest.approx(0, abs=1e-3))
    assert len({*near["train_images"]}) == 6
    assert near["distances"][1] > 1


@pytest.mark.parametrize(("count", "towers"), [(1, 1), (40, 1), (96, 2)])
def test_every_filter_is_in_the_grid_once(count, towers):
    """Filter k is of one colour, k: each tower has its own, in their order."""
    filters = np.broadcast_to(np.arange(count)[:, None, None, None] / 128, (count, 3, 3, 3))
    grids = [axes.images[0].get_array() for axes in drawings.filter_grid(filters, towers).axes]
    assert len(grids) == towers
    for tower, grid in enumerate(grids):
        colours, counts = np.unique(np.asarray(grid)[..., 0], return_counts=True)
        own = np.arange(tower * count // towers, (tower + 1) * count // towers) / 128
        assert [*colours[colours < 1]] == [*own.astype(np.float32)]
        assert len({*counts[colours < 1]}) == 1
        assert counts[0] == 63**2


@pytest.mark.parametrize("name", ["simple_cnn", "fully_connected"])
def test_filters_are_scaled_each_to_its_own_range(config, name):
    config.model.update(dict(name=name, width=24))
    run = build.prepare(config)
    state = run.init()
    params = state.params
    layer, shape = ("conv1", (32, 3, 3, 3)) if name == "simple_cnn" else ("fc1", (24, 32, 32, 3))
    label, filters = pictures.first_layer(run, params)
    assert (label, filters.shape) == (f"{layer}.kernel", shape)
    assert np.ptp(filters.reshape(len(filters), -1), 1) == pytest.approx(np.ones(len(filters)))
    # In the order in which flatten puts an image.
    weights = np.asarray(params[layer]["kernel"][..., 7]).reshape(filters.shape[1:])
    np.testing.assert_allclose(filters[7], (weights - weights.min()) / np.ptp(weights), rtol=1e-5)


def test_test_images_are_chosen_by_the_seed():
    shown, compared = pictures.choose_images(3, 100)
    assert (len({*shown}), len({*compared}), {*shown} & {*compared}) == (8, 5, set())
    assert [*pictures.choose_images(3, 100)[0]] == [*shown]
    assert [*pictures.choose_images(4, 100)[0]] != [*shown]
    assert [len(indices) for indices in pictures.choose_images(3, 4)] == [4, 4]


def test_captions_name_the_images():
    row = dict(width=48)
    for title, caption in (
        pictures.predictions_caption([row], "validation"),
        pictures.neighbours_caption([row], "validation"),
    ):
        assert "alidation image" in caption
        assert "est image" not in title + caption


def test_few_classes_and_images_are_drawn(config):
    """Three classes, long names, and fewer images than there is room for."""
    data = dataclasses.replace(build.prepare(config).data, class_names=("a", "b" * 40, "$c_1$"))
    row = dict(test_image=0, label=1, classes=[2, 1, 0], probabilities=[0.5, 0.3, 0.2])
    near = dict(test_image=0, label=1, train_images=[3, 4], labels=[1, 0])
    with pictures.plots.style():
        texts = [
            [
                text.get_text()
                for axes in fig.axes
                for text in [axes.title, *axes.texts]
                if text.get_text()
            ]
            for fig in (
                drawings.prediction_bars(data, [row] * 3),
                drawings.neighbour_rows(data, [near]),
            )
        ]
    above, _, _, second, *_ = texts[0]
    assert (
        texts[0][:7] == [above, "$c_1$", "50", second, "30", "a", "20"]
        and texts[0] == texts[0][:7] * 3
    )
    assert texts[1] == [texts[1][0], texts[1][1], "a"]
    for text, fewest, most in (
        (above, 8, 16),
        (second, 10, 18),
        (texts[1][0], 5, 11),
        (texts[1][1], 5, 11),
    ):
        assert re.fullmatch(rf"b{{{fewest},{most}}}…", text)
    wide, narrow = (len(drawings.shortened(letter * 40, 0.12, fontsize=7)) for letter in "Wi")
    assert wide < narrow / 2 < 20  # by their width, not their number
    assert drawings.shortened("i" * 20, 0.12, fontsize=7) == "i" * 20


def test_a_long_name_keeps_all_letters_that_fit_and_the_rest_is_not_measured(monkeypatch):
    measured, of_text = [], drawings.TextPath
    monkeypatch.setattr(
        drawings,
        "TextPath",
        lambda at, text, *rest, **more: measured.append(text) or of_text(at, text, *rest, **more),
    )
    for name in (
        "great white shark, man-eater",
        "A V" * 9,
        "i" * 70,
        "W" * 17,
        "n01440764",
        "x" + " " * 40 + "y",
        " ",
    ):
        short = drawings.shortened(name, 0.12, fontsize=7)
        fitting = [
            f"{name[:kept]}…"
            for kept in range(len(name))
            if drawings.shortened(f"{name[:kept]}…", 0.12, fontsize=7) == f"{name[:kept]}…"
        ]
        assert short in (name, fitting[-1])
        assert (short == name) == (name in ("n01440764", " "))
    measured.clear()
    assert drawings.shortened("abcdefgh " * 222, 0.12, fontsize=7).startswith("abcdefgh")
    assert sum(map(len, measured)) < 400


@pytest.fixture
def saved(config, tmp_path):
    """Write nothing but config.json of a run, with some changes; return the folder."""

    def write(**changes):
        run = build.prepare(config)
        own = configs.as_json(run.config) | dict(dataset=run.data.name, fallback=run.data.fallback)
        for field, value in changes.items():
            own[field] = own[field] | value if isinstance(value, dict) else value
        (tmp_path / "config.json").write_text(json.dumps(own))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "holds no checkpoint that can be used"),
        (
            dict(model=dict(name="alexnet_3000")),
            "model.name=alexnet_3000: unknown; if an experiment adds it, give that experiment by",
        ),
        (dict(data=dict(name="folder", dir="/no/where")), "data.dir=/no/where: is no folder"),
        (
            dict(dataset="digits"),
            "was trained on digits, but its data.dir= holds synthetic: give the former's place by "
            "--data_dir",
        ),
        (dict(data_files="0a"), "was trained on synthetic, but its data.dir= holds other files or"),
        (
            dict(data_digest="0a"),
            "was trained on synthetic, but its data.dir= holds other files or",
        ),
        (dict(eval={}, optimizer=3), "optimizer=3: expected a dict"),
        (dict(data=3), "data=3: expected a dict"),
    ],
)
def test_bad_input_is_one_line(saved, capsys, monkeypatch, changes, message):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    folder = saved(**changes)
    assert report.main(["--pictures", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}: {message}")
    assert error.count("\n") == 1
    assert not (folder / "report.html").exists()


def test_a_run_from_before_images_could_be_left_out_is_one(saved, capsys):
    folder = saved()
    old = json.loads((folder / "config.json").read_text())
    del old["data"]["skip_bad"]
    (folder / "config.json").write_text(json.dumps(old))
    assert report.main(["--pictures", str(folder)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {folder}: holds no checkpoint that can be")


def test_cifar10_that_is_gone_is_an_error_and_not_the_digits(saved, capsys, monkeypatch):
    from cnn_spmd.data import cifar10

    def gone(data_dir):
        raise cifar10.Unreachable("no way out")

    monkeypatch.setattr(cifar10, "find", gone)
    folder = saved(data=dict(name="cifar10", fallback="digits"), dataset="cifar10")
    assert report.main(["--pictures", str(folder), "--data_dir", "x"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder}: data.name=cifar10: no way out; give ")
    assert error.endswith("by --data_dir=PATH\n")


@pytest.mark.parametrize("dataset", ["digits", "synthetic"])
def test_a_place_for_data_that_have_none_is_refused(saved, capsys, dataset):
    folder = saved(dataset=dataset)
    assert report.main(["--pictures", str(folder), "--data_dir", "/data"]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {folder}: --data_dir=/data: has no effect on {dataset}, expected none\n"
    )


def test_ctrl_c_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        pictures, "draw_pictures", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    assert report.main(["--pictures", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_what_is_no_run(tmp_path, capsys):
    missing = "does not exist, expected the folder of a run"
    for folder, wrong in (
        (tmp_path, "holds no run (no config.json)"),
        (tmp_path / "none", missing),
    ):
        assert report.main(["--pictures", str(folder)]) == 2
        assert capsys.readouterr().err == f"error: {folder}: {wrong}\n"
    (tmp_path / "config.json").write_text("{")
    assert report.main(["--pictures", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'config.json'}: damaged JSON")
    # A run that is still training holds the lock: its half-made checkpoint must stay.
    with workdir.locked(tmp_path):
        assert report.main(["--pictures", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: another run is using it")
    assert report.main(["--data_dir", "x", str(tmp_path)]) == 2
    assert "error: --" in capsys.readouterr().err
