"""Define the config: its fields, how it resolves, what a resumed run may change.

SCHEMA has every field. docs/config.md is generated from it:
`python -m cnn_spmd.config > docs/config.md`.
"""

import copy
import json
import math
import os
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import ml_collections

from cnn_spmd.errors import UserError, did_you_mean, unknown


class Field(NamedTuple):
    """A field of the config: its default, what it does, which values it may have.

    A value has the type of the default. An integer may stand for a float, and a list for a tuple.
    """

    default: Any
    help: str
    low: float | None = None  # the lowest value; of a dict, the lowest value of an entry
    high: float | None = None  # the highest value
    below: float | None = None  # every value is less than this
    choices: tuple[str, ...] = ()
    item: Any = None  # a value of the type of each entry of a tuple or dict

    @property
    def range(self) -> str:
        """Return the range of its numbers in words."""
        if self.below is not None:
            return f"from {self.low} to below {self.below}"
        return f"at least {self.low}" if self.high is None else f"from {self.low} to {self.high}"


MESH_AXES = ("data", "model")  # a further axis needs a row of the placement table that uses it

# Every field, by its dotted name. Names of networks, data sets, optimizers, decays and schemes are
# checked by the module that has them.
SCHEMA = {
    "experiment": Field("experiment", "name of the experiment; its folders are named after it"),
    "seed": Field(0, "seed of weights, batches, crops and dropout masks", low=0, below=2**31),
    # How long, and how much at a time.
    "batch_size": Field(512, "global batch: images per step, over all devices", low=1),
    "epochs": Field(40, "passes over the training images", low=0, high=10**7),
    "steps": Field(0, "steps to train, instead of epochs; 0: as epochs says", low=0, high=10**7),
    "steps_per_call": Field(
        0, "steps of a chunk (one compiled call); 0: up to 100, on a CPU 1", low=0, high=10**5
    ),
    "collectives_in_flight": Field(
        1, "collectives that may be under way at once, on GPUs; XLA's default: 1", low=1, high=1000
    ),
    "dtype": Field(
        "auto",
        "type of the computation; auto: bfloat16, on a CPU float32",
        choices=("auto", "float32", "bfloat16"),
    ),
    "profile": Field(0, "steps, at least, to trace after the last one", low=0, high=1000),
    "noise_scale": Field(
        0, "batches, up to an epoch, that measure the noise scale; 0: none", low=0, high=10**6
    ),
    "card": Field(
        "", "calibration that predicts the step: h200, or a file; empty: that of the devices"
    ),
    # Where arrays live: cnn_spmd/sharding/table.py.
    **{
        f"mesh.{axis}": Field(
            -1 if axis == MESH_AXES[-1] else 1,
            f"devices along the {axis} axis; -1: all that are left",
            low=-1,
            high=2**16,
        )
        for axis in MESH_AXES
    },
    "parallelism": Field("data", "scheme: a row of the placement table, or of placement"),
    "placement": Field({}, "rows of your own, in the form of the placement table", item={}),
    # The network.
    "model.name": Field("alexnet", "network: one of [these](networks.md), or one of your own"),
    "model.width": Field(4096, "units of each hidden dense layer", low=1, high=10**6),
    "model.dropout": Field(0.5, "share of hidden dense units that are dropped", low=0.0, below=1.0),
    "model.batch_norm": Field(
        "global",
        "statistics of batch norm: of the global batch, or of each device's part of it",
        choices=("global", "per_device"),
    ),
    "model.fast": Field(True, "fast forms of layers and gradients; False: the plain forms"),
    "init_from": Field(
        "", "weights to start from: of cnn_spmd.export, or torchvision's AlexNet; empty: none"
    ),
    "dense_microbatch": Field(
        0, "examples that the dense layers see at a time (variable batch); 0: the batch", low=0
    ),
    "dense_updates": Field(
        "each",
        "with dense_microbatch: update the dense layers after each micro-batch, or once (sum)",
        choices=("each", "sum"),
    ),
    # The images.
    "data.name": Field("cifar10", "data set: a name in cnn_spmd/data/registry.py, or tfds:NAME"),
    "data.dir": Field("", "where its files are; empty: where TFDS keeps them"),
    "data.resident": Field(
        "auto",
        "on each device: all images (yes), a shard, or none (no: streamed); auto: what fits",
        choices=("auto", "yes", "sharded", "no"),
    ),
    "data.image_size": Field(
        0,
        "side of photographs, of their central square; 0: what tfds:NAME or npz has, or 256",
        low=0,
        high=4096,
    ),
    "data.skip_bad": Field(0, "photographs that may be left out as they cannot be read", low=0),
    "data.normalise": Field(
        "channel",
        "channel: mean 0, deviation 1; pixel_mean: less the mean image; torchvision: its constants",
        choices=("channel", "pixel_mean", "torchvision"),
    ),
    "data.crop": Field(
        0, "side of the random crop that the network sees; 0: all, or what fits the network", low=0
    ),
    "data.crop_pad": Field(0, "reflected pixels around an image before it is cropped", low=0),
    "data.flip": Field(True, "mirror training images at random, where the data set allows it"),
    "data.colour_noise": Field(
        0.0, "PCA noise on colours, in standard deviations (AlexNet 2012: 0.1)", low=0.0
    ),
    "data.held_out": Field(0, "last training images that the first steps leave out", low=0),
    "data.held_out_steps": Field(0, "steps that leave out data.held_out images", low=0),
    "data.validation": Field(
        0, "training images to evaluate on instead of the test split; 0: the test split", low=0
    ),
    "data.fallback": Field("", "digits: stand in where CIFAR-10 cannot be had; empty: an error"),
    "data.fallback_epochs": Field(
        4, "epochs on the fallback, unless epochs or steps is set by hand; 0: as given", low=0
    ),
    "data.fallback_batch_size": Field(
        64, "batch_size on the fallback, unless that is set by hand; 0: as given", low=0
    ),
    "data.fallback_learning_rate": Field(
        0.1, "learning rate on the fallback, unless that is set by hand; 0: as given", low=0.0
    ),
    "data.synthetic.image_size": Field(32, "side of random images in pixels", low=1, high=4096),
    "data.synthetic.classes": Field(10, "classes of random images", low=1, high=10**6),
    "data.synthetic.train_examples": Field(4096, "random images to train on", low=1, high=10**7),
    "data.synthetic.test_examples": Field(1024, "random images to test on", low=1, high=10**7),
    # The loss and the update.
    "label_smoothing": Field(
        0.0, "share of each label that is spread over all classes", low=0.0, below=1.0
    ),
    "optimizer.name": Field("sgd", "sgd, lars, larc, adamw, muon, or one of your own"),
    "optimizer.options": Field({}, "numbers for an optimizer of your own, by name", item=0.0),
    "optimizer.learning_rate": Field(0.01, "highest learning rate", low=0.0),
    "optimizer.scaling": Field(
        0.0,
        "multiply the rate by (batch_size / 128) ** scaling; 0 turns scaling off",
        low=0.0,
        high=1.0,
    ),
    "optimizer.warmup": Field(
        0.0, "share of the steps over which the rate grows from 0", low=0.0, high=1.0
    ),
    "optimizer.warmup_factor": Field(
        0.0, "the rate's factor during the warm-up; 0: it grows from 0 to 1", low=0.0, high=1.0
    ),
    "optimizer.warmup_epochs": Field(
        0.0, "epochs over which the rate grows from 0, instead of warmup", low=0.0
    ),
    "optimizer.warmup_steps": Field(
        0, "steps over which the rate grows from 0, instead of warmup", low=0, high=10**7
    ),
    "optimizer.decay": Field(
        "linear", "after the warm-up: linear, polynomial, cosine, constant, staged, or your own"
    ),
    "optimizer.power": Field(
        2.0, "decay=polynomial: the rate falls as (1 - t) ** power, t from 0 to 1", low=0.0
    ),
    "optimizer.stages": Field(
        (), "decay=staged: shares of the steps where the rate falls, such as (0.25, 0.5)", item=0.0
    ),
    "optimizer.stage_factor": Field(
        0.1, "decay=staged: what the rate is multiplied by at each stage", low=0.0, high=1.0
    ),
    "optimizer.bias_rate": Field(1.0, "multiply the rate of all biases by this", low=0.0),
    "optimizer.layer_rates": Field(
        {}, 'multiply the rate of some layers, such as {"fc1": 0.25}', low=0.0, item=0.0
    ),
    "optimizer.momentum": Field(
        0.9, "share of the last update that the next one repeats; adamw: beta 1", low=0.0, below=1.0
    ),
    "optimizer.nesterov": Field(False, "Nesterov's form of momentum"),
    "optimizer.beta2": Field(
        0.999, "adamw, muon: share of the last mean square that the next keeps", low=0.0, below=1.0
    ),
    "optimizer.trust": Field(
        0.001, "lars, larc: eta of the local rate, about eta times norm(w) / norm(g)", low=0.0
    ),
    "optimizer.weight_decay": Field(5e-4, "decay of kernels", low=0.0),
    "optimizer.decay_all": Field(False, "decay biases and the scales of batch norms, too"),
    "optimizer.weight_decays": Field(
        {}, 'another weight decay for some layers, such as {"fc3": 0.01}', low=0.0, item=0.0
    ),
    "optimizer.clip_norm": Field(
        0.0, "scale a longer gradient down to this norm; 0 turns clipping off", low=0.0
    ),
    # Between the steps.
    "eval.every_epochs": Field(10, "epochs between evaluations; 0: only at the end", low=0),
    "eval.views": Field(
        "one",
        "views of a test image whose softmax outputs are averaged; mirrored: two; ten: crops",
        choices=("one", "mirrored", "ten"),
    ),
    "checkpoint.every_epochs": Field(20, "epochs between checkpoints; 0: only at the end", low=0),
    "checkpoint.keep": Field(2, "newest checkpoints to keep, beside the most accurate one", low=1),
}

