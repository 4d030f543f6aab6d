"""Photographs in class folders and from TFDS: what the prepared arrays hold, what is refused, how they are kept."""

import concurrent.futures
import errno
import io
import json
import os
import shutil
import struct
import tempfile
import threading
import time
import zlib
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from cnn_spmd import config as configs
from cnn_spmd import sweep
from cnn_spmd.data import dataset, digest, folder, prepared
from cnn_spmd.data import registry as sources
from cnn_spmd.errors import UserError
from cnn_spmd.report import pictures
from cnn_spmd.training import build as setup
from cnn_spmd.training import loop

SIZE = 16


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(
        tempfile, "tempdir", str(tmp_path)
    )  # TFDS leaves an empty temporary folder a builder


def colours(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth image, which JPEG and rescaling change little: colours that run across it."""
    start, end = np.random.default_rng(seed).integers(256, size=(2, 3))
    along = np.add.outer(np.linspace(0, 1, height), np.linspace(0, 1, width))[..., None] / 2
    return (start * (1 - along) + end * along).astype(np.uint8)


def write(path: Path, image: np.ndarray | Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(
        path,
        "png" if path.suffix == ".png" else "jpeg",
        **({} if path.suffix == ".png" else dict(quality=95)),
    )


@pytest.fixture
def root(tmp_path) -> Path:
    """Two classes: 3 + 2 images to train on, 1 + 1 to test on."""
    names = [
        "train/dog/b.jpg",
        "train/dog/a.JPEG",
        "train/cat/c.png",
        "train/cat/d.jpeg",
        "train/cat/e.jpg",
        "val/cat/a.jpg",
        "val/dog/a.jpg",
    ]
    for seed, name in enumerate(names):
        write(tmp_path / "pets" / name, colours(40, 30, seed))
    return tmp_path / "pets"


def load(
    root: Path | str, name: str = "folder", size: int = SIZE, skip_bad: int = 0, **check
) -> dataset.Dataset:
    return sources.load(
        ml_collections.ConfigDict(
            dict(name=name, dir=str(root), image_size=size, skip_bad=skip_bad)
        ),
        **check,
    )


def caches(tmp_path: Path) -> list[Path]:
    """The folders that are prepared to the end."""
    return sorted(
        path for path in (tmp_path / "tfds/cnn_spmd_photographs").glob("*") if not path.suffix
    )


def test_classes_and_images_in_their_order(root, tmp_path):
    (root / "train/cat/notes.txt").write_text("no image")
    (root / "train/.hidden").mkdir()
    (root / "test/other").mkdir(parents=True)  # val/ comes first
    data = load(root)
    assert data.class_names == ("cat", "dog")
    assert data.name.startswith("folder-")
    assert (data.mirror, data.fallback) == (True, None)
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert {x.dtype for x in (data.train_labels, data.test_labels)} == {np.dtype(np.int32)}
    assert isinstance(data.train_images, np.memmap)
    assert data.train_images.shape == (5, SIZE, SIZE, 3)
    assert data.train_images.dtype == np.uint8
    for image, seed in zip(
        [*data.train_images, *data.test_images], [2, 3, 4, 1, 0, 5, 6], strict=True
    ):
        expected = colours(40, 30, seed)[5:35]
        np.testing.assert_allclose(image.mean((0, 1)), expected.mean((0, 1)), atol=3)


@pytest.mark.parametrize(
    ("height", "width"), [(300, 401), (401, 300), (256, 256), (100, 80), (512, 768), (768, 512)]
)
def test_shorter_side_rescaled_and_centre_cropped(tmp_path, height, width):
    """Against the paper's own order: rescale to a shorter side of 256, then cut out the centre."""
    image = colours(height, width)
    if (
        min(height, width) == 512
    ):  # rescaled by a whole number, so the two orders agree on noise too
        image = np.random.default_rng(0).integers(256, size=image.shape, dtype=np.uint8)
    image = Image.fromarray(image)
    write(tmp_path / "image.png", image)
    scale = 256 / min(height, width)
    rescaled = np.asarray(
        image.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR), int
    )
    top, left = ((side - 256) // 2 for side in rescaled.shape[:2])
    got = prepared.decoded(tmp_path / "image.png", 256)
    assert got.shape == (256, 256, 3)
    assert np.abs(got - rescaled[top : top + 256, left : left + 256]).max() <= 2


def png16(path: Path, values_HWC: np.ndarray) -> None:
    """A PNG of 16-bit grey (one channel) or colour (three), which pillow reads and cannot write."""
    height, width, channels = values_HWC.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values_HWC)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 0 if channels == 1 else 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def transparent_palette() -> Image.Image:
    image = Image.fromarray(colours(SIZE, SIZE)).quantize(256)
    image.info["transparency"] = bytes(range(256))
    return image


