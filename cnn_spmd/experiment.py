"""Make a config from an experiment's file and the fields that are set by hand.

The command line, a sweep, or overrides in Python set fields by hand.
"""

import functools
import inspect
import os
import pathlib
import runpy
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from cnn_spmd import config as configs
from cnn_spmd.errors import UserError
from cnn_spmd.training import provenance, runfiles, weights

flags.disclaim_key_flags()  # --help shows --config as a flag of launch.py

EXPERIMENTS = pathlib.Path(__file__).parent.parent / "experiments"


def load_config(
    path: str | os.PathLike, overrides: Mapping[str, Any] | None = None
) -> ml_collections.ConfigDict:
    """Return the config of an experiment with some fields replaced.

    The command line replaces fields in the same way.

    path: FILE or FILE:VARIANT, such as "experiments/alexnet_cifar.py:fast". overrides: values by
    dotted names, such as {"model.width": 256}.

    Raises UserError for a missing or failing file, an
    unknown field, a wrong type, a value out of range, and an override that nothing uses.
    """
    from cnn_spmd.training import unused  # imports jax, which launch.py has to set up first

    config = load_file(os.fspath(path))
    overrides = dict(overrides or {})
    for field, value in overrides.items():
        _override(config, field, value)
    configs.keep_given(config, overrides)
    configs.validate(config)
    unused.refuse(config, overrides)
    return config


def _override(config: ml_collections.ConfigDict, field: str, value: Any) -> None:
    """Set a field by its dotted name.

    Raises UserError for an unknown field and a wrong type.
    """
    configs.refuse_unknown(field, str(value))
    section, _, last = field.rpartition(".")
    if configs.is_entry(field):
        configs.check_value(section, {last: value})
        value = type(configs.SCHEMA[section].item)(value)
    elif field in configs.SCHEMA:
        configs.check_value(field, value)
    else:
        example = next(name for name in configs.SCHEMA if name.startswith(f"{field}."))
        raise UserError(f"{field}: is a section, expected a field such as {example}")
    # ConfigDict makes an integer a float, and a list a tuple, where the field is one.
    (configs.get(config, section) if section else config)[last] = value


def load_file(text: str) -> ml_collections.ConfigDict:
    """Run get_config() of an experiment, FILE or FILE:VARIANT.

    FILE may also be the config.json of a run, or a weights file: then the config is that run's.
    Fields that its config lacks get their defaults.
    Raises UserError where there is no such file, and for whatever fails in it, with its line there.
    """
    path, *variant = text.split(":", 1)
    if os.path.isfile(text):  # the name of a folder may have a colon
        path, variant = text, []
    if not os.path.isfile(path):
        seen_from_here = pathlib.Path("experiments").is_dir()
        folder = "experiments" if seen_from_here else EXPERIMENTS
        known = ", ".join(sorted(f"{folder}/{path.name}" for path in EXPERIMENTS.glob("*.py")))
        raise UserError(f"--config={path}: no such experiment, expected one of {known}")
    if source := trained_source(path):
        return configs.from_saved(weights.read_saved(source))
    file = pathlib.Path(path)
    provenance.experiment_files[file.name] = runfiles.sha256(file)
    try:
        get_config = runpy.run_path(path).get("get_config")
        if get_config and variant and not inspect.signature(get_config).parameters:
            raise UserError(f"--config={text}: {path} has no variants, expected {path} alone")
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
    with config.unlocked():
        configs.fill(config)
    return config


def trained_source(path: str) -> pathlib.Path | None:
    """Return what --config names: a weights file, or a run by its config.json; None: neither."""
    file = pathlib.Path(path)
    if weights.is_file(file):
        return file
    return file.parent if file.name == "config.json" else None


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


# ---- The command line


class Experiments(flags.ArgumentParser):
    """Parses --config=FILE or --config=FILE:VARIANT with `load_file`."""

    def parse(self, path: str) -> ml_collections.ConfigDict:
        """Return the experiment's config, in which no field can be added."""
        return load_file(path).lock()


def define_flag(values: flags.FlagValues, argv: Sequence[str] | None = None) -> flags.FlagHolder:
    """Define --config, and through it --config.FIELD for the fields that argv sets.

    argv: as sys.argv, which None stands for.
    """
    define = functools.partial(
        config_flags.DEFINE_config_file,
        "config",
        None,
        "Experiment: experiments/NAME.py, or NAME.py:VARIANT; or the config.json of a run, or a "
        "weights file. Its fields are set with --config.FIELD=VALUE; docs/config.md has them all.",
        flag_values=values,
    )
    try:
        holder = define(sys_argv=argv)
    except (flags.Error, ValueError):  # a --flagfile that cannot be read; parse_flags says so
        holder = define(sys_argv=[""])
    values["config"].parser = Experiments()
    return holder


