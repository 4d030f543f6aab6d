"""Class folders: what is found, in which order, and refused before decoding."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import ROOT
from photos import SIZE, assert_same, colours, load, prepared_folders, write_image
from PIL import Image

from cnn_spmd import experiment, sweep
from cnn_spmd.data import prepared
from cnn_spmd.errors import UserError
from cnn_spmd.training import build, loop, restore


def test_classes_and_images_in_their_order(pets):
    (pets / "train/cat/notes.txt").write_text("no image")
    (pets / "train/.hidden").mkdir()
    data = load(pets)
    assert data.name.startswith("folder-")
    assert data.class_names == ("cat", "dog")
    assert (data.mirror, data.fallback) == (True, None)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert {x.dtype for x in (data.train_labels, data.test_labels)} == {np.dtype(np.int32)}
    assert isinstance(data.train_images, np.memmap)
    assert data.train_images.shape == (5, SIZE, SIZE, 3)
    assert data.train_images.dtype == np.uint8
    images = [*data.train_images, *data.test_images]
    for image, seed in zip(images, [2, 3, 4, 1, 0, 5, 6], strict=True):
        expected = colours(40, 30, seed)[5:35]
        np.testing.assert_allclose(image.mean((0, 1)), expected.mean((0, 1)), atol=3)


def test_webp_is_read(pets):
    Image.fromarray(colours(40, 30, 6)).save(pets / "val/dog/b.WebP", "webp", lossless=True)
    shutil.copy(pets / "val/dog/b.WebP", pets / "val/dog/c.jpg")  # the content decides
    data = load(pets)
    assert data.test_labels.tolist() == [0, 1, 1, 1]
    np.testing.assert_array_equal(data.test_images[2], data.test_images[3])
    means = data.test_images.mean((1, 2))
    np.testing.assert_allclose(means[2], means[1], atol=3)


def test_val_is_used_and_test_beside_it_is_not(pets, caplog):
    (pets / "test/other").mkdir(parents=True)
    assert load(pets).class_names == ("cat", "dog")
    assert f"data.dir={pets}: holds val/ and test/: val/ is used, test/ is not." in caplog.text
    caplog.clear()
    shutil.rmtree(pets / "test")
    (pets / "val").rename(pets / "test")
    assert load(pets).test_labels.tolist() == [0, 1]
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["train/cat/more.jpg/", "train/cat/a.gif", "val/labels.csv"])
def test_what_is_left_out_is_named(pets, caplog, name):
    if name.endswith("/"):
        (pets / name).mkdir()
    else:
        (pets / name).write_text("an image of another kind, or none")
    assert len(load(pets).train_images) == 5
    suffixes = ".jpg/.jpeg/.png/.webp"
    assert f"left out, as no {suffixes} in a class folder: {pets / name}." in caplog.text
    (pets / "notes.txt").write_text("beside the two folders, anything may be")
    (pets / "train/cat/b.gif").write_text("another one")
    load(pets)
    assert " and 1 more." in caplog.text


def test_a_class_whose_name_is_no_text_can_be_drawn(pets):
    for split in ("train", "val"):
        os.rename(pets / split / "dog", os.fsencode(pets / split) + b"/d\xf6g")
    assert load(pets).class_names == ("cat", "d\ufffdg")


def test_a_part_is_held_out_where_there_is_nothing_to_test_on(pets, pets_config, capsys):
    """A fifth of each class, the same every time; at least one image."""
    shutil.rmtree(pets / "val")
    for i in range(7):
        write_image(pets / f"train/dog/{i}.png", colours(30, 30, i))
    setup = build.prepare(pets_config)
    data = setup.data
    assert np.bincount(data.train_labels).tolist() == [2, 7]
    assert np.bincount(data.test_labels).tolist() == [1, 2]
    assert setup.data_fields["test_images_from_train"] == data.test_from_train == 3
    build.say_choices(pets_config, setup)
    said = f"{pets.name} has nothing to test on: 3 of its images are held out for that, the same"
    assert capsys.readouterr().out.startswith(said)
    for path in [*(pets / "train").iterdir()]:  # class folders alone are the same data set
        path.rename(pets / path.name)
    (pets / "train").rmdir()
    assert_same(load(pets), data)
    assert load(pets).name == data.name
    (pets / "bird").mkdir()
    write_image(pets / "bird/only.jpg", colours(30, 30))
    with pytest.raises(UserError, match="nothing to test on, and 1 image of class bird, expected"):
        load(pets)


# ---- Refusals


def flatten(folder: Path) -> None:
    """Move all images out of their class folders, as ImageNet's validation set is."""
    for path in sorted(folder.glob("*/*")):
        path.rename(folder / f"{path.parent.name}_{path.name}")
    for path in folder.glob("*/"):
        path.rmdir()


