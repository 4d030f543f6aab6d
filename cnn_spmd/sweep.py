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
import math
import pathlib
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence

from rich import console, live, table

from cnn_spmd import config as configs
from cnn_spmd import experiment, worker
from cnn_spmd.data import dataset, registry
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import build, runfiles, unused, workdir

COLUMNS = (
    "run",
    "status",
    "images/s",
    "step, ms",
    "ring MB per step",
    "test accuracy",
    "s",
    "reason",
)
# A run's status by launch.py's exit code; any other code means failed.
OUTCOMES = {0: "completed", 2: "refused", 75: "interrupted"}
LONGEST_NAME = 150  # characters of a run's folder; file systems allow 255 bytes
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
    """Raise UserError for a swept field or scheme that is unknown, or that no combination uses.

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
        schemes = [*TABLE, *config.placement]
        if "parallelism" in swept and config.parallelism not in schemes:
            raise UserError(
                f"--sweep=parallelism={config.parallelism}: unknown, expected some of "
                f"{', '.join(schemes)}"
            )
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
    """Yield a row of sweep.json per combination.

    It is pending, or refused with the reason why it cannot work on `devices`.
    """
    datasets: dict[str, dataset.Dataset] = {}
    fine: set[str] = set()
    for settings in combos:
        row = dict(
            name=folder_name(settings),
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


def folder_name(settings: dict[str, str]) -> str:
    """Return the name of a combination's folder, which no other combination has."""
    name = ",".join(
        value if field == "mesh" else f"{field}={value}" for field, value in settings.items()
    )
    unsafe = f"[/{re.escape(workdir.UNREADABLE)}]"
    if not re.search(unsafe, name) and len(name) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{re.sub(unsafe, '_', name)[:LONGEST_NAME]}-{digest}"


def _check(
    arguments: Sequence[str],
    shape: str | None,
    devices: Sequence,
    datasets: dict[str, dataset.Dataset],
    fine: set[str],
) -> None:
    """Raise UserError where a run with these arguments cannot work on `devices`.

    shape: the value of --mesh. datasets: those that are loaded already, by their config. fine: the
    configs that can work, except for their seed, which decides on no shape.
    """
    config, given = experiment.parse_arguments(arguments)
    if shape:
        config.mesh.update(mesh.parse(shape))
    configs.validate(config)
    unused.refuse(config, given)
    config.seed = 0
    if (content := repr(config)) in fine:
        return
    with contextlib.redirect_stdout(io.StringIO()):  # the run itself will print it
        check = functools.partial(build.prepare, config, devices)
        if (key := repr(config.data)) not in datasets:
            datasets[key] = registry.load(config.data, check)
        check(datasets[key])
    fine.add(content)


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
    combinations on. Raises UserError for a folder that cannot be used, or holds another sweep.
    """
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
        rows = list(plan(combos, shared, devices))
        earlier = _take_completed(rows, old["runs"] if old else [], folder)
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


def _take_completed(rows: list[dict], old: list[dict], folder: pathlib.Path) -> list[dict]:
    """Replace the rows that an earlier command completed; return its other rows.

    Its refused rows are left out. Raises UserError where a run of a killed sweep still lives.
    """
    earlier = {row["name"]: row for row in old}
    for i, row in enumerate(rows):
        before = earlier.pop(row["name"], None)
        if not (folder / row["name"]).is_dir():
            continue
        if before and before["status"] == "completed":
            rows[i] = before
        else:
            with workdir.locked(folder / row["name"]):
                pass
    return [row for row in earlier.values() if row["status"] != "refused"]


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
        self.all_rows = [*earlier, *rows]
        self.folder = folder

    def run(self) -> dict:
        """Run all that is pending; return what sweep.json holds."""
        pending = [row for row in self.rows if row["status"] == "pending"]
        seconds: list[float] = []
        with self._screen() as screen:
            for left, row in zip(range(len(pending), 0, -1), pending, strict=True):
                row["status"] = "running"
                self._write()
                caption = f"{left} to go"
                if seconds:
                    caption += f", about {sum(seconds) / len(seconds) * left / 60:.0f} min"
                screen.update(table_of(self.all_rows, caption), refresh=True)
                try:
                    self._run_row(row)
                finally:  # an interrupted run, too, is shown as such
                    screen.update(table_of(self.all_rows), refresh=True)
                seconds.append(row["seconds"])
        return self._write()

    def _screen(self):
        """Return rich's live table on a terminal, otherwise plain lines."""
        if not sys.stdout.isatty():
            return _Lines(self.all_rows)
        plain = console.Console(markup=False, emoji=False)  # values may hold brackets and colons
        return live.Live(table_of(self.all_rows), console=plain, auto_refresh=False)

    def _run_row(self, row: dict) -> None:
        """Run one row and fill in its seconds, status, figures and reason."""
        folder = self.folder / row["name"]
        log = self.folder / f"{row['name']}.log"
        arguments = [*shlex.split(row["command"])[2:], f"--workdir={folder}"]
        since = time.monotonic()
        log_begins = log.stat().st_size if log.exists() else 0
        try:
            code = self.runner.run(arguments, log)
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
    last = (errors or lines or ["said nothing"])[-1].removeprefix("error: ")[:300]
    if code >= 0:
        return last
    quoted = f"last output: {last}" if lines else last
    return f"killed by {signal.Signals(-code).name}; {quoted}"


# ---- Print


def table_of(rows: Sequence[dict], caption: str = "") -> table.Table:
    """Return the sweep as a table for a terminal."""
    metrics = runfiles.registered_metrics(row["figures"] for row in rows)
    made = table.Table(*COLUMNS, *metrics, caption=caption or None, caption_justify="left")
    for row in rows:
        made.add_row(*_cells(row), *_metric_cells(row, metrics))
    return made


def _metric_cells(row: dict, metrics: Sequence[str]) -> list[str]:
    """Return the values of registered metrics; empty where a run has none."""
    values = row["figures"].get("eval") or {}
    return [f"{values[name]:.4g}" if name in values else "" for name in metrics]


def _cells(row: dict) -> list[str]:
    """Return a row's text under COLUMNS; empty where a figure is not known."""
    figures = row["figures"]
    times = figures.get("step_milliseconds") or {}  # none where a resumed run had no step left
    ring = figures.get("ring_bytes")  # none where there is no report on the program
    cells = [row["name"], row["status"]]
    for value, form in (
        (figures.get("images_per_second"), "{:,.0f}"),
        (times.get("median"), "{:.2f}"),
        (None if ring is None else ring / 1e6, "{:.1f}"),
        (figures.get("accuracy"), "{:.2%}"),
        (row["seconds"], "{:.0f}"),
    ):
        cells.append("" if value is None else form.format(value))
    return [*cells, row["reason"]]


class _Lines:
    """Stand in for rich's live table without a terminal, with plain lines."""

    def __init__(self, rows: list[dict]):
        self.rows = rows
        self.printed: dict[str, str] = {}  # the last printed status of each run

    def __enter__(self):
        print("  ".join(COLUMNS))
        self.update()
        return self

    def __exit__(self, *_):
        pass

    def update(self, *_, **__) -> None:
        """Print a line for each row whose status changed."""
        for row in self.rows:
            if self.printed.get(row["name"], "pending") != row["status"]:
                self.printed[row["name"]] = row["status"]
                metrics = runfiles.registered_metrics([row["figures"]])
                named = zip(metrics, _metric_cells(row, metrics), strict=True)
                cells = [*_cells(row), *(f"{name} {value}" for name, value in named)]
                print("  ".join(cell for cell in cells if cell), flush=True)
