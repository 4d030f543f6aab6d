"""List the runs of a sweep: one experiment over several meshes and settings.

A combination that cannot work is refused before anything starts. sweep_run.py runs the others.
"""

import contextlib
import functools
import io
import itertools
import math
import shlex
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_collections

from cnn_spmd import config as configs
from cnn_spmd import experiment
from cnn_spmd.analysis import program
from cnn_spmd.data import registry
from cnn_spmd.data.dataset import Dataset, Found
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh
from cnn_spmd.training import build, unused

LONGEST_REASON = 300  # characters
NOT_FIELDS = ("mesh", "batch_per_device")  # swept by flags of their own

# ---- What is swept


def combinations(
    meshes: str | None, batches: str | None, fields: Sequence[str], devices: int
) -> list[dict[str, str]]:
    """Return every combination of what is swept.

    Each is a dict such as {"mesh": "4x2", "batch_per_device": "32", field: value}. meshes: the
    value of --mesh; "all" is 1x1, to compare with, and every shape of all the devices. batches: the
    value of --batch_per_device. fields: each "FIELD=VALUE,VALUE". Raises UserError for text of
    another form, and for a field given twice.
    """
    axes: dict[str, list[str]] = {}
    if meshes is not None:
        axes["mesh"] = _mesh_values(meshes, devices)
    if batches is not None:
        axes["batch_per_device"] = _batch_values(batches)
    for text in fields:
        field, equals, values = text.partition("=")
        field = field.removeprefix("config.")
        if not field or not equals:
            raise UserError(
                f"--sweep={text}: expected FIELD=VALUE,VALUE, such as parallelism=data,hybrid"
            )
        if field.split(".")[0] == "mesh":
            raise UserError(f"--sweep={text}: set by --mesh")
        if field == "batch_size" and batches is not None:
            raise UserError(f"--sweep={text}: set by --batch_per_device")
        if field in axes:
            raise UserError(f"--sweep={field}={values}: {field} is given twice")
        axes[field] = _values(f"--sweep={field}", values)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _mesh_values(text: str, devices: int) -> list[str]:
    """Return the mesh shapes that --mesh names.

    Raises UserError for a word that is no shape.
    """
    if text == "all":
        one = "x".join("1" * len(configs.MESH_AXES))
        text = ",".join([one, *mesh.shapes_over(devices)])
    shapes = _values("--mesh", text)
    for shape in shapes:
        if shape == "all":
            raise UserError(f"--mesh={text}: expected either all or shapes")
        mesh.parse(shape)
    return shapes


def _batch_values(text: str) -> list[str]:
    """Return the sizes that --batch_per_device names.

    Raises UserError for a word that is no size.
    """
    sizes = _values("--batch_per_device", text)
    for size in sizes:
        if not size.isdecimal() or len(size) > 9 or not int(size):
            raise UserError(
                f"--batch_per_device={text}: {size} is not a positive integer of at most nine "
                "digits"
            )
    return sizes


def _values(flag: str, text: str) -> list[str]:
    """Split a flag's values at commas; of equal numbers the first stays."""
    values = split_list(text)
    if not all(values):
        raise UserError(f"{flag}={text}: has an empty value, expected values joined by commas")
    first: dict[int | float | str, str] = {}
    for value in values:
        first.setdefault(_number(value), value)
    return list(first.values())


