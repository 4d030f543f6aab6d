"""What a config means: from the command line, ranges of its fields, how it resolves, what a resumed run may change."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from cnn_spmd.data.sources import Dataset
from cnn_spmd.errors import UserError

# Field: (lowest, highest or None, whether the highest is itself allowed). Names are checked by the module that knows them.
RANGES = {
    "seed": (0, 2**31, False),
    "batch_size": (1, None, True),
    "epochs": (0, 10**7, True),
    "steps": (0, 10**7, True),
    "steps_per_call": (0, None, True),
    "profile": (0, 10**6, True),
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
    "data.fallback_epochs": (1, None, True),
    "data.fallback_batch_size": (1, None, True),
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
FREE = ("placement", "optimizer.layer_rates", "optimizer.weight_decays")  # whose fields are the user's to name
LARGEST = 3e38  # of numbers whose range is open: a float32 holds it
CHOICES = {"dtype": ("auto", "float32", "bfloat16"), "dense_updates": ("each", "sum"), "data.resident": ("auto", "yes", "no"),
           "data.normalise": ("channel", "pixel_mean"), "eval.views": ("one", "mirrored", "ten")}

# data.resident="auto": a data set lives on the devices where it takes at most this share of their memory, or so many bytes
# where nobody knows that; else it is streamed, by default in calls of at most so many bytes of images, or one step.
RESIDENT_SHARE, RESIDENT_BYTES, CALL_BYTES = 0.4, 4e9, 1e9

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"

# What a resumed run may change: the numbers do not depend on it, but for steps and epochs, which the learning rate follows from
# there on. Which images are left out is in the data's digest.
MAY_DIFFER = ("mesh", "model.levers", "parallelism", "placement", "steps_per_call", "eval.every_epochs", "checkpoint",
              "data.dir", "data.resident", "data.fallback", "data.fallback_epochs", "data.fallback_batch_size",
              "data.fallback_learning_rate", "data.skip_bad", "skipped_images", "epochs", "steps",
              "profile")


def parse_flags(values: flags.FlagValues, argv: Sequence[str], known_only: bool = False) -> list[str]:
    """absl's flag parser, which returns what is no flag; known_only leaves unknown flags in it.

    Raises UserError, a line each, for unknown flags and fields, wrong types, missing experiments.
    """
    try:
        rest = values(argv, known_only)
        if values.config is None:
            raise flags.Error("--config is missing: give an experiment, such as --config experiments/alexnet_cifar.py")
        values.config.experiment  # noqa: B018  (a config file that is not there raises at its first use)
    except OSError:
        folder = "experiments" if pathlib.Path("experiments").is_dir() else EXPERIMENTS  # seen from here
        known = ", ".join(sorted(f"{folder}/{path.name}" for path in EXPERIMENTS.glob("*.py")))
        raise UserError(f"--config={values['config'].config_filename}: no such experiment, expected one of {known}") from None
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        text = str(error.args[0] if error.args else error).strip()
        if "Error whilst parsing config file" in text:  # a traceback, with the reason last
            text = text.splitlines()[-1].removeprefix("ValueError: ")
        elif isinstance(error, KeyError | AttributeError):
            given = [argument for argument in argv if argument.split("=")[0].endswith(f".{text[1:-1]}")]
            text = f"{given[0]}: no such field, expected those of the experiment" if given else f"no such config field: {text}"
        raise UserError(" ".join(text.split())) from None
    return rest


def parsed(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    """The config that launch.py's arguments give; their other flags count for nothing. Raises UserError as parse_flags."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=["", *arguments])
    parse_flags(values, ["", *arguments], known_only=True)
    return values.config


def validate(config: ml_collections.ConfigDict) -> None:
    """Raises UserError for the first field outside its range, naming it, its value and the range; or unknown, or missing."""
    from experiments import alexnet_cifar  # which has every field

    fields = (*flat(alexnet_cifar.get_config().to_dict()), *FREE)
    for field in fields:
        try:
            _get(config, field)
        except (AttributeError, KeyError, TypeError):
            raise UserError(f"{field}: missing, expected as in experiments/alexnet_cifar.py") from None
    for field, value in flat(config.to_dict()).items():
        if field not in fields and not field.startswith(tuple(f"{free}." for free in FREE)):
            raise UserError(f"{field}={value}: no such field, expected those of experiments/alexnet_cifar.py")
    for field, (low, high, inclusive) in RANGES.items():
        value = _get(config, field)
        values = {f"{field}.{name}": each for name, each in value.items()} if hasattr(value, "items") else {field: value}
        for name, each in values.items():  # a number, or one a layer
            fine = isinstance(each, int | float) and low <= each <= LARGEST
            if not fine or (high is not None and (each > high if inclusive else each >= high)):
                expected = f"from {low} to {'' if inclusive else 'below '}{high}"
                if high is None:
                    expected = f"at least {low}" + f" and at most {LARGEST:g}" * isinstance(low, float)
                raise UserError(f"{name}={each}: expected {expected}")
    for field, choices in CHOICES.items():
        if (value := _get(config, field)) not in choices:
            raise UserError(f"{field}={value}: unknown, expected one of {', '.join(choices)}")
    if not config.epochs and not config.steps:
        raise UserError("epochs=0, steps=0: expected a positive number in one of them")


