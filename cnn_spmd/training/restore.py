"""Restore what was trained, from the folder of a run or from a weights file.

Evaluation, predictions, exports and pictures start here. A weights file of export.py stands for a
run: it holds the config, the names of the classes and what normalises the images. So it needs no
data set, except to be evaluated.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import ml_collections
import numpy as np

from cnn_spmd import config as configs
from cnn_spmd.data.augment import Preprocessing
from cnn_spmd.data.dataset import VALIDATION, Dataset, Unread, blank_arrays
from cnn_spmd.errors import IF_ADDED, UnknownName, UserError, one_line
from cnn_spmd.training import build, runfiles, weights, workdir
from cnn_spmd.training.checkpoint import Checkpoints
from cnn_spmd.training.one_checkpoint import Checkpoint
from cnn_spmd.training.step import TrainState
from cnn_spmd.training.workdir import has_checkpoint


class Restored(NamedTuple):
    """What was trained: its setup, its newest state, and where that comes from."""

    setup: build.Setup
    state: TrainState
    step: int
    accuracy: float | None  # of the test split, as the run measured it at this step


@contextlib.contextmanager
def locked(source: pathlib.Path, flag: str = "") -> Iterator[None]:
    """Lock the folder of a run; a weights file needs no lock.

    Without the lock, a run that continues there could lose the checkpoint that it is saving.
    flag: the command-line flag that gave the source, for messages.
    """
    if weights.is_file(source):
        yield
        return
    weights.refuse_no_run(source)
    with workdir.locked(source, flag):
        yield


def restore(
    source: pathlib.Path,
    config: ml_collections.ConfigDict,
    saved: dict,
    data: Dataset | Unread | None = None,
) -> Restored:
    """Return what was trained, on the mesh of `config`.

    source: the folder of a run, or a weights file. config: what the run saved, with what is to
    differ. saved: of weights.read_saved. data: the config's data set, where it is found already.
    Where config.data.validation is 0 and the run's is not, the test split is taken, and the images
    are normalised as in the run. Raises UserError for other data than the run's, for another
    data.validation, and without a usable checkpoint.
    """
    setup = prepare(source, config, saved, data)
    of_run = saved["data"].get("validation", 0)
    if config.data.validation == of_run:
        return newest(source, setup, saved)
    trained_on = setup.data.with_validation(of_run)
    preprocessing = build.make_preprocessing(setup.config, trained_on)
    restored = newest(source, with_preprocessing(setup, preprocessing), saved)
    return restored._replace(accuracy=None)  # the run measured it on the validation images


def load_trained(source: pathlib.Path | str, data_dir: str | None = None) -> Restored:
    """Return what was trained, with its setup, on the first device.

    source: the folder of a run, whose newest checkpoint is taken, or a weights file. data_dir: as
    of on_one_device. `setup.functions.scores(state, images)` gives the log probability of each
    class, [B, C], for uint8 images [B, H, W, 3] as the run's data set has them; jit it.
    Raises UserError as on_one_device, and where a run is training in the folder.
    """
    source = pathlib.Path(source)
    with locked(source):
        return on_one_device(source, data_dir)


def on_one_device(source: pathlib.Path, data_dir: str | None = None) -> Restored:
    """Return what was trained, on the first device, whatever the run's mesh was.

    data_dir: where the run's data set is now, if it has moved; a weights file needs none. Raises
    UserError for a damaged config.json, and as `restore`.
    """
    saved = weights.read_saved(source)
    try:
        config = config_on_one_device(saved, data_dir)
        if weights.is_file(source):
            setup = prepare_without_data(source, config, saved)
        else:
            setup = prepare(source, config, saved)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{source}: is damaged or of another version ({one_line(error)})"
        ) from error
    except UnknownName as error:
        raise naming_experiment(error, source) from error
    except UserError as error:
        message = str(error).replace("--config.data.dir=", "--data_dir=")
        if data_dir is None and message.startswith("data.dir="):
            message += "; where it has moved: --data_dir=PATH"
        raise UserError(f"{source}: {message}") from error
    return newest(source, setup, saved)


def prepare(
    source: pathlib.Path,
    config: ml_collections.ConfigDict,
    saved: dict,
    data: Dataset | Unread | None = None,
) -> build.Setup:
    """Return the Setup of what was trained; arguments are those of `restore`."""
    if weights.is_file(source):
        config.init_from = str(source)
    return build.prepare(config, data=data, check=lambda made: refuse_other_data(made, saved))


def newest(source: pathlib.Path, setup: build.Setup, saved: dict) -> Restored:
    """Return the newest usable state, with its setup; change nothing in the folder."""
    if weights.is_file(source):
        about = weights.read_about(source)
        initial_state = setup.functions.jit_init()(np.uint32(setup.config.seed))
        state = setup.start_weights().put_into(initial_state)
        return Restored(setup, state, about["step"], about["accuracy"])
    state = None
    if has_checkpoint(source):
        directory, run = source.resolve() / "checkpoints", saved.get("run", "")
        checkpoints = Checkpoints(directory, setup.config.checkpoint.keep, run, read_only=True)
        state = checkpoints.restore(setup.functions.abstract_state)
        checkpoints.close()
    if state is None:
        raise UserError(
            f"{source}: holds no checkpoint that can be used: train it to its end first"
        )
    step = int(state.step)
    return Restored(setup, state, step, Checkpoint(directory / str(step)).accuracy())


def naming_experiment(error: UnknownName, source: pathlib.Path) -> UserError:
    """Return the error for an unknown name in a saved config: it says which experiment adds it.

    A weights file may have come from elsewhere: it holds the experiment's name without its folder.
    """
    adds = experiment_of(source)
    value = f", the path of your {adds}" if weights.is_file(source) else f"={adds}"
    return UserError(f"{source}: {error.problem}{IF_ADDED}{adds and value}")


def experiment_of(source: pathlib.Path) -> str:
    """Return the experiment that the run's command names; "" where the files do not say it.

    A weights file names the experiment that adds what it needs.
    """
    if weights.is_file(source):
        return weights.read_about(source).get("adds", "")
    summary = runfiles.read_json(source / "summary.json", required=False)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--config", default="")
    return parser.parse_known_args(shlex.split(summary.get("command") or ""))[0].config


def config_on_one_device(saved: dict, data_dir: str | None) -> ml_collections.ConfigDict:
    """Return a run's config for one device, without a fallback for its data set."""
    if data_dir is not None and saved["dataset"] in ("digits", "synthetic"):
        raise UserError(
            f"--data_dir={data_dir}: has no effect on {saved['dataset']}, expected none"
        )
    config = configs.from_saved(saved)
    config.mesh.update(dict(data=1, model=1))
    config.parallelism = "data"
    config.data.fallback = ""
    if data_dir is not None:
        config.data.dir = data_dir
    return config


