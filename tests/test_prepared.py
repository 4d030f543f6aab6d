"""Photographs on disk: decoded once, resumed after a kill, never mixed up."""

import concurrent.futures
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from photos import (
    SIZE,
    assert_same,
    colours,
    cut,
    empty,
    load,
    prepared_folders,
    store,
    write_eps,
    write_image,
    write_tiff,
)
from PIL import Image

from cnn_spmd import config as configs
from cnn_spmd.data import dataset, decoding, digest, prepared, progress, square
from cnn_spmd.errors import UserError
from cnn_spmd.training import build, loop


def load_anew(root: Path, monkeypatch) -> dataset.Dataset:
    """Load a data set as if nothing had ever been prepared."""
    with monkeypatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(root.parent / "anew"))
        shutil.rmtree(root.parent / "anew", ignore_errors=True)
        return load(root)


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """The files that are decoded, in their order."""
    files = []

    def note(file: str, size: int, decode=square.decode) -> np.ndarray:
        files.append("/".join(file.split("/")[-3:]))
        return decode(file, size)

    monkeypatch.setattr(square, "decode", note)
    monkeypatch.setattr(progress, "cores", lambda: 1)
    return files


# ---- Found again, or prepared anew


def test_a_data_set_is_prepared_once(pets, tmp_path, monkeypatch, capsys):
    first = load(pets)
    assert f"preparing 7 images of {pets}," in capsys.readouterr().err
    # A copy has times of its own, but is the same data set.
    shutil.copytree(pets, tmp_path / "copy/of")
    os.utime(tmp_path / "copy/of/train/cat/c.png", (1, 1))
    assert load(tmp_path / "copy/of").name == first.name
    monkeypatch.setattr(prepared, "prepare", None)
    second = load(pets)
    np.testing.assert_array_equal(second.train_images, first.train_images)
    assert second.name == first.name


def test_a_changed_file_is_prepared_anew(pets, tmp_path):
    before = load(pets)
    os.utime(pets / "val/dog/a.jpg", (1, 1))  # as another file of the same size would have
    assert load(pets).name == before.name
    assert len(prepared_folders(tmp_path)) == 2
    write_image(pets / "val/dog/a.jpg", colours(50, 50, 99))
    after = load(pets)
    assert after.name != before.name
    np.testing.assert_array_equal(after.train_images, before.train_images)
    assert not np.array_equal(after.test_images[1], before.test_images[1])
    assert load(pets, size=8).train_images.shape == (5, 8, 8, 3)


def copy_times(path: Path, other: Path) -> None:
    """Give each file below `path` the times of the one of the same name below `other`."""
    for file in path.rglob("*"):
        status = (other / file.relative_to(path)).stat()
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_other_pixels_under_equal_names_sizes_and_times_are_prepared_anew(pets, tmp_path):
    for number, path in enumerate(sorted(pets.rglob("*.*"))):
        path.rename(path.with_suffix(".png"))
        write_image(path.with_suffix(".png"), np.full((20, 20, 3), number, np.uint8))
    shutil.copytree(pets, tmp_path / "other")
    for path in sorted((tmp_path / "other").rglob("*.*")):
        write_image(path, np.asarray(Image.open(path)) + np.uint8(100))
    copy_times(tmp_path / "other", pets)
    first, second = load(pets), load(tmp_path / "other")
    np.testing.assert_array_equal(second.train_images, first.train_images + 100)
    first_train = np.array(first.train_images)
    for path in (pets / "train/cat").iterdir():  # also where a file is overwritten
        times = path.stat()
        write_image(path, np.asarray(Image.open(path)) + np.uint8(50))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    np.testing.assert_array_equal(load(pets).train_images[:3], first_train[:3] + 50)


def test_the_digest_is_stored_beside_the_arrays(pets, tmp_path, monkeypatch):
    seen = []
    first = load(pets, check=seen.append)
    assert seen[0].digest == ""
    assert first.digest == digest.of_arrays(first.arrays)
    monkeypatch.setattr(prepared, "CHECKED_BYTES", 0)  # larger ones are not read at each start
    monkeypatch.setattr(digest, "of_arrays", None)
    assert load(pets).digest == first.digest