KINDS = {
    "grey.jpg": lambda image: image.convert("L"),
    "grey.png": lambda image: image.convert("L"),
    "cmyk.jpg": lambda image: image.convert("CMYK"),
    "palette.png": lambda image: image.quantize(256),
    "transparent.png": lambda image: image.convert("RGBA"),
    "transparent_palette.png": lambda image: transparent_palette(),
    "transparent_grey.png": lambda image: image.convert("LA"),
    "bits.png": lambda image: image.convert("1"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb(tmp_path, name):
    image = Image.fromarray(colours(SIZE, SIZE))
    write(tmp_path / name, KINDS[name](image))
    got = prepared.decoded(tmp_path / name, SIZE).astype(int)
    assert got.shape == (SIZE, SIZE, 3)
    expected = np.asarray(
        image.convert("L" if "grey" in name else "1" if "bits" in name else "RGB").convert("RGB"),
        int,
    )
    assert np.abs(got - expected).max() <= (12 if "palette" in name or ".jpg" in name else 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_become_eight(tmp_path, channels):
    values = np.random.default_rng(0).integers(1 << 16, size=(SIZE, SIZE, channels))
    png16(tmp_path / "deep.png", values)
    np.testing.assert_array_equal(
        prepared.decoded(tmp_path / "deep.png", SIZE), np.broadcast_to(values >> 8, (SIZE, SIZE, 3))
    )


def test_webp_is_read(root):
    Image.fromarray(colours(40, 30, 6)).save(root / "val/dog/b.WebP", "webp", lossless=True)
    shutil.copy(root / "val/dog/b.WebP", root / "val/dog/c.jpg")  # the content decides
    data = load(root)
    assert data.test_labels.tolist() == [0, 1, 1, 1]
    np.testing.assert_array_equal(data.test_images[2], data.test_images[3])
    np.testing.assert_allclose(
        data.test_images[2].mean((0, 1)), data.test_images[1].mean((0, 1)), atol=3
    )


# ------------------------------------------------------------------------------------------------------------ refusals


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 2])


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def a_text(path: Path) -> None:
    path.write_text("<html>Not found</html>")


def a_tiff(path: Path) -> None:
    pixels = np.random.default_rng(0).random((20, 20), np.float32)  # which would become zeros
    Image.fromarray(pixels).save(path, "tiff")


def an_eps(path: Path) -> None:
    Image.new("RGB", (20, 20)).save(path, "eps")  # a program, which Ghostscript would run


@pytest.mark.parametrize("spoil", [cut, nothing, a_text, a_tiff, an_eps])
@pytest.mark.parametrize("name", ["train/cat/c.png", "val/dog/a.jpg"])
def test_an_image_that_cannot_be_read_is_named(root, tmp_path, name, spoil):
    spoil(root / name)
    with pytest.raises(UserError, match=rf"^{root}: cannot read .*{name} \(.*\): mend") as refusal:
        load(root)
    assert "\n" not in str(refusal.value)
    assert caches(tmp_path) == []


@pytest.mark.parametrize(
    "spoil", [a_tiff, an_eps, lambda path: Image.new("RGB", (20, 20)).save(path, "gif")]
)
def test_an_image_of_another_format_is_refused_whatever_its_name(tmp_path, spoil):
    spoil(tmp_path / "a.png")
    for file in (tmp_path / "a.png", io.BytesIO((tmp_path / "a.png").read_bytes())):
        with pytest.raises(ValueError, match=r"^is no JPEG, PNG or WebP image$"):
            prepared.decoded(file, SIZE)


def test_of_many_images_all_are_named_in_one_pass(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared, "SHOWN", 3)
    for path in [*(root / "train").rglob("*.*"), root / "val/cat/a.jpg"]:
        nothing(path)
    (root / "val/cat/a.jpg").rename(root / "val/cat/a\n.jpg")
    with pytest.raises(
        UserError,
        match=rf"^{root}: cannot read {root}/train/cat/c.png \(.*\) and 5 more of 7 images, all of "
        r"them listed in (.*): mend or remove them, .*--config.data.skip_bad=6$",
    ) as refusal:
        load(root)
    names = [
        "train/cat/c.png",
        "train/cat/d.jpeg",
        "train/cat/e.jpg",
        "train/dog/a.JPEG",
        "train/dog/b.jpg",
        r"val/cat/a\n.jpg",
    ]
    shown = [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("cannot read")
    ]
    assert [line.split(" (")[0] for line in shown] == [
        f"cannot read {root / name}" for name in names[:3]
    ]
    (listing,) = (tmp_path / "tfds/cnn_spmd_photographs").glob("*.txt")
    assert str(listing) in str(refusal.value)
    assert [line.split(" (")[0] for line in listing.read_text().splitlines()] == [
        str(root / name) for name in names
    ]


def flat(folder: Path) -> None:
    """Without class folders, as ImageNet's validation images are published."""
    for path in sorted(folder.glob("*/*")):
        path.rename(folder / f"{path.parent.name}_{path.name}")
    for path in folder.glob("*/"):
        path.rmdir()


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
    "no val": (lambda root: shutil.rmtree(root / "val"), "holds no val/ or test/"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "holds no train/"),
    "no class": (
        lambda root: [shutil.rmtree(path) for path in root.glob("*/*")],
        "train/ and val/ hold no class folders",
    ),
    "nothing": (shutil.rmtree, "is no folder"),
    "a flat val": (lambda root: flat(root / "val"), "val/ holds images but no class folders"),
    "a flat train": (lambda root: flat(root / "train"), "train/ holds images but no class folders"),
    "a space": (
        lambda root: (root / "val/dog").rename(root / "val/dog "),
        "class 'dog' is in train/ but not in val/, which has 'dog ': they differ in spaces",
    ),
    "another accent": (
        lambda root: [
            (root / split / "dog").rename(root / split / name)
            for split, name in (("train", "\xe9"), ("val", "e\u0301"))
        ],
        r"class '\u0065\u0301' is in val/ but not in train/, which has '\\xe9': they differ "
        r"in Unicode normalisation \('e\\u0301'\)",
    ),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_is_lacking_is_named(root, tmp_path, what):
    spoil, message = LACKING[what]
    spoil(root)
    with pytest.raises(UserError, match=rf"^data.dir={root}: {message}.*expected") as refusal:
        load(root)
    assert "\n" not in str(refusal.value)
    assert caches(tmp_path) == []


def test_the_folder_must_be_given():
    with pytest.raises(
        UserError, match=r"data.dir=: is empty, expected a folder that holds train/CLASS"
    ):
        load("")


def test_where_there_is_no_room_it_says_so(root, tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepared.shutil,
        "disk_usage",
        lambda _: shutil._ntuple_diskusage(1, 0, 7 * SIZE * SIZE * 3 - 1),
    )
    with pytest.raises(
        UserError,
        match=rf"TFDS_DATA_DIR={tmp_path}/tfds: has 5,375 bytes free, but 7 images of 16x16 "
        "need 5,376 bytes",
    ):
        load(root)
    (tmp_path / "tfds").rename(tmp_path / "gone")
    (tmp_path / "tfds").write_text("a file")
    with pytest.raises(
        UserError, match=rf"TFDS_DATA_DIR={tmp_path}/tfds: cannot keep the prepared images there"
    ):
        load(root)


def test_a_link_to_nowhere_is_named(root):
    (root / "train/cat/c.png").unlink()
    (root / "train/cat/c.png").symlink_to(root / "gone.png")
    with pytest.raises(UserError, match=rf"^data.dir={root}: {root}/train/cat/c.png: No such file"):
        load(root)


def test_a_pipe_is_named(root):
    """It would be waited for."""
    os.mkfifo(root / "val/cat/b.jpg")
    with pytest.raises(
        UserError, match=rf"^data.dir={root}: {root}/val/cat/b.jpg: is no regular file, expected"
    ):
        load(root)


def test_a_line_break_in_a_name_makes_no_second_line(root):
    (root / "val/cat/a\nb.jpg").write_text("no image")
    with pytest.raises(
        UserError, match=rf"^{root}: cannot read .*val/cat/a\\nb.jpg \(.*\): mend"
    ) as refusal:
        load(root)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["train/cat/more.jpg/", "train/cat/a.gif", "val/labels.csv"])