# Fields of older versions, and what to do instead. In a saved run they are ignored.
GONE = {"model.levers": "set model.fast to True (all of them) or False (none) instead"}

# By the type of a field: which types its value may have, and how a message names them.
TYPES = {
    bool: (bool, "True or False"),
    int: (int, "an integer"),
    float: (int | float, "a number"),
    str: (str, "a string"),
    tuple: (tuple | list, "a tuple"),
    dict: (dict, "a dict"),
}
LARGEST = {float: 3e38, int: 2**31 - 1}  # of open ranges: a float32 or an int32 holds it
AUTO = "auto"  # of --mesh and parallelism: what the planner finds the fastest (plan.py)
IMAGE_SIZE = 256  # data.image_size where nothing else says it: Krizhevsky et al. 2012, section 2
MOST_CPU_DEVICES = 2048  # of one process: XLA numbers those of another process from here on

# data.resident="auto" keeps a data set on every device where it takes at most RESIDENT_SHARE of the
# device's memory. Where nobody knows that memory, the limit is RESIDENT_BYTES. Otherwise it splits
# the data set over all devices where each shard takes at most SHARDED_SHARE: ImageNet at 256 pixels
# takes 62% of the memory that JAX uses on four H200s. Otherwise the host streams the images; a
# chunk then has at most CHUNK_BYTES of them, or a single step.
RESIDENT_SHARE = 0.4
SHARDED_SHARE = 0.75
JAX_SHARE = 0.75  # of a GPU's memory: what JAX takes by default
RESIDENT_BYTES = 4e9
CHUNK_BYTES = 1e9