def test_photographs_of_other_pixels_do_not_continue_a_run(pets, pets_config):
    """This is known only once they are decoded: names and sizes are equal."""
    saved = build.prepare(pets_config).saved_config
    path = pets / "train/cat/c.png"
    size = path.stat().st_size
    write_image(path, np.full((40, 30, 3), 7, np.uint8))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    assert path.stat().st_size == size
    seen = []

    def check(setup: build.Setup) -> None:
        seen.append(setup.data.digest)
        configs.refuse_changes("r", saved, setup.saved_config)

    change = rf"data_digest: {saved['data_digest']} -> [0-9a-f]{{16}}"
    with pytest.raises(UserError, match=rf"^r: .*\({change}\): .*same data"):
        build.prepare(pets_config, check=check)
    assert seen[0] == "" != seen[1]


# ---- Damaged prepared files


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["train_images.npy", "test_labels.npy"])
def test_damaged_prepared_files_are_made_anew(pets, tmp_path, caplog, name, damage):
    data = load(pets)
    # Damage would show through a memory map, so we compare with a copy.
    images, labels = np.array(data.train_images), data.test_labels
    (folder,) = prepared_folders(tmp_path)
    damage(folder / name)
    found = load(pets)
    assert caplog.text.count(f"{folder} is damaged") == 1
    np.testing.assert_array_equal(found.train_images, images)
    np.testing.assert_array_equal(found.test_labels, labels)


def test_changed_pixels_in_the_prepared_files_are_noticed(pets, tmp_path, caplog):
    first = load(pets)
    pixels = np.array(first.train_images)
    (folder,) = prepared_folders(tmp_path)
    content = bytearray((folder / "train_images.npy").read_bytes())
    content[-1] ^= 1
    (folder / "train_images.npy").write_bytes(content)
    again = load(pets)
    assert caplog.text.count("its pixels or labels are not those that were prepared") == 1
    assert again.digest == first.digest
    np.testing.assert_array_equal(again.train_images, pixels)


# ---- Images that cannot be read


def write_text(path: Path) -> None:
    path.write_text("<html>Not found</html>")


@pytest.mark.parametrize("spoil", [cut, empty, write_text, write_tiff, write_eps])
@pytest.mark.parametrize("name", ["train/cat/c.png", "val/dog/a.jpg"])
def test_an_image_that_cannot_be_read_is_named(pets, tmp_path, name, spoil):
    spoil(pets / name)
    with pytest.raises(UserError, match=rf"^{pets}: cannot read .*{name} \(.*\): mend") as refusal:
        load(pets)
    assert "\n" not in str(refusal.value)
    assert prepared_folders(tmp_path) == []


def test_many_unreadable_images_are_all_named_at_once(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepared, "SHOWN", 3)
    for path in [*(pets / "train").rglob("*.*"), pets / "val/cat/a.jpg"]:
        empty(path)
    (pets / "val/cat/a.jpg").rename(pets / "val/cat/a\n.jpg")
    message = (
        rf"^{pets}: cannot read {pets}/train/cat/c.png \(.*\) and 5 more of 7 images, all of "
        r"them listed in (.*): mend or remove them, .*--config.data.skip_bad=6$"
    )
    with pytest.raises(UserError, match=message) as refusal:
        load(pets)
    names = [
        f"{pets}/{name}"
        for name in (
            "train/cat/c.png",
            "train/cat/d.jpeg",
            "train/cat/e.jpg",
            "train/dog/a.JPEG",
            "train/dog/b.jpg",
            r"val/cat/a\n.jpg",
        )
    ]
    lines = capsys.readouterr().err.splitlines()
    shown = [line.split(" (")[0] for line in lines if line.startswith("cannot read")]
    assert shown == [f"cannot read {name}" for name in names[:3]]
    (listing,) = store(tmp_path).glob("*.txt")
    assert str(listing) in str(refusal.value)
    assert [line.split(" (")[0] for line in listing.read_text().splitlines()] == names