def forget_flags(values: flags.FlagValues) -> None:
    """Forget what was parsed, so that `parse_flags` starts again from the defaults."""
    for name in list(values):
        if name.startswith("config."):  # of a field that the last command set
            delattr(values, name)
    values.unparse_flags()


def parse_flags(
    values: flags.FlagValues, argv: Sequence[str], known_only: bool = False
) -> list[str]:
    """Parse flags as absl does, and return the arguments that are no flags.

    known_only: leave unknown flags among these. Fields that the flags set win over data.fallback_*.
    Raises UserError, a line each, for unknown flags and fields, wrong types, missing or failing
    experiments, and missing flag files.
    """
    try:
        if {"--flagfile=", "-flagfile="} & set(argv):
            raise flags.Error("--flagfile=: is empty, expected a file of flags")
        rest = values(argv, known_only)
        if values.config is None:
            raise flags.Error(_missing_config(values))
        configs.check_types(values.config)
        configs.keep_given(values.config, given_fields(values))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_text_of(error, argv)) from None
    return rest


def _missing_config(values: flags.FlagValues) -> str:
    """Say what can take the place of --config, by launch.py's other flags."""
    said = "--config is missing: give an experiment, such as --config experiments/alexnet_cifar.py"
    given = values.flag_values_dict()
    if given.get("evaluate"):  # with --workdir, launch.py takes the config that is there
        return f"{said}; or test what was trained: --workdir RUN --evaluate"
    saved = pathlib.Path(given.get("workdir") or "") / "config.json"
    if given.get("workdir") and saved.is_file():
        said += f", or that of the run: --config {saved}; --evaluate would test that run"
    return said


def given_fields(values: flags.FlagValues) -> set[str]:
    """Return the dotted names of the fields that parsed flags set."""
    flag = values["config"]
    return set(flag.override_values) if flag.present else set()


def parse_arguments(arguments: Sequence[str]) -> tuple[ml_collections.ConfigDict, set[str]]:
    """Return the config that launch.py's arguments give, and the fields that they set.

    Its other flags are left out. Raises UserError as parse_flags.
    """
    values = flags.FlagValues()
    define_flag(values, ["", *arguments])
    parse_flags(values, ["", *arguments], known_only=True)
    return values.config, given_fields(values)


def _text_of(error: Exception, argv: Sequence[str]) -> str:
    """Say in one line what the libraries that parse the flags found wrong."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0] if error.args else error).strip()
    cause = error.__context__
    if isinstance(cause, UserError):  # an error of `load_file`
        text = str(cause)
    elif isinstance(error, flags.UnrecognizedFlagError):
        fields = configs.fields_called(error.flagname)
        text += f"; did you mean --config.{fields[0]}?" if fields else ""
    elif " in argv before a value for --config " in text:
        early = text.removeprefix("Found ").partition(" in argv ")[0]
        text = f"{early}: stands before --config, expected it after --config"
    elif isinstance(error, UnicodeDecodeError):
        text = "--flagfile: is not UTF-8, expected a text file of flags"
    elif isinstance(cause, OSError):
        text = f"--flagfile={cause.filename}: {cause.strerror}, expected a file of flags"
    elif isinstance(error, flags.IllegalFlagValueError) and text.startswith("flag --config."):
        argument = text.removeprefix("flag ").removesuffix(f": {cause}")
        name, _, value = argument.removeprefix("--config.").partition("=")
        field = configs.SCHEMA.get(name)
        if field:
            text = f"{argument}: expected {configs.TYPES[type(field.default)][1]}"
            if isinstance(field.default, dict):
                text += " as Python writes it, with True, False or None"
            if "," in value and isinstance(field.default, int | float):
                text += f"; --sweep {name}={value} runs one value after another"
    elif isinstance(error, KeyError | AttributeError):
        text = f"no such config field: {text}"
        for argument in argv:
            name, _, value = argument.lstrip("-").partition("=")
            if name.startswith("config."):
                try:
                    configs.refuse_unknown(name.removeprefix("config."), value)
                except UserError as refused:
                    return f"--config.{refused}"
            section, _, entry = name.rpartition(".")
            if text.endswith(f": {entry!r}"):  # of a dict whose names are the user's
                text = (
                    f"--{name}={value}: {section} has no {entry} yet, expected all its entries: "
                    f"--{section}='{{\"{entry}\": {value}}}'"
                )
    return " ".join(text.split())