def test_what_is_left_out_is_told(root, caplog, name):
    (root / name).mkdir() if name.endswith("/") else (root / name).write_text(
        "an image of another kind, or none"
    )
    assert len(load(root).train_images) == 5
    assert f"left out, as no .jpg/.jpeg/.png/.webp in a class folder: {root / name}." in caplog.text
    (root / "test.txt").write_text("beside the two folders, anything may be")
    (root / "train/cat/b.gif").write_text("another one")
    load(root)
    assert " and 1 more." in caplog.text


def test_a_class_whose_name_is_no_text_can_be_drawn(root):
    for split in ("train", "val"):
        os.rename(root / split / "dog", os.fsencode(root / split) + b"/d\xf6g")
    assert load(root).class_names == ("cat", "d\ufffdg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(batch_size=6), "batch_size=6: folder-.* has 5 training images"),
        ({"data.crop": SIZE + 1}, "data.crop=17: images are 16 pixels wide"),
        ({"model.name": "alexnets"}, "model.name=alexnets: unknown"),
        (dict(dense_microbatch=3), "dense_microbatch=3: does not divide batch_size=4"),
    ],
)
def test_what_does_not_fit_is_refused_before_images_are_decoded(
    root, config, monkeypatch, change, message
):
    config.update(
        dict(
            batch_size=4,
            steps=2,
            data=dict(name="folder", dir=str(root), image_size=SIZE, crop_pad=1),
        )
    )
    config.update_from_flattened_dict(change)
    monkeypatch.setattr(prepared, "prepare", None)
    with pytest.raises(UserError, match=f"^{message}"):
        setup.prepare(config)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
