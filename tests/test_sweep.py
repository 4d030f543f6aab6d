"""Sweeps: combinations, refusals, failing runs, going on, and a real sweep."""

import dataclasses
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
from conftest import ROOT
from run_helpers import lines, rows, saved_state
from test_launch import SMALL, finished, start  # noqa: F401  (start is a fixture)

from cnn_spmd import config as configs
from cnn_spmd import experiment, sweep, sweep_run, sweep_screen, worker
from cnn_spmd.data import registry
from cnn_spmd.data.digits import load_digits
from cnn_spmd.errors import UserError
from cnn_spmd.models import NETWORKS
from cnn_spmd.report import compare
from cnn_spmd.training import provenance, runfiles
from cnn_spmd.training import workdir as workdirs

SHARED = SMALL[:2]
# Stands in for launch.py as a worker: what a run does is its seed.
FAKE = """
import json, os, pathlib, signal, sys, time
from multiprocessing import connection
pipe = connection.Connection(int(sys.argv[2]))
pipe.send(8)

def run(folder, seed):
    with open(folder.parent / "started", "a") as file:
        file.write(seed + "\\n")
    with open(folder.parent / "processes", "a") as file:
        file.write(f"{os.getpid()}\\n")
    if (folder.parent / "repaired").exists() or seed == "0":
        folder.mkdir(exist_ok=True)
        summary = dict(device_kind="card", host_cores=2, versions={}, commit="c")
        (folder / "summary.json").write_text(json.dumps(summary))
        return 0, ""
    if seed == "1":
        return 1, "error: seed=1: is refused by the run itself"
    if seed == "2":
        return 1, "one\\njaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory\\nat the end"
    if seed == "3":
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == "5" and os.fork():  # ends, while a process that it started holds the pipe
        os._exit(7)
    if seed == "5":
        time.sleep(4)
        os._exit(0)
    if seed == "6":
        return 1, "does not leave"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)

while True:
    try:
        arguments, log = pipe.recv()
    except EOFError:
        sys.exit()
    seed = next(arg.split("=")[1] for arg in arguments if arg.startswith("--config.seed="))
    code, said = run(pathlib.Path(arguments[-1].removeprefix("--workdir=")), seed)
    with open(log, "a") as file:
        file.write(said)
    pipe.send((code, ""))
    if seed == "6":
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("meshes", "batches", "fields", "count"),
    [
        ("8x1,4x2", None, [], 2),
        ("all", None, [], 5),
        ("8x1", "32,128", ["parallelism=data,hybrid", "config.seed=0,1"], 8),
        (None, None, ["seed=0,1,1"], 2),
        (None, None, ["optimizer.stages=(0.5, 0.7),()", 'placement={"a": {"b": ("c", "d")}}'], 2),
    ],
)
def test_combinations(meshes, batches, fields, count):
    combos = sweep.combinations(meshes, batches, fields, 8)
    assert len(combos) == count
    assert len({json.dumps(combo) for combo in combos}) == count
    if meshes == "all":
        assert [combo["mesh"] for combo in combos] == ["1x1", "8x1", "4x2", "2x4", "1x8"]


@pytest.mark.parametrize(
    ("meshes", "batches", "fields", "message"),
    [
        ("8x1,", None, [], "--mesh=8x1,: has an empty value"),
        (",", None, [], "--mesh=,: has an empty value"),
        ("8x1,4by2", None, [], "--mesh=4by2: expected DATAxMODEL"),
        ("all,1x3", None, [], "--mesh=all,1x3: expected either all or shapes"),
        (None, "32,-1", [], "--batch_per_device=32,-1: -1 is not a positive integer"),
        (None, "32," + "9" * 5000, [], "9 is not a positive integer of at most nine digits"),
        (None, "", [], "--batch_per_device=: has an empty value"),
        (None, None, ["seed"], "--sweep=seed: expected FIELD=VALUE,VALUE"),
        (None, None, ["seed="], "--sweep=seed=: has an empty value"),
        (None, None, ["seed=1", "config.seed=2"], "seed is given twice"),
        (None, "32", ["batch_size=1"], "--sweep=batch_size=1: set by --batch_per_device"),
        (None, None, ["mesh.data=1,2"], "set by --mesh"),
    ],
)
def test_lists_that_are_refused(meshes, batches, fields, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        sweep.combinations(meshes, batches, fields, 8)


@pytest.mark.parametrize(
    ("swept", "message"),
    [
        ("model.dropout=0.0,0.5", "--sweep=model.dropout: model.name=simple_cnn does not use it;"),
        ("model.droput=0.0,0.5", '--sweep=model.droput: no such field, .* mean "model.dropout"'),
        ("parallelism=data,hybird", "--sweep=parallelism=hybird: unknown; .* mean .hybrid"),
        ("model.name=simple_cn,alexnet", "--sweep=model.name=simple_cn: .* mean .simple_cnn"),
        ("data.name=cifar10,digit", r'--sweep=data.name=digit: .* mean "digits"\? .* by --config$'),
        ("optimizer.name=sgd,adam", '--sweep=optimizer.name=adam: unknown.* mean "adamw"'),
        ("optimizer.lr=1,2", '--sweep=optimizer.lr: no such .* mean "optimizer.learning_rate"'),
        (
            "model.levers=(),1",
            "--sweep=model.levers: no such field, set model.fast to True",
        ),
        ("dense_updates=each,sum", "--sweep=dense_updates: has no effect with dense_microbatch=0"),
        ("seed=0,x", "--sweep=seed=x: expected an integer$"),
        ("model.dropout=0.5,1.5", "--sweep=model.dropout=1.5: expected from 0.0 to below 1.0$"),
        (
            "dtype=auto,float",
            "--sweep=dtype=float: unknown; .*float32.* Expected one of auto, float32, bf",
        ),
        ("optimizer.layer_rates.fc1=1,2", "--sweep=optimizer.layer_rates.fc1=1: .* has no fc1 yet"),
    ],
)
def test_a_sweep_over_what_nothing_uses_is_refused(monkeypatch, swept, message):
    monkeypatch.chdir(ROOT)
    combos = sweep.combinations("1x1,2x1", None, [swept], 8)
    with pytest.raises(UserError, match=f"^{message}"):
        sweep.refuse_fields(combos, SMALL, 8)


def test_a_sweep_in_which_some_use_a_field_refuses_the_others(monkeypatch):
    monkeypatch.chdir(ROOT)
    fields = ["model.name=simple_cnn,one_convolution", "model.dropout=0.0,0.3", "model.width=8"]
    combos = sweep.combinations(None, None, fields, 8)
    sweep.refuse_fields(combos, SMALL, 8)
    reasons = [row["reason"] for row in sweep.plan(combos, SMALL, jax.devices()[:1])]
    assert ["does not use it" in reason for reason in reasons] == [True, True, False, False]
    assert reasons[2:] == ["", ""]


def test_what_cannot_work_is_refused_with_its_reason(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    combos = [
        dict(mesh="3x5"),
        dict(mesh="4x2", seed="x"),
        dict(mesh="4x2", nope="1"),
        dict(parallelism="towers"),
        {"data.synthetic.image_size": "0"},
        {"model.dropout": "nan"},
        dict(mesh="4x2", batch_per_device="9"),
        dict(mesh="4x2", batch_per_device="8"),
        dict(seed="0"),
    ]
    rows = list(sweep.plan(combos, SMALL, jax.devices()))
    assert [row["status"] for row in rows] == ["refused"] * 7 + ["pending"] * 2
    for row, reason in zip(
        rows,
        (
            "needs 15 devices, but there are 8",
            "--config.seed=x: expected an integer",
            "nope",
            "parallelism=towers: unknown",
            "data.synthetic.image_size=0: expected from 1 to 4096",
            "model.dropout=nan: expected from 0.0",
            "batch_size=72: synthetic has 64",
        ),
        strict=False,
    ):
        assert reason in row["reason"]
        assert "\n" not in row["reason"]
    runfiles.write_json(tmp_path / "rows.json", dict(rows=rows))
    assert rows[7]["command"].startswith("python launch.py --config experiments/alexnet_cifar.py")
    assert rows[7]["command"].endswith("--config.data.fallback= --mesh=4x2 --config.batch_size=64")


def test_a_network_that_raises_is_refused_and_the_others_run(monkeypatch):
    """It is the user's own, and may raise anything."""

    def broken(**_):
        raise TypeError("my network\nis broken")

    monkeypatch.chdir(ROOT)
    monkeypatch.setitem(NETWORKS, "broken", broken)
    combos = [{"model.name": name} for name in ("broken", "simple_cnn")]
    rows = list(sweep.plan(combos, SMALL, jax.devices()))
    assert [row["status"] for row in rows] == ["refused", "pending"]
    assert rows[0]["reason"].startswith("TypeError: my network is broken (")