def rename_dog(root: Path, in_train: str, in_val: str) -> None:
    (root / "train/dog").rename(root / "train" / in_train)
    (root / "val/dog").rename(root / "val" / in_val)


LACKING = {
    "an empty class": (lambda root: (root / "val/cat/a.jpg").unlink(), "val/cat/ holds no image"),
    "a class without images": (
        lambda root: (root / "val/cat/a.jpg").rename(root / "val/cat/a.gif"),
        "val/cat/ holds no image",
    ),
    "a class to train on only": (
        lambda root: shutil.rmtree(root / "val/dog"),
        "class 'dog' is in train/ but not in val/",
    ),
    "a class to test on only": (
        lambda root: shutil.rmtree(root / "train/cat"),
        "class 'cat' is in val/ but not in train/",
    ),
    "no train": (lambda root: shutil.rmtree(root / "train"), "holds no train/"),
    "no class": (
        lambda root: [shutil.rmtree(path) for path in root.glob("*/*")],
        "found no class folders in train/ and val/",
    ),
    "nothing": (shutil.rmtree, "is no folder"),
    "a flat val": (
        lambda root: flatten(root / "val"),
        "val/ holds images but no class folders",
    ),
    "a flat train": (
        lambda root: flatten(root / "train"),
        "train/ holds images but no class folders",
    ),
    "one class": (
        lambda root: [shutil.rmtree(path) for path in root.glob("*/*") if path.name != "dog"],
        "holds one class, dog",
    ),
    "a space": (
        lambda root: rename_dog(root, "dog", "dog "),
        "class 'dog' is in train/ but not in val/, which has 'dog ': they differ in spaces",
    ),
    "another accent": (
        lambda root: rename_dog(root, "\xe9", "e\u0301"),
        r"class '\u0065\u0301' is in val/ but not in train/, which has '\\xe9': they differ "
        r"in Unicode normalisation \('e\\u0301'\)",
    ),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_is_lacking_is_named(pets, tmp_path, what):
    spoil, message = LACKING[what]
    spoil(pets)
    with pytest.raises(UserError, match=rf"^data.dir={pets}: {message}.*expected") as refusal:
        load(pets)
    assert "\n" not in str(refusal.value)
    assert prepared_folders(tmp_path) == []


def test_the_folder_must_be_given(tfds_directory):
    message = r"data.dir=: is empty, expected a folder that holds train/CLASS"
    with pytest.raises(UserError, match=message):
        load("")


def test_a_link_to_nowhere_is_named(pets):
    (pets / "train/cat/c.png").unlink()
    (pets / "train/cat/c.png").symlink_to(pets / "gone.png")
    with pytest.raises(UserError, match=rf"^data.dir={pets}: {pets}/train/cat/c.png: No such file"):
        load(pets)


def test_a_pipe_is_named(pets):
    """Opening it would wait for a writer."""
    os.mkfifo(pets / "val/cat/b.jpg")
    message = rf"^data.dir={pets}: {pets}/val/cat/b.jpg: is no regular file, expected"
    with pytest.raises(UserError, match=message):
        load(pets)


# ---- Refused before an image is decoded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=6), "batch_size=6: pets has 5 training images"),
        ({"data.crop": SIZE + 1}, "data.crop=17: images are 16 pixels wide"),
        ({"model.name": "alexnets"}, "model.name=alexnets: unknown"),
        (dict(dense_microbatch=3), "dense_microbatch=3: does not divide batch_size=4"),
    ],
)
def test_what_does_not_fit_is_refused_early(pets_config, monkeypatch, change, message):
    pets_config.update_from_flattened_dict(change)
    monkeypatch.setattr(prepared, "prepare", None)
    with pytest.raises(UserError, match=f"^{message}"):
        build.prepare(pets_config)