def test_a_sweep_refuses_it_as_early(root, monkeypatch):
    monkeypatch.setattr(prepared, "prepare", None)
    shared = [
        "--config",
        str(Path(__file__).parent.parent / "experiments/alexnet_cifar.py"),
        "--config.data.name=folder",
        f"--config.data.dir={root}",
        f"--config.data.image_size={SIZE}",
    ]
    (row,) = sweep.plan([dict(batch_size="6")], shared, jax.devices()[:1])
    assert row["status"] == "refused"
    assert "batch_size=6: folder-" in row["reason"]


def test_a_workdir_that_is_anothers_is_refused_before_images_are_decoded(
    root, config, tmp_path, monkeypatch
):
    config.update(
        dict(
            batch_size=4,
            steps=2,
            data=dict(name="folder", dir=str(root), image_size=SIZE, crop_pad=1),
        )
    )
    monkeypatch.setattr(prepared, "prepare", None)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("mine")
    with pytest.raises(
        UserError, match=f"^--workdir={tmp_path}/notes: is not empty and holds no run"
    ):
        loop.train(config, tmp_path / "notes")
    (tmp_path / "notes/config.json").write_text("{}")
    with pytest.raises(
        UserError, match=f"^--workdir={tmp_path}/notes: holds a run with another config"
    ):
        loop.train(config, tmp_path / "notes")


def test_pictures_of_other_photographs_are_refused_before_these_are_decoded(
    root, config, tmp_path, monkeypatch
):
    config.update(
        dict(
            batch_size=4,
            steps=2,
            data=dict(name="folder", dir=str(root), image_size=SIZE, crop_pad=1),
        )
    )
    run = setup.prepare(config)
    (tmp_path / "r").mkdir()
    (tmp_path / "r/config.json").write_text(json.dumps(run.saved))
    shutil.copytree(root, tmp_path / "other")
    shutil.copy(root / "val/cat/a.jpg", tmp_path / "other/val/cat/b.jpg")
    monkeypatch.setattr(prepared, "prepare", None)
    with pytest.raises(
        UserError,
        match=rf"^{tmp_path}/r: was trained on {run.data.name}, but .*/other holds folder-",
    ):
        pictures.restore(tmp_path / "r", str(tmp_path / "other"))
    shutil.rmtree(root)
    with pytest.raises(
        UserError, match=r"/r: data.dir=.* is no folder.*; where it has moved: --data_dir=PATH$"
    ):
        pictures.restore(tmp_path / "r", None)


def test_the_check_sees_the_data_set_as_it_will_be(root):
    seen = []
    data = load(root, check=seen.append)
    (before,) = seen
    assert (before.name, before.class_names, before.mirror) == (
        data.name,
        data.class_names,
        data.mirror,
    )
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        was, is_ = getattr(before, field), getattr(data, field)
        assert (was.shape, was.dtype) == (is_.shape, is_.dtype)
    load(root, check=seen.append)  # what is prepared is taken
    assert len(seen) == 1


# -------------------------------------------------------------------------------------------------- the prepared files


def test_prepared_once(root, tmp_path, monkeypatch, capsys):
    first = load(root)
    assert f"preparing 7 images of {root}," in capsys.readouterr().err
    shutil.copytree(
        root, tmp_path / "copy/of"
    )  # copies have times of their own, but are the same data set
    os.utime(tmp_path / "copy/of/train/cat/c.png", (1, 1))
    assert load(tmp_path / "copy/of").name == first.name
    monkeypatch.setattr(prepared, "prepare", None)
    second = load(root)
    np.testing.assert_array_equal(second.train_images, first.train_images)
    assert second.name == first.name


def test_a_changed_file_is_prepared_anew(root, tmp_path):
    before = load(root)
    os.utime(root / "val/dog/a.jpg", (1, 1))  # another file of the same size
    assert load(root).name == before.name
    assert len(caches(tmp_path)) == 2
    write(root / "val/dog/a.jpg", colours(50, 50, 99))
    after = load(root)
    assert after.name != before.name
    np.testing.assert_array_equal(after.train_images, before.train_images)
    assert not np.array_equal(after.test_images[1], before.test_images[1])
    assert load(root, size=8).train_images.shape == (5, 8, 8, 3)


