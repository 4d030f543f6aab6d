"""Data sets that TFDS has prepared: known ones, others, and what is refused."""

import os
import shutil
import socket
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from photos import SIZE, colours, cut, load, to_parquet, to_tfrecord, write_image

from cnn_spmd import config as configs
from cnn_spmd.data import cifar10_archive, network, photographs, prepared, registry
from cnn_spmd.data import tfds as tfds_source
from cnn_spmd.errors import UserError
from cnn_spmd.training import build

pytestmark = pytest.mark.usefixtures("tfds_directory")


class Imagenette(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A small copy of what TFDS's own prepares: JPEG bytes, and labels of ten classes."""

    name = "imagenette"
    VERSION = tfds.core.Version("1.0.0")
    splits = (("train", 12), ("validation", 11))

    def features(self) -> dict:
        image = tfds.features.Image(encoding_format="jpeg")
        return dict(image=image, label=tfds.features.ClassLabel(names=[f"n{i}" for i in range(10)]))

    def _info(self):
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, n) for split, n in self.splits}

    def _generate_examples(self, split, n):
        for i in range(n):
            path = Path(self.data_dir).parent / f"{i}.jpg"
            write_image(path, colours(20, 30, i + 100 * (split != "train")))
            yield i, dict(image=path.read_bytes(), label=i % 10)


class Flowers(Imagenette, skip_registration=True):
    """A data set that this package does not know."""

    name = "flowers"
    splits = (("train", 12), ("test", 11))


class Sentences(Imagenette, skip_registration=True):
    """A data set without images."""

    name = "sentences"

    def features(self) -> dict:
        return dict(text=tfds.features.Text(), label=tfds.features.ClassLabel(names=["a", "b"]))

    def _generate_examples(self, split, n):
        for i in range(n):
            yield i, dict(text="a sentence", label=i % 2)


def prepare(tmp_path: Path, builder: type) -> Path:
    """Prepare a data set, and return its folder."""
    builder(data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    return tmp_path / "tfds" / builder.name / "1.0.0"


@pytest.mark.parametrize(
    "builder, form", [(Imagenette, "tfrecord"), (Flowers, "array_record"), (Flowers, "parquet")]
)
def test_a_prepared_data_set_is_loaded_by_its_name(tmp_path, monkeypatch, builder, form):
    """It tests on `validation`, or on `test` where there is no such split."""
    folder = prepare(tmp_path, builder)
    if form == "tfrecord":
        to_tfrecord(folder)
    if form == "parquet":
        to_parquet(folder)
    # TFDS is at work on another version, or was killed.
    shutil.copytree(folder, folder.with_name("incomplete.ABC_1.0.1"))
    next(folder.with_name("incomplete.ABC_1.0.1").glob("*train*")).unlink()
    data = load("", builder.name)
    assert (data.name, data.class_names[3], len(data.class_names)) == (builder.name, "n3", 10)
    assert data.train_labels.tolist() == [*range(10), 0, 1]
    assert data.test_labels.tolist() == [*range(10), 0]
    for seed, image in [*enumerate(data.train_images), *enumerate(data.test_images, 100)]:
        expected = colours(20, 30, seed)[:, 5:25]
        np.testing.assert_allclose(image.mean((0, 1)), expected.mean((0, 1)), atol=3)
    monkeypatch.setattr(prepared, "prepare", None)
    again = load(tmp_path / "tfds", builder.name)
    np.testing.assert_array_equal(again.train_images, data.train_images)
    assert again.files == data.files != ""


def test_of_validation_and_test_the_former_is_used(tmp_path, caplog):
    class Both(Flowers, skip_registration=True):
        name = "both"
        splits = (("train", 12), ("test", 10), ("validation", 11))

    prepare(tmp_path, Both)
    assert len(load("", "both").test_images) == 11
    assert "tests on the split validation; the split test is not used" in caplog.text


def test_a_data_set_without_images_is_refused(tmp_path):
    prepare(tmp_path, Sentences)
    message = r"^data.name=sentences: has no Image among its features \(label, text\), expected a"
    with pytest.raises(UserError, match=message) as refusal:
        load("", "sentences")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["petals", "petal/s", "..", ""])
