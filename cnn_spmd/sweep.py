"""Run one experiment over several meshes and settings: a sweep.

Each run has a folder of its own. A warm process runs them in turn (worker.py).
A combination that cannot work is refused before anything starts. A run that fails is recorded with
its reason, and the sweep goes on. sweep.json holds every combination; the same command on the same
folder runs those that are not completed yet.
"""

import contextlib
import datetime
import functools
import hashlib
import io
import itertools
import json
import math
import pathlib
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import ml_collections

from cnn_spmd import config as configs
from cnn_spmd import experiment, sweep_screen, worker
from cnn_spmd.analysis import program
from cnn_spmd.data import dataset, registry
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh
from cnn_spmd.training import build, runfiles, unused, workdir

# A run's status by launch.py's exit code; any other code means failed.
OUTCOMES = {0: "completed", 2: "refused", 75: "interrupted"}
LONGEST_NAME = 100  # characters of a run's folder; file systems allow 255 bytes
LONGEST_VALUE = 24  # characters of a value in it
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
    """Raise UserError for an unknown swept field or name, or a field that nothing uses.

    Where some combinations use it, `plan` refuses the others one by one.
    """
    swept = [field for field in combos[0] if field not in NOT_FIELDS]
    for field in swept:
        try:
            configs.refuse_unknown(field)
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
    """Yield a row of sweep.json per combination; `run` gives it a number and a name.

    It is pending, or refused with the reason why it cannot work on `devices`.
    """
    datasets: dict[str, dataset.Dataset] = {}
    fine: set[str] = set()
    for settings in combos:
        row = dict(
            number=None,
            name=None,
            mesh=settings.get("mesh"),
            settings={
                field: _number(value) for field, value in settings.items() if field != "mesh"
            },
            status="pending",
            reason="",
            command="",
            seconds=None,
            figures={},
        )
        try:
            arguments = arguments_of(settings, shared, len(devices))
            row["command"] = shlex.join(["python", "launch.py", *arguments])
            _check(arguments, row["mesh"], devices, datasets, fine)
        except UserError as error:
            row.update(status="refused", reason=str(error))
        yield row


def folder_name(number: int, settings: dict) -> str:
    """Return the name of a run's folder, such as 03-4x2,learning_rate=0.1.

    number: its own in the sweep, so that no other run has the folder. settings: those in which the
    runs differ, by short names.
    """
    parts = [
        _safe(value) if name == "mesh" else f"{name}={_safe(value)}"
        for name, value in settings.items()
    ]
    return "-".join([f"{number:02d}", ",".join(parts)])[:LONGEST_NAME].rstrip("-")


def _safe(value: object) -> str:
    """Return a value with what a shell or Orbax cannot read as "_"; a digest if it is long."""
    text = re.sub(r"[^A-Za-z0-9.+-]+", "_", str(value)).strip("_")
    if 0 < len(text) <= LONGEST_VALUE:
        return text
    return hashlib.sha256(str(value).encode()).hexdigest()[:8]


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


def _check(
    arguments: Sequence[str],
    shape: str | None,
    devices: Sequence,
    datasets: dict[str, dataset.Dataset],
    fine: set[str],
) -> None:
    """Raise UserError where a run with these arguments cannot work on `devices`.

    shape: the value of --mesh. datasets: those that are loaded already, by their config. fine: the
    configs that can work, with seed 0.
    """
    config = _config_of(arguments, shape)
    if (content := repr(config)) in fine:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself will print it
        check = functools.partial(build.prepare, config, devices)
        if (key := repr(config.data)) not in datasets:
            datasets[key] = registry.load(config.data, check)
        check(datasets[key])
    fine.add(content)


