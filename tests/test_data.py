"""Data sets by name: your own, refused arrays, digests, digits, random images."""

import dataclasses
import re

import ml_collections
import numpy as np
import pytest

import cnn_spmd
from cnn_spmd.data import dataset, digest, registry
from cnn_spmd.data.dataset import Dataset
from cnn_spmd.data.digits import load_digits
from cnn_spmd.errors import UserError
from cnn_spmd.training import build, loop


def config_data(**fields) -> ml_collections.ConfigDict:
    synthetic = dict(image_size=24, classes=5, train_examples=20, test_examples=10)
    return ml_collections.ConfigDict(dict(dir="", fallback="", synthetic=synthetic) | fields)


def arrays() -> dict[str, np.ndarray]:
    """Return 6 + 4 grey images of three classes."""
    labels = np.arange(10, dtype=np.int32) % 3
    images = np.zeros((10, 8, 8, 3), np.uint8) + (80 * labels[:, None, None, None]).astype(np.uint8)
    return dict(
        train_images=images[:6],
        train_labels=labels[:6],
        test_images=images[6:],
        test_labels=labels[6:],
    )


def load_greys(data: ml_collections.ConfigDict) -> Dataset:
    return Dataset(name="greys", **arrays(), class_names=("black", "dark", "light"))


# ---- A data set of your own


def test_a_loader_of_arrays_is_all_that_a_data_set_takes(monkeypatch, tmp_path):
    monkeypatch.setitem(registry.DATASETS, "greys", load_greys)
    data = registry.load(config_data(name="greys"))
    assert (data.name, data.mirror, data.fallback) == ("greys", True, None)
    assert data.digest == digest.of_arrays(arrays())
    for field, array in arrays().items():
        np.testing.assert_array_equal(data.arrays[field], array)


def test_validation_takes_the_last_training_images(monkeypatch, config):
    """They stand where the test images were; the digest is that of the whole data set."""
    monkeypatch.setitem(registry.DATASETS, "greys", load_greys)
    config.update(dict(batch_size=3, data=dict(name="greys", validation=3)))
    data = build.prepare(config).data
    assert (data.name, data.digest) == ("greys_validation", digest.of_arrays(arrays()))
    for split, part in (("train", slice(3)), ("test", slice(3, None))):
        for kind in ("images", "labels"):
            expected = arrays()[f"train_{kind}"][part]
            np.testing.assert_array_equal(data.arrays[f"{split}_{kind}"], expected)


def test_validation_of_images_sorted_by_class_is_evenly_spaced():
    data = load_greys(config_data())
    order = np.argsort(data.train_labels, kind="stable")
    by_class = dataclasses.replace(
        data, train_images=data.train_images[order], train_labels=data.train_labels[order]
    )
    split = by_class.with_validation(3)
    for labels in (split.train_labels, split.test_labels):
        np.testing.assert_array_equal(labels, [0, 1, 2])
    np.testing.assert_array_equal(split.test_images[:, 0, 0, 0], [0, 80, 160])


@pytest.mark.parametrize("examples", [2, 4, 6, 7])
def test_validation_without_all_classes_is_refused(examples):
    expected = f"data.validation={examples}: greys has 6 training images, expected all its classes"
    with pytest.raises(UserError, match=expected):
        load_greys(config_data()).with_validation(examples)


def test_transposed_images_have_the_digest_of_their_pixels():
    """As arrays [N, C, H, W] from elsewhere become [N, H, W, C]."""
    turned = arrays()
    for split in ("train_images", "test_images"):
        channels_first = np.ascontiguousarray(turned[split].transpose(0, 3, 1, 2))
        turned[split] = channels_first.transpose(0, 2, 3, 1)
    assert not turned["train_images"].flags["C_CONTIGUOUS"]
    assert digest.of_arrays(turned) == digest.of_arrays(arrays())


def test_a_known_digest_is_looked_up_by_every_byte(monkeypatch):
    monkeypatch.setattr(digest, "KNOWN", {digest.quick_hash(arrays()): "known"})
    assert digest.of_arrays(arrays()) == "known"
    for name in arrays():
        changed = arrays()
        changed[name][-1] += 1
        assert digest.of_arrays(changed) != "known"


def test_a_run_trains_on_it_and_records_its_digest(monkeypatch, tmp_path, config):
    monkeypatch.setitem(registry.DATASETS, "greys", load_greys)
    config.update(dict(batch_size=3, epochs=1))
    config.data.update(dict(name="greys", crop_pad=1))
    summary = loop.train(config, tmp_path / "r")
    assert summary["dataset"] == "greys"
    assert summary["data_digest"] == digest.of_arrays(arrays())
    assert summary["eval"]["examples"] == 4