def test_a_line_break_in_a_name_makes_no_second_line(pets):
    (pets / "val/cat/a\nb.jpg").write_text("no image")
    message = rf"^{pets}: cannot read .*val/cat/a\\nb.jpg \(.*\): mend"
    with pytest.raises(UserError, match=message) as refusal:
        load(pets)
    assert "\n" not in str(refusal.value)


def test_unreadable_images_are_left_out_on_request(pets, monkeypatch, decoded, capsys):
    bad = ["train/cat/d.jpeg", "val/dog/b.jpg"]
    write_image(pets / "val/dog/b.jpg", colours(30, 40, 40))
    for name in bad:
        empty(pets / name)
    with pytest.raises(UserError, match=r"1 more of 8 images: mend .*skip_bad=2$"):
        load(pets, skip_bad=1)
    capsys.readouterr()
    data = load(pets, skip_bad=2)
    warning = f"warning: {pets}: 2 of 8 images cannot be read and are left out, as data.skip_bad=2"
    assert f"{warning} allows" in capsys.readouterr().err
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    assert sorted(decoded) == sorted([*{*decoded}, *bad])  # only the bad ones are tried twice
    decoded.clear()
    again = load(pets, skip_bad=3)
    assert decoded == []
    assert_same(again, data)
    assert (data.skipped, again.skipped) == (2, 2)
    with pytest.raises(UserError, match=r"1 more of 8 images: mend .*skip_bad=2$"):
        load(pets)
    assert decoded == []
    for name in bad:
        (pets / name).unlink()
    assert_same(load_anew(pets, monkeypatch), data)


@pytest.mark.parametrize("names", [["dog"], ["cat", "dog"]])
def test_no_class_may_be_left_out(pets, tmp_path, names):
    for name in names:
        empty(pets / f"val/{name}/a.jpg")
    message = (
        rf"^data.skip_bad=5: leaves no image of class '{names[0]}' in test, expected at least one"
    )
    with pytest.raises(UserError, match=message):
        load(pets, skip_bad=5)
    assert prepared_folders(tmp_path) == []


def test_every_file_of_a_run_says_how_many_images_were_left_out(
    pets, pets_config, tmp_path, capsys
):
    """And the terminal has the folder's own name."""
    assert build.prepare(pets_config).data_fields.keys() == {"dataset", "fallback"}
    empty(pets / "train/cat/d.jpeg")
    pets_config.data.skip_bad = 1
    loop.train(pets_config, tmp_path / "r")
    assert f", data {pets.name}, " in capsys.readouterr().out
    files = [
        json.loads((tmp_path / f"r/{name}.json").read_text())
        for name in ("config", "program", "summary")
    ]
    files += map(json.loads, (tmp_path / "r/metrics.jsonl").read_text().splitlines())
    assert len(files) > 4
    assert {file["skipped_images"] for file in files} == {1}
    # A run may be resumed with another skip_bad that changes nothing. Before the images are
    # decoded, nobody knows how many are left out.
    pets_config.data.skip_bad = 7
    shutil.rmtree(tmp_path / "tfds")
    seen = []

    def check(setup: build.Setup) -> None:
        configs.refuse_changes("r", files[0], setup.saved_config)
        seen.append(setup)

    build.prepare(pets_config, check=check)
    assert len(seen) == 2


# ---- Interrupted decoding continues