def test_runs_that_differ_in_their_seed_are_checked_once(monkeypatch):
    monkeypatch.chdir(ROOT)
    checked = []

    def prepare(config, *_):
        checked.append(config.batch_size)
        if config.batch_size == 48:
            raise UserError("refused")

    monkeypatch.setattr(sweep.build, "prepare", prepare)
    combos = sweep.combinations(None, None, ["seed=0,1", "batch_size=16,32,48"], 8)
    statuses = [row["status"] for row in sweep.plan(combos, SMALL, jax.devices())]
    assert statuses == ["pending", "pending", "refused"] * 2
    assert checked == [16, 32, 48, 48]


def test_names_of_folders_are_short_and_safe():
    names = [
        sweep_run.folder_name(3, settings)
        for settings in (
            dict(mesh="4x2", learning_rate=1e-05),
            dict(stages="(0.5, 0.75)"),
            dict(dir="/a/b *?[\\", more="ü"),
            dict(placement="x" * 300),
            {f"field_{number}": "y" * 20 for number in range(30)},
            {},
        )
    ]
    assert names[:2] == ["03-4x2,learning_rate=1e-05", "03-stages=0.5_0.75"]
    assert re.fullmatch(r"03-dir=a_b,more=[0-9a-f]{8}", names[2])
    assert re.fullmatch(r"03-placement=[0-9a-f]{8}", names[3])
    assert len(names[4]) == sweep_run.LONGEST_NAME
    assert names[5] == "03"


