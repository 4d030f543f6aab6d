"""A sweep: one experiment over mesh shapes and settings, each run in a process and a folder of its own.

A combination that cannot work is refused before anything starts; a run that fails is recorded with its reason, and the
sweep goes on. sweep.json holds every combination; the same command on the same folder runs what is not done yet.
"""

import contextlib
import datetime
import functools
import hashlib
import io
import itertools
import math
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

from absl import logging
from rich import console, live, table

from cnn_spmd import config as configs
from cnn_spmd.data import dataset
from cnn_spmd.data import registry as sources
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh
from cnn_spmd.training import build as setups
from cnn_spmd.training import interrupt, runfiles
from cnn_spmd.training import workdir as workdirs

LAUNCH = pathlib.Path(__file__).parent.parent / "launch.py"
COLUMNS = (
    "run",
    "status",
    "images/s",
    "step, ms",
    "ring MB a step",
    "test accuracy",
    "s",
    "reason",
)
OUTCOMES = {
    0: "completed",
    2: "refused",
    75: "interrupted",
}  # by launch.py's exit codes; others: failed


def combinations(
    meshes: str | None, batches: str | None, fields: Sequence[str], devices: int
) -> list[dict[str, str]]:
    """Every combination as {"mesh": "4x2", "batch_per_device": "32", field: value}, of what is swept alone.

    meshes: of --mesh, joined by commas; "all" is 1x1, to compare with, and every shape of all the devices. batches: of
    --batch_per_device. fields: each "FIELD=VALUE,VALUE". Raises UserError for what is no such list, and for a field given
    twice.
    """
    axes: dict[str, list[str]] = {}

    def add(field: str, flag: str, text: str) -> None:
        values = parts_of(text)
        if not all(values):
            raise UserError(f"{flag}={text}: has an empty value, expected values joined by commas")
        if field in axes:
            raise UserError(f"{flag}={text}: {field} is given twice")
        axes[field] = list({_number(value): value for value in reversed(values)}.values())[
            ::-1
        ]  # 0.001 and 1e-3 are one

    if meshes == "all":
        meshes = ",".join(
            ["1x1", *(f"{n}x{devices // n}" for n in range(devices, 0, -1) if devices % n == 0)]
        )
    if meshes is not None:
        add("mesh", "--mesh", meshes)
        for shape in axes["mesh"]:
            if shape == "all":
                raise UserError(f"--mesh={meshes}: expected either all or shapes")
            mesh.parse(shape)
    if batches is not None:
        add("batch_per_device", "--batch_per_device", batches)
        for size in axes["batch_per_device"]:
            if not size.isdecimal() or len(size) > 9 or not int(size):
                raise UserError(
                    f"--batch_per_device={batches}: {size} is not a positive integer of at most nine digits"
                )
    for text in fields:
        field, equals, values = text.partition("=")
        field = field.removeprefix("config.")
        if not field or not equals:
            raise UserError(
                f"--sweep={text}: expected FIELD=VALUE,VALUE, such as parallelism=data,hybrid"
            )
        if field.split(".")[0] == "mesh" or (field == "batch_size" and batches is not None):
            raise UserError(
                f"--sweep={text}: set by {'--batch_per_device' if field == 'batch_size' else '--mesh'}"
            )
        add(field, f"--sweep={field}", values)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def parts_of(text: str) -> list[str]:
    """What the commas of a list part; those in brackets, as in ("a", "b"),("c",), part nothing."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def arguments_of(settings: dict[str, str], shared: Sequence[str], devices: int) -> list[str]:
    """launch.py's arguments for one combination. A sweep never falls back to another data set, unless `shared` says so."""
    arguments = [*shared]
    if not any(argument.lstrip("-").split("=")[0] == "config.data.fallback" for argument in shared):
        arguments.append("--config.data.fallback=")
    for field, value in settings.items():
        if field == "mesh":
            arguments.append(f"--mesh={value}")
        elif field != "batch_per_device":
            arguments.append(f"--config.{field}={value}")
    if "batch_per_device" in settings:
        shape = configs.parsed(arguments).mesh
        data, model = (
            mesh.parse(settings["mesh"])
            if "mesh" in settings
            else mesh.shape(shape.data, shape.model, devices)
        )
        arguments.append(f"--config.batch_size={int(settings['batch_per_device']) * data * model}")
    return arguments