def refuse_other_data(setup: build.Setup, saved: dict) -> None:
    """Raise UserError where the data are not those that the run was trained on."""
    data = setup.data
    asked, validation = saved["dataset"], setup.config.data.validation
    of_run = saved["data"].get("validation", 0)
    if validation not in (0, of_run):
        known = f"{of_run}, as in the run, or 0, the test split" if of_run else "0, as in the run"
        raise UserError(
            f"data.validation={validation}: expected {known}: it was trained on the other "
            "training images"
        )
    other_files = data.files != saved.get("data_files", data.files)
    # There is no digest yet where the images are still to be decoded.
    other_pixels = data.digest and saved.get("data_digest", data.digest) != data.digest
    # A run on validation images may be tested on the test split; an unread data set has that only.
    names = (asked, asked.removesuffix(VALIDATION)) if of_run else (asked,)
    other_name = data.name not in names
    if other_name or other_files or other_pixels:
        found = data.name if other_name else "other files or pixels of it"
        raise UserError(
            f"was trained on {asked}, but its data.dir={setup.config.data.dir} holds {found}: "
            "give the former's place by --config.data.dir=PATH"
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of commands that take the folder of a run or a weights file."""
    parser.add_argument("--data_dir", metavar="PATH", help="where the run's data.dir is now")
    parser.add_argument(
        "--config", metavar="E", help="the experiment, where the run needs what it adds"
    )


def prepare_without_data(
    source: pathlib.Path, config: ml_collections.ConfigDict, saved: dict
) -> build.Setup:
    """Return the Setup of a weights file, with one black image in the place of its data set.

    Nothing in its config asks for more images. It normalises as the file says.
    """
    about = weights.read_about(source)
    config.update(dict(batch_size=1, dense_microbatch=0, noise_scale=0))
    config.data.update(dict(validation=0, held_out=0, held_out_steps=0))
    black = Dataset(
        name=saved["dataset"],
        **blank_arrays(dict(train=1, test=1), about["image_size"]),
        class_names=tuple(about["class_names"]),
        mirror=about["mirror"],
        files=saved.get("data_files", ""),
        digest=saved.get("data_digest", ""),
    )
    setup = prepare(source, config, saved, black)
    mean, std = (np.asarray(about[name], np.float32) for name in ("mean", "std"))
    old = setup.functions.preprocessing
    return with_preprocessing(setup, dataclasses.replace(old, mean=mean, std=std))


def with_preprocessing(setup: build.Setup, preprocessing: Preprocessing) -> build.Setup:
    """Return a setup with another preprocessing, before anything of it is compiled."""
    functions = dataclasses.replace(setup.functions, preprocessing=preprocessing)
    return dataclasses.replace(setup, functions=functions)