def same_times(path: Path, other: Path) -> None:
    """Gives each file below `path` the times of the one of the same name below `other`."""
    for file in path.rglob("*"):
        status = (other / file.relative_to(path)).stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_pixels_under_equal_names_sizes_and_times_are_prepared_anew(root, tmp_path):
    for number, path in enumerate(sorted(root.rglob("*.*"))):
        path.rename(path.with_suffix(".png"))
        write(path.with_suffix(".png"), np.full((20, 20, 3), number, np.uint8))
    shutil.copytree(root, tmp_path / "other")
    for path in sorted((tmp_path / "other").rglob("*.*")):
        write(path, np.asarray(Image.open(path)) + np.uint8(100))
    same_times(tmp_path / "other", root)
    first, second = load(root), load(tmp_path / "other")
    np.testing.assert_array_equal(second.train_images, first.train_images + 100)
    first_train = np.array(first.train_images)
    for path in (root / "train/cat").iterdir():  # in place, too
        times = path.stat()
        write(path, np.asarray(Image.open(path)) + np.uint8(50))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    np.testing.assert_array_equal(load(root).train_images[:3], first_train[:3] + 50)


def test_the_digest_is_kept_beside_the_arrays(root, tmp_path, monkeypatch):
    seen = []
    first = load(root, check=seen.append)
    assert (seen[0].digest, first.digest) == (
        "",
        digest.of_arrays(
            {
                field: getattr(first, field)
                for field in ("train_images", "train_labels", "test_images", "test_labels")
            }
        ),
    )
    (cache,) = caches(tmp_path)
    (cache / "info.json").unlink()  # one that was prepared before there were digests
    assert load(root).digest == first.digest
    monkeypatch.setattr(prepared, "CHECKED_BYTES", 0)  # larger ones are not read at each start
    monkeypatch.setattr(digest, "of_arrays", None)
    assert load(root).digest == first.digest


def test_pixels_that_changed_in_the_prepared_files_are_noticed(root, tmp_path, caplog):
    first = load(root)
    pixels = np.array(first.train_images)
    (cache,) = caches(tmp_path)
    data = bytearray((cache / "train_images.npy").read_bytes())
    data[-1] ^= 1
    (cache / "train_images.npy").write_bytes(data)
    again = load(root)
    assert "its pixels or labels are not those that were prepared" in caplog.text
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.train_images, pixels)