def test_a_name_that_is_nowhere_says_what_there_is(tmp_path, name):
    prepare(tmp_path, Imagenette)
    message = (
        rf"^data.name={name}: unknown, expected one of cifar10, .*folder, .*, tfds:NAME of TFDS's "
        rf"catalog, or what TFDS has prepared in {tmp_path}/tfds; if an experiment adds it, "
    )
    with pytest.raises(UserError, match=message):
        load("", name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("CIFAR10", '"cifar10"'),
        ("imagenet", '"imagenet2012" or "imagenette"'),
        ("cifar100", '"tfds:cifar100"'),
        ("MNIST:3.0.1", '"tfds:mnist:3.0.1"'),
        ("dtd", '"tfds:dtd"'),
    ],
)
def test_a_name_that_is_almost_right_says_what_is_meant(name, meant):
    with pytest.raises(UserError) as refused:
        load("", name)
    said = f"data.name={name}: unknown; did you mean {meant}? Expected one of cifar10, "
    assert str(refused.value).startswith(said)


def test_files_that_were_written_again_are_another_data_set(tmp_path):
    """Although names, sizes and times of modification are equal."""
    prepare(tmp_path, Imagenette)
    before = tfds_source.find_source("imagenette", tmp_path / "tfds")
    (records,) = (tmp_path / "tfds").rglob("*train.array_record*")
    times = records.stat()
    records.write_bytes(records.read_bytes())
    os.utime(records, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = tfds_source.find_source("imagenette", tmp_path / "tfds")
    assert after.content == before.content
    assert after.fingerprint != before.fingerprint


def test_a_named_data_set_says_which_files_it_is(pets, tmp_path, monkeypatch):
    """A run continues with a copy of them, and with no others."""
    monkeypatch.setitem(photographs.CLASSES, "imagenette", 2)
    first = load(pets, "imagenette")
    shutil.copytree(pets, tmp_path / "copy")
    assert load(tmp_path / "copy", "imagenette").files == first.files
    (tmp_path / "copy/train/cat/c.png").unlink()
    other = load(tmp_path / "copy", "imagenette")
    assert (other.name, first.name) == ("imagenette", "imagenette")
    saved, changed = (
        build.Setup(ml_collections.ConfigDict(), data, None, None).saved_config
        for data in (first, other)
    )
    configs.refuse_changes("a", saved, saved)
    with pytest.raises(UserError, match=rf"data_files: {first.files} -> {other.files}"):
        configs.refuse_changes("a", saved, changed)


@pytest.mark.parametrize("name", ["imagenet2012", "imagenette"])
def test_a_known_data_set_that_is_not_there_says_how_to_get_it(tmp_path, name):
    message = (
        f"data.name={name}: {tmp_path}/tfds/{name} holds no prepared data set: .*tfds build "
        f"{name}.* --file_format=array_record .*--config.data.dir=DIR"
    )
    with pytest.raises(UserError, match=message) as refusal:
        load("", name)
    assert ("ILSVRC2012_img_train.tar" in str(refusal.value)) == (name == "imagenet2012")
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=rf"^data.dir={tmp_path}/gone: is no folder"):
        load(tmp_path / "gone", name)


def test_a_damaged_tfrecord_file_is_named(tmp_path):
    folder = prepare(tmp_path, Imagenette)
    to_tfrecord(folder)
    path = folder / "imagenette-train.tfrecord-00001-of-00002"
    cut(path)
    message = rf"cannot read image 6 .*{path.name}: damaged.* and 5 more of 23 images"
    with pytest.raises(UserError, match=message) as refusal:
        load("", "imagenette")
    assert "\n" not in str(refusal.value)


def test_a_format_that_needs_tensorflow_is_refused(tmp_path):
    folder = prepare(tmp_path, Imagenette)
    info = (folder / "dataset_info.json").read_text()
    (folder / "dataset_info.json").write_text(info.replace("array_record", "riegeli"))
    for path in folder.glob("*.array_record*"):
        path.rename(str(path).replace("array_record", "riegeli"))
    message = rf"^data.name=imagenette: {folder} cannot be read \(.*RIEGELI.*: prepare it, where "
    with pytest.raises(UserError, match=message) as refusal:
        load("", "imagenette")
    assert "\n" not in str(refusal.value)