# Each of data.fallback_*, and the fields that it replaces on a data set that stands in for another:
# the last one gets its value, one before it becomes 0.
FALLBACK_FIELDS = {
    "fallback_batch_size": ("batch_size",),
    "fallback_epochs": ("steps", "epochs"),
    "fallback_learning_rate": ("optimizer.learning_rate",),
}

# Fields that say where and how a network computes, and not what. A resumed run and an evaluation
# may change them. One exception: with model.batch_norm=per_device the mesh changes the numbers of
# training.
COMPUTING = ("mesh", "parallelism", "placement", "model.fast", "data.dir", "data.resident")
# What a resumed run may change beside these. The learning rate follows steps and epochs from there
# on; data_digest shows which images data.skip_bad leaves out.
MAY_DIFFER = (
    *COMPUTING,
    "steps_per_call",
    "collectives_in_flight",
    "eval.every_epochs",
    "checkpoint",
    "data.fallback",
    *(f"data.{name}" for name in FALLBACK_FIELDS),
    "data.skip_bad",
    "epochs",
    "steps",
    "profile",
    "noise_scale",
    "card",
)
# What a run's config.json says of its data beside the config; a resumed run has the same.
DATA_FIELDS = ("dataset", "fallback", "data_files", "data_digest")

# ---- Fields: defaults, types, ranges