def resolve(config: ml_collections.ConfigDict, data: Dataset, platform: str,
            memory: float | None = None) -> ml_collections.ConfigDict:
    """A copy with what was left open filled in: the data set there is, where it lives, batch size, learning rate, steps, dtype.

    platform: of the devices, "cpu" or another; memory: bytes that each of them can hold, where that is known. Raises
    UserError where the batch is larger than the data set or the crop does not fit the images.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    if data.fallback:
        config.epochs, config.steps = config.data.fallback_epochs, 0
        config.batch_size = config.data.fallback_batch_size
        config.optimizer.learning_rate = config.data.fallback_learning_rate
        config.data.name = data.name
    if config.dtype == "auto":
        config.dtype = "float32" if platform == "cpu" else "bfloat16"
    examples, side = data.train_images.shape[:2]
    if config.batch_size > examples:
        raise UserError(f"batch_size={config.batch_size}: {data.name} has {examples} training images, expected at most that")
    if config.data.crop_pad >= side:
        raise UserError(f"data.crop_pad={config.data.crop_pad}: images are {side} pixels wide, expected less than that")
    if config.data.crop > side:
        raise UserError(f"data.crop={config.data.crop}: images are {side} pixels wide, expected at most that")
    if config.eval.views == "ten" and config.data.crop in (0, side):
        raise UserError(f"eval.views=ten: data.crop={config.data.crop} leaves no corners, expected a crop below {side} pixels")
    if config.data.held_out_steps and examples - config.data.held_out < config.batch_size:
        raise UserError(f"data.held_out={config.data.held_out}: leaves {max(examples - config.data.held_out, 0)} of {examples} "
                        f"training images, expected at least batch_size={config.batch_size}")
    per_epoch = examples // config.batch_size
    config.steps = config.steps or config.epochs * per_epoch
    if config.steps > 10**7:
        raise UserError(f"epochs={config.epochs}: makes {config.steps} steps, expected at most 10000000")
    config.epochs = 0  # steps says it from here on
    if config.data.resident == "auto":
        size = data.train_images.nbytes + data.test_images.nbytes
        config.data.resident = "yes" if size <= (RESIDENT_SHARE * memory if memory else RESIDENT_BYTES) else "no"
    if not config.steps_per_call:  # a CPU runs the body of a scan some fifty times slower than the bare step
        config.steps_per_call = 1 if platform == "cpu" else steps_per_call(config, per_epoch)
        if config.data.resident == "no":
            batch_bytes = config.batch_size * data.train_images[0].nbytes
            config.steps_per_call = min(config.steps_per_call, max(1, int(CALL_BYTES / batch_bytes)))
    return config


def steps_per_call(config: ml_collections.ConfigDict, per_epoch: int) -> int:
    """The most steps, up to 100, of which whole calls end at each evaluation and checkpoint: one program serves them all.

    Where there is no such number from 20 on, some hundred or fewer, and a shorter call at the end.
    """
    until = min(config.steps, per_epoch * math.gcd(config.eval.every_epochs, config.checkpoint.every_epochs) or config.steps)
    return max((n for n in range(20, 101) if until % n == 0), default=math.ceil(until / math.ceil(until / 100)))


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
    differ = [f"{field}: {old.get(field, 'absent')} -> {new.get(field, 'absent')}"
              for field in sorted(old.keys() | new.keys())
              if old.get(field) != new.get(field) and not any(f"{field}.".startswith(f"{free}.") for free in MAY_DIFFER)]
    if differ:
        of_data = " with the same data (data.dir)" * ("data_digest" in "".join(differ))
        raise UserError(f"{where}: holds a run with another config ({'; '.join(differ)}): give the "
                        f"same config{of_data} or another --workdir")


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
    for name in field.split("."):
        config = config[name]
    return config


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested objects as one, with dotted names."""
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