def test_decoded_images_are_still_used_after_bad_ones_were_mended(
    pets, tmp_path, monkeypatch, decoded, capsys
):
    good = (pets / "train/cat/d.jpeg").read_bytes()
    for name in ("train/cat/d.jpeg", "val/cat/a.jpg", "train/dog/a.JPEG"):
        empty(pets / name)
    with pytest.raises(UserError, match="and 2 more of 7 images: mend"):
        load(pets)
    assert prepared_folders(tmp_path) == []
    assert len(decoded) == 7
    decoded.clear()
    # One is mended, one is removed, and one is replaced by others before and after it.
    (pets / "train/cat/d.jpeg").write_bytes(good)
    (pets / "train/dog/a.JPEG").unlink()
    (pets / "val/cat/a.jpg").unlink()
    for seed, name in enumerate(["val/cat/0.png", "val/cat/1.png", "train/dog/c.jpg"], 20):
        write_image(pets / name, colours(30, 40, seed))
    data = load(pets)
    assert decoded == ["train/cat/d.jpeg", "train/dog/c.jpg", "val/cat/0.png", "val/cat/1.png"]
    assert "4 of these images are decoded already" in capsys.readouterr().err
    assert_same(data, load_anew(pets, monkeypatch))
    assert len(prepared_folders(tmp_path)) == 1
    assert not list(store(tmp_path).glob("*.part"))


def test_a_new_first_class_moves_the_labels_of_the_others(pets, monkeypatch, decoded):
    empty(pets / "val/dog/a.jpg")
    with pytest.raises(UserError):
        load(pets)
    write_image(pets / "val/dog/a.jpg", colours(30, 40, 30))
    for split in ("train", "val"):
        write_image(pets / split / "ant/a.png", colours(30, 40, 31))
    data = load(pets)
    assert data.train_labels.tolist() == [0, 1, 1, 1, 2, 2]
    assert_same(data, load_anew(pets, monkeypatch))


KILLED = """
import signal, sys
import ml_collections
from cnn_spmd.data import progress, registry, square

def decode(file, size, decode=square.decode, decoded=[]):
    if len(decoded) == 4:
        signal.raise_signal(signal.SIGKILL)
    decoded.append(file)
    return decode(file, size)

square.decode = decode
progress.cores = lambda: 1
registry.load(ml_collections.ConfigDict(dict(name="folder", dir=sys.argv[1], image_size=16)))
"""