def plan(combos: Sequence[dict], shared: Sequence[str], devices: Sequence) -> Iterator[dict]:
    """A row of sweep.json for each combination: pending, or refused with the reason why it cannot work on `devices`."""
    datasets: dict[str, dataset.Dataset] = {}
    for settings in combos:
        name = ",".join(
            value if field == "mesh" else f"{field}={value}" for field, value in settings.items()
        )
        unsafe = f"[/{re.escape(workdirs.UNREADABLE)}]"
        if (
            re.search(unsafe, name) or len(name) > 150
        ):  # it shall be that of a folder, and of no other row
            name = (
                f"{re.sub(unsafe, '_', name)[:150]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
            )
        numbers = {field: _number(value) for field, value in settings.items() if field != "mesh"}
        row = dict(
            name=name,
            mesh=settings.get("mesh"),
            settings=numbers,
            status="pending",
            reason="",
            command="",
            seconds=None,
            figures={},
        )
        try:
            arguments = arguments_of(settings, shared, len(devices))
            row["command"] = shlex.join(["python", "launch.py", *arguments])
            config = configs.parsed(arguments)
            if row["mesh"]:
                config.mesh.data, config.mesh.model = mesh.parse(row["mesh"])
            configs.validate(config)
            with contextlib.redirect_stdout(io.StringIO()):  # the run itself will say it
                check = functools.partial(setups.prepare, config, devices)
                if (key := repr(config.data)) not in datasets:
                    datasets[key] = sources.load(config.data, check)
                check(datasets[key])
        except UserError as error:
            row.update(status="refused", reason=str(error))
        yield row


def run(
    experiment: str,
    shared: Sequence[str],
    combos: Sequence[dict],
    devices: Sequence,
    cpu_devices: int | None,
    folder: pathlib.Path,
) -> dict:
    """Runs, or goes on with, the sweep in `folder`, which gets sweep.json, and a folder and a log a run.

    shared: launch.py's arguments that all runs have; devices: as many as there are, to check the combinations on.
    Returns what sweep.json holds. Raises UserError for a folder that is not to be had, or holds another sweep.
    """
    with workdirs.locked(folder) as content:
        old = runfiles.read_json(folder / "sweep.json", required=False)
        runs = (old or {}).get("runs")
        if not isinstance(runs, list) or not all(
            isinstance(run, dict) and {"name", "status"} <= run.keys() for run in runs
        ):
            old = None
        if old is None and content - {workdirs.LOCK}:
            (folder / workdirs.LOCK).unlink()
            raise UserError(
                f"--workdir={folder}: is not empty and holds no sweep (no whole sweep.json): give a new folder"
            )
        same = dict(
            arguments=list(shared),
            devices=len(devices),
            cpu_devices=cpu_devices,
            config=configs.flat(configs.as_json(configs.parsed(shared))),
        )  # an experiment's file changes, too
        for field, value in same.items():
            if old and (before := old.get(field, value)) != value:
                if field == "config":
                    before, value = (
                        {
                            name: one.get(name)
                            for name in sorted(before.keys() | value.keys())
                            if before.get(name) != value.get(name)
                        }
                        for one in (before, value)
                    )
                elif field == "arguments" and set(before) != set(value):  # those that differ
                    before, value = (
                        [x for x in before if x not in value],
                        [x for x in value if x not in before],
                    )
                raise UserError(
                    f"--workdir={folder}: holds a sweep with other {field} ({before}, now {value}): give the same "
                    "or another --workdir"
                )
        rows = list(plan(combos, shared, devices))
        done = {row["name"]: row for row in old["runs"]} if old else {}
        for i, row in enumerate(rows):
            before = done.pop(row["name"], None)
            if before and before["status"] == "completed" and (folder / row["name"]).is_dir():
                rows[i] = before
            elif (folder / row["name"]).is_dir():  # of a sweep that was killed: its run may live
                with workdirs.locked(folder / row["name"]):
                    pass
        kept = [row for row in done.values() if row["status"] != "refused"]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        sweep = dict(
            experiment=experiment,
            **same,
            started=old["started"] if old else now,
            hardware=old and old["hardware"],
        )
        return _run_all(sweep, rows, kept, folder)