def test_runs_are_numbered_and_named_by_what_differs(tmp_path):
    fields = ["optimizer.learning_rate=0.1,0.01", "seed=3", "model.dropout=0.0,0.5"]
    rows = [
        dict(mesh="4x2", settings={**combo}, name=None)
        for combo in sweep.combinations(None, None, fields, 8)
    ]
    sweep_run._take_earlier(rows, [], tmp_path)
    assert [row["name"] for row in rows] == [
        "01-learning_rate=0.1,dropout=0.0",
        "02-learning_rate=0.1,dropout=0.5",
        "03-learning_rate=0.01,dropout=0.0",
        "04-learning_rate=0.01,dropout=0.5",
    ]


@pytest.mark.parametrize(
    "field", ["batch_size", "batch_per_device", "epochs", "steps", "optimizer.learning_rate"]
)
def test_what_the_fallback_sets_can_be_swept(monkeypatch, field):
    monkeypatch.chdir(ROOT)
    digits = dataclasses.replace(load_digits(None), fallback="cifar10")
    monkeypatch.setitem(registry.DATASETS.data, "cifar10", lambda data: digits)
    arguments = [*SHARED, "--config.data.fallback=digits", "--config.model.name=simple_cnn"]
    (row,) = sweep.plan([{field: "3"}], arguments, jax.devices()[:1])
    assert row["status"] == "pending", row["reason"]
    config, _ = experiment.parse_arguments(row["command"].split()[2:])
    config = configs.resolve(config, digits, "cpu")
    found = configs.flat(config.to_dict()) | dict(
        batch_per_device=config.batch_size, epochs=config.steps // (1437 // 64)
    )
    assert found[field] == 3


def test_a_seed_counts_once():
    def run(seed, rate, settings):
        figures = dict(
            mesh=dict(data=1, model=1),
            parallelism="data",
            batch_size=8,
            seed=seed,
            images_per_second=rate,
        )
        return dict(status="completed", settings=settings, figures=figures)

    (group,) = compare.groups_of(
        [run(0, 1.0, {}), run(0, 2.0, dict(seed=0)), run(1, None, {}), run(1, 4.0, dict(seed=1))]
    )
    assert group.values("images_per_second") == [
        1.0,
        4.0,
    ]  # not the one that had no step left


