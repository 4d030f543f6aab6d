"""CIFAR-10 from small archives: forms, refusals, caches, download, fallback."""

import concurrent.futures
import functools
import gzip
import hashlib
import http.server
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from photos import to_tfrecord
from PIL import Image

from cnn_spmd import config as configs
from cnn_spmd.data import cifar10, cifar10_archive, network, prepared, registry
from cnn_spmd.data import tfds as tfds_source
from cnn_spmd.errors import UserError
from cnn_spmd.training import build

N = 7  # images per file, instead of 10,000
KEYS = ["train_images", "train_labels", "test_images", "test_labels"]


@pytest.fixture(autouse=True)
def small_files_and_no_network(monkeypatch, tfds_directory):
    monkeypatch.setattr(cifar10_archive, "IMAGES_PER_FILE", N)
    # No server listens on this port.
    monkeypatch.setattr(cifar10_archive, "URL", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    monkeypatch.setenv("NO_PROXY", "*")


def write_folder(parent: Path, seed: int = 0) -> tuple[Path, dict[str, np.ndarray]]:
    """Write a random cifar-10-batches-bin; return it and the arrays it stands for."""
    folder = parent / cifar10_archive.FOLDER
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(6 * N, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(10, size=6 * N, dtype=np.int32)
    for i, name in enumerate(cifar10_archive.ALL_FILES):
        with open(folder / name, "wb") as file:
            for n in range(i * N, (i + 1) * N):
                planes = [images[n, :, :, c].tobytes() for c in range(3)]
                file.write(bytes([labels[n]]) + b"".join(planes))
    (folder / "batches.meta.txt").write_text("\n".join(cifar10_archive.CLASS_NAMES) + "\n\n")
    arrays = (images[:-N], labels[:-N], images[-N:], labels[-N:])
    return folder, dict(zip(KEYS, arrays, strict=True))


def write_archive(parent: Path, seed: int = 0) -> tuple[Path, dict[str, np.ndarray]]:
    folder, arrays = write_folder(parent / "unpacked", seed)
    return pack(folder, parent / cifar10_archive.ARCHIVE), arrays


def pack(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=cifar10_archive.FOLDER)
    return path


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert list(found) == KEYS
    for key in KEYS:
        assert found[key].dtype == expected[key].dtype, key
        np.testing.assert_array_equal(found[key], expected[key], err_msg=key)


def load(source: Path | str) -> dict[str, np.ndarray]:
    return cifar10.read(cifar10.find(str(source))).arrays


def kept(tmp_path: Path) -> list[Path]:
    """Return the folders in which arrays are kept."""
    return sorted((tmp_path / "tfds").glob("cnn_spmd_cifar10/*-arrays"))


def left_behind(tmp_path: Path) -> list[Path]:
    """Return what is kept of CIFAR-10, finished or not, except empty locks."""
    found = sorted((tmp_path / "tfds").glob("cnn_spmd_cifar10/*"))
    return [path for path in found if path.suffix != ".lock" or path.stat().st_size]


def config(**fields) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(dict(name="cifar10", dir="", fallback="digits") | fields)


# ---- CIFAR-10 from data.dir


@pytest.mark.parametrize(
    "form", ["archive", "folder holding the archive", "folder", "folder holding the folder"]
)
def test_every_form_of_data_dir_gives_what_was_written(tmp_path, form):
    path, expected = (write_archive if "archive" in form else write_folder)(tmp_path / "given")
    dataset = registry.load(config(dir=str(path.parent if "holding" in form else path)))
    assert_equal(dataset.arrays, expected)
    assert (dataset.name, dataset.fallback, dataset.mirror) == ("cifar10", None, True)
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert " ".join(dataset.class_names) == names


def test_the_second_load_comes_from_the_kept_arrays(tmp_path, monkeypatch, capfd):
    path, expected = write_archive(tmp_path)
    load(path)
    (folder,) = kept(tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    line = f"preparing CIFAR-10 of {path} in {folder}, once"
    assert [each for each in err.splitlines() if "Using them all the same" not in each] == [line]
    monkeypatch.setattr(cifar10_archive, "read", None)  # calling it is a TypeError
    assert_equal(load(path), expected)
    assert "preparing" not in capfd.readouterr().err


def test_another_archive_is_not_served_from_the_cache(tmp_path):
    path, first = write_archive(tmp_path / "a", seed=0)
    other, second = write_archive(tmp_path / "b", seed=1)
    assert_equal(load(path), first)
    shutil.copy(other, path)
    assert_equal(load(path), second)
    assert len(kept(tmp_path)) == 2


def test_official_checksum_and_size_are_those_of_tfds():
    url = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
    info = tfds.download.checksums.get_all_url_infos()[url]
    assert (info.checksum, int(info.size)) == (
        cifar10_archive.ARCHIVE_SHA256,
        cifar10_archive.ARCHIVE_BYTES,
    )


# ---- Refusals


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def wrong_label(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[cifar10_archive.RECORD_BYTES] = 10
    path.write_bytes(content)


BAD_FILES = {
    "short": (cut, r"data_batch_3.bin has 21,411 bytes, not 21,511"),
    "missing": (Path.unlink, r"data_batch_3.bin"),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path)), r"data_batch_3.bin"),
    "wrong label": (wrong_label, r"data_batch_3.bin holds label 10; expected 0 to 9"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
@pytest.mark.parametrize("bad", BAD_FILES)
def test_a_bad_file_is_refused_by_name(tmp_path, bad, packed):
    spoil, message = BAD_FILES[bad]
    path, _ = write_folder(tmp_path)
    spoil(path / "data_batch_3.bin")
    if packed:
        path = pack(path, tmp_path / "some.tar.gz")
    with pytest.raises(UserError, match=message) as refusal:
        registry.load(config(dir=str(path)))  # the fallback must not hide it
    assert f"data.dir={path}" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert left_behind(tmp_path) == []


def flip_bit(path: Path, at: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def flip_last_bit(path: Path) -> None:
    flip_bit(path, 1)


def flip_bit_before_padding(path: Path) -> None:
    """Do damage that only gzip's checksum shows; add padding that tar readers skip."""
    padded = gzip.decompress(path.read_bytes()) + bytes(1 << 22)
    path.write_bytes(gzip.compress(padded, compresslevel=0))
    content = bytearray(path.read_bytes())
    content[3 * cifar10_archive.RECORD_BYTES] ^= 1
    path.write_bytes(content)


BAD_ARCHIVES = {
    "truncated": cut,
    "flipped bit": flip_bit_before_padding,
    "empty": lambda path: path.write_bytes(b""),
    "a web page": lambda path: path.write_text("<html>Not found</html>"),
    "no tar inside": lambda path: path.write_bytes(gzip.compress(b"x" * 5000)),
    "half a header": lambda path: path.write_bytes(gzip.compress(b"x" * 100)),
}


@pytest.mark.parametrize("bad", BAD_ARCHIVES)
def test_a_damaged_archive_is_refused(tmp_path, bad):
    path, _ = write_archive(tmp_path)
    BAD_ARCHIVES[bad](path)
    with pytest.raises(UserError, match=rf"^data.dir={path}: .*expected") as refusal:
        registry.load(config(dir=str(path)))
    assert "\n" not in str(refusal.value)
    assert left_behind(tmp_path) == []


def test_the_digest_is_that_of_pixels_and_labels(tmp_path):
    write_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_folder(tmp_path / "c", seed=1)
    first, copy, other = (
        registry.load(config(dir=str(tmp_path / folder))).digest for folder in "abc"
    )
    assert first == copy != other
    assert re.fullmatch("[0-9a-f]{16}", first)


def test_a_resumed_run_keeps_its_pixels(tmp_path):
    """They may lie in another data.dir. A run from before digests existed continues."""
    write_folder(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    write_folder(tmp_path / "c", seed=1)

    def saved(folder: str) -> dict:
        fields = config(dir=str(tmp_path / folder))
        whole = ml_collections.ConfigDict(dict(data=fields))
        return build.Setup(whole, registry.load(fields), None, None).saved_config

    first, copy, other = map(saved, "abc")
    assert len({first["data_digest"], other["data_digest"]}) == 2
    configs.refuse_changes("--workdir=r", first, copy)
    change = f"data_digest: {first['data_digest']} -> {other['data_digest']}"
    message = (
        rf"^--workdir=r: .*\({change}\): give the same config with the same data \(data.dir\) or "
        "another --workdir$"
    )
    with pytest.raises(UserError, match=message):
        configs.refuse_changes("--workdir=r", first, other)
    del first["data_digest"]
    configs.refuse_changes("--workdir=r", first, other)


@pytest.mark.parametrize(
    "name, problem", [("nowhere", "does not exist"), ("empty", "holds no CIFAR-10")]
)
def test_data_dir_must_hold_cifar10(tmp_path, name, problem):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        UserError, match=f"data.dir=.*{name}: {problem}.*; give {cifar10_archive.ARCHIVE}"
    ):
        registry.load(config(dir=str(tmp_path / name)))


@pytest.mark.parametrize(
    "name",
    ["cifar-10-python.tar.gz", "cifar-10-batches-py/data_batch_1", "cifar-10-batches-mat/a.mat"],
)
def test_cifar10_in_another_version_is_named(tmp_path, name):
    path = tmp_path / "given" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"a pickle")
    version = "MATLAB" if "mat" in name else "Python"
    for given in (tmp_path / "given", tmp_path / "given" / name.split("/")[0]):
        message = (
            rf"^data.dir={given}: is CIFAR-10 in its {version} version, expected the binary "
            rf"version; give {cifar10_archive.ARCHIVE}, the folder"
        )
        with pytest.raises(UserError, match=message):
            registry.load(config(dir=str(given)))
    _, expected = write_archive(tmp_path / "given")  # beside the other version
    assert_equal(load(tmp_path / "given"), expected)


def test_an_empty_folder_of_the_right_name_names_what_it_lacks(tmp_path):
    (tmp_path / cifar10_archive.FOLDER).mkdir()
    with pytest.raises(UserError, match=r"data_batch_1.bin: No such file"):
        registry.load(config(dir=str(tmp_path)))


def test_photographs_are_not_taken_for_cifar10(pets):
    message = (
        rf"^data.dir={pets}: holds no CIFAR-10 .*; for photographs in class folders, set "
        "--config.data.name=folder$"
    )
    with pytest.raises(UserError, match=message):
        registry.load(config(dir=str(pets)))


def test_an_unknown_fallback_is_refused():
    with pytest.raises(UserError, match=r"data.fallback=mnist: choose digits"):
        registry.load(config(fallback="mnist"))


# ---- Interruptions and damaged caches


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    path, expected = write_archive(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    for module, name in ((cifar10_archive, "read"), (prepared.np, "save")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(module, name, interrupted)
            load(path)
        assert kept(tmp_path) == []
    assert_equal(load(path), expected)
    assert left_behind(tmp_path) == kept(tmp_path)


def test_of_two_processes_one_prepares(tmp_path, monkeypatch, capsys):
    path, expected = write_archive(tmp_path)
    calls = []

    def slow(source, read=cifar10_archive.read):
        calls.append(source)
        time.sleep(0.1)
        return read(source)

    monkeypatch.setattr(cifar10_archive, "read", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for found in pool.map(load, [path] * 2):
            assert_equal(found, expected)
    assert calls == [path]
    assert "waiting for another run, which prepares CIFAR-10" in capsys.readouterr().err


def other_arrays(path: Path) -> None:
    np.save(path, np.zeros((N, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("damage", [cut, flip_last_bit, other_arrays, Path.unlink])
def test_damaged_arrays_are_made_again_and_said(tmp_path, caplog, damage):
    path, expected = write_archive(tmp_path)
    load(path)
    (folder,) = kept(tmp_path)
    damage(folder / "test_images.npy")
    assert_equal(load(path), expected)
    assert f"{folder} is damaged" in caplog.text
    caplog.clear()
    assert_equal(load(path), expected)
    assert "is damaged" not in caplog.text
    assert left_behind(tmp_path) == [folder]


@pytest.mark.parametrize("problem", ["a file", "full"])
def test_arrays_that_cannot_be_kept_are_said_and_not_fatal(tmp_path, caplog, monkeypatch, problem):
    def full(*_):
        raise OSError("No space left on device")

    path, expected = write_archive(tmp_path)
    if problem == "full":
        monkeypatch.setattr(prepared.np, "save", full)
    else:
        (tmp_path / "tfds").write_text("a file, not a directory")
    assert_equal(load(path), expected)
    assert f"TFDS_DATA_DIR={tmp_path}/tfds: cannot keep the arrays of CIFAR-10" in caplog.text
    assert left_behind(tmp_path) == []


# ---- What TFDS has prepared


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A small copy of TFDS's own data set, which shuffles its examples."""

    name = "cifar10"
    VERSION = tfds.core.Version("3.0.2")

    def __init__(self, arrays: dict[str, np.ndarray], **kwargs):
        self.arrays = arrays
        super().__init__(**kwargs)

    def _info(self):
        features = dict(
            id=tfds.features.Text(),
            image=tfds.features.Image(shape=(32, 32, 3)),
            label=tfds.features.ClassLabel(num_classes=10),
        )
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        images, labels = self.arrays[f"{split}_images"], self.arrays[f"{split}_labels"]
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image).save(png, "png")
            yield i, dict(id=f"{split}_{i:05d}", image=png.getvalue(), label=label)


def prepare_by_tfds(tmp_path: Path, arrays: dict[str, np.ndarray]) -> Path:
    builder = Cifar10(arrays, data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    return tmp_path / "tfds/cifar10/3.0.2"


@pytest.mark.parametrize("form", ["array_record", "tfrecord"])
def test_what_tfds_has_prepared_is_the_archive(tmp_path, monkeypatch, form):
    """It is found in TFDS's data directory or in data.dir, and read once."""
    folder, expected = write_folder(tmp_path)
    path = prepare_by_tfds(tmp_path, expected)
    if form == "tfrecord":
        to_tfrecord(path)
    first = next(iter(tfds_source.open_splits(path, ["train"])[0]))
    assert first["id"] != b"train_00000"
    with pytest.raises(UserError, match="are not those of CIFAR-10"):
        load("")
    same = registry.load(config(dir=str(folder))).digest
    monkeypatch.setattr(cifar10_archive, "DIGEST", same)
    assert_equal(load(""), expected)
    shutil.rmtree(kept(tmp_path)[0])
    assert registry.load(config(dir=str(tmp_path / "tfds"))).digest == same
    monkeypatch.setattr(tfds_source, "open_splits", None)
    assert_equal(load(""), expected)
    assert_equal(load(tmp_path / "tfds"), expected)


@pytest.mark.parametrize("damage", [cut, flip_bit, Path.unlink])
def test_damaged_files_of_tfds_are_refused(tmp_path, damage):
    path = prepare_by_tfds(tmp_path, write_folder(tmp_path)[1])
    damage(next(path.glob("*test.array_record*")))
    message = rf"^{path}: cannot be read \(.*; delete this folder, and .*--config.data.dir=PATH$"
    with pytest.raises(UserError, match=message) as refusal:
        registry.load(config())
    assert "\n" not in str(refusal.value)


def test_an_id_that_is_missing_is_refused(tmp_path):
    class Repeated(Cifar10, skip_registration=True):
        name = "cifar10"

        def _generate_examples(self, split):
            for i, example in super()._generate_examples(split):
                yield i, example | dict(id=f"{split}_{max(i, 1):05d}")

    arrays = write_folder(tmp_path)[1]
    Repeated(arrays, data_dir=tmp_path / "tfds", file_format="array_record").download_and_prepare()
    with pytest.raises(UserError, match=r"cifar10/3.0.2: cannot be read .*expected 35, each once"):
        load("")


# ---- Download and fallback


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Return a function that starts a server with one answer to every request.

    length: the bytes that it says the body has, where these are not its own.
    """
    servers = []

    def start(body: bytes, length: int | None = None, status: int = 200) -> None:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body) if length is None else length))
                    self.end_headers()
                    self.wfile.write(body)
                except ConnectionError:  # the probe hangs up on the body
                    pass

            def log_message(self, *args):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        serve_forever = functools.partial(servers[-1].serve_forever, poll_interval=0.05)
        threading.Thread(target=serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{servers[-1].server_port}/{cifar10_archive.ARCHIVE}"
        monkeypatch.setattr(cifar10_archive, "URL", url)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A small archive that passes for the official one, and its arrays."""
    path, expected = write_archive(tmp_path / "official")
    monkeypatch.setattr(cifar10_archive, "ARCHIVE_BYTES", path.stat().st_size)
    monkeypatch.setattr(
        cifar10_archive, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()
    )
    return path, expected


def test_download_once_then_no_network(official, serve, tmp_path, monkeypatch):
    path, expected = official
    serve(path.read_bytes())
    assert_equal(load(""), expected)
    monkeypatch.setattr(requests, "get", None)
    monkeypatch.setattr(requests, "Session", None)
    assert_equal(load(""), expected)
    assert_equal(load(path), expected)  # the same archive, so the same arrays
    assert [folder.name for folder in kept(tmp_path)] == ["official-arrays"]


def test_official_archive_given_once_needs_no_download(official, tmp_path):
    path, expected = official
    load(path)
    assert_equal(load(""), expected)
    (folder,) = kept(tmp_path)
    flip_last_bit(folder / "train_labels.npy")
    message = rf"^{folder}: is damaged, and cannot reach .*; give .* by --config.data.dir=PATH$"
    with pytest.raises(UserError, match=message):
        registry.load(config())
    assert_equal(load(path), expected)


@pytest.mark.parametrize("how", ["dies half way", "another content", "refused"])
def test_a_failed_download_is_unreachable(official, serve, tmp_path, how):
    content = official[0].read_bytes()
    if how == "dies half way":
        serve(content[: len(content) // 2], length=len(content))
    else:
        serve(b"<html>Please log in</html>", status=403 if how == "refused" else 200)
    with pytest.raises(
        cifar10.Unreachable, match=rf"{cifar10_archive.URL}.*--config.data.dir"
    ) as refusal:
        registry.load(config(fallback=""))
    assert "\n" not in str(refusal.value)
    if how == "refused":  # the probe finds it: TFDS would try some of these again
        assert "HTTP status 403" in str(refusal.value)
    assert left_behind(tmp_path) == []
    assert registry.load(config()).fallback == "cifar10"


@pytest.mark.parametrize(
    "host", ["refuses", "is silent", "has no address", "stalls the name server"]
)
def test_an_unreachable_host_is_noticed_in_time(monkeypatch, host):
    monkeypatch.setattr(network, "PROBE_SECONDS", 0.2)
    answered = threading.Event()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        if host == "is silent":
            monkeypatch.setattr(
                cifar10_archive, "URL", f"http://127.0.0.1:{listener.getsockname()[1]}/"
            )
        if host == "has no address":
            monkeypatch.setattr(cifar10_archive, "URL", "http://cifar.invalid/")
        if host == "stalls the name server":

            def stall(*args, **kwargs):
                answered.wait(30)
                return []

            monkeypatch.setattr(socket, "getaddrinfo", stall)
        start = time.monotonic()
        with pytest.raises(cifar10.Unreachable, match="cannot reach"):
            load("")
        assert time.monotonic() - start < 3
        answered.set()


def test_the_fallback_cannot_be_missed(capsys):
    dataset = registry.load(config())
    assert (dataset.name, dataset.fallback) == ("digits", "cifar10")
    assert len(dataset.train_images) == 1437
    banner = capsys.readouterr().err
    assert banner.count("\n") >= 6
    for part in (
        "WARNING",
        "DOES NOT USE CIFAR-10",
        cifar10_archive.URL,
        "--config.data.dir=",
        '--config.data.fallback=""',
    ):
        assert part in banner
    assert max(map(len, banner.splitlines())) <= 80


def test_without_fallback_it_is_an_error():
    message = r"data.name=cifar10: cannot reach .*--config.data.dir"
    with pytest.raises(cifar10.Unreachable, match=message):
        registry.load(config(fallback=""))


def test_a_run_that_has_the_data_imports_neither_tfds_nor_requests(tmp_path):
    """Importing each takes a second."""
    path, _ = write_archive(tmp_path)
    program = (
        "import sys; from cnn_spmd.data import cifar10, cifar10_archive, registry; "
        f"cifar10_archive.IMAGES_PER_FILE = {N}; cifar10.read(cifar10.find({str(path)!r})); "
        "assert not {'tensorflow_datasets', 'requests', 'tensorflow'} & {*sys.modules}"
    )
    subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": "."},
    )


def test_pixels_that_are_not_cifar10s_are_named(tmp_path, caplog, monkeypatch):
    folder, _ = write_folder(tmp_path / "a")
    found = registry.load(config(dir=str(folder))).digest
    assert f"these are not CIFAR-10's pixels and labels (their digest is {found}" in caplog.text
    caplog.clear()
    monkeypatch.setattr(cifar10_archive, "DIGEST", found)
    registry.load(config(dir=str(folder)))
    assert "these are not" not in caplog.text
