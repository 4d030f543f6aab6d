"""Run the combinations of a sweep, and keep sweep.json.

Each run has a folder of its own. A warm process runs them in turn (worker.py). A run that fails is
recorded with its reason, and the sweep goes on. sweep.json holds every combination; the same
command on the same folder runs those that are not completed yet.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import pathlib
import re
import shlex
import signal
import time
from collections.abc import Callable, Sequence

from absl import logging

from cnn_spmd import config as configs
from cnn_spmd import experiment, sweep, sweep_screen, worker
from cnn_spmd.errors import UserError
from cnn_spmd.training import provenance, runfiles, workdir

# A run's status by launch.py's exit code; any other code means failed.
OUTCOMES = {0: "completed", 2: "refused", 75: "interrupted"}
LONGEST_NAME = 100  # characters of a run's folder; file systems allow 255 bytes
LONGEST_VALUE = 24  # characters of a value in it


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
    rows = list(sweep.plan(combos, shared, devices))
    if all(row["status"] == "refused" for row in rows) and not (folder / "sweep.json").exists():
        _take_earlier(rows, [], folder)
        with sweep_screen.Screen(rows, []):
            return dict(runs=rows)
    with workdir.locked(folder) as content:
        old = _read_sweep(folder)
        if old is None and content - workdir.BEFORE_A_RUN:
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
        _warn_of_other_code([*earlier, *rows], folder)
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        header = dict(
            experiment=name,
            **same,
            started=old["started"] if old else now,
            hardware=old and old["hardware"],
        )
        all_rows = sorted([*earlier, *rows], key=lambda row: row["number"])
        return _Sweep(header, rows, all_rows, runner, folder).run()


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
        # Show only what differs; arguments may also differ in their order alone.
        if field == "config":
            before, now = (configs.flat(configs.complete(each)) for each in (before, now))
            names = sorted(before.keys() | now.keys())
            differ = [name for name in names if before.get(name) != now.get(name)]
            before, now = ({name: each.get(name) for name in differ} for each in (before, now))
        elif field == "arguments" and set(before) != set(now):
            before, now = (
                [argument for argument in before if argument not in now],
                [argument for argument in now if argument not in before],
            )
        if before != now:
            raise UserError(
                f"--workdir={folder}: holds a sweep with other {field} ({before}, now {now}): give "
                "the same or another --workdir"
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


def _warn_of_other_code(rows: Sequence[dict], folder: pathlib.Path) -> None:
    """Warn where runs of a sweep were completed by other code than what runs now."""
    runs: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: row["number"]):
        if row["status"] == "completed":
            summary = runfiles.read_json(folder / row["name"] / "summary.json", required=False)
            runs.setdefault(provenance.other_code(summary), []).append(str(row["number"]))
    for other, numbers in runs.items():
        if other:
            logging.warning("Other code made the runs %s: %s.", ", ".join(numbers), other)


def _combination(row: dict) -> str:
    """Return what no two runs of a sweep share: the mesh and the settings."""
    return json.dumps([row.get("mesh"), row.get("settings")], sort_keys=True)


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


@dataclasses.dataclass
class _Sweep:
    """Run the pending rows of a sweep in turn, and keep sweep.json up to date.

    all_rows: also those of an earlier command that this one does not name.
    """

    header: dict
    rows: list[dict]
    all_rows: list[dict]
    runner: worker.Worker
    folder: pathlib.Path

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
            try:
                row["figures"] = runfiles.figures_of(folder)
            except UserError as error:  # of a run that was complete, and whose files were damaged
                row.update(status="failed", reason=f"{error}: delete {folder} to train it again")
                self._write()
                return
            if row["figures"]["profile"]:
                self.runner.close()  # the profiler may slow down what its process runs later
            summary = runfiles.read_json(folder / "summary.json")
            now = {key: summary[key] for key in runfiles.HARDWARE}
            self.header["hardware"] = runfiles.merge_facts(self.header["hardware"] or now, now)
        else:
            row["reason"] = reason_of(code, log, log_begins)
        self._write()

    def _write(self) -> dict:
        """Write sweep.json, and return what it holds."""
        content = self.header | dict(runs=self.all_rows)
        runfiles.write_json(self.folder / "sweep.json", content)
        return content


def reason_of(code: int, log: pathlib.Path, begin: int = 0) -> str:
    """Say in one line why a run ended so, by the last error in its log.

    begin: the bytes of the log that are of earlier attempts.
    """
    text = log.read_bytes()[begin:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "rror:" in line or "RESOURCE_EXHAUSTED" in line]
    last = (errors or lines or ["said nothing"])[-1].removeprefix("error: ")[: sweep.LONGEST_REASON]
    if code >= 0:
        return last
    quoted = f"last output: {last}" if lines else last
    return f"killed by {signal.Signals(-code).name}; {quoted}"