def test_the_classes_of_a_known_data_set_are_counted(pets):
    message = r"holds 2 classes, but data.name=imagenette has 10"
    with pytest.raises(UserError, match=message):
        load(pets, "imagenette", SIZE)


# ---- tfds:NAME


class Blossoms(Imagenette):
    """A data set that TFDS knows: grey squares of 20 pixels with two labels, to train on only."""

    name = "blossoms"
    splits = (("train", 12),)

    def features(self) -> dict:
        image = tfds.features.Image(shape=(20, 20, 1), encoding_format="png")
        labels = dict(kind=tfds.features.ClassLabel(num_classes=3), colour=self.colour)
        return dict(picture=image, **labels)

    colour = tfds.features.ClassLabel(num_classes=2)

    def _info(self):
        features = tfds.features.FeaturesDict(self.features())
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=("picture", "kind")
        )

    def _generate_examples(self, split, n):
        for i in range(n):
            path = Path(self.data_dir).parent / f"{i}.png"  # arrays would need TensorFlow
            write_image(path, np.full((20, 20), 10 * i, np.uint8))
            yield i, dict(picture=path.read_bytes(), kind=i % 3, colour=0)


def test_a_data_set_is_downloaded_prepared_and_found_again(tmp_path, monkeypatch, capsys, caplog):
    """Image and label are found by supervised_keys, and a fifth is held out to test on."""
    data = load("", "tfds:blossoms", size=0)
    assert "downloading and preparing tfds:blossoms in " in capsys.readouterr().err
    assert (data.name, data.class_names, data.test_from_train) == (
        "tfds:blossoms",
        ("0", "1", "2"),
        2,
    )
    assert data.train_images.shape == (10, 20, 20, 3)  # with image_size=0, their own side
    greys = np.concatenate([data.train_images[:, 0, 0, 0], data.test_images[:, 0, 0, 0]])
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert sorted(greys) == [*range(0, 120, 10)]
    np.testing.assert_array_equal(labels, greys // 10 % 3)
    assert "blossoms/1.0.0: its labels are kind; not used: colour." in caplog.text
    monkeypatch.setattr(Blossoms, "download_and_prepare", None)
    monkeypatch.setattr(prepared, "prepare", None)
    assert load("", "tfds:blossoms", size=0).digest == data.digest


def test_several_labels_are_refused_before_a_download(monkeypatch):
    monkeypatch.setattr(Blossoms, "download_and_prepare", None)
    monkeypatch.setattr(
        Blossoms,
        "_info",
        lambda self: tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(self.features())
        ),
    )
    message = (
        r"^data.name=tfds:blossoms: has several features of the kind ClassLabel \(colour, kind\)"
    )
    with pytest.raises(UserError, match=message):
        load("", "tfds:blossoms")


@pytest.mark.parametrize(
    "name, message",
    [
        ("oxford_flower102", "TFDS knows no such data set.*; did you mean tfds:oxford_flowers102"),
        ("MNISTS", "TFDS knows no such data set.*; did you mean tfds:mnist"),
        ("../x", "expected tfds: and a name of https://www.tensorflow.org/datasets/catalog, such"),
        ("mnist:9.9.9", "Dataset mnist cannot be loaded at version 9.9.9, only: "),
        ("mnist", r"cannot be downloaded and prepared \(cannot reach http.*: prepare it, where"),
    ],
)
def test_what_tfds_cannot_give_is_refused_in_one_line(monkeypatch, name, message):
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", None)
    with pytest.raises(UserError, match=rf"^data.name=tfds:{name}: {message}") as refusal:
        load("", f"tfds:{name}")
    assert "\n" not in str(refusal.value)


def test_tfds_is_not_imported_beside_other_imports(pets, tmp_path):
    """Only what is read without TFDS may be found in a thread while jax is imported."""

    def may(name: str, directory: str = "") -> bool:
        return registry.may_use_tfds(ml_collections.ConfigDict(dict(name=name, dir=directory)))

    assert not any(may(name) for name in ("digits", "synthetic", "npz", "folder"))
    assert [may("imagenette", each) for each in ("", str(pets))] == [True, False]
    assert may("tfds:mnist") and may("mnist") and may("cifar10") and may("cifar10", str(pets))
    archive = tmp_path / cifar10_archive.ARCHIVE
    archive.touch()
    assert not may("cifar10", str(archive))