IMAGES = np.zeros((6, 8, 8, 3), np.uint8)
REFUSED = {
    "a list": (dict(train_images=[1]), "train_images: found list, expected a NumPy array, uint8"),
    "floats": (
        dict(train_images=IMAGES.astype(np.float32)),
        r"train_images: found float32 \(6, 8, 8, 3\), expected uint8 \[N, H, W, 3\] with H = W",
    ),
    "grey": (dict(test_images=IMAGES[..., 0]), r"test_images: found uint8 \(6, 8, 8\), expected"),
    "one channel": (dict(train_images=IMAGES[..., :1]), r"train_images: found uint8 \(6, 8, 8, 1"),
    "oblong": (dict(train_images=IMAGES[:, 1:]), r"train_images: found uint8 \(6, 7, 8, 3\)"),
    "nothing to train on": (
        dict(train_images=IMAGES[:0], train_labels=np.zeros(0, np.int32)),
        r"train_images: found uint8 \(0, 8, 8, 3\), expected at least one image",
    ),
    "nothing to test on": (
        dict(test_images=IMAGES[:0], test_labels=np.zeros(0, np.int32)),
        r"test_images: found uint8 \(0, 8, 8, 3\), expected at least one image",
    ),
    "two sizes": (
        dict(test_images=np.zeros((4, 9, 9, 3), np.uint8)),
        r"train_images, test_images: found \(6, 8, 8, 3\) and \(4, 9, 9, 3\), expected images of",
    ),
    "long labels": (
        dict(train_labels=np.zeros(6, np.int64)),
        r"train_labels: found int64 \(6,\), expected int32 \[6\], one label per image",
    ),
    "a list of labels": (dict(test_labels=[0] * 4), "test_labels: found list, expected a NumPy"),
    "a label too few": (dict(train_labels=np.zeros(5, np.int32)), r"train_labels: found int32 \(5"),
    "label 3": (
        dict(test_labels=np.array([0, 1, 2, 3], np.int32)),
        "test_labels: found label 3, expected 0 to 2 for 3 class names",
    ),
    "one class": (
        dict(
            class_names=("cat",),
            train_labels=np.zeros(6, np.int32),
            test_labels=np.zeros(4, np.int32),
        ),
        "class_names: found 1 class, expected at least two classes",
    ),
    "label -1": (
        dict(test_labels=np.array([0, 1, 2, -1], np.int32)),
        "test_labels: found label -1, expected 0 to 2",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_arrays_of_another_form_are_refused_in_one_line(monkeypatch, what):
    change, message = REFUSED[what]

    def load(data: ml_collections.ConfigDict) -> Dataset:
        return dataclasses.replace(load_greys(data), **change)

    monkeypatch.setitem(registry.DATASETS, "greys", load)
    with pytest.raises(UserError, match=rf"^data.name=greys: {message}") as refusal:
        registry.load(config_data(name="greys"))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "call", [cnn_spmd.prepare, lambda config, data: loop.train(config, "run", data)]
)
@pytest.mark.parametrize("what", ["floats", "label 3", "a dict"])
def test_data_given_in_python_are_checked_as_those_of_a_loader(
    what, call, config, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    change, message = REFUSED.get(what, ({}, "found dict in its place, expected a Dataset"))
    data = arrays() if what == "a dict" else dataclasses.replace(load_greys(None), **change)
    config.data.name = "greys"
    with pytest.raises(UserError, match=rf"^data.name=greys: {message}"):
        call(config, data=data)


def test_a_run_does_not_resume_on_other_data_given_in_python(config, tmp_path):
    data = load_digits(None)
    loop.train(config, tmp_path, dataclasses.replace(data, digest=""))
    other = dataclasses.replace(data, train_labels=data.train_labels[::-1], digest="")
    config.epochs = 3
    with pytest.raises(UserError, match="data_digest"):
        loop.train(config, tmp_path, other)


def test_a_loader_that_returns_something_else_is_refused(monkeypatch):
    monkeypatch.setitem(registry.DATASETS, "greys", lambda data: arrays())
    message = "^data.name=greys: found dict in its place, expected a Dataset"
    with pytest.raises(UserError, match=message):
        registry.load(config_data(name="greys"))


def test_a_data_set_that_is_still_to_be_read_is_checked_before(monkeypatch):
    """The check may refuse it, and then nothing is read."""

    def load_later(data: ml_collections.ConfigDict) -> dataset.Unread:
        return dataset.Unread(load_greys(data), read=lambda: decoded.append(data))

    def refuse(preview: Dataset) -> None:
        raise UserError(f"{preview.name} is refused")

    decoded = []
    monkeypatch.setitem(registry.DATASETS, "greys", load_later)
    with pytest.raises(UserError, match="greys is refused"):
        registry.load(config_data(name="greys"), refuse)
    assert decoded == []


def test_an_unknown_name_is_refused(tfds_directory):
    with pytest.raises(UserError, match=r"data.name=mnist: .*cifar10, digits, synthetic"):
        registry.load(config_data(name="mnist"))


# ---- Digests


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_the_digest_is_the_same_every_time(name):
    """A digest of synthetic images is made of their sizes."""
    first, again = (registry.load(config_data(name=name)).digest for _ in range(2))
    assert first == again
    assert re.fullmatch("[0-9a-f]{16}", first)
    sizes = dict(image_size=24, classes=5, train_examples=20, test_examples=11)
    other = registry.load(config_data(name=name, synthetic=sizes)).digest
    assert (other != first) == (name == "synthetic")


def test_threads_compute_the_same_digest(monkeypatch):
    expected = digest.of_arrays(arrays())
    monkeypatch.setattr(digest, "THREADED_BYTES", 0)
    assert digest.of_arrays(arrays()) == expected


def test_each_pixel_and_label_counts_in_the_digest():
    values = {field: np.zeros_like(array) for field, array in arrays().items()}
    digests = {digest.of_arrays(values)}
    for field in values:
        values[field].flat[-1] = 1
        digests.add(digest.of_arrays(values))
    values["train_images"] = values["train_images"][::-1]  # in another order
    digests.add(digest.of_arrays(values))
    assert len(digests) == 6


# ---- Digits and random images


def test_digits():
    found, again = (
        registry.load(config_data(name="digits")),
        registry.load(config_data(name="digits")),
    )
    for field, array in found.arrays.items():
        np.testing.assert_array_equal(again.arrays[field], array)
    assert found.train_images.shape == (1437, 32, 32, 3)
    assert found.test_images.shape == (360, 32, 32, 3)
    assert (found.train_images.dtype, found.train_labels.dtype) == (np.uint8, np.int32)
    assert (found.train_images.min(), found.train_images.max()) == (0, 255)
    assert (found.name, found.fallback, found.mirror) == ("digits", None, False)
    assert found.class_names == tuple("0123456789")
    per_class = np.bincount(found.test_labels, minlength=10)
    assert 34 <= per_class.min() <= per_class.max() <= 37  # stratified
    # Images and labels belong together: most are nearest to the mean image of their class.
    means = np.stack([found.train_images[found.train_labels == k].mean(0) for k in range(10)])
    distances = ((found.test_images[:, None] - means) ** 2).sum((2, 3, 4))
    assert (distances.argmin(1) == found.test_labels).mean() > 0.85


def test_synthetic():
    found, again = (
        registry.load(config_data(name="synthetic")),
        registry.load(config_data(name="synthetic")),
    )
    for field, array in found.arrays.items():
        np.testing.assert_array_equal(again.arrays[field], array)
    assert found.train_images.shape == (20, 24, 24, 3)
    assert found.test_images.shape == (10, 24, 24, 3)
    assert (found.train_images.dtype, found.train_labels.dtype) == (np.uint8, np.int32)
    assert set(found.train_labels) == set(range(5))
    assert len(found.class_names) == 5
    assert abs(found.train_images.mean() - 127.5) < 3
    assert not np.array_equal(found.train_images[:10], found.test_images)


def test_a_data_set_larger_than_memory_is_refused():
    huge = config_data(name="synthetic")
    huge.synthetic.update(dict(train_examples=10**7, image_size=4096))
    message = r"data.name=synthetic: does not fit in this machine's memory \(Unable to allocate"
    with pytest.raises(UserError, match=message):
        registry.load(huge)


# ---- Arrays in an .npz file


def save(path, **named) -> ml_collections.ConfigDict:
    """Write arrays to an .npz file; return config.data that names it."""
    np.savez(path, **named)
    return config_data(name="npz", dir=str(path), image_size=0)


def keras() -> dict[str, np.ndarray]:
    """Return `arrays` as Keras's data sets have them, grey and with 64-bit labels."""
    found = arrays()
    return dict(
        x_train=found["train_images"][..., 0],
        y_train=found["train_labels"].astype(np.int64),
        x_test=found["test_images"][..., 0],
        y_test=found["test_labels"].astype(np.int64),
    )


def test_arrays_of_an_npz_file(tmp_path, caplog):
    """They may have several names and forms; a validation split comes before the test split."""
    data = registry.load(save(tmp_path / "a.npz", **keras()))
    for field, array in arrays().items():
        np.testing.assert_array_equal(data.arrays[field], array)
    assert (data.name, data.class_names) == (f"npz-{data.digest[:8]}", ("0", "1", "2"))
    assert data.test_from_train == 0
    named = arrays() | dict(
        val_images=arrays()["train_images"], val_labels=np.arange(6)[:, None] % 3
    )
    other = registry.load(save(tmp_path / "b.npz", **named))
    np.testing.assert_array_equal(other.test_images, data.train_images)
    np.testing.assert_array_equal(other.test_labels, data.train_labels)
    assert "tests on val_images; test_images is not used" in caplog.text
    larger = save(tmp_path / "a.npz", **keras())
    larger.image_size = 16
    np.testing.assert_array_equal(
        registry.load(larger).train_images, data.train_images.repeat(2, 1).repeat(2, 2)
    )


def test_an_npz_file_without_test_images_has_a_part_held_out(tmp_path, capsys, config):
    images, labels = arrays()["train_images"], np.array([*"cabcab"])
    data = registry.load(save(tmp_path / "a.npz", images=images, labels=labels))
    assert data.class_names == ("a", "b", "c")
    assert sorted(data.test_labels) == [0, 1, 2]
    config.batch_size = 3
    config.data.update(dict(name="npz", dir=str(tmp_path / "a.npz")))
    setup = build.prepare(config)
    assert setup.data_fields["test_images_from_train"] == 3
    build.say_choices(config, setup)
    said = capsys.readouterr().out
    assert "a.npz has nothing to test on: 3 of its images are held out" in said
    assert "epochs" not in said
    config.steps = 1001
    build.say_choices(config, build.prepare(config))
    said = "warning: 1,001 steps are 1,001 epochs of a.npz; --config.steps=0 --config.epochs=N"
    assert said in capsys.readouterr().out
    assert setup.config.data.image_size == 8


BAD_ARRAYS = {
    "no labels": (
        dict(x_train=IMAGES),
        "holds x_train, expected x_train, y_train, x_test, y_test, or train_images",
    ),
    "no labels to test on": (
        dict(x_train=IMAGES, y_train=range(6), x_test=IMAGES),
        "holds x_test without y_test, expected both or neither$",
    ),
    "no images to test on": (
        dict(images=IMAGES, labels=range(6), val_labels=range(6)),
        "holds val_labels without val_images, expected both or neither$",
    ),
    "floats": (
        dict(x=IMAGES / np.float32(255), y=range(6)),
        "x: found float32, expected uint8 from 0 to 255: of floats from 0 to 1, save",
    ),
    "channels first": (
        dict(x=np.moveaxis(IMAGES, 3, 1), y=range(6)),
        r"x: found the shape \(6, 3, 8, 8\), expected \[N, H, W\]",
    ),
    "oblong": (
        dict(x=IMAGES[:, 1:], y=[0] * 6),
        "holds images of 7x8 pixels, expected squares: set --config.data.image_size",
    ),
    "one-hot": (
        dict(x=IMAGES, y=np.eye(6)),
        r"y: found float64 \(6, 6\), expected 6 integers or strings, one per image: of one-hot",
    ),
    "a pickle": (dict(x=IMAGES, y=np.array([None] * 6)), "cannot be read .*ValueError: Object arr"),
    "a class to test on only": (
        dict(x_train=IMAGES, y_train=[0] * 6, x_test=IMAGES, y_test=[0, 7, 0, 0, 0, 0]),
        "label 7 is only among those to test on",
    ),
    "a single image": (
        dict(x=IMAGES, y=[0, 0, 0, 0, 0, 4]),
        "has nothing to test on, and 1 image of class 4, expected at least 2",
    ),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_bad_arrays_of_an_npz_file_are_refused_in_one_line(tmp_path, what):
    named, message = BAD_ARRAYS[what]
    data = save(tmp_path / "a.npz", **named)
    with pytest.raises(UserError, match=rf"^data.dir={tmp_path}/a.npz: {message}") as refusal:
        registry.load(data)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "path, problem", [("gone.npz", "no such file"), ("a.npy", "no .npz file"), ("", "no .npz file")]
)
def test_a_file_that_is_no_npz_is_refused(tmp_path, path, problem):
    np.save(tmp_path / "a.npy", IMAGES)
    where = str(tmp_path / path)
    with pytest.raises(UserError, match=f"^data.dir={where}: {problem}, expected one that numpy"):
        registry.load(config_data(name="npz", dir=where, image_size=0))
