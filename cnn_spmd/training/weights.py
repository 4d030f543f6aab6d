"""Read and write weights files, in the format safetensors.

A file holds arrays by name and a text. In our files a name is that of a parameter or of a variable
of the model state, such as conv1.kernel or norm1.mean; the text is a JSON object, called `about`
here, which export.py describes. Files of torchvision's AlexNet hold other names and layouts, and no
such text. No pickle is ever loaded: it could run any code.

This module does not import jax, so that launch.py can read a config from a file.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from cnn_spmd.errors import UserError, one_line
from cnn_spmd.training import runfiles

SUFFIX = ".safetensors"
ABOUT = "cnn_spmd"  # the name of our text in a file's metadata
DIGEST = "cnn_spmd_sha256"  # of our text and the arrays; the format itself has no checksum
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")

# Our layers, and the same layers of torchvision.models.alexnet.
TORCHVISION = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc1": "classifier.1",
    "fc2": "classifier.4",
    "fc3": "classifier.6",
}
SIDE = 6  # of fc1's input map, in pixels, for images of 224x224


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Return the arrays of a file, by our names, and `about`.

    `about` is {} for a file of another origin. Arrays of torchvision's AlexNet get our names and
    layouts. Raises UserError for a file that is missing, damaged or no safetensors.
    """
    with _opened(path) as file:
        about, metadata = _about(file, path), file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if DIGEST in metadata and metadata[DIGEST] != _digest(metadata.get(ABOUT, ""), arrays):
        raise _damaged(path)
    names = {f"{layer}.{kind}" for layer in TORCHVISION.values() for kind in ("weight", "bias")}
    return from_torchvision(arrays) if arrays.keys() == names else arrays, about


def is_file(source: pathlib.Path) -> bool:
    """Return whether a path names a weights file, and not the folder of a run."""
    return source.suffix == SUFFIX and not source.is_dir()


def read_saved(source: pathlib.Path) -> dict:
    """Return what config.json holds of a run, or of the run of a weights file.

    Raises UserError where there is none.
    """
    if not is_file(source):
        refuse_no_run(source)
        return runfiles.read_json(source / "config.json")
    about = read_about(source)
    if not about:
        raise UserError(
            f"{source}: holds no config, expected a file of python -m cnn_spmd.export; other "
            f"weights are evaluated by --config=EXPERIMENT --config.init_from={source} --evaluate"
        )
    return about["config"]


def refuse_no_run(folder: pathlib.Path) -> None:
    """Raise UserError unless a folder holds a run."""
    refuse_pickle(folder)
    if not folder.exists():
        raise UserError(
            f"{folder}: does not exist, expected the folder of a run{file_beside(folder)}"
        )
    if not (folder / "config.json").is_file():
        said = runfiles.instead_of(folder) or file_beside(folder)
        raise UserError(f"{folder}: holds no run (no config.json){said}")


def file_beside(path: pathlib.Path) -> str:
    """Return the end of the error for a path that is no run: it names a weights file like it."""
    likely = (pathlib.Path(f"{path}{SUFFIX}"), path.parent / f"{path.stem}{SUFFIX}")
    found = next((file for file in likely if file.is_file()), None)
    return f"; did you mean the weights file {found}?" if found else ""


def read_about(path: pathlib.Path) -> dict:
    """Return `about` alone, without reading arrays. Raises UserError as `read`."""
    with _opened(path) as file:
        return _about(file, path)


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], about: dict) -> None:
    """Write a file; a kill at any moment leaves the old one.

    Raises OSError where that fails.
    """
    # PyTorch's libraries ask for a "format"; arrays are the same in every format.
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    text = json.dumps(about, allow_nan=False)
    metadata = {"format": "pt", ABOUT: text, DIGEST: _digest(text, contiguous)}
    with runfiles.atomic_write(path) as temporary:
        temporary.write_bytes(safetensors.numpy.save(contiguous, metadata))


def to_torchvision(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of AlexNet for 224x224 images, as torchvision stores them.

    A convolution's kernel HWIO becomes OIHW, a dense kernel [in, out] becomes [out, in]. torch
    flattens the last maps as CHW, we do as HWC.
    """
    found = {}
    for ours, theirs in TORCHVISION.items():
        kernel = arrays[f"{ours}.kernel"]
        if ours == "fc1":
            kernel = kernel.reshape(SIDE, SIDE, -1, kernel.shape[-1]).transpose(2, 0, 1, 3)
            kernel = kernel.reshape(-1, kernel.shape[-1])
        axes = (3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)
        found[f"{theirs}.weight"] = kernel.transpose(axes)
        found[f"{theirs}.bias"] = arrays[f"{ours}.bias"]
    return found


def from_torchvision(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return torchvision's AlexNet by our names and layouts.

    This is the inverse of to_torchvision.
    """
    found = {}
    for ours, theirs in TORCHVISION.items():
        kernel = arrays[f"{theirs}.weight"]
        kernel = kernel.transpose((2, 3, 1, 0) if kernel.ndim == 4 else (1, 0))
        if ours == "fc1" and len(kernel) % SIDE**2 == 0:
            kernel = kernel.reshape(-1, SIDE, SIDE, kernel.shape[-1]).transpose(1, 2, 0, 3)
            kernel = kernel.reshape(-1, kernel.shape[-1])
        found[f"{ours}.kernel"] = kernel
        found[f"{ours}.bias"] = arrays[f"{theirs}.bias"]
    return found


def refuse_pickle(path: pathlib.Path) -> None:
    """Raise UserError for the name of a pickle, which says how to convert it."""
    if path.suffix.lower() in PICKLES:
        converted = path.with_suffix(SUFFIX)
        raise UserError(
            f"{path}: is a pickle, which could run any code when it is loaded; where you trust it, "
            'convert it: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), '{converted}')\""
        )


def _opened(path: pathlib.Path) -> Any:
    """Open a file, whose arrays are read when they are asked for."""
    refuse_pickle(path)
    if path.suffix != SUFFIX:
        raise UserError(f"{path}: expected a file whose name ends in {SUFFIX}")
    if not path.is_file():
        wrong = "is no file" if path.exists() else "does not exist"
        raise UserError(f"{path}: {wrong}, expected a weights file")
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as safetensors ({one_line(error)})") from error


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """Return the SHA-256 of a text, arrays and their names, in hexadecimal."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _about(file: Any, path: pathlib.Path) -> dict:
    """Return `about` of an opened file. Raises UserError where it is damaged."""
    try:
        return json.loads((file.metadata() or {}).get(ABOUT, "{}"))
    except ValueError:
        raise _damaged(path) from None


def _damaged(path: pathlib.Path) -> UserError:
    return UserError(
        f"{path}: is damaged: it does not hold what was written, expected an intact copy"
    )
