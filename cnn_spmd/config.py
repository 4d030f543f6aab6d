"""What a config means: from the command line, ranges of its fields, how it resolves, what a resumed run may change."""

import json
import math
import os
import pathlib
import re
import runpy
import traceback
from collections.abc import Collection, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from cnn_spmd.errors import UserError

flags.disclaim_key_flags()  # --help shows --config as a flag of launch.py

# Field: (lowest, highest or None, whether the highest is itself allowed). Names are checked by the module that knows them.
RANGES = {
    "seed": (0, 2**31, False),
    "batch_size": (1, None, True),
    "epochs": (0, 10**7, True),
    "steps": (0, 10**7, True),
    "steps_per_call": (0, 10**5, True),
    "profile": (0, 1000, True),  # a trace takes some 4 MB of memory a step, of a small network
    "mesh.data": (-1, 2**16, True),
    "mesh.model": (-1, 2**16, True),
    "dense_microbatch": (0, None, True),
    "label_smoothing": (0.0, 1.0, False),
    "model.width": (1, 10**6, True),
    "model.dropout": (0.0, 1.0, False),
    "data.image_size": (1, 4096, True),
    "data.skip_bad": (0, None, True),
    "data.synthetic.image_size": (1, 4096, True),
    "data.synthetic.classes": (1, 10**6, True),
    "data.synthetic.train_examples": (1, 10**7, True),
    "data.synthetic.test_examples": (1, 10**7, True),
    "data.crop": (0, None, True),
    "data.colour_noise": (0.0, None, True),
    "data.crop_pad": (0, None, True),
    "data.held_out": (0, None, True),
    "data.held_out_steps": (0, None, True),
    "data.fallback_epochs": (0, None, True),
    "data.fallback_batch_size": (0, None, True),
    "data.fallback_learning_rate": (0.0, None, True),
    "optimizer.learning_rate": (0.0, None, True),
    "optimizer.scaling": (0.0, 1.0, True),
    "optimizer.bias_rate": (0.0, None, True),
    "optimizer.warmup": (0.0, 1.0, True),
    "optimizer.stage_factor": (0.0, 1.0, True),
    "optimizer.momentum": (0.0, 1.0, False),
    "optimizer.weight_decay": (0.0, None, True),
    "optimizer.clip_norm": (0.0, None, True),
    "optimizer.weight_decays": (0.0, None, True),
    "optimizer.layer_rates": (0.0, None, True),
    "eval.every_epochs": (0, None, True),
    "checkpoint.every_epochs": (0, None, True),
    "checkpoint.keep": (1, None, True),
}
# Fields whose entries are the user's to name, and a value of the type that each entry has.
FREE = {
    "placement": {},
    "optimizer.layer_rates": 0.0,
    "optimizer.weight_decays": 0.0,
    "optimizer.options": 0.0,
}
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
MOST_CPU_DEVICES = 2048  # of one process: XLA takes the next one for that of another process
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "dense_updates": ("each", "sum"),
    "data.resident": ("auto", "yes", "no"),
    "data.normalise": ("channel", "pixel_mean"),
    "eval.views": ("one", "mirrored", "ten"),
}

# data.resident="auto": a data set lives on the devices where it takes at most this share of their memory, or so many bytes
# where nobody knows that; else it is streamed, by default in calls of at most so many bytes of images, or one step.
RESIDENT_SHARE, RESIDENT_BYTES, CALL_BYTES = 0.4, 4e9, 1e9

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"

# What a resumed run may change: the numbers do not depend on it, but for steps and epochs, which the learning rate follows from
# there on. Which images are left out is in the data's digest; `run` is what a run calls itself (training/checkpoint.py).
MAY_DIFFER = (
    "run",
    "mesh",
    "model.levers",
    "model.fast",
    "parallelism",
    "placement",
    "steps_per_call",
    "eval.every_epochs",
    "checkpoint",
    "data.dir",
    "data.resident",
    "data.fallback",
    "data.fallback_epochs",
    "data.fallback_batch_size",
    "data.fallback_learning_rate",
    "data.skip_bad",
    "skipped_images",
    "epochs",
    "steps",
    "profile",
)


# Each of data.fallback_*, and the fields that it replaces on a data set that stands in for another.
OF_THE_FALLBACK = {
    "fallback_batch_size": ("batch_size",),
    "fallback_epochs": ("steps", "epochs"),
    "fallback_learning_rate": ("optimizer.learning_rate",),
}


class Experiments(flags.ArgumentParser):
    """Parses --config=FILE or --config=FILE:VARIANT with `load`."""

    def parse(self, path: str) -> ml_collections.ConfigDict:
        return load(path).lock()