def default() -> ml_collections.ConfigDict:
    """Return a new config in which every field has its default."""
    config = ml_collections.ConfigDict()
    fill(config)
    return config


def fill(config: ml_collections.ConfigDict | dict) -> None:
    """Give each field that a config lacks its default, in place.

    Raises UserError for a section, such as config.mesh, that is no dict.
    """
    for name, field in SCHEMA.items():
        *sections, last = name.split(".")
        at = config
        for depth, section in enumerate(sections, 1):
            if section not in at:
                at[section] = {}
            at = at[section]
            if not isinstance(at, dict | ml_collections.ConfigDict):
                raise UserError(f"{'.'.join(sections[:depth])}={at!r}: expected a dict")
        if last not in at:
            at[last] = copy.deepcopy(field.default)


def complete(saved: dict) -> dict:
    """Return the config that a run saved with the fields of today.

    saved: what config.json, or summary.json under "config", holds; or the same with dotted names.
    A field that it lacks has its default; what is no field (any more) is left out. Values are as
    JSON reads them back: tuples are lists. Raises UserError as `fill`.
    """
    nested = _nested(copy.deepcopy(saved))
    fill(nested)
    return json.loads(json.dumps(_nested({name: get(nested, name) for name in SCHEMA})))


def from_saved(saved: dict) -> ml_collections.ConfigDict:
    """Return the config that a run saved, with the fields and types of today.

    saved: as for `complete`.
    """
    completed = complete(saved)
    values = {name: get(completed, name) for name in SCHEMA}
    for name, field in SCHEMA.items():
        if isinstance(field.default, tuple):  # JSON reads tuples as lists
            values[name] = tuple(values[name])
    return ml_collections.ConfigDict(_nested(values))


def _nested(values: dict) -> dict:
    """Return values with dotted names as nested dicts."""
    found: dict = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        at = found
        for section in sections:
            at = at.setdefault(section, {})
        at[last] = value
    return found


def get(config: Any, field: str) -> Any:
    """Return the value of a field by its dotted name."""
    for name in field.split("."):
        config = config[name]
    return config


def refuse_unknown(field: str, value: str = "") -> None:
    """Raise UserError unless a field, section or entry has this dotted name.

    An entry is that of a dict whose names are the user's, such as optimizer.layer_rates.fc3.
    value: as the user gave it, for the message.
    """
    if field in SCHEMA or field in _sections() or is_entry(field):
        return
    remedy = GONE.get(field, "expected one of docs/config.md" + _near_field(field))
    raise UserError(f"{field}{value and f'={value}'}: no such field, {remedy}")


def _near_field(name: str) -> str:
    """Return the end of a message: the nearest field; empty where none is near."""
    section = name.rpartition(".")[0]
    for field in fields_called(name.rpartition(".")[2]):
        if section in ("", field.rpartition(".")[0]):
            return f'; did you mean "{field}"?'
    others = sorted(each for each in _sections() if not name.startswith(f"{each}."))
    return did_you_mean(name, [*SCHEMA, *others])


def fields_called(name: str) -> list[str]:
    """Return the fields that a name without its section may stand for.

    name: the last part of a field, such as "learning_rate", or its initials, "lr".
    """
    found = []
    for field in SCHEMA:
        last = field.rpartition(".")[2]
        words = last.split("_")
        if name in (field, last) or (words[1:] and name == "".join(word[0] for word in words)):
            found.append(field)
    return found


def is_entry(field: str) -> bool:
    """Return whether a dotted name is that of an entry of a dict field."""
    parent = SCHEMA.get(field.rpartition(".")[0])
    return parent is not None and isinstance(parent.default, dict)


def is_part_of(field: str, names: Collection[str]) -> bool:
    """Return whether a field is among these fields and sections, or lies in one of them."""
    return f"{field}.".startswith(tuple(f"{name}." for name in names))


def _sections() -> set[str]:
    """Return the names of the dicts that hold fields, such as data and data.synthetic."""
    parts = [name.split(".") for name in SCHEMA]
    return {".".join(each[:depth]) for each in parts for depth in range(1, len(each))}