def dry_run(combos: Sequence[dict], shared: Sequence[str], devices: Sequence) -> Iterator[dict]:
    """Yield a row per combination, with the `report` on its compiled train step.

    Combinations that differ only in their seed are compiled once. status: fits, "does not fit",
    compiled (the memory of the devices is not known), or refused with the reason.
    """
    datasets: dict[str, dataset.Dataset] = {}
    reports: dict[str, dict] = {}
    for number, settings in enumerate(combos, 1):
        row = dict(
            number=number,
            mesh=settings.get("mesh"),
            settings={field: value for field, value in settings.items() if field != "mesh"},
            report=None,
            reason="",
        )
        try:
            config = _config_of(arguments_of(settings, shared, len(devices)), row["mesh"])
            if (content := repr(config)) not in reports:
                if (key := repr(config.data)) not in datasets:
                    datasets[key] = registry.find(config.data).preview
                with contextlib.redirect_stdout(io.StringIO()):
                    reports[content] = build.prepare(config, devices, datasets[key]).report()
            row["report"] = report = reports[content]
            row["reason"] = report.get("error", "")
            status = {True: "fits", False: "does not fit", None: "compiled"}
            row["status"] = status[program.fits(report)]
        except (UserError, jax.errors.JaxRuntimeError) as error:
            row.update(status="refused", reason=" ".join(str(error).split())[:LONGEST_REASON])
        yield row


# ---- Run


def run(
    name: str,
    shared: Sequence[str],
    combos: Sequence[dict],
    devices: Sequence,
    runner: worker.Worker,
    folder: pathlib.Path,
) -> dict:
    """Run a sweep in `folder`, or continue the one there; return sweep.json.

    The folder gets sweep.json, and a folder and a log per run. name: of the experiment; shared:
    launch.py's arguments that all runs have; devices: as many as the runner has, to check the
    combinations on. Where every combination is refused, nothing is written, unless the folder has a
    sweep. Raises UserError for a folder that cannot be used, or holds another sweep.
    """
    rows = list(plan(combos, shared, devices))
    if all(row["status"] == "refused" for row in rows) and not (folder / "sweep.json").exists():
        _take_earlier(rows, [], folder)
        with sweep_screen.Screen(rows, []):
            return dict(runs=rows)
    with workdir.locked(folder) as content:
        old = _read_sweep(folder)
        if old is None and content - {workdir.LOCK}:
            (folder / workdir.LOCK).unlink()
            raise UserError(
                f"--workdir={folder}: is not empty and holds no sweep (no whole sweep.json): give "
                "a new folder"
            )
        config, _ = experiment.parse_arguments(shared)
        same = dict(
            arguments=list(shared),
            devices=len(devices),
            cpu_devices=runner.cpu_devices,
            config=configs.flat(configs.as_json(config)),  # an experiment's file may change, too
        )
        if old:
            _refuse_another_sweep(folder, old, same)
        earlier = _take_earlier(rows, old["runs"] if old else [], folder)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        sweep = dict(
            experiment=name,
            **same,
            started=old["started"] if old else now,
            hardware=old and old["hardware"],
        )
        return _Sweep(sweep, rows, earlier, runner, folder).run()


def _read_sweep(folder: pathlib.Path) -> dict | None:
    """Return what sweep.json holds; None where it is missing or damaged."""
    old = runfiles.read_json(folder / "sweep.json", required=False)
    runs = old.get("runs")
    if not isinstance(runs, list):
        return None
    is_sweep = all(isinstance(run, dict) and {"name", "status"} <= run.keys() for run in runs)
    return old if is_sweep else None


def _refuse_another_sweep(folder: pathlib.Path, old: dict, same: dict) -> None:
    """Raise UserError, naming what differs, where `old` is not a sweep like `same`.

    A field of the config that the old sweep lacks means its default.
    """
    for field, now in same.items():
        before = old.get(field, now)
        if field == "config":
            before, now = (configs.flat(configs.complete(each)) for each in (before, now))
        if before == now:
            continue
        if field == "config":
            names = sorted(before.keys() | now.keys())
            differ = [name for name in names if before.get(name) != now.get(name)]
            before, now = ({name: each.get(name) for name in differ} for each in (before, now))
        elif field == "arguments" and set(before) != set(now):  # show those that differ
            before, now = (
                [argument for argument in before if argument not in now],
                [argument for argument in now if argument not in before],
            )
        raise UserError(
            f"--workdir={folder}: holds a sweep with other {field} ({before}, now {now}): give the "
            "same or another --workdir"
        )