def define_flag(values: flags.FlagValues, argv: Sequence[str] | None = None) -> flags.FlagHolder:
    """Define --config, and through it --config.FIELD for the fields that argv sets.

    argv: as sys.argv, which None stands for.
    """

    def define(argv: Sequence[str] | None) -> flags.FlagHolder:
        return config_flags.DEFINE_config_file(
            "config",
            None,
            "Experiment: experiments/NAME.py, or NAME.py:VARIANT. Its fields are set with "
            "--config.FIELD=VALUE.",
            flag_values=values,
            sys_argv=argv,
        )

    try:
        holder = define(argv)
    except (flags.Error, ValueError):  # a --flagfile that cannot be read; parse_flags says so
        holder = define([""])
    values["config"].parser = Experiments()
    return holder


def load(text: str) -> ml_collections.ConfigDict:
    """Run get_config() of an experiment, given as FILE or FILE:VARIANT.

    Raises UserError where there is no such file, and for whatever fails in it, with its line there.
    """
    path, *variant = (
        [text] if os.path.isfile(text) else text.split(":", 1)
    )  # a folder's name may have a colon
    if not os.path.isfile(path):
        seen_from_here = pathlib.Path("experiments").is_dir()
        folder = "experiments" if seen_from_here else EXPERIMENTS
        known = ", ".join(sorted(f"{folder}/{path.name}" for path in EXPERIMENTS.glob("*.py")))
        raise UserError(f"--config={path}: no such experiment, expected one of {known}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = get_config(*variant) if get_config else None
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        text = " ".join(f"{_line_of(error, path)}: {type(error).__name__}: {text}".split())
        raise UserError(text.removesuffix(":")) from None
    if isinstance(config, ml_collections.FrozenConfigDict):
        config = ml_collections.ConfigDict(config)
    if not isinstance(config, ml_collections.ConfigDict):
        found = f"returns {type(config).__name__}" if get_config else "is missing"
        raise UserError(
            f"--config={path}: get_config() {found}, expected it to return a ConfigDict as that of "
            "experiments/alexnet_cifar.py"
        )
    return config


def _line_of(error: BaseException, path: str) -> str:
    """Name the place in the file at `path` where an error arose: FILE:LINE, or FILE."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == path
    ]
    return f"{path}:{lines[-1]}" if lines else path


def parse_flags(
    values: flags.FlagValues, argv: Sequence[str], known_only: bool = False
) -> list[str]:
    """absl's flag parser, which returns what is no flag; known_only leaves unknown flags in it.

    Fields that the flags set win over data.fallback_*. Raises UserError, a line each, for unknown
    flags and fields, wrong types, missing or failing experiments, and missing flag files.
    """
    try:
        if {"--flagfile=", "-flagfile="} & set(argv):
            raise flags.Error("--flagfile=: is empty, expected a file of flags")
        rest = values(argv, known_only)
        if values.config is None:
            raise flags.Error(
                "--config is missing: give an experiment, such as --config experiments/alexnet_cifar.py"
            )
        check_types(values.config)
        keep_given(values.config, values["config"].override_values)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_text_of(error, argv)) from None
    return rest


def _text_of(error: Exception, argv: Sequence[str]) -> str:
    """Say in one line what the libraries that parse the flags found wrong."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text, cause = str(error.args[0] if error.args else error).strip(), error.__context__
    if isinstance(cause, UserError):  # an error of `load`
        text = str(cause)
    elif isinstance(error, UnicodeDecodeError):
        text = "--flagfile: is not UTF-8, expected a text file of flags"
    elif isinstance(cause, OSError):
        text = f"--flagfile={cause.filename}: {cause.strerror}, expected a file of flags"
    elif isinstance(error, flags.IllegalFlagValueError) and text.startswith("flag --config."):
        given = text.removeprefix("flag ").removesuffix(f": {cause}")
        like = flat(_schema()).get(given.removeprefix("--config.").partition("=")[0])
        text = f"{given}: expected {TYPES[type(like)][1]}" if type(like) in TYPES else text
    elif isinstance(error, KeyError | AttributeError):
        given = [argument for argument in argv if argument.split("=")[0].endswith(f".{text[1:-1]}")]
        text = f"no such config field: {text}"
        if given:
            text = f"{given[0]}: no such field, expected those of the experiment"
    return " ".join(text.split())


def keep_given(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """Set each of data.fallback_* to 0 that would replace a given field.

    given: the fields that the command line sets, with dotted names; those of data.fallback_* that
    are among them stay.
    """
    for fallback, fields in OF_THE_FALLBACK.items():
        replaces_given = any(
            f"{field}.".startswith(f"{name}.") for field in fields for name in given
        )
        if replaces_given and not {"data", f"data.{fallback}"} & set(given):
            config.data[fallback] = type(config.data[fallback])(0)


def parsed(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The config that launch.py's arguments give; their other flags count for nothing. Raises UserError as parse_flags."""
    values = flags.FlagValues()
    define_flag(values, ["", *arguments])
    parse_flags(values, ["", *arguments], known_only=True)
    return values.config


def _schema() -> dict:
    """The config that has every field, each with a value of its type."""
    from experiments import alexnet_cifar

    return alexnet_cifar.get_config().to_dict()


def check_types(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field that is unknown, missing or of a wrong type."""
    _check_type("", config.to_dict(), _schema())


def _check_type(field: str, value: Any, like: Any) -> None:
    """Raises UserError unless a field's value, and all in it, has the type of `like`.

    An integer may stand for a float, and a list for a tuple. An empty dict or tuple says nothing of
    its entries.
    """
    kinds, expected = TYPES[type(like)]
    if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(like, bool):
        raise UserError(f"{field}={value!r}: expected {expected}")
    if isinstance(like, tuple):
        for i, item in enumerate(value if like else ()):
            _check_type(f"{field}[{i}]", item, like[0])
    if not isinstance(like, dict):
        return
    for name, each in value.items():
        inner = f"{field}.{name}" if field else str(name)
        if not isinstance(name, str):
            raise UserError(f"{field or 'config'}: has the name {name!r}, expected a string")
        if field in FREE:
            _check_type(inner, each, FREE[field])
        elif name in like:
            _check_type(inner, each, like[name])
        elif like:
            shown = inner if isinstance(each, dict) else f"{inner}={each}"
            raise UserError(
                f"{shown}: no such field, expected those of experiments/alexnet_cifar.py"
            )
    for name in like:
        if name not in value:
            inner = f"{field}.{name}" if field else name
            raise UserError(f"{inner}: missing, expected as in experiments/alexnet_cifar.py")


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field outside its range, or as check_types.

    The message names the field, its value and the range.
    """
    check_types(config)
    if not re.fullmatch(r"[\w.+-]*\w[\w.+-]*", config.experiment):  # folders are named after it
        raise UserError(
            f"experiment={config.experiment}: expected letters, digits and _.+- only, such as alexnet_cifar"
        )
    for field, (low, high, inclusive) in RANGES.items():
        value = _get(config, field)
        values = {field: value}
        if field in FREE:
            values = {f"{field}.{name}": each for name, each in value.items()}
        for name, each in values.items():  # a number, or one a layer
            largest = LARGEST[type(low)]
            too_high = high is not None and (each > high if inclusive else each >= high)
            if too_high or not low <= each <= largest:
                expected = f"from {low} to {'' if inclusive else 'below '}{high}"
                if high is None:
                    expected = f"at least {low} and at most {largest}"
                raise UserError(f"{name}={each}: expected {expected}")
    for field, choices in CHOICES.items():
        if (value := _get(config, field)) not in choices:
            raise UserError(f"{field}={value}: unknown, expected one of {', '.join(choices)}")
    if not config.epochs and not config.steps:
        raise UserError("epochs=0, steps=0: expected a positive number in one of them")
    expanded("data.dir", config.data.dir)
    if config.data.name == "synthetic":
        sizes = config.data.synthetic
        fields = ", ".join(
            f"data.synthetic.{name}={value}" for name, value in sizes.items() if name != "classes"
        )
        needed = (sizes.train_examples + sizes.test_examples) * sizes.image_size**2 * 3
        refuse_beyond(machine_memory(), needed, fields)


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
    """Raises UserError naming the fields that make more bytes than there are of memory."""
    if needed > memory:
        raise UserError(
            f"{fields}: needs {needed / 1e9:,.1f} GB, expected at most the {memory / 1e9:,.1f} GB of "
            "memory that there are"
        )


def resolve(
    config: ml_collections.ConfigDict, data: Any, platform: str, memory: float | None = None
) -> ml_collections.ConfigDict:
    """A copy with what was left open filled in: the data set there is, where it lives, batch size, learning rate, steps, dtype.

    data: a Dataset; platform: of the devices, "cpu" or another; memory: bytes that each of them can hold, where that is
    known. Raises UserError where the batch is larger than the data set or the crop does not fit the images.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    if data.fallback:
        if config.data.fallback_epochs:
            config.epochs, config.steps = config.data.fallback_epochs, 0
        config.batch_size = config.data.fallback_batch_size or config.batch_size
        rates = config.data.fallback_learning_rate, config.optimizer.learning_rate
        config.optimizer.learning_rate = rates[0] or rates[1]
        config.data.name = data.name
    if config.dtype == "auto":
        config.dtype = "float32" if platform == "cpu" else "bfloat16"
    examples, side = data.train_images.shape[:2]
    if config.batch_size > examples:
        remedy = f"set --config.batch_size={examples} or less"
        if side == config.data.image_size:  # photographs
            remedy += (
                f"; they become squares of data.image_size={side} pixels: set "
                f"--config.data.image_size too where model.name={config.model.name} takes others"
            )
        raise UserError(
            f"batch_size={config.batch_size}: {data.name} has {examples} training images, expected "
            f"at most that: {remedy}"
        )
    if config.data.crop_pad >= side:
        raise UserError(
            f"data.crop_pad={config.data.crop_pad}: images are {side} pixels wide, expected less than that"
        )
    if config.data.crop > side:
        raise UserError(
            f"data.crop={config.data.crop}: images are {side} pixels wide, expected at most that"
        )
    if config.eval.views == "ten" and config.data.crop in (0, side):
        raise UserError(
            f"eval.views=ten: data.crop={config.data.crop} leaves no corners, expected a crop below {side} pixels"
        )
    if config.data.held_out_steps and examples - config.data.held_out < config.batch_size:
        raise UserError(
            f"data.held_out={config.data.held_out}: leaves {max(examples - config.data.held_out, 0)} of {examples} "
            f"training images, expected at least batch_size={config.batch_size}"
        )
    per_epoch = examples // config.batch_size
    config.steps = config.steps or config.epochs * per_epoch
    if config.steps > 10**7:
        raise UserError(
            f"epochs={config.epochs}: makes {config.steps} steps, expected at most 10000000"
        )
    config.epochs = 0  # steps says it from here on
    if config.data.resident == "auto":
        size = data.train_images.nbytes + data.test_images.nbytes
        config.data.resident = (
            "yes" if size <= (RESIDENT_SHARE * memory if memory else RESIDENT_BYTES) else "no"
        )
    if (
        not config.steps_per_call
    ):  # a CPU runs the body of a scan some fifty times slower than the bare step
        config.steps_per_call = 1 if platform == "cpu" else steps_per_call(config, per_epoch)
        if config.data.resident == "no":
            batch_bytes = config.batch_size * data.train_images[0].nbytes
            config.steps_per_call = min(
                config.steps_per_call, max(1, int(CALL_BYTES / batch_bytes))
            )
    return config


def values_on_fallback(config: ml_collections.ConfigDict) -> str:
    """Say which values of a resolved config are from data.fallback_*, and which were given."""
    origins: dict[str, list[str]] = {}
    for fallback, (field, *_) in OF_THE_FALLBACK.items():
        origin = "from data.fallback_*" if config.data[fallback] else "as given"
        origins.setdefault(origin, []).append(f"{field}={_get(config, field)}")
    return "; ".join(f"{', '.join(fields)}, {origin}" for origin, fields in origins.items())


def steps_per_call(config: ml_collections.ConfigDict, per_epoch: int) -> int:
    """The most steps, up to 100, of which whole calls end at each evaluation and checkpoint: one program serves them all.

    Where there is no such number from 20 on, some hundred or fewer, and a shorter call at the end.
    """
    until = min(
        config.steps,
        per_epoch * math.gcd(config.eval.every_epochs, config.checkpoint.every_epochs)
        or config.steps,
    )
    return max(
        (n for n in range(20, 101) if until % n == 0),
        default=math.ceil(until / math.ceil(until / 100)),
    )


def as_json(config: ml_collections.ConfigDict) -> dict:
    """The config as its JSON file reads back: tuples are lists."""
    return json.loads(json.dumps(config.to_dict()))


def refuse_changes(where: str, old: dict, new: dict) -> None:
    """Raises UserError naming each field in which two resolved configs differ, beyond what a resumed run may change.

    where: the folder of the old one, as it was given. The data's digest is compared where both have
    it: older runs do not, nor do photographs that are still to be decoded.
    """
    old, new = flat(old), flat(new)
    if "data_digest" not in old or "data_digest" not in new:
        old, new = old | dict(data_digest=None), new | dict(data_digest=None)
    differ = [
        f"{field}: {old.get(field, 'absent')} -> {new.get(field, 'absent')}"
        for field in sorted(old.keys() | new.keys())
        if old.get(field) != new.get(field)
        and not any(f"{field}.".startswith(f"{free}.") for free in MAY_DIFFER)
    ]
    if differ:
        of_data = " with the same data (data.dir)" * ("data_digest" in "".join(differ))
        raise UserError(
            f"{where}: holds a run with another config ({'; '.join(differ)}): give the "
            f"same config{of_data} or another --workdir"
        )


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names."""
    found = {}
    for name, value in tree.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found