def check_types(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for the first field that is unknown, missing or of a wrong type."""
    values = config.to_dict()
    _check_section("", values)
    for field in SCHEMA:
        try:
            get(values, field)
        except KeyError:
            raise UserError(
                f"{field}: missing, expected a value as in docs/config.md: start from "
                "cnn_spmd.config.default()"
            ) from None


def _check_section(section: str, values: dict) -> None:
    for name, value in values.items():
        _refuse_unless_string(section or "config", name)
        field = f"{section}.{name}" if section else name
        if field in SCHEMA:
            check_value(field, value)
        elif field not in _sections():
            refuse_unknown(field, "" if isinstance(value, dict) else str(value))
        elif isinstance(value, dict):
            _check_section(field, value)
        else:
            raise UserError(f"{field}={value!r}: expected a dict")


def check_value(field: str, value: Any) -> None:
    """Raise UserError unless a value, and each entry of it, has the type of its field."""
    like, item = SCHEMA[field].default, SCHEMA[field].item
    _check_type(field, value, like)
    if isinstance(like, tuple):
        for i, each in enumerate(value):
            _check_type(f"{field}[{i}]", each, item)
    elif isinstance(like, dict):
        for name, each in value.items():
            _check_type(f"{field}.{name}", each, item)


def _check_type(name: str, value: Any, like: Any) -> None:
    """Raise UserError unless a value has the type of `like`, with strings as names."""
    kinds, expected = TYPES[type(like)]
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(like, bool):
        raise UserError(f"{name}={value!r}: expected {expected}")
    if isinstance(like, dict):
        for inner in value:
            _refuse_unless_string(name, inner)


def _refuse_unless_string(of: str, name: Any) -> None:
    if not isinstance(name, str):
        raise UserError(f"{of}: has the name {name!r}, expected a string")


def validate(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for the first field outside its range, or as check_types.

    The message names the field, its value and the range.
    """
    check_types(config)
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", config.experiment):  # folders are named after it
        raise UserError(
            f"experiment={config.experiment}: expected letters, digits and _.+- only, such as "
            "alexnet_cifar"
        )
    for name in SCHEMA:
        validate_field(config, name)
    if not config.epochs and not config.steps:
        raise UserError("epochs=0, steps=0: expected a positive number in one of them")
    _refuse_several_warmups(config.optimizer)
    expanded("data.dir", config.data.dir)
    if config.data.name == "synthetic":
        sizes = config.data.synthetic
        fields = ", ".join(
            f"data.synthetic.{name}={value}" for name, value in sizes.items() if name != "classes"
        )
        needed = (sizes.train_examples + sizes.test_examples) * sizes.image_size**2 * 3
        refuse_beyond(machine_memory(), needed, fields)


def validate_field(config: ml_collections.ConfigDict, name: str) -> None:
    """Raise UserError where one field of SCHEMA is outside its own range."""
    field, value = SCHEMA[name], get(config, name)
    if field.choices and value not in field.choices:
        raise unknown(name, value, field.choices)
    if field.low is None:
        return
    if not isinstance(field.default, dict):
        _check_range(name, value, field)
        return
    for key, each in value.items():
        _check_range(f"{name}.{key}", each, field)


def _refuse_several_warmups(settings: ml_collections.ConfigDict) -> None:
    """Raise UserError where two of the three fields say how long the warm-up is."""
    fields = ("warmup", "warmup_epochs", "warmup_steps")
    given = [f"optimizer.{name}={settings[name]}" for name in fields if settings[name]]
    if len(given) > 1:
        raise UserError(f"{', '.join(given)}: expected one of them, and 0 in the others")


def _check_range(name: str, value: float, field: Field) -> None:
    """Raise UserError for a number outside the range of its field."""
    high = LARGEST[type(field.low)] if field.high is None else field.high
    # Written so that NaN is refused.
    if not (field.low <= value <= high and (field.below is None or value < field.below)):
        end = f" and at most {high}" if field.high is None and field.below is None else ""
        raise UserError(f"{name}={value}: expected {field.range}{end}")


def expanded(field: str, path: str) -> pathlib.Path:
    """Replace ~ and ~user in a path. Raises UserError where there is no such user."""
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError:
        raise UserError(
            f"{field}={path}: has no such home folder, expected the path of a folder"
        ) from None


def machine_memory() -> int:
    """Count the bytes of memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def refuse_beyond(memory: float, needed: float, fields: str) -> None:
    """Raise UserError, naming the fields, if they need more bytes than there are."""
    if needed > memory:
        raise UserError(
            f"{fields}: needs {needed / 1e9:,.1f} GB, expected at most the {memory / 1e9:,.1f} GB "
            "of memory that there are"
        )


# ---- From a config to what it means for a data set


def keep_given(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """Set to 0 each of data.fallback_* that would replace a field set by hand.

    given: the dotted names of the fields that were set by hand; those of data.fallback_* that are
    among them stay.
    """
    for fallback, fields in FALLBACK_FIELDS.items():
        replaces_given = any(is_part_of(field, given) for field in fields)
        if replaces_given and not is_part_of(f"data.{fallback}", given):
            config.data[fallback] = type(config.data[fallback])(0)


def resolve(
    config: ml_collections.ConfigDict,
    data: Any,
    platform: str,
    memory: float | None = None,
    devices: int = 1,
) -> ml_collections.ConfigDict:
    """Return a copy in which everything that was left open is filled in.

    These are the data set that there is, where it lives, batch size, learning rate, steps, steps
    per call and dtype. data: a Dataset; platform: of the devices, "cpu" or another; memory: bytes
    that each of them can hold, where that is known; devices: of the mesh. Raises UserError where
    the batch is larger than the data set, or where crop or held_out do not fit it.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    if data.fallback:
        _take_fallback(config, data.name)
    if not config.data.image_size:
        has_own_side = config.data.name.partition(":")[0] in ("npz", "tfds")
        config.data.image_size = data.train_images.shape[1] if has_own_side else IMAGE_SIZE
    _refuse_misfits(config, data)
    if config.dtype == "auto":
        config.dtype = "float32" if platform == "cpu" else "bfloat16"
    per_epoch = len(data.train_images) // config.batch_size
    config.steps = config.steps or config.epochs * per_epoch
    if config.steps > 10**7:
        raise UserError(
            f"epochs={config.epochs}: makes {config.steps} steps, expected at most 10000000"
        )
    config.epochs = 0  # steps says it from here on
    _resolve_warmup(config, per_epoch)
    _resolve_noise_scale(config, per_epoch)
    if config.data.resident == "auto":
        config.data.resident = _where_images_live(data, memory, devices)
    if not config.steps_per_call:
        config.steps_per_call = _steps_per_call(config, data, platform)
    return config


def _resolve_warmup(config: ml_collections.ConfigDict, per_epoch: int) -> None:
    """Turn optimizer.warmup_epochs into steps, in place.

    Raises UserError for a warm-up that is longer than the run.
    """
    settings = config.optimizer
    if settings.warmup_epochs:
        settings.warmup_steps = round(settings.warmup_epochs * per_epoch)
    if settings.warmup_steps > config.steps:
        given = "warmup_epochs" if settings.warmup_epochs else "warmup_steps"
        raise UserError(
            f"optimizer.{given}={settings[given]}: makes a warm-up of {settings.warmup_steps} "
            f"steps, expected at most the run's {config.steps}: lower it, or train longer"
        )
    settings.warmup_epochs = 0.0  # warmup_steps says it from here on


def _resolve_noise_scale(config: ml_collections.ConfigDict, per_epoch: int) -> None:
    """Cut noise_scale to an epoch and to the run, in place. Raises UserError for one batch."""
    batches = min(config.noise_scale, per_epoch, config.steps)
    if batches == 1:
        raise UserError(
            f"noise_scale={config.noise_scale}: takes 1 batch, of {per_epoch} in an epoch and "
            f"{config.steps} in the run, expected 0 or at least 2"
        )
    config.noise_scale = batches


def _where_images_live(data: Any, memory: float | None, devices: int) -> str:
    """Choose data.resident; arguments are those of `resolve`."""
    room = RESIDENT_SHARE * memory if memory else RESIDENT_BYTES
    if image_bytes_per_device("yes", data, devices) <= room:
        return "yes"
    # Simulated devices, whose memory nobody knows, share that of the host: shards gain nothing.
    room = SHARDED_SHARE * memory if memory else 0
    fits = image_bytes_per_device("sharded", data, devices) <= room
    return "sharded" if fits and devices > 1 else "no"


def image_bytes_per_device(resident: str, data: Any, devices: int) -> int:
    """Return the bytes of both splits' images that each device holds during a whole run."""
    if resident == "no":
        return 0
    shards = devices if resident == "sharded" else 1
    return sum(
        -(-len(images) // shards) * images[0].nbytes
        for images in (data.train_images, data.test_images)
    )


def _take_fallback(config: ml_collections.ConfigDict, name: str) -> None:
    """Give a config the fallback's name, and the nonzero values of data.fallback_*."""
    for fallback, (*others, field) in FALLBACK_FIELDS.items():
        if value := config.data[fallback]:
            config.update_from_flattened_dict({field: value} | dict.fromkeys(others, 0))
    config.data.name = name


def _refuse_misfits(config: ml_collections.ConfigDict, data: Any) -> None:
    """Raise UserError for a batch, crop or held-out part that a data set cannot give."""
    examples, side = data.train_images.shape[:2]
    crop = config.data.crop
    if config.batch_size > examples:
        more = ", or data.synthetic.train_examples" if data.name == "synthetic" else ""
        raise UserError(
            f"batch_size={config.batch_size}: {shown_data(config, data.name)} has {examples} "
            f"training images, expected at most that: set --config.batch_size={examples} or less"
            f"{more}"
        )
    if config.data.crop_pad >= side:
        raise UserError(
            f"data.crop_pad={config.data.crop_pad}: images are {side} pixels wide, expected less "
            "than that"
        )
    if crop > side:
        raise UserError(f"data.crop={crop}: images are {side} pixels wide, expected at most that")
    if config.eval.views == "ten" and crop in (0, side):
        raise UserError(
            f"eval.views=ten: data.crop={crop} leaves no corners, expected a crop below "
            f"{side} pixels"
        )
    left = max(examples - config.data.held_out, 0)
    if config.data.held_out_steps and left < config.batch_size:
        fixed = f"; steps={config.steps} is fixed too: --config.steps=0 --config.epochs=N"
        raise UserError(
            f"data.held_out={config.data.held_out}: leaves {left} of {examples} training images, "
            f"expected at least batch_size={config.batch_size}: set --config.data.held_out=0 and "
            "--config.data.held_out_steps=0, or a smaller data.held_out"
            f"{fixed * bool(config.steps)}"
        )


def values_on_fallback(config: ml_collections.ConfigDict) -> str:
    """Say which values of a resolved config are from data.fallback_*."""
    origins: dict[str, list[str]] = {}
    for fallback, (field, *_) in FALLBACK_FIELDS.items():
        origin = "from data.fallback_*" if config.data[fallback] else "as given"
        origins.setdefault(origin, []).append(f"{field}={get(config, field)}")
    return "; ".join(f"{', '.join(fields)}, {origin}" for origin, fields in origins.items())


def _steps_per_call(config: ml_collections.ConfigDict, data: Any, platform: str) -> int:
    """Choose the steps of a chunk, for a resolved number of steps.

    A CPU runs the body of a scan many times slower than the bare step: its chunks have one step.
    """
    if platform == "cpu":
        return 1
    per_epoch = len(data.train_images) // config.batch_size
    between = per_epoch * math.gcd(config.eval.every_epochs, config.checkpoint.every_epochs)
    steps = chunk_steps(min(config.steps, between or config.steps))
    if config.data.resident == "no":
        batch_bytes = config.batch_size * data.train_images[0].nbytes
        steps = min(steps, max(1, int(CHUNK_BYTES / batch_bytes)))
    return steps


def chunk_steps(until: int) -> int:
    """Return the most steps of a chunk, from 20 to 100, that divide `until`.

    One program then serves all chunks. Without such a number there are as few chunks as possible of
    at most 100 steps, and the last one is shorter.
    """
    for steps in range(100, 19, -1):
        if until % steps == 0:
            return steps
    return math.ceil(until / math.ceil(until / 100))


# ---- Saved configs


def as_json(config: ml_collections.ConfigDict) -> dict:
    """Return the config as its JSON file reads back: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def evaluated_split(config: ml_collections.ConfigDict) -> str:
    """Return on which images a run is evaluated: "test" or "validation"."""
    return "validation" if config.data.validation else "test"


def shown_data(config: ml_collections.ConfigDict, name: str) -> str:
    """Return what messages call a data set (own_name); name: of the Dataset."""
    return own_name(config.data.name, config.data.dir, name)


def own_name(kind: str, place: str, name: str) -> str:
    """Return what a data set is called: class folders and npz files by their place.

    kind, place: data.name and data.dir. name: of the Dataset, which holds a digest for these two;
    other data sets are called by it. A folder that is called train has its parent's name.
    """
    if kind not in ("folder", "npz") or not place:  # a weights file does not know the place
        return name
    path = pathlib.Path(place).absolute()
    return path.parent.name if path.name == "train" else path.name


def refuse_changes(where: str, old: dict, new: dict) -> None:
    """Raise UserError naming each field that a resumed run must not change.

    where: the folder of the old run, as it was given; old, new: as config.json has them, resolved.
    A field that one of them lacks means its default. The data's digest is compared where both have
    it: older runs do not, nor do photographs that are still to be decoded.
    """
    before, after = _compared(old), _compared(new)
    if "data_digest" not in before or "data_digest" not in after:
        before.pop("data_digest", None)
        after.pop("data_digest", None)
    if differ := [f"{field}: {a} -> {b}" for field, a, b in differences(before, after)]:
        of_data = " with the same data (data.dir)" * ("data_digest" in "".join(differ))
        raise UserError(
            f"{where}: holds a run with another config ({'; '.join(differ)}): give the "
            f"same config{of_data} or another --workdir"
        )


def differences(before: dict, after: dict) -> Iterator[tuple[str, Any, Any]]:
    """Yield each field that differs, with both values; None is as good as absent."""
    for field in sorted(before.keys() | after.keys()):
        if before.get(field) != after.get(field):
            yield field, before.get(field, "absent"), after.get(field, "absent")


def _compared(saved: dict) -> dict[str, Any]:
    """Return what a resumed run must share with this one, by dotted names."""
    fields = flat(complete(saved))
    # Runs from before the field have no number there.
    fields["data.image_size"] = fields["data.image_size"] or IMAGE_SIZE
    fields = {name: fields[name] for name in fields if not is_part_of(name, MAY_DIFFER)}
    return fields | {name: saved[name] for name in DATA_FIELDS if name in saved}


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one, with dotted names; an empty dict leaves nothing."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


# ---- docs/config.md

PAGE = """\
# Every field of the config

Generated by `python -m cnn_spmd.config > docs/config.md` from `SCHEMA` in `cnn_spmd/config.py`.

An experiment file starts from these defaults (`config = cnn_spmd.config.default()`) and states what
differs. Any field is set with `--config.FIELD=VALUE`, and swept with `--sweep FIELD=VALUE,VALUE`. A
dict is given with all its entries, as Python writes it (`True`, not `true`):
`--config.optimizer.layer_rates='{"fc1": 0.25}'`. A field set by hand that the chosen network, data
set or optimizer does not use is refused, unless its value is 0, False or empty. One of your own may
use every field, so that nothing is refused.
"""


def page() -> str:
    """Return docs/config.md: a table of fields for each section of the config."""
    lines = [PAGE]
    tables: dict[str, list[str]] = {}
    for name, field in SCHEMA.items():
        section = name.partition(".")[0] if "." in name else "general"
        cells = f"`{name}`", f"`{field.default!r}`", _values(field), field.help
        tables.setdefault(section, []).append(f"| {' | '.join(cells)} |")
    for section, rows in tables.items():
        head = ["| field | default | values | what it does |", "|---|---|---|---|"]
        lines += [f"## {section}\n", *head, *rows, ""]
    return "\n".join(lines).rstrip("\n") + "\n"


def _values(field: Field) -> str:
    """Say which values a field may have, for docs/config.md."""
    if field.choices:
        return ", ".join(f"`{choice}`" for choice in field.choices)
    kind = TYPES[type(field.default)][1]
    return kind if field.low is None else f"{kind}, {field.range}"


if __name__ == "__main__":
    print(page(), end="")