def _take_earlier(rows: list[dict], old: list[dict], folder: pathlib.Path) -> list[dict]:
    """Replace the rows that an earlier command completed; return its other rows.

    Each row gets its number and its name: those of the same combination in `old`, or new ones. The
    rows of older sweeps have no number, and names of another form. The refused rows of the earlier
    command are left out. Raises UserError where a run of a killed sweep still lives.
    """
    for number, row in enumerate(old, 1):
        row.setdefault("number", number)
    earlier = {_combination(row): row for row in old}
    taken = []
    free = itertools.count(max((row["number"] for row in old), default=0) + 1)
    fields = sweep_screen.differing(rows)
    for i, row in enumerate(rows):
        before = earlier.get(_combination(row))
        if before is None:
            own = sweep_screen.swept(row)
            row["number"] = next(free)
            shown = {name: own[field] for field, name in fields.items() if field in own}
            row["name"] = folder_name(row["number"], shown)
            continue
        taken.append(before)
        row.update(number=before["number"], name=before["name"])
        if not (folder / row["name"]).is_dir():
            continue
        if before["status"] == "completed":
            rows[i] = before
        else:
            with workdir.locked(folder / row["name"]):
                pass
    return [row for row in old if row["status"] != "refused" and row not in taken]


def _combination(row: dict) -> str:
    """Return what no two runs of a sweep share: the mesh and the settings."""
    return json.dumps([row.get("mesh"), row.get("settings")], sort_keys=True)


class _Sweep:
    """Run the pending rows of a sweep in turn, and keep sweep.json up to date.

    earlier: rows of an earlier command that this one does not name.
    """

    def __init__(
        self,
        sweep: dict,
        rows: list[dict],
        earlier: list[dict],
        runner: worker.Worker,
        folder: pathlib.Path,
    ):
        self.sweep = sweep
        self.rows = rows
        self.runner = runner
        self.all_rows = sorted([*earlier, *rows], key=lambda row: row["number"])
        self.folder = folder

    def run(self) -> dict:
        """Run all that is pending; return what sweep.json holds."""
        pending = [row for row in self.rows if row["status"] == "pending"]
        with sweep_screen.Screen(self.all_rows, pending) as screen:
            for row in pending:
                row["status"] = "running"
                self._write()
                screen.begin(row, self.folder / row["name"])
                self._run_row(row, screen.tick)
                screen.end()
        return self._write()

    def _run_row(self, row: dict, tick: Callable[[], None]) -> None:
        """Run one row and fill in its seconds, status, figures and reason.

        tick: called every second or so.
        """
        folder = self.folder / row["name"]
        log = self.folder / f"{row['name']}.log"
        arguments = [*shlex.split(row["command"])[2:], f"--workdir={folder}"]
        since = time.monotonic()
        log_begins = log.stat().st_size if log.exists() else 0
        try:
            code = self.runner.run(arguments, log, tick)
        finally:
            row["seconds"] = round(time.monotonic() - since, 1)
            row["status"] = "interrupted"
            self._write()
        row["status"] = OUTCOMES.get(code, "failed")
        if code == 0:
            row["figures"] = runfiles.figures_of(folder)
            if row["figures"]["profile"]:
                self.runner.close()  # the profiler may slow down what its process runs later
            summary = runfiles.read_json(folder / "summary.json")
            now = {key: summary[key] for key in runfiles.HARDWARE}
            self.sweep["hardware"] = runfiles.merge_facts(self.sweep["hardware"] or now, now)
        else:
            row["reason"] = reason_of(code, log, log_begins)
        self._write()

    def _write(self) -> dict:
        """Write sweep.json, and return what it holds."""
        content = self.sweep | dict(runs=self.all_rows)
        runfiles.write_json(self.folder / "sweep.json", content)
        return content


def reason_of(code: int, log: pathlib.Path, begin: int = 0) -> str:
    """Say in one line why a run ended so, by the last error in its log.

    begin: the bytes of the log that are of earlier attempts.
    """
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror:" in line or "RESOURCE_EXHAUSTED" in line]
    last = (errors or lines or ["said nothing"])[-1].removeprefix("error: ")[:LONGEST_REASON]
    if code >= 0:
        return last
    quoted = f"last output: {last}" if lines else last
    return f"killed by {signal.Signals(-code).name}; {quoted}"
