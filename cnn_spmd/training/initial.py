"""Start a run from the weights of a file: the config's field init_from.

The step is 0, and the optimizer and the seed are as without a file. Where the file's network has
another number of classes, the output layer is left as it is initialized from the seed.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from cnn_spmd import config as configs
from cnn_spmd.data.feed import put
from cnn_spmd.errors import UserError
from cnn_spmd.sharding.placement import name_of
from cnn_spmd.training import runfiles, weights
from cnn_spmd.training.step import TrainState

OUTPUT = "fc3"  # the output layer, in every network


class Start(NamedTuple):
    """What a run starts from, beside its seed."""

    arrays: Mapping[str, np.ndarray]  # by name; the others are initialized from the seed
    record: dict | None  # for summary.json: the file, its digest, the layers that it does not set
    text: str = ""  # the line that says so

    def put_into(self, state: TrainState) -> TrainState:
        """Return a state at step 0 with these arrays in it, placed as before."""

        def replaced(path: tuple, old: jax.Array) -> jax.Array:
            new = self.arrays.get(name_in_state(path))
            return old if new is None else put(new.astype(old.dtype), old.sharding)

        kept = state.params, state.model_state
        params, model_state = jax.tree_util.tree_map_with_path(replaced, kept)
        return state._replace(params=params, model_state=model_state)


def read(
    init_from: str, network: str, abstract_state: TrainState, class_names: Sequence[str]
) -> Start:
    """Return what a run starts from; init_from and network: the config's init_from and model.name.

    abstract_state: shapes of the run's state. class_names: of the run's data set.
    Raises UserError where the file cannot be read, and where its arrays are not those of the
    network.
    """
    if not init_from:
        return Start({}, None)
    path = configs.expanded("init_from", init_from)
    try:
        arrays, about = weights.read(path)
    except UserError as error:
        raise UserError(f"init_from={error}") from error
    wanted = arrays_of(abstract_state)
    kernel = f"{OUTPUT}.kernel"
    fresh = ()
    if kernel in arrays and kernel in wanted:
        found, expected = arrays[kernel].shape, wanted[kernel].shape
        if found[:-1] == expected[:-1] and found != expected:
            fresh = tuple(name for name in wanted if name.startswith(f"{OUTPUT}."))
            classes = f"the file has {found[-1]} classes, the data set {expected[-1]}"
    used = {name: array for name, array in arrays.items() if name not in fresh}
    kept = {name: wanted[name] for name in wanted if name not in fresh}
    try:
        refuse_others(path, used, kept)
    except UserError as error:
        held = about["config"]["model"]["name"] if about else network
        if held == network:
            raise
        raise UserError(
            f"init_from={path}: the file holds {held}, but the config has model.name={network}: "
            f"set --config.model.name={held}"
        ) from error
    text = f"Started from {path}: it sets {len(used)} of the network's {len(wanted)} arrays."
    if fresh:
        text += f" {OUTPUT} is left at its fresh initialization: {classes}."
    elif (known := about.get("class_names")) and list(known) != list(class_names):
        text += (
            f" {OUTPUT} is kept, although the file's classes ({known[0]}, ...) have other names "
            f"than the data set's ({class_names[0]}, ...)."
        )
    fresh_layers = [OUTPUT] if fresh else []
    record = dict(file=str(path), sha256=runfiles.sha256(path), fresh_layers=fresh_layers)
    return Start(used, record, text)


def refuse_others(
    path: pathlib.Path, found: Mapping[str, np.ndarray], wanted: Mapping[str, Any]
) -> None:
    """Raise UserError unless a file holds the wanted arrays, in their shapes."""
    for problem, names in (
        ("lacks", wanted.keys() - found.keys()),
        ("holds what the network lacks:", found.keys() - wanted.keys()),
    ):
        if names:
            first = min(names)
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"init_from={path}: {problem} {first}{more}, expected the arrays of model.name and "
                "model.width, by their names"
            )
    for name, array in found.items():
        if array.shape != wanted[name].shape:
            raise UserError(
                f"init_from={path}: {name} is of shape {array.shape}, expected "
                f"{wanted[name].shape}: set the model, data.image_size and data.crop that it had"
            )


def arrays_of(state: TrainState) -> dict[str, Any]:
    """Return the parameters and the variables of the model state by name."""
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.model_state))
    return {name_in_state(path): leaf for path, leaf in leaves}


def name_in_state(path: tuple) -> str:
    """Return the name of a leaf of (params, model_state), such as conv1.kernel."""
    return name_of(path[1:]).removesuffix(".value")