def test_photographs_of_other_pixels_are_no_longer_the_runs(root, config):
    """What is known before images are decoded cannot tell: names and sizes are equal."""
    config.update(
        dict(
            batch_size=4,
            steps=2,
            data=dict(name="folder", dir=str(root), image_size=SIZE, crop_pad=1),
        )
    )
    saved = setup.prepare(config).saved
    path = root / "train/cat/c.png"
    size = path.stat().st_size
    write(path, np.full((40, 30, 3), 7, np.uint8))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert path.stat().st_size == size

    def check(run):
        seen.append(run.data.digest)
        configs.refuse_changes("r", saved, run.saved)

    seen = []
    with pytest.raises(
        UserError,
        match=rf"^r: .*\(data_digest: {saved['data_digest']} -> [0-9a-f]{{16}}\): .*same data",
    ):
        setup.prepare(config, check=check)
    assert seen[0] == "" != seen[1]


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The files that are decoded, by their order."""
    files = []

    def note(file: Path, size: int, decoded=prepared.decoded) -> np.ndarray:
        files.append("/".join(file.parts[-3:]))
        return decoded(file, size)

    monkeypatch.setattr(prepared, "decoded", note)
    monkeypatch.setattr(prepared.os, "cpu_count", lambda: 1)
    return files


def same_data(found: dataset.Dataset, expected: dataset.Dataset) -> None:
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(
            getattr(found, field), getattr(expected, field), err_msg=field
        )
    assert found.digest == expected.digest


def anew(root: Path, monkeypatch) -> dataset.Dataset:
    """The data set as it is prepared where nothing was prepared before."""
    with monkeypatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(root.parent / "anew"))
        shutil.rmtree(root.parent / "anew", ignore_errors=True)
        return load(root)


def test_what_is_decoded_is_kept_when_others_are_bad(root, tmp_path, monkeypatch, decoded, capsys):
    good = (root / "train/cat/d.jpeg").read_bytes()
    for name in ("train/cat/d.jpeg", "val/cat/a.jpg", "train/dog/a.JPEG"):
        nothing(root / name)
    with pytest.raises(UserError, match="and 2 more of 7 images: mend"):
        load(root)
    assert caches(tmp_path) == []
    assert len(decoded) == 7
    decoded.clear()
    # Mended, removed, and replaced by others before and after it.
    (root / "train/cat/d.jpeg").write_bytes(good)
    (root / "train/dog/a.JPEG").unlink()
    (root / "val/cat/a.jpg").unlink()
    for seed, name in enumerate(["val/cat/0.png", "val/cat/1.png", "train/dog/c.jpg"], 20):
        write(root / name, colours(30, 40, seed))
    data = load(root)
    assert decoded == ["train/cat/d.jpeg", "train/dog/c.jpg", "val/cat/0.png", "val/cat/1.png"]
    assert "4 of these images are decoded already" in capsys.readouterr().err
    same_data(data, anew(root, monkeypatch))
    assert len(caches(tmp_path)) == 1
    assert not list((tmp_path / "tfds/cnn_spmd_photographs").glob("*.part"))


def test_a_class_that_comes_first_moves_the_others_labels(root, monkeypatch, decoded):
    nothing(root / "val/dog/a.jpg")
    with pytest.raises(UserError):
        load(root)
    write(root / "val/dog/a.jpg", colours(30, 40, 30))
    for split in ("train", "val"):
        write(root / split / "ant/a.png", colours(30, 40, 31))
    data = load(root)
    assert data.train_labels.tolist() == [0, 1, 1, 1, 2, 2]
    same_data(data, anew(root, monkeypatch))


@pytest.mark.parametrize("power", ["on", "cut"])
def test_an_interrupted_preparation_is_gone_on_with(root, tmp_path, monkeypatch, decoded, power):
    """Images whose pixels did not reach the disk are decoded again."""

    def interrupted(file: Path, size: int, decode=prepared.decoded) -> np.ndarray:
        if len(decoded) == 4:
            raise KeyboardInterrupt
        return decode(file, size)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared, "decoded", interrupted)
        load(root)
    assert caches(tmp_path) == []
    if power == "cut":
        (part,) = (tmp_path / "tfds/cnn_spmd_photographs").glob("*.part")
        with (part / "train_images.npy").open("r+b") as file:
            file.seek(prepared.HEADER + SIZE * SIZE * 3)
            file.write(bytes(SIZE * SIZE * 3))
    decoded.clear()
    data = load(root)
    assert decoded == ["train/cat/d.jpeg"] * (power == "cut") + [
        "train/dog/b.jpg",
        "val/cat/a.jpg",
        "val/dog/a.jpg",
    ]
    same_data(data, anew(root, monkeypatch))


def test_an_interruption_at_the_very_end_is_none(root, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepared.np, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        load(root)
    assert caches(tmp_path) == []
    monkeypatch.setattr(prepared, "decoded", None)
    same_data(load(root), load(root))


def test_bad_images_are_left_out_where_that_is_asked_for(
    root, tmp_path, monkeypatch, decoded, capsys
):
    bad = ["train/cat/d.jpeg", "val/dog/b.jpg"]
    write(root / "val/dog/b.jpg", colours(30, 40, 40))
    for name in bad:
        nothing(root / name)
    with pytest.raises(UserError, match=r"1 more of 8 images: mend .*skip_bad=2$"):
        load(root, skip_bad=1)
    capsys.readouterr()
    data = load(root, skip_bad=2)
    told = capsys.readouterr().err
    assert (
        f"WARNING: {root}: 2 of 8 images cannot be read and are left out, as data.skip_bad=2 allows"
        in told
    )
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    assert sorted(decoded) == sorted([*{*decoded}, *bad])  # those alone are tried twice
    decoded.clear()
    again = load(root, skip_bad=3)
    assert decoded == []
    same_data(again, data)
    assert (data.skipped, again.skipped) == (2, 2)
    with pytest.raises(UserError, match=r"1 more of 8 images: mend .*skip_bad=2$"):
        load(root)
    assert decoded == []
    for name in bad:
        (root / name).unlink()
    same_data(anew(root, monkeypatch), data)


@pytest.mark.parametrize("names", [["dog"], ["cat", "dog"]])
def test_no_class_may_be_left_out(root, tmp_path, names):
    for name in names:
        nothing(root / f"val/{name}/a.jpg")
    with pytest.raises(
        UserError,
        match=rf"^data.skip_bad=5: leaves no image of class '{names[0]}' in test, expected at ",
    ):
        load(root, skip_bad=5)
    assert caches(tmp_path) == []


def test_every_file_of_a_run_says_how_many_images_were_left_out(root, config, tmp_path):
    config.update(
        dict(
            batch_size=4,
            steps=2,
            epochs=0,
            data=dict(name="folder", dir=str(root), image_size=SIZE, crop_pad=1),
        )
    )
    assert setup.prepare(config).identity.keys() == {"dataset", "fallback"}
    nothing(root / "train/cat/d.jpeg")
    config.data.skip_bad = 1
    loop.train(config, tmp_path / "r")
    files = [
        json.loads((tmp_path / f"r/{name}.json").read_text())
        for name in ("config", "program", "summary")
    ]
    files += map(json.loads, (tmp_path / "r/metrics.jsonl").read_text().splitlines())
    assert len(files) > 4
    assert {file["skipped_images"] for file in files} == {1}
    seen = []
    config.data.skip_bad = 7  # which changes nothing
    shutil.rmtree(tmp_path / "tfds")  # how many are left out is not known before they are decoded
    setup.prepare(
        config, check=lambda run: seen.append(configs.refuse_changes("r", files[0], run.saved))
    )
    assert len(seen) == 2


# ---------------------------------------------------------------------- odd and full file systems


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_it_is_said_and_the_images_are_prepared(root, tmp_path, monkeypatch, caplog):
    expected = anew(root, monkeypatch)
    monkeypatch.setattr(prepared.fcntl, "flock", no_locks)
    same_data(load(root), expected)
    assert (
        "cannot be locked (No locks available): another run may prepare the same images"
        in caplog.text
    )
    assert {path.suffix for path in (tmp_path / "tfds/cnn_spmd_photographs").iterdir()} == {
        "",
        ".lock",
    }


def test_two_that_prepare_the_same_without_locks_do_no_harm(root, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=30)

    def decode_all(*arguments, decode_all=prepared.decode_all):
        bad = decode_all(*arguments)
        both.wait()
        return bad

    expected = anew(root, monkeypatch)
    monkeypatch.setattr(prepared.fcntl, "flock", no_locks)
    monkeypatch.setattr(prepared, "decode_all", decode_all)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found in pool.map(load, [root] * 2):
            same_data(found, expected)
    assert {path.suffix for path in (tmp_path / "tfds/cnn_spmd_photographs").iterdir()} == {
        "",
        ".lock",
    }


def test_a_disk_that_fills_up_is_one_line_and_nothing_is_left(root, tmp_path, monkeypatch):
    def full(file: int, start: int, size: int) -> None:
        os.truncate(file, size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepared.os, "posix_fallocate", full)
    with pytest.raises(
        UserError,
        match=rf"^TFDS_DATA_DIR={tmp_path}/tfds: cannot keep the prepared images there .*No space "
        r"left on device\); choose a directory that can be written and has room$",
    ):
        load(root)
    assert {path.suffix for path in (tmp_path / "tfds/cnn_spmd_photographs").iterdir()} == {".lock"}


def test_room_is_there_before_a_pixel_is_written(root, tmp_path, monkeypatch):
    """A memory map of a file with holes dies of a bus error on a full disk."""

    def holes(file: Path, size: int, decoded=prepared.decoded) -> np.ndarray:
        (part,) = (tmp_path / "tfds/cnn_spmd_photographs").glob("*.part")
        for path in part.iterdir():
            assert path.stat().st_blocks * 512 >= path.stat().st_size > 0, path
        return decoded(file, size)

    monkeypatch.setattr(prepared, "decoded", holes)
    load(root, size=64)


@pytest.mark.parametrize(
    ("sizes", "texts"),
    [
        ((0, 40_000_000), ["0.0 MB", "40.0 MB"]),
        ((5, 5_000), ["0.0 kB", "5.0 kB"]),
        ((999, 1_000), ["999 bytes", "1,000 bytes"]),
        ((10**12, 10**12 + 7), ["1,000,000,000,000 bytes", "1,000,000,000,007 bytes"]),
        ((10**9, 2 * 10**12), ["1.0 GB", "2,000.0 GB"]),
        ((196_608,), ["196.6 kB"]),
    ],
)
def test_amounts_differ_as_the_numbers_do(sizes, texts):
    assert prepared.amounts(*sizes) == texts


def test_one_prepares_while_another_waits(root, monkeypatch, capsys):
    calls = []

    def slow(*arguments, prepare=prepared.prepare):
        calls.append(arguments)
        time.sleep(0.2)
        prepare(*arguments)

    monkeypatch.setattr(prepared, "prepare", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [root] * 2)
    np.testing.assert_array_equal(first.train_images, second.train_images)
    assert len(calls) == 1
    assert f"waiting for another run, which prepares {root} in " in capsys.readouterr().err


@pytest.mark.parametrize("damage", [cut, nothing, Path.unlink])
@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy"])
def test_damaged_prepared_files_are_made_anew(root, tmp_path, caplog, name, damage):
    data = load(root)
    expected, labels = (
        np.array(data.train_images),
        data.test_labels,
    )  # a copy: damage shows through a memory map
    (cache,) = caches(tmp_path)
    damage(cache / name)
    found = load(root)
    assert f"{cache} is damaged" in caplog.text
    np.testing.assert_array_equal(found.train_images, expected)
    np.testing.assert_array_equal(found.test_labels, labels)


# ---------------------------------------------------------------------------------------------------------------- TFDS


class Imagenette(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What TFDS's own prepares, small: JPEG bytes and labels of ten classes."""

    name = "imagenette"
    VERSION = tfds.core.Version("1.0.0")
    splits = (("train", 12), ("validation", 11))

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(names=[f"n{i}" for i in range(10)]),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split, n) for split, n in self.splits}

    def _generate_examples(self, split, n):
        for i in range(n):
            path = Path(self.data_dir).parent / f"{i}.jpg"
            write(path, colours(20, 30, i + 100 * (split != "train")))
            yield i, dict(image=path.read_bytes(), label=i % 10)