def test_the_refusal_of_a_first_command_names_the_flag_that_makes_it_work(
    pets, monkeypatch, capsys
):
    """The shipped experiment on a small folder needs another batch; the crop fits by itself."""
    arguments = [
        "--config",
        str(ROOT / "experiments/alexnet_cifar.py"),
        "--config.data.name=folder",
        f"--config.data.dir={pets}",
    ]

    def prepare() -> build.Setup:
        return build.prepare(experiment.parse_arguments(arguments)[0], jax.devices()[:1])

    with monkeypatch.context() as patch:
        patch.setattr(prepared, "prepare", None)
        with pytest.raises(UserError, match=r"^batch_size=512: .*: set --config.batch_size=5 or"):
            prepare()
        arguments.append("--config.batch_size=5")
        arguments.append("--config.data.image_size=64")
        message = "images of 64x64, expected a side of 32 or 224: set --config.data.image_size for"
        with pytest.raises(UserError, match=message):
            prepare()
    arguments.pop()
    setup = prepare()
    build.say_choices(experiment.parse_arguments(arguments)[0], setup)
    assert (setup.data.train_images.shape, setup.image_size) == ((5, 256, 256, 3), 224)
    assert (setup.config.data.image_size, setup.config.data.crop) == (256, 224)
    said = "data.crop=224: model.name=alexnet takes images of 32 or 224 pixels, not of 256."
    assert capsys.readouterr().out.count(said) == 1


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
def test_a_sweep_refuses_as_early(pets, monkeypatch):
    monkeypatch.setattr(prepared, "prepare", None)
    shared = [
        "--config",
        str(ROOT / "experiments/alexnet_cifar.py"),
        "--config.data.name=folder",
        f"--config.data.dir={pets}",
        f"--config.data.image_size={SIZE}",
    ]
    (row,) = sweep.plan([dict(batch_size="6")], shared, jax.devices()[:1])
    assert row["status"] == "refused"
    assert "batch_size=6: pets has" in row["reason"]


def test_the_workdir_of_another_run_is_refused_early(pets_config, tmp_path, monkeypatch):
    monkeypatch.setattr(prepared, "prepare", None)
    workdir = tmp_path / "notes"
    workdir.mkdir()
    (workdir / "a.txt").write_text("mine")
    with pytest.raises(UserError, match=f"^--workdir={workdir}: is not empty and holds no run"):
        loop.train(pets_config, workdir)
    (workdir / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"^--workdir={workdir}: holds a run with another config"):
        loop.train(pets_config, workdir)


def test_pictures_of_other_photographs_are_refused_early(pets_config, pets, tmp_path, monkeypatch):
    setup = build.prepare(pets_config)
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.json").write_text(json.dumps(setup.saved_config))
    shutil.copytree(pets, tmp_path / "other")
    shutil.copy(pets / "val/cat/a.jpg", tmp_path / "other/val/cat/b.jpg")
    monkeypatch.setattr(prepared, "prepare", None)
    message = rf"^{tmp_path}/r: was trained on {setup.data.name}, but .*/other holds folder-"
    with pytest.raises(UserError, match=message):
        restore.on_one_device(tmp_path / "r", str(tmp_path / "other"))
    shutil.rmtree(pets)
    message = r"/r: data.dir=.* is no folder.*; where it has moved: --data_dir=PATH$"
    with pytest.raises(UserError, match=message):
        restore.on_one_device(tmp_path / "r")


def test_the_check_sees_the_data_set_as_it_will_be(pets):
    seen = []
    data = load(pets, check=seen.append)
    (before,) = seen
    for field in ("name", "class_names", "mirror"):
        assert getattr(before, field) == getattr(data, field)
    for field, array in data.arrays.items():
        assert before.arrays[field].shape == array.shape
        assert before.arrays[field].dtype == array.dtype
    load(pets, check=seen.append)  # which is prepared already
    assert len(seen) == 1