def test_a_sweep_may_fall_back_only_where_it_is_told_to(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert (
        sweep.arguments_of({}, [*SHARED, "--config.data.fallback_epochs=1"], 8)[-1]
        == "--config.data.fallback="
    )
    assert (
        sweep.arguments_of({}, [*SHARED, "--config.data.fallback=digits"], 8)[-1]
        == "--config.data.fallback=digits"
    )


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """Sweeps over seeds whose runs are FAKE."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(worker, "LAUNCH", tmp_path / "fake.py")
    monkeypatch.setattr(
        runfiles,
        "figures_of",
        lambda folder: dict(
            images_per_second=1.0,
            step_milliseconds=dict(median=1.0),
            ring_bytes=0,
            accuracy=0.5,
            profile=None,
        ),
    )
    monkeypatch.setattr(
        sweep,
        "plan",
        lambda combos, shared, devices: [
            dict(
                number=None,
                name=None,
                mesh=None,
                settings=combo,
                status="pending",
                reason="",
                seconds=None,
                figures={},
                command=f"python launch.py --config.seed={combo['seed']}",
            )
            for combo in combos
        ],
    )

    def run(*seeds):
        combos = [dict(seed=seed) for seed in seeds]
        with worker.Worker(None) as runner:
            return sweep_run.run("e", SHARED, combos, jax.devices(), runner, tmp_path / "s")

    return run


def processes_of(folder):
    """The number of the process of each run in turn: 0, 1, ..."""
    ids = (folder / "processes").read_text().split()
    return [list(dict.fromkeys(ids)).index(each) for each in ids]


def test_a_failed_run_is_told_and_tried_again(fake, tmp_path, capsys):
    result = fake(0, 1, 2, 3)
    assert processes_of(tmp_path / "s") == [0, 0, 1, 2]  # a fresh one after each failure
    assert result == json.loads((tmp_path / "s/sweep.json").read_text())
    got = {run["name"]: (run["status"], run["reason"]) for run in result["runs"]}
    assert got == {
        "01-seed=0": ("completed", ""),
        "02-seed=1": ("failed", "seed=1: is refused by the run itself"),
        "03-seed=2": ("failed", "jaxlib.XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"),
        "04-seed=3": ("failed", "killed by SIGKILL; said nothing"),
    }
    assert result["hardware"]["device_kind"] == "card"
    out = capsys.readouterr().out
    assert out.startswith("A sweep of 4 runs: 4 pending\n1 of 4: run 1  seed=0\n  completed: ")
    assert "2 of 4: run 2, ETA of the sweep 0:0" in out
    assert max(map(len, out.partition("The sweep of")[2].partition("Run")[0].splitlines())) <= 80
    for row in result["runs"][1:]:
        assert out.count(row["reason"]) == 1

    (tmp_path / "s/repaired").touch()
    result = fake(2, 3)  # the others stay as they are
    assert [(run["name"], run["status"]) for run in result["runs"]] == [
        ("01-seed=0", "completed"),
        ("02-seed=1", "failed"),
        ("03-seed=2", "completed"),
        ("04-seed=3", "completed"),
    ]
    assert (tmp_path / "s/started").read_text().split() == ["0", "1", "2", "3", "2", "3"]
    assert processes_of(tmp_path / "s")[4:] == [3, 3]
    capsys.readouterr()
    (tmp_path / "s/01-seed=0/summary.json").unlink()  # sweep.json has its figures
    result = fake(0, 2)
    assert (tmp_path / "s/started").read_text().split() == [
        "0",
        "1",
        "2",
        "3",
        "2",
        "3",
    ]  # what is done is not run again
    assert all(run["figures"] for run in result["runs"] if run["status"] == "completed")
    out = capsys.readouterr().out
    assert "Run 2 failed: seed=1: is refused by the run itself" in out  # why the exit code is not 0
    shutil.rmtree(tmp_path / "s/01-seed=0")
    fake(0, 2)
    assert (tmp_path / "s/started").read_text().split() == ["0", "1", "2", "3", "2", "3", "0"]


def test_a_process_that_ends_or_hangs_does_not_hang_the_sweep(fake, monkeypatch, capfd):
    monkeypatch.setattr(worker, "LEAVE_SECONDS", 0.1)
    since = time.monotonic()
    rows = fake(5, 6, 0)["runs"]
    assert time.monotonic() - since < 4  # what the first run started still holds its pipe
    assert [row["status"] for row in rows] == ["failed", "failed", "completed"]
    assert [row["reason"] for row in rows] == ["said nothing", "does not leave", ""]


def test_a_sweep_looks_at_its_run_while_it_waits(monkeypatch):
    monkeypatch.setattr(worker, "ALIVE_SECONDS", 0.01)
    runner = worker.Worker(None)
    runner._process = types.SimpleNamespace(poll=lambda: None)
    runner._pipe, theirs = multiprocessing.Pipe()
    with theirs, runner._pipe:
        assert runner._answer(lambda: theirs.send("seen")) == "seen"


def test_a_profiled_run_has_its_process_for_itself(fake, monkeypatch, tmp_path):
    figures = runfiles.figures_of

    def profiled(folder):
        return figures(folder) | dict(profile=dict(steps=1))

    monkeypatch.setattr(runfiles, "figures_of", profiled)
    (tmp_path / "s").mkdir()
    fake(0)
    (tmp_path / "s/repaired").touch()
    fake(1, 2)
    assert processes_of(tmp_path / "s") == [0, 1, 2]


def test_what_keeps_a_process_from_another_run(monkeypatch, tmp_path):
    own = tmp_path / "own.py"
    own.touch()
    os.utime(own, (time.time() + 2e4,) * 2)
    monkeypatch.setitem(sys.modules, "own", types.SimpleNamespace(__file__=str(own)))
    assert worker._leftover(time.time() + 1e4) == f"{own} has changed"
    monkeypatch.setattr(jax, "live_arrays", lambda: [np.zeros(worker.LEFT_BYTES + 1, np.uint8)])
    assert worker._leftover(time.time() + 3e4) == "this one leaves 1,048,577 bytes on the devices"


def invented_rows(*settings):
    """Rows of sweep.json without a mesh, the first of which is completed."""
    rows = [
        dict(
            number=number,
            mesh=None,
            settings=each,
            status="pending",
            reason="",
            seconds=None,
            figures={},
        )
        for number, each in enumerate(settings, 1)
    ]
    figures = dict(
        accuracy=0.5,
        images_per_second=1e5,
        ring_bytes=3e6,
        step_milliseconds=dict(median=1.5),
        eval=dict(top5=0.9),
    )
    rows[0].update(status="completed", seconds=100.0, figures=figures)
    return rows


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_step_and_eta(monkeypatch, tmp_path):
    """In 80 columns, with brackets as they are, and the rows around the one that runs."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    settings = [{"optimizer.learning_rate": 1 / n, "b": "[red]:x: [/a]"} for n in range(1, 31)]
    rows = invented_rows(*settings)
    clock = [0.0]
    monkeypatch.setattr(sweep_screen.time, "monotonic", lambda: clock[0])
    with sweep_screen.Screen(rows, rows[1:]) as screen:
        rows[24]["status"] = "running"
        screen.begin(rows[24], tmp_path)
        (tmp_path / "config.json").write_text('{"steps": 40}')
        (tmp_path / "metrics.jsonl").write_text('cut}\n{"step": 10, "split": "train"}\n{"st')
        clock[0] = 30.0
        seen = terminal.tell()
        screen.tick()
        frame = terminal.getvalue()[seen:]
        rows[24].update(status="failed", reason="fast_forms=[]", seconds=31.0)
        screen.end()
    # 90 s of this run, and 5 runs as long as the one that is completed.
    assert "24 of 29: run 25, step 10 of 40, ETA of the sweep 9:50" in frame
    assert "running" in frame
    assert len(frame.splitlines()) <= 12
    out = terminal.getvalue()
    assert out.endswith("\nRun 25 failed: fast_forms=[]\n")
    assert "[red]" not in out  # all runs share it


def test_a_table_of_a_sweep_fits_80_columns():
    shared = {"model.dropout": 0.5, "optimizer.stages": "[red]", "seed": 4}
    more = {"optimizer.stages": "(0.5, 0.75) " * 9, "seed": 5, "a.seed": 6}
    rows = invented_rows(shared, shared | more)
    names = sweep_screen.differing(rows)
    assert names == {"optimizer.stages": "stages", "seed": "seed", "a.seed": "a.seed"}
    figures = sweep_screen.figure_columns(rows)
    assert "ring MB" not in figures  # a single one, with which nothing can be compared
    for width, shown in (
        (80, "accuracy images/s top5"),
        (120, "accuracy images/s seconds step ms top5"),
    ):
        table = [*sweep_screen.table_of(rows, names, "title", figures, width)]
        assert max(map(len, table)) <= width
        assert " ".join(table[1].split()) == f"run stages seed a.seed status {shown}"
        assert "[red]" in table[2]
        assert " ".join(table).count("0.75)") == 9  # nothing is cut


def test_an_older_sweep_is_found_by_its_settings(fake, tmp_path):
    """Its folders have other names, and its rows no number."""
    fake(0, 1)
    path = tmp_path / "s/sweep.json"
    old = json.loads(path.read_text())
    for row in old["runs"]:
        name = f"seed={row['settings']['seed']}"
        (tmp_path / f"s/{row['name']}.log").rename(tmp_path / f"s/{name}.log")
        if row["status"] == "completed":
            (tmp_path / "s" / row["name"]).rename(tmp_path / "s" / name)
        row["name"] = name
        del row["number"]
    path.write_text(json.dumps(old))
    (tmp_path / "s/repaired").touch()
    result = fake(3, 1, 0)
    assert [(run["number"], run["name"]) for run in result["runs"]] == [
        (1, "seed=0"),
        (2, "seed=1"),
        (3, "03-seed=3"),
    ]
    assert (tmp_path / "s/started").read_text().split() == ["0", "1", "3", "1"]


def test_a_sweep_says_every_commit_that_it_ran_at(fake, tmp_path):
    fake(0)
    (tmp_path / "fake.py").write_text(
        FAKE.replace('commit="c"', 'commit="d"').replace("versions={}", "versions=dict(jax='2')")
    )
    (tmp_path / "s/repaired").touch()
    hardware = fake(0, 1)["hardware"]
    assert hardware == dict(device_kind="card", host_cores=2, versions=dict(jax="2"), commit="c, d")
    assert fake(0, 1, 2)["hardware"] == hardware


def test_a_sweep_names_the_runs_of_other_code(fake, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(sweep_run.logging, "warning", lambda text, *rest: said.append(text % rest))
    fake(0)
    (tmp_path / "s/repaired").touch()
    for run in fake(0, 1)["runs"]:
        (tmp_path / "s" / run["name"] / "summary.json").write_text(
            json.dumps(dict(experiment_files={"own.py": "a"}))
        )
    said.clear()
    for digest in ("a", "b"):
        monkeypatch.setitem(provenance.experiment_files, "own.py", digest)
        fake(0, 1)
    assert said == ["Other code made the runs 1, 2: own.py was edited."]


def test_a_run_whose_files_are_damaged_does_not_stop_the_sweep(fake, tmp_path, monkeypatch):
    figures_of = runfiles.figures_of

    def damaged(folder):
        if folder.name.startswith("01"):
            raise UserError("program.json: damaged JSON")
        return figures_of(folder)

    monkeypatch.setattr(runfiles, "figures_of", damaged)
    first, *_ = fake(0, 2)["runs"]
    assert first["status"] == "failed"
    folder = tmp_path / "s" / first["name"]
    assert first["reason"] == f"program.json: damaged JSON: delete {folder} to train it again"
    assert [run["status"] for run in fake(0, 2)["runs"]] == ["failed", "failed"]


def test_what_was_refused_is_forgotten_by_another_list(fake, monkeypatch):
    def refused(*arguments, planned=sweep.plan):
        return [
            row | (dict(status="refused") if row["settings"]["seed"] == 9 else {})
            for row in planned(*arguments)
        ]

    monkeypatch.setattr(sweep, "plan", refused)
    assert [run["status"] for run in fake(0, 9)["runs"]] == ["completed", "refused"]
    assert [run["status"] for run in fake(0)["runs"]] == ["completed"]


def test_a_sweep_may_follow_a_dry_run(fake, tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s/program.json").write_text("{}")
    assert fake(0)["runs"][0]["status"] == "completed"


def test_a_run_that_still_lives_is_waited_for(fake, tmp_path):
    """As one of a sweep that was killed."""
    fake(1)
    with (
        workdirs.locked(tmp_path / "s/01-seed=1"),
        pytest.raises(UserError, match=r"seed=1: another run is using it"),
    ):
        fake(0, 1)
    assert (tmp_path / "s/started").read_text().split() == ["1"]


def test_a_run_that_had_no_step_left_has_no_speed(fake, monkeypatch):
    monkeypatch.setattr(
        runfiles,
        "figures_of",
        lambda folder: dict(
            images_per_second=None,
            step_milliseconds=None,
            ring_bytes=0,
            accuracy=0.5,
            profile=None,
        ),
    )
    assert fake(0)["runs"][0]["status"] == "completed"


def test_ctrl_c_lets_the_run_save_and_the_sweep_goes_on_later(fake, tmp_path):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # pytest-xdist's workers ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            fake(0, 4, 1)
    finally:
        signal.signal(signal.SIGINT, before)
    statuses = {
        run["name"]: run["status"]
        for run in json.loads((tmp_path / "s/sweep.json").read_text())["runs"]
    }
    assert statuses == {
        "01-seed=0": "completed",
        "02-seed=4": "interrupted",
        "03-seed=1": "pending",
    }
    (tmp_path / "s/repaired").touch()
    assert {run["status"] for run in fake(0, 4, 1)["runs"]} == {"completed"}


def test_a_signal_as_a_run_starts_leaves_no_process_behind(fake, monkeypatch):
    begun, popen = [], subprocess.Popen

    def interrupted(*arguments, **settings):
        begun.append(popen(*arguments, **settings))
        signal.raise_signal(signal.SIGINT)
        return begun[0]

    monkeypatch.setattr(worker.subprocess, "Popen", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fake(4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert begun[0].poll() is not None


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "other").mkdir(parents=True), "is not empty and holds no sweep"),
        (
            lambda folder: folder.mkdir() or (folder / "sweep.json").write_text('{"runs": ['),
            "no whole sweep.json",
        ),
        (lambda folder: folder.write_text("a file"), "cannot be written"),
        (
            lambda folder: (
                folder.mkdir()
                or (folder / "sweep.json").write_text(
                    json.dumps(
                        dict(
                            arguments=[*SHARED, "--config.seed=3"],
                            devices=8,
                            cpu_devices=None,
                            runs=[],
                        )
                    )
                )
            ),
            r"a sweep with other arguments \(\['--config.seed=3'\], now \[\]\)",
        ),
        (
            lambda folder: (
                folder.mkdir()
                or (folder / "sweep.json").write_text(
                    json.dumps(
                        dict(
                            arguments=SHARED,
                            devices=8,
                            cpu_devices=None,
                            runs=[],
                            config=configs.flat(
                                configs.as_json(experiment.parse_arguments(SHARED)[0])
                            )
                            | {"optimizer.momentum": 0.5},
                        )
                    )
                )
            ),  # the experiment's file was another
            r"other config \(\{'optimizer.momentum': 0.5\}, now \{'optimizer.momentum': 0.9\}\)",
        ),
    ],
)
def test_folders_that_are_refused(fake, tmp_path, prepare, message):
    prepare(tmp_path / "s")
    with pytest.raises(UserError, match=message):
        fake(0)
    assert not (tmp_path / "s/started").exists()


def test_a_real_sweep_from_the_command_line(start, tmp_path):  # noqa: F811
    arguments = [
        *SMALL,
        "--cpu_devices",
        "2",
        "--mesh",
        "1x1,2x1,3x1",
        "--workdir",
        "s",
        "--profile",
        "2",
        "--noise_scale",
        "3",
    ]
    out, _ = finished(start(*arguments), code=1)  # not every combination worked
    assert "2 of 3 runs are completed" in out
    assert "; the speed of simulated devices is not that of real ones" in out
    # Before the first run, and after the table.
    refused = "Run 3 refused: mesh.data=3, mesh.model=1: needs 3 devices, but there are 2: "
    assert out.count(refused) == 2
    assert out.index(refused) < out.index("1 of 2: run 1")
    runs = json.loads((tmp_path / "s/sweep.json").read_text())["runs"]
    page = (tmp_path / "s/report.html").read_text()
    for run in runs[:2]:
        assert run["status"] == "completed"
        assert f"{run['figures']['images_per_second']:,.0f}" in page
        assert (run["figures"]["profile"]["communication_milliseconds"] > 0) == (
            run["mesh"] == "2x1"
        )
        (noise,) = lines(tmp_path / "s" / run["name"], "noise")
        assert noise["batches"] == 3
    assert {"report.md", "report.csv", "01-1x1", "01-1x1.log"} <= {
        path.name for path in (tmp_path / "s").iterdir()
    }
    out, _ = finished(
        start(*SMALL, "--cpu_devices", "2", "--mesh", "3x1,5x1", "--workdir", "t"), code=2
    )  # none can
    assert not (tmp_path / "t").exists()


def test_runs_in_one_process_are_those_of_processes_of_their_own(start, tmp_path):  # noqa: F811
    """From a file of flags, among programs that print as they start, with a bad variable."""
    (tmp_path / "flags.txt").write_text("\n".join(["--sweep=seed=0,1", "--workdir=s"]))
    (tmp_path / "sitecustomize.py").write_text("print('7 of us')")
    cache = dict(
        JAX_COMPILATION_CACHE_DIR=str(tmp_path / "programs"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_TRACEBACK_IN_LOCATIONS_LIMIT="100",  # jax's default
    )
    surroundings = dict(PYTHONPATH=str(tmp_path), JAX_ENABLE_X64="1")
    out, _ = finished(start(*SMALL, "--flagfile", "flags.txt", **surroundings, **cache))
    assert "2 of 2 runs are completed" in out
    assert out.count("7 of us") == 2  # that of the sweep and one for both runs
    summaries = [
        runfiles.read_json(tmp_path / f"s/{seed + 1:02d}-seed={seed}/summary.json")
        for seed in range(2)
    ]
    for seed, summary in enumerate(summaries):
        said = (tmp_path / f"s/{seed + 1:02d}-seed={seed}.log").read_text()
        assert said.count("JAX_ENABLE_X64=1 has no effect") == 1
        assert said.count("Done: synthetic") == 1
        assert summary["config"]["seed"] == seed
    assert summaries[1]["startup_seconds"] < sum(
        row["seconds"] for row in runfiles.read_json(tmp_path / "s/sweep.json")["runs"][1:]
    )

    arguments = ["--config.seed=1", "--config.data.fallback=", "--workdir=alone"]
    finished(start(*SMALL, *arguments, **cache))
    worked, alone = tmp_path / "s/02-seed=1", tmp_path / "alone"
    programs = runfiles.read_json(alone / "summary.json")["programs_from_cache"]
    assert programs >= summaries[1]["programs_from_cache"] > 0  # the process still has one or two
    for split in ("train", "final"):
        assert rows(worked, split) == rows(alone, split)
    saved, again = (saved_state(folder, summaries[1]["steps"]) for folder in (worked, alone))
    assert saved.keys() == again.keys()
    assert all((saved[name] == again[name]).all() for name in saved)


def test_a_dry_run_of_a_sweep_is_one_table(monkeypatch, capsys):
    """Two seeds share a compiled program; a run that cannot work has its reason below."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "80")
    combos = sweep.combinations("4x2,2x1,3x1", None, ["seed=0,1"], 8)
    fields = ["--config.parallelism=data"]
    rows = sweep.dry_run(combos, [*SMALL, *fields], jax.devices(), lambda c: registry.find(c.data))
    found = sweep_screen.show_dry_run(rows, 6)
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out[:9])) <= 80
    header = "run mesh seed status state MB held MB sent MB theory MB collectives"
    assert " ".join(out[2].split()) == header
    state, held, sent, theory, collectives = out[3].split()[4:]
    assert out[4].split()[:4] == ["2", "4x2", "1", "compiled"]
    assert out[4].split()[4:] == [state, held, sent, theory, collectives]
    assert float(held) > float(state) > 0
    assert float(sent) == float(theory) > 0
    assert found[0]["report"] is found[1]["report"]
    assert out[10].startswith("Runs 5, 6 refused: batch_size")
    by_theory = "theory MB: sent per step by the closed form."
    assert out[9] == by_theory
    assert len(out) == 11
    scattered = found[0]["report"] | dict(closed_form=[dict(operation="reduce-scatter")])
    predicted = dict(predicted_milliseconds=1.5)
    for prediction, more in ((None, []), (predicted, ["ms: the step as predicted."])):
        explained = [by_theory, *more]
        report = scattered | dict(prediction=prediction)
        sweep_screen.show_dry_run([found[0] | dict(report=report)], 1)
        title, *lines = capsys.readouterr().out.splitlines()
        assert title.startswith("A dry run of 1 run. MB per device")
        notes = lines[3:]
        assert notes[: len(explained)] == explained
        assert notes[len(explained)].startswith("XLA for CPUs has no reduce-scatter.")


@pytest.mark.parametrize(
    "content", ['{"runs": null}', '{"runs": [null]}', '{"runs": [{"name": "a"}]}', "[1]"]
)
def test_a_sweep_json_of_another_form_is_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(UserError, match=r"holds no sweep \(no whole sweep\.json\)"):
        sweep_run.run("x", SHARED, [], [], worker.Worker(None), tmp_path)


def test_equal_values_are_swept_once():
    values = "optimizer.learning_rate=0.001,1e-3,0.01"
    assert [
        combo["optimizer.learning_rate"] for combo in sweep.combinations(None, None, [values], 1)
    ] == ["0.001", "0.01"]