def build(tmp_path: Path, builder: type, file_format: str = "array_record") -> None:
    builder(data_dir=tmp_path / "tfds", file_format=file_format).download_and_prepare()


def test_a_prepared_tfds_data_set(tmp_path, monkeypatch):
    build(tmp_path, Imagenette)
    data = load("", "imagenette")
    assert (data.name, data.class_names[3], len(data.class_names)) == ("imagenette", "n3", 10)
    assert data.train_labels.tolist() == [*range(10), 0, 1]
    assert data.test_labels.tolist() == [*range(10), 0]
    for seed, image in [*enumerate(data.train_images), *enumerate(data.test_images, 100)]:
        np.testing.assert_allclose(
            image.mean((0, 1)), colours(20, 30, seed)[:, 5:25].mean((0, 1)), atol=3
        )
    monkeypatch.setattr(prepared, "prepare", None)
    again = load(tmp_path / "tfds", "imagenette")
    np.testing.assert_array_equal(again.train_images, data.train_images)
    assert again.files == data.files != ""


def test_a_tfds_data_set_whose_file_was_written_again_is_another(tmp_path):
    """Though names, sizes and times of modification are equal."""
    build(tmp_path, Imagenette)
    before = folder.from_tfds("imagenette", tmp_path / "tfds")
    (records,) = (tmp_path / "tfds").rglob("*train.array_record*")
    times = records.stat()
    records.write_bytes(records.read_bytes())
    os.utime(records, ns=(times.st_atime_ns, times.st_mtime_ns))
    after = folder.from_tfds("imagenette", tmp_path / "tfds")
    assert after.content == before.content
    assert after.fingerprint != before.fingerprint