def _run_all(sweep: dict, rows: list[dict], kept: list[dict], folder: pathlib.Path) -> dict:
    """Runs the pending rows one after another; `kept` are those of an earlier command that this one does not name."""

    def write() -> dict:
        whole = sweep | dict(runs=[*kept, *rows])
        runfiles.write_json(folder / "sweep.json", whole)
        return whole

    pending = [row for row in rows if row["status"] == "pending"]
    show, seconds = sys.stdout.isatty(), []
    plain = console.Console(markup=False, emoji=False)  # values may hold brackets and colons
    with (
        live.Live(table_of([*kept, *rows]), console=plain, auto_refresh=False)
        if show
        else _Lines([*kept, *rows])
    ) as screen:
        for left, row in zip(range(len(pending), 0, -1), pending, strict=True):
            row["status"] = "running"
            write()
            eta = (
                f"{left} to go, about {sum(seconds) / len(seconds) * left / 60:.0f} min"
                if seconds
                else f"{left} to go"
            )
            screen.update(table_of([*kept, *rows], eta), refresh=True)
            since = time.monotonic()
            try:
                code = _run_one(shlex.split(row["command"])[2:], folder / row["name"])
            finally:
                row["seconds"] = round(time.monotonic() - since, 1)
                row["status"] = "interrupted"
                write()
            seconds.append(row["seconds"])
            row["status"] = OUTCOMES.get(code, "failed")
            if code == 0:
                row["figures"] = runfiles.figures_of(folder / row["name"])
                summary = runfiles.read_json(folder / row["name"] / "summary.json")
                now = {key: summary[key] for key in runfiles.HARDWARE}
                sweep["hardware"] = runfiles.merge_facts(sweep["hardware"] or now, now)
            else:
                row["reason"] = reason_of(code, folder / f"{row['name']}.log")
            write()
            screen.update(table_of([*kept, *rows]), refresh=True)
    return write()


def _run_one(arguments: list[str], folder: pathlib.Path) -> int:
    """One run in a process and a session of its own: a Ctrl-C is ours to pass on, once. Returns its exit code."""
    with folder.with_name(folder.name + ".log").open("w") as log:
        process = None
        try:
            with interrupt.delayed_signals():  # or a process would be left behind that nobody knows
                process = subprocess.Popen(
                    [sys.executable, LAUNCH, *arguments, f"--workdir={folder}"],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            return process.wait()
        except KeyboardInterrupt:
            if process is None:
                raise
            logging.warning(
                "Interrupted: waiting for %s to save; a second signal stops it at once.",
                folder.name,
            )
            process.send_signal(signal.SIGTERM)
            try:
                process.wait()
            finally:
                process.kill()
            raise


def reason_of(code: int, log: pathlib.Path) -> str:
    """Why a run ended with this exit code, from the last line of its log that tells, in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    telling = (
        [line for line in lines if "rror:" in line or "RESOURCE_EXHAUSTED" in line]
        or lines
        or ["said nothing"]
    )
    killed = f"killed by {signal.Signals(-code).name}; " if code < 0 else ""
    return f"{killed}{telling[-1].removeprefix('error: ')[:300]}"


def table_of(rows: Sequence[dict], caption: str = "") -> table.Table:
    """The sweep as a table for a terminal."""
    made = table.Table(*COLUMNS, caption=caption or None, caption_justify="left")
    for row in rows:
        made.add_row(*_cells(row))
    return made


def _cells(row: dict) -> list[str]:
    cells, got = [row["name"], row["status"]], row["figures"]
    times = got.get("step_milliseconds") or {}  # none where a resumed run had no step left to do
    ring = got.get("ring_bytes")  # none where there is no report on the program
    for value, form in (
        (got.get("images_per_second"), "{:,.0f}"),
        (times.get("median"), "{:.2f}"),
        (None if ring is None else ring / 1e6, "{:.1f}"),
        (got.get("accuracy"), "{:.2%}"),
        (row["seconds"], "{:.0f}"),
    ):
        cells.append("" if value is None else form.format(value))
    return [*cells, row["reason"]]


class _Lines:
    """Stands in for rich's live table where there is no terminal: a line for each row whose status has changed."""

    def __init__(self, rows: list[dict]):
        self.rows, self.told = rows, {}

    def __enter__(self):
        print("  ".join(COLUMNS))
        self.update()
        return self

    def __exit__(self, *_):
        pass

    def update(self, *_, **__) -> None:
        for row in self.rows:
            if self.told.get(row["name"], "pending") != row["status"]:
                self.told[row["name"]] = row["status"]
                print("  ".join(cell for cell in _cells(row) if cell), flush=True)


def _number(text: str) -> int | float | str:
    """A swept value as JSON shall hold it."""
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)):
                return value
    return text