def split_list(text: str) -> list[str]:
    """Split text at its commas, except at those in brackets, as in ("a", "b"),("c",)."""
    parts = [""]
    depth = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _number(text: str) -> int | float | str:
    """Return a swept value as sweep.json holds it: a finite number where it is one."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)):
                return value
    return text


def refuse_fields(combos: Sequence[dict[str, str]], shared: Sequence[str], devices: int) -> None:
    """Raise UserError for an unknown swept field, value or name, or a field that nothing uses.

    Where some combinations use it, `plan` refuses the others one by one.
    """
    swept = [field for field in combos[0] if field not in NOT_FIELDS]
    for field in swept:
        try:
            configs.refuse_unknown(field)
            for value in dict.fromkeys(settings[field] for settings in combos):
                _refuse_value(field, value, shared)
        except UserError as error:
            raise UserError(f"--sweep={error}") from None
    reasons: dict[str, list[str]] = {field: [] for field in swept}
    for settings in combos:
        try:
            config, _ = experiment.parse_arguments(arguments_of(settings, shared, devices))
        except UserError:
            continue  # refused by `plan`, with its reason
        try:
            unused.refuse_unknown(config, swept)
        except UserError as error:
            raise UserError(f"--sweep={error}") from None
        for field in swept:
            reasons[field].append(unused.reason(config, field))
    for field, found in reasons.items():
        if found and all(found):
            raise UserError(f"--sweep={field}: {found[0]}")


def _refuse_value(field: str, value: str, shared: Sequence[str]) -> None:
    """Raise UserError for a swept value of a wrong type, or outside the range of its field."""
    argument = f"--config.{field}={value}"
    try:
        config, _ = experiment.parse_arguments([*shared, argument])
    except UserError as error:
        raise UserError(f"{field}={value}: {str(error).removeprefix(f'{argument}: ')}") from None
    configs.validate_field(config, field if field in configs.SCHEMA else field.rpartition(".")[0])


# ---- Plan: each combination as a command, checked


def arguments_of(settings: dict[str, str], shared: Sequence[str], devices: int) -> list[str]:
    """Return launch.py's arguments for one combination.

    A sweep never falls back to another data set, unless `shared` says so.
    """
    arguments = [*shared]
    if not any(argument.lstrip("-").split("=")[0] == "config.data.fallback" for argument in shared):
        arguments.append("--config.data.fallback=")
    for field, value in settings.items():
        if field == "mesh":
            arguments.append(f"--mesh={value}")
        elif field != "batch_per_device":
            arguments.append(f"--config.{field}={value}")
    if "batch_per_device" in settings:
        if "mesh" in settings:
            sizes = mesh.parse(settings["mesh"])
        else:
            config, _ = experiment.parse_arguments(arguments)
            sizes = mesh.shape(config.mesh.to_dict(), devices)
        batch_size = int(settings["batch_per_device"]) * math.prod(sizes.values())
        arguments.append(f"--config.batch_size={batch_size}")
    return arguments


def plan(combos: Sequence[dict], shared: Sequence[str], devices: Sequence) -> Iterator[dict]:
    """Yield a row of sweep.json per combination; `run` gives it its number and a name.

    It is pending, or refused with the reason why it cannot work on `devices`.
    """

    def find(config: ml_collections.ConfigDict) -> Dataset:
        return registry.load(config.data, functools.partial(build.prepare, config, devices))

    def check(config: ml_collections.ConfigDict, data: Dataset) -> dict:
        build.prepare(config, devices, data)
        return dict(status="pending")

    return _rows(combos, shared, len(devices), find, check)


def dry_run(
    combos: Sequence[dict],
    shared: Sequence[str],
    devices: Sequence,
    find: Callable[[ml_collections.ConfigDict], Found],
) -> Iterator[dict]:
    """Yield a row per combination, with the `report` on its compiled train step.

    find: returns the data set of a config, or what stands for it. status: fits, "does not fit",
    compiled (the memory of the devices is not known), or refused with the reason.
    """

    def compile_and_report(config: ml_collections.ConfigDict, data: Found) -> dict:
        report = build.prepare(config, devices, data.preview).report()
        status = {True: "fits", False: "does not fit", None: "compiled"}[program.fits(report)]
        return dict(status=status, reason=report.get("error", ""), report=report)

    return _rows(combos, shared, len(devices), find, compile_and_report)


def _rows(
    combos: Sequence[dict],
    shared: Sequence[str],
    devices: int,
    find: Callable[[ml_collections.ConfigDict], Found],
    work: Callable[[ml_collections.ConfigDict, Found], dict],
) -> Iterator[dict]:
    """Yield a row per combination: refused with the reason, or with the fields that work returns.

    find: returns the data set of a config, once for equal fields of data. work: gets a config and
    its data set, once for configs that differ only in their seed.
    """
    datasets: dict[str, Found] = {}
    done: dict[str, dict] = {}
    for number, settings in enumerate(combos, 1):
        swept = {field: _number(value) for field, value in settings.items() if field != "mesh"}
        row = dict(
            number=number,
            name=None,
            mesh=settings.get("mesh"),
            settings=swept,
            status="refused",
            reason="",
            command="",
            seconds=None,
            figures={},
        )
        try:
            arguments = arguments_of(settings, shared, devices)
            row["command"] = shlex.join(["python", "launch.py", *arguments])
            config = _config_of(arguments, row["mesh"])
            if (content := repr(config)) not in done:
                with contextlib.redirect_stdout(io.StringIO()):  # the run itself will print it
                    if (key := repr(config.data)) not in datasets:
                        datasets[key] = find(config)
                    done[content] = work(config, datasets[key])
            row.update(done[content])
        except UserError as error:
            row["reason"] = str(error)
        except jax.errors.JaxRuntimeError as error:
            row["reason"] = " ".join(str(error).split())[:LONGEST_REASON]
        except Exception as error:  # of a network or an optimizer of the user's own
            text = " ".join(f"{type(error).__name__}: {error}".split())
            row["reason"] = f"{text[:LONGEST_REASON]} (run this combination alone to see where)"
        yield row


def _config_of(arguments: Sequence[str], shape: str | None) -> ml_collections.ConfigDict:
    """Return the config of a combination, with seed 0, as the seed decides on no shape.

    shape: the value of --mesh. Raises UserError for fields that are wrong or that nothing uses.
    """
    config, given = experiment.parse_arguments(arguments)
    if shape:
        config.mesh.update(mesh.parse(shape))
    configs.validate(config)
    unused.refuse(config, given)
    config.seed = 0
    return config