def test_a_named_data_set_says_which_files_it_is(root, tmp_path, monkeypatch):
    """A run goes on with a copy of them, and with no others."""
    monkeypatch.setitem(folder.CLASSES, "imagenette", 2)
    first = load(root, "imagenette")
    shutil.copytree(root, tmp_path / "copy")
    assert load(tmp_path / "copy", "imagenette").files == first.files
    (tmp_path / "copy/train/cat/c.png").unlink()
    other = load(tmp_path / "copy", "imagenette")
    assert (other.name, first.name) == ("imagenette", "imagenette")
    saved, changed = (
        setup.Setup(ml_collections.ConfigDict(), data, None, None).saved for data in (first, other)
    )
    configs.refuse_changes("a", saved, saved)
    with pytest.raises(UserError, match=rf"data_files: {first.files} -> {other.files}"):
        configs.refuse_changes("a", saved, changed)


@pytest.mark.parametrize("name", ["imagenet2012", "imagenette"])
def test_a_tfds_data_set_that_is_not_there_says_how_to_get_it(tmp_path, name):
    with pytest.raises(
        UserError,
        match=f"data.name={name}: {tmp_path}/tfds/{name} holds no prepared data set: .*tfds build "
        f"{name}.* --file_format=array_record .*--config.data.dir=DIR",
    ) as refusal:
        load("", name)
    assert ("ILSVRC2012_img_train.tar" in str(refusal.value)) == (name == "imagenet2012")
    assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match=rf"^data.dir={tmp_path}/gone: is no folder"):
        load(tmp_path / "gone", name)


def test_a_tfds_data_set_of_another_form_is_refused(tmp_path):
    class Trained(Imagenette, skip_registration=True):
        name, splits = "imagenette", (("train", 1),)

    build(tmp_path, Trained)
    with pytest.raises(
        UserError, match=r"imagenette/1.0.0 cannot be read \(.*validation.*tfds build"
    ) as refusal:
        load("", "imagenette")
    assert "\n" not in str(refusal.value)


def test_the_classes_are_counted(root):
    with pytest.raises(UserError, match=r"holds 2 classes, but data.name=imagenette has 10"):
        load(root, "imagenette")