@pytest.mark.parametrize("power", ["on", "cut"])
def test_a_killed_preparation_continues(pets, tmp_path, monkeypatch, decoded, power, capsys):
    """After a power cut, images whose pixels did not reach the disk are decoded again."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, str(pets)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert prepared_folders(tmp_path) == []
    expected = ["train/dog/b.jpg", "val/cat/a.jpg", "val/dog/a.jpg"]
    if power == "cut":
        expected.insert(0, "train/cat/d.jpeg")  # image 1
        (part,) = store(tmp_path).glob("*.part")
        with (part / "train_images.npy").open("r+b") as file:
            file.seek(decoding.HEADER_BYTES + SIZE * SIZE * 3)
            file.write(bytes(SIZE * SIZE * 3))
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0)
    data = load(pets)
    assert decoded == expected
    notes = capsys.readouterr().err
    assert "4 of these images are decoded already" in notes
    assert "prepared 7 of 7 images, " in notes
    assert f"prepared {len(expected)} images in " in notes
    assert_same(data, load_anew(pets, monkeypatch))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_the_progress_counts_new_images_only(monkeypatch, capsys, terminal):
    """80 of 1,000 images are kept, and 20 of the others take 10 s on two cores."""
    clock = iter([0.0, 50.0, 60.0, 60.5]).__next__  # digests are compared until 50 s
    monkeypatch.setattr(progress.time, "monotonic", clock)
    monkeypatch.setattr(progress, "cores", lambda: 2)
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
        monkeypatch.setenv("COLUMNS", "120")
    shown = progress.Progress(total=1000, kept=80)
    shown.update(0)
    shown.update(20)
    shown.close()
    end = "prepared 20 images in 10.0 s, 2 per second (1 per core)\n"
    if terminal:
        text = sys.stderr.getvalue()
        assert re.search(r"100/1,000 images .*2 per second \(1 per core\), ETA 7:30", text)
        assert text.endswith(end)
    else:
        line = "prepared 100 of 1,000 images, 2 per second (1 per core), ETA 7:30\n"
        assert capsys.readouterr().err == line + end


def test_an_interruption_at_the_very_end_loses_nothing(pets, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(decoding.np, "save", interrupted)
        load(pets)
    assert prepared_folders(tmp_path) == []
    expected = load_anew(pets, monkeypatch)
    monkeypatch.setattr(square, "decode", None)
    assert_same(load(pets), expected)


# ---- Several processes, and file systems that are full or have no locks


def test_one_prepares_while_another_waits(pets, monkeypatch, capsys):
    calls = []

    def slow(*arguments, decode_into=prepared.decode_into):
        calls.append(arguments)
        time.sleep(0.2)
        decode_into(*arguments)

    monkeypatch.setattr(prepared, "decode_into", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first, second = pool.map(load, [pets] * 2)
    np.testing.assert_array_equal(first.train_images, second.train_images)
    assert len(calls) == 1
    assert f"waiting for another run, which prepares {pets} in " in capsys.readouterr().err


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_without_locks_the_images_are_prepared_with_a_warning(pets, tmp_path, monkeypatch, caplog):
    expected = load_anew(pets, monkeypatch)
    monkeypatch.setattr(prepared.fcntl, "flock", no_locks)
    assert_same(load(pets), expected)
    warning = "cannot be locked (No locks available): another run may prepare the same images"
    assert warning in caplog.text
    assert {path.suffix for path in store(tmp_path).iterdir()} == {"", ".lock"}


def test_two_processes_without_locks_do_no_harm(pets, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=30)

    def decode(*arguments, decode=decoding.Workspace.decode):
        bad = decode(*arguments)
        both.wait()
        return bad

    expected = load_anew(pets, monkeypatch)
    monkeypatch.setattr(prepared.fcntl, "flock", no_locks)
    monkeypatch.setattr(decoding.Workspace, "decode", decode)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found in pool.map(load, [pets] * 2):
            assert_same(found, expected)
    assert {path.suffix for path in store(tmp_path).iterdir()} == {"", ".lock"}


def test_a_disk_without_room_is_refused_with_the_bytes(pets, tmp_path, monkeypatch):
    usage = shutil._ntuple_diskusage(1, 0, 7 * SIZE * SIZE * 3 - 1)
    monkeypatch.setattr(decoding.shutil, "disk_usage", lambda _: usage)
    message = (
        rf"TFDS_DATA_DIR={tmp_path}/tfds: has 5,375 bytes free, but 7 images of 16x16 need 5,376 "
        "bytes"
    )
    with pytest.raises(UserError, match=message):
        load(pets)
    (tmp_path / "tfds").rename(tmp_path / "gone")
    (tmp_path / "tfds").write_text("a file")
    message = rf"TFDS_DATA_DIR={tmp_path}/tfds: cannot keep the prepared images there"
    with pytest.raises(UserError, match=message):
        load(pets)


def test_a_disk_that_fills_up_is_one_line_and_nothing_is_left(pets, tmp_path, monkeypatch):
    def full(file: int, start: int, size: int) -> None:
        os.truncate(file, size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decoding.os, "posix_fallocate", full)
    message = (
        rf"^TFDS_DATA_DIR={tmp_path}/tfds: cannot keep the prepared images there .*No space "
        r"left on device\); choose a directory that can be written and has room$"
    )
    with pytest.raises(UserError, match=message):
        load(pets)
    assert {path.suffix for path in store(tmp_path).iterdir()} == {".lock"}


def test_the_disk_has_room_before_a_pixel_is_written(pets, tmp_path, monkeypatch):
    """A write to a hole of a mapped file on a full disk ends with a bus error."""

    def decode(file: Path, size: int, decode=square.decode) -> np.ndarray:
        (part,) = store(tmp_path).glob("*.part")
        for path in part.iterdir():
            assert path.stat().st_blocks * 512 >= path.stat().st_size > 0, path
        return decode(file, size)

    monkeypatch.setattr(square, "decode", decode)
    load(pets, size=64)
