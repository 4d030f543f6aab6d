"""The command line as a user types it, in processes of its own."""

import errno
import fcntl
import importlib
import json
import os
import pathlib
import pwd
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
from conftest import ROOT
from jax._src import lib
from PIL import Image

import launch
from cnn_spmd import config as configs
from cnn_spmd import experiment, plan, sweep_run, sweep_screen
from cnn_spmd.analysis import program
from cnn_spmd.analysis import target as targets
from cnn_spmd.data import folder, prepared
from cnn_spmd.errors import UserError
from cnn_spmd.training import build, interrupt, loop
from cnn_spmd.training import workdir as workdirs

SMALL = [
    "--config",
    "experiments/alexnet_cifar.py",
    "--config.model.name=simple_cnn",
    "--config.model.fast=False",  # otherwise JAX traces kernels for GPUs in each process
    "--config.data.name=synthetic",
    "--config.data.synthetic.train_examples=64",
    "--config.data.synthetic.test_examples=40",
    "--config.batch_size=16",
    "--config.optimizer.learning_rate=0.001",
    "--config.epochs=1",
]
# The same without what only random images use, for another data set.
OTHER_DATA = [argument for argument in SMALL if "synthetic" not in argument]


@pytest.fixture
def start(tmp_path):
    """Starts launch.py in a copy of the repository's layout; kills what is left over."""
    for name in ("launch.py", "experiments"):
        (tmp_path / name).symlink_to(ROOT / name)
    started = []

    def start(*arguments, terminal=None, **environment):
        environment = os.environ | dict(JAX_PLATFORMS="cpu", PYTHONUNBUFFERED="1") | environment
        command, out = (
            [sys.executable, "launch.py", *map(str, arguments)],
            terminal or subprocess.PIPE,
        )
        started.append(
            subprocess.Popen(
                ["setsid", "--ctty", *command] if terminal else command,
                cwd=tmp_path,
                env=environment,
                text=True,
                stdin=terminal,
                stdout=out,
                stderr=out,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def finished(process, code=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    return out, err


def losses(workdir):
    """Return the loss of each line of a run's metrics.jsonl."""
    return [
        json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--config", "experiments/nope.py"],
            "--config=experiments/nope.py: no such experiment, expected one of "
            "experiments/alexnet_2012_imagenet.py, experiments/alexnet_cifar.py",
        ),
        (
            ["--config", "experiments/alexnet_cifar.py:slow"],
            "experiments/alexnet_cifar.py:slow: unknown variant",
        ),
        (
            [*SMALL, "--config.optimiser.learning_rate=1"],
            'expected one of docs/config.md; did you mean "optimizer.learning_rate"?',
        ),
        (
            [*SMALL, "--config.foo=1"],
            "--config.foo=1: no such field, expected one of docs/config.md",
        ),
        ([*SMALL, "--config.optimizer.foo=1"], "--config.optimizer.foo=1: no such field"),
        ([*SMALL, "--epochs=4"], "line flag 'epochs'; did you mean --config.epochs?"),
        ([*SMALL, "--config.model.name=simple_cn"], 'did you mean "simple_cnn"?'),
        (
            [*SMALL, "--config.model.name=simple_cn", "--sweep", "seed=0,1", "--dry_run"],
            'did you mean "simple_cnn"?',
        ),
        ([*SMALL, "--workdir="], "--workdir=: is empty"),
        ([*SMALL, "--workdir=gs://bucket/a"], "--workdir=gs://bucket/a: is not on this machine"),
        ([*SMALL, "--mesh="], "--mesh=: expected DATAxMODEL"),
        (
            [*SMALL, "--target", "h100:1x8"],
            "--target=h100:1x8: those GPUs are not here, expected --dry_run",
        ),
        ([*SMALL, "--plan_rows", "--target", "h100:1x8"], "--plan_rows: expected --plan with it"),
        (
            [*SMALL, "--dry_run", "--target", "b300:8"],
            "--target=b300:8: expected CARD:HOSTSxGPUS with a card of h100",
        ),
        (
            [*SMALL, "--dry_run", "--target", "h100:9999999x8"],
            "such as h100:64x8, and at most 65536 GPUs",
        ),
        (
            [*SMALL, "--config.model.dropout=0.9"],
            "model.dropout=0.9: model.name=simple_cnn does not use it; those that do: alexnet, ",
        ),
        ([*SMALL, "--config.batch_size=many"], "--config.batch_size=many: expected an integer"),
        (
            [*SMALL, "--flagfile=nope"],
            "--flagfile=nope: No such file or directory, expected a file of flags",
        ),
        (
            [*SMALL, "--workdir=~nosuchuser/x"],
            "--workdir=~nosuchuser/x: has no such home folder, expected the path of a folder",
        ),
        (
            [*SMALL, "--cpu_devices=100000"],
            "--cpu_devices=100000: 100000 is not an integer in the range [1, 2048]",
        ),
        ([*SMALL, "--frobnicate"], "Unknown command line flag 'frobnicate'"),
        ([*SMALL, "stray"], "unexpected argument 'stray'"),
        ([*SMALL, "--mesh", "4by2"], "--mesh=4by2: expected DATAxMODEL"),
        (
            [*SMALL, "--mesh", "1x1", "--config.mesh.data=4"],
            "--mesh=1x1: config.mesh is given too, expected one of them",
        ),
        (
            [*SMALL, "--mesh", "1x1,2x1", "--dry_run", "--workdir", "s"],
            "--workdir=s: a dry run of a sweep writes no file",
        ),
        (
            [*SMALL, "--mesh", "1x1,2x1", "--sweep", "model.dropout=0.0,0.5", "--dry_run"],
            "--sweep=model.dropout: model.name=simple_cnn",
        ),
        (["--evaluate", "--workdir=~no-user/a"], "--workdir=~no-user/a: has no such home folder"),
        (["--evaluate"], "experiments/alexnet_cifar.py; or test what was trained: --workdir RUN"),
        (["--workdir=DIR"], ", or that of the run: --config DIR/config.json; --evaluate would"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys, tmp_path):
    """What a process does, without its surroundings: the next test has these. DIR is a run."""
    (tmp_path / "config.json").touch()
    arguments = [argument.replace("DIR", str(tmp_path)) for argument in arguments]
    message = message.replace("DIR", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["launch.py", *arguments])
    monkeypatch.setattr(launch, "set_up_jax", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.chdir(ROOT)
    experiment.forget_flags(launch.flags.FLAGS)
    try:
        code = launch.main(launch.parse(sys.argv))
    except SystemExit as end:
        code = end.code
    finally:
        experiment.forget_flags(launch.flags.FLAGS)
    assert code == 2
    refused_in_one_line(*capsys.readouterr(), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--config is missing"),
        (
            [*SMALL, "--cpu_devices", "2", "--mesh", "4x2"],
            "mesh.data=4, mesh.model=2: needs 8 devices, but there are 2",
        ),
    ],
)
def test_a_process_with_bad_input_ends_with_one_line_and_exit_code_2(start, arguments, message):
    """As its flags are parsed, and when it has taken the devices."""
    refused_in_one_line(*finished(start(*arguments), code=2), message)


def refused_in_one_line(out, err, message):
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "def get_config():\n    return open('nope.csv')",
            "OWN:2: FileNotFoundError: [Errno 2] No such file or directory: 'nope.csv'",
        ),
        (
            "rows = open('nope.csv')",
            "OWN:1: FileNotFoundError: [Errno 2] No such file or directory: 'nope.csv'",
        ),
        ("def get_config():\n    return {}['a']", "OWN:2: KeyError: 'a'"),
        (
            "def get_config():\n    return int('a\\nb')",
            r"OWN:2: ValueError: invalid literal for int() with base 10: 'a\nb'",
        ),
        ("\nassert not 'one\\n   two'", "OWN:2: AssertionError"),
        ("raise RuntimeError('one\\n   two')", "OWN:1: RuntimeError: one two"),
        (
            "import json\nimport nosuchmodule",
            "OWN:2: ModuleNotFoundError: No module named 'nosuchmodule'",
        ),
        ("def get_config()\n    pass", "OWN:1: SyntaxError: expected ':'"),
        ("import sys\nsys.exit('no')", "OWN:2: SystemExit: no"),
        (
            "def get_config(one, two):\n    pass",
            "OWN: TypeError: get_config() missing 2 required positional arguments: 'one' and 'two'",
        ),
        (
            "def get_config():\n    pass",
            "--config=OWN: get_config() returns NoneType, expected it to return a ConfigDict",
        ),
        (
            "def get_config():\n    return dict(seed=0)",
            "--config=OWN: get_config() returns dict, expected",
        ),
        ("", "--config=OWN: get_config() is missing, expected"),
    ],
)
def test_an_experiment_that_fails_says_where(tmp_path, content, message):
    path = tmp_path / "own.py"
    path.write_text(content)
    with pytest.raises(
        UserError, match=f"^{re.escape(message.replace('OWN', str(path)))}"
    ) as error:
        experiment.parse_arguments(["--config", str(path)])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("config.batch_size = 512.5", "OWN:4: TypeError: Could not override field 'batch_size'"),
        ("config.data.flip = 'no'", "OWN:4: TypeError: Could not override field 'flip'"),
        (
            "config.data.update(dict(flip='no'))",
            "OWN:4: TypeError: Could not override field 'flip'",
        ),
        ("config.optimizer.stages = 3", "OWN:4: TypeError: Could not override field 'stages'"),
        ("config.steps = True", "steps=True: expected an integer"),
        ("config.seed = None", "seed=None: expected an integer"),
        (
            "config = ConfigDict(config.to_dict() | dict(steps=2.5))",
            "steps=2.5: expected an integer",
        ),
        (
            "config = ConfigDict(config.to_dict() | dict(batch_size='512'))",
            "batch_size='512': expected an integer",
        ),
        (
            "config = ConfigDict(config.to_dict() | dict(label_smoothing='.1'))",
            "label_smoothing='.1': expected a number",
        ),
        ("config = ConfigDict(config.to_dict() | dict(mesh=3))", "mesh=3: expected a dict"),
        ("config.optimizer.stages = None", "optimizer.stages=None: expected a tuple"),
        ("config.optimizer.stages = (0.5, 'x')", "optimizer.stages[1]='x': expected a number"),
        (
            "config.model.levers = ('pool_first',)",
            "model.levers=('pool_first',): no such field, set model.fast to True",
        ),
        ("config.data.dir = None", "data.dir=None: expected a string"),
        (
            "config.optimizer.layer_rates = {1: 2.0}",
            "optimizer.layer_rates: has the name 1, expected a string",
        ),
        (
            "config.optimizer.layer_rates.fc3 = True",
            "optimizer.layer_rates.fc3=True: expected a number",
        ),
        (
            "config.placement = dict(mine={1: 'data'})",
            "placement.mine: has the name 1, expected a string",
        ),
        ("config.placement = dict(mine=3)", "placement.mine=3: expected a dict"),
        (
            "config.optimiser = dict(rate=1.0)",
            'optimiser: no such field, expected one of docs/config.md; did you mean "optimizer"?',
        ),
    ],
)
def test_types_in_an_experiment_are_those_of_the_shipped_one(tmp_path, change, message):
    path = tmp_path / "own.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom experiments import alexnet_cifar\n"
        f"def get_config(config=alexnet_cifar.get_config()):\n    {change}\n    return config"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message.replace('OWN', str(path)))}"):
        experiment.parse_arguments(["--config", str(path)])


def test_an_integer_may_stand_for_a_float_and_a_list_for_a_tuple(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom experiments import alexnet_cifar\n"
        "def get_config():\n"
        "    config = alexnet_cifar.get_config().to_dict()\n    config['optimizer']['warmup'] = 0\n"
        "    config['optimizer']['stages'] = [0.5]\n    return ConfigDict(config)"
    )
    configs.validate(experiment.parse_arguments(["--config", str(path)])[0])


def test_a_field_before_the_experiment_is_refused():
    message = "^--config.seed=1: stands before --config, expected it after --config$"
    with pytest.raises(UserError, match=message):
        experiment.parse_arguments(["--config.seed=1", "--config", str(ROOT / SMALL[1])])


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.batch_size=512.5", "--config.batch_size=512.5: expected an integer"),
        ("--config.steps=True", "--config.steps=True: expected an integer"),
        ("--config.data.flip=no", "--config.data.flip=no: expected True or False"),
        ("--config.model.dropout=a: b", "--config.model.dropout=a: b: expected a number"),
        (
            "--config.batch_size=8,16",
            "--config.batch_size=8,16: expected an integer; --sweep batch_size=8,16 runs one",
        ),
        ("--config.optimizer.stages=x", "optimizer.stages[0]='x': expected a number"),
        (
            '--config.model.levers="()"',
            '--config.model.levers="()": no such field, set model.fast to',
        ),
        (
            "--config.optimizer.layer_rates={1:2}",
            "optimizer.layer_rates: has the name 1, expected a string",
        ),
        (
            "--config.placement={'mine': {'at_rest': {}, 'gather_again': true}}",
            "--config.placement={'mine': {'at_rest': {}, 'gather_again': true}}: expected a dict "
            "as Python writes it, with True, False or None",
        ),
        ("--config.mesh={'data':1}", "mesh.model: missing"),
        ("--flagfile=", "--flagfile=: is empty, expected a file of flags"),
        ("--flagfile=/nope/flags", "--flagfile=/nope/flags: No such file or directory"),
    ],
)
def test_types_on_the_command_line(argument, message):
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        experiment.parse_arguments(["--config", str(ROOT / SMALL[1]), argument])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s3://bucket/a", "s3://bucket/a: is not on this machine: give a local folder"),
        ("file:///a/b", "file:///a/b: is not on this machine"),
        ("a/b\udcff", "a/b\udcff is not UTF-8"),
        ("~/a", "~/a: has no such home folder"),
    ],
)
def test_a_workdir_that_cannot_be_one_is_refused(text, message, monkeypatch):
    def unknown(_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(UserError, match=re.escape(message)):
        workdirs.parse(text)
    assert workdirs.parse("a:/b") == pathlib.Path("a:/b")


def test_a_workdir_below_a_folder_that_is_not_utf8_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "a\udcff")
    with pytest.raises(UserError, match="is not UTF-8"):
        workdirs.parse("b")


def test_hostile_surroundings_change_no_number(start, tmp_path):
    """No reader, no stderr, no home, a path beyond ASCII, jax's own settings.

    Without them, a run has a default workdir, named after experiment and time.
    """
    hostile = dict(
        JAX_ENABLE_X64="1",
        JAX_DEFAULT_PRNG_IMPL="rbg",
        JAX_THREEFRY_PARTITIONABLE="0",
        JAX_RANDOM_SEED_OFFSET="3",
        JAX_DEFAULT_MATMUL_PRECISION="bfloat16",
        JAX_NUMPY_DTYPE_PROMOTION="strict",
        JAX_NUMPY_RANK_PROMOTION="raise",
        PYTHONIOENCODING="ascii",
        HOME="/nowhere/at/all",
    )
    plain, odd = start(*SMALL), start(*SMALL, "--workdir", "s3:\xe4", **hostile)
    odd.stdout.close()
    odd.stderr.close()
    assert odd.wait(120) == 0
    out, _ = finished(plain)
    (workdir,) = (tmp_path / "runs").iterdir()
    assert losses(workdir) == losses(tmp_path / "s3:\xe4")
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["environment"] == dict(XLA_FLAGS=os.environ["XLA_FLAGS"])
    assert summary["status"] == "completed"
    assert re.fullmatch(r"alexnet_cifar-\d{8}-\d{6}-\d{6}", workdir.name)
    assert f"Files: runs/{workdir.name}" in out
    assert "memory per device: " in out
    assert "Where each parameter lives" not in out  # the tables are for --dry_run


def test_a_platform_that_is_not_here_is_one_line(start):
    for process in [
        start(*SMALL, *swept, JAX_PLATFORMS="nope") for swept in ([], ["--sweep", "seed=0,1"])
    ]:
        out, err = finished(process, code=2)
        assert err.startswith("error: JAX_PLATFORMS=nope: Unable to initialize backend 'nope'")
        assert (err.count("\n"), out) == (1, "")


def test_help_shows_every_flag(start):
    out, _ = finished(start("--help"), code=1)  # absl's code for --help
    for flag in (
        "--config: ",
        "--mesh",
        "--sweep",
        "--batch_per_device",
        "--profile",
        "--noise_scale",
        "--cpu_devices",
        "--workdir",
        "--[no]dry_run",
        "Exit codes",
    ):
        assert flag in out


def give_flags(monkeypatch, **given):
    """Give launch.py these flags, and the defaults of all others."""
    for name, holder in [*vars(launch).items()]:
        if isinstance(holder, launch.flags.FlagHolder):
            value = given.get(name, holder.default)
            monkeypatch.setattr(launch, name, types.SimpleNamespace(value=value))


def test_a_plan_with_a_card_takes_any_name_as_target(config, monkeypatch):
    """Without the card, and in a dry run, the error says which names are known."""
    for given, message in (
        (dict(PLAN=True, CARD="h200"), None),
        (dict(PLAN=True), "a card of a100, .*calibrate writes on a machine with such GPUs$"),
        (dict(DRY_RUN=True, CARD="h200"), "a card of h100, such as h100:64x8, .* GPUs$"),
    ):
        with monkeypatch.context() as patch:
            give_flags(patch, CONFIG=config, TARGET="rtx4090:1x4", **given)
            if not message:
                assert launch.planned_gpus() == ("rtx4090", 1, 4)
                continue
            with pytest.raises(UserError, match=message):
                launch.planned_gpus()


def test_a_plan_shows_the_meshes_that_are_asked_for(config, monkeypatch):
    shown = []
    monkeypatch.setattr(launch.environment, "simulate", lambda _: None)
    monkeypatch.setattr(jax, "devices", lambda: [None] * 8)
    monkeypatch.setattr(launch, "planned", lambda _, data, meshes: shown.append(meshes))
    monkeypatch.setattr(plan, "as_text", lambda _: [])
    for given, meshes in (
        (None, "auto"),
        ("all", "auto"),
        ("4x2", "4x2"),
        ("4X2,8x1,4x2", "4x2,8x1"),
        ("4x2,2x2", "--mesh=4x2,2x2: 2x2 does not take all 8 devices, expected shapes of 8x1, 4x2"),
        ("4x2,", "--mesh=: expected DATAxMODEL"),
    ):
        with monkeypatch.context() as patch:
            give_flags(patch, CONFIG=config, TARGET="h100:1x8", PLAN=True, MESH=given)
            if meshes.startswith("--"):
                with pytest.raises(UserError, match=f"^{meshes}"):
                    launch.launch(["launch.py"])
            else:
                assert launch.launch(["launch.py"]) == 0
                assert shown.pop() == meshes


def test_what_is_for_other_machines_looks_for_no_data(config, monkeypatch, capsys):
    """Where the sizes are known. Otherwise the error says how to give them."""
    found = []
    monkeypatch.setattr(launch.environment, "simulate", lambda _: None)
    for name in ("print_plan", "report_program"):
        monkeypatch.setattr(launch, name, lambda _, data: found.append(data) or 0)
    config.data.update(dict(name="cifar10", dir="nowhere"))
    for command in ("DRY_RUN", "PLAN"):
        with monkeypatch.context() as patch:
            give_flags(patch, CONFIG=config, TARGET="h100:8x8", **{command: True})
            assert launch.launch(["launch.py"]) == 0
        assert len(found.pop().train_images) == 50_000
    assert capsys.readouterr().out.startswith(f"Planning {config.experiment} on h100:8x8: ")
    with monkeypatch.context() as patch:
        setup = types.SimpleNamespace(report=lambda: dict(memory={}, bytes_per_device={}))
        patch.setattr(targets, "devices", lambda _: jax.devices())
        patch.setattr(build, "prepare", lambda *given: found.append(given[-1]) or setup)
        patch.setattr(sweep_screen, "show_dry_run", lambda rows, _: [*rows])
        patch.setattr(sys, "argv", ["launch.py", *SMALL[:2], "--config.data.dir=nowhere"])
        give_flags(patch, CONFIG=config, TARGET="h100:1x8", DRY_RUN=True, MESH="2x1,1x1")
        assert launch.launch(["launch.py"]) == 0
    assert {len(data.train_images) for data in found} == {50_000}
    config.data.name = "folder"
    give_flags(monkeypatch, CONFIG=config, TARGET="h100:8x8", PLAN=True)
    with pytest.raises(UserError, match=r"^data.dir=nowhere: .*; or take its sizes: --config.d"):
        launch.launch(["launch.py"])


@pytest.mark.parametrize("swept", ["model.name=simple_cnn,vgg_8", "seed=0,1"])
def test_a_sweep_of_networks_says_that_they_share_a_recipe(config, monkeypatch, capsys, swept):
    monkeypatch.setattr(launch.environment, "simulate", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["launch.py", *SMALL])
    monkeypatch.setattr(sweep_run, "run", lambda name, shared, combos, *_: combos)
    give_flags(monkeypatch, CONFIG=config, SWEEP=[swept])
    assert len(launch.sweep_in(None, types.SimpleNamespace(cpu_devices=1))) == 2
    said = f"warning: all networks are trained by one recipe, that of {config.experiment}; for "
    assert capsys.readouterr().out.startswith(said) == ("model.name" in swept)


def test_a_dry_run_without_a_whole_report_fails(config, monkeypatch, capsys):
    give_flags(monkeypatch, CONFIG=config, DRY_RUN=True)
    assert launch.launch(["launch.py"]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(
        program.hlo, "Module", lambda *_: (_ for _ in ()).throw(ValueError("not known"))
    )
    assert launch.launch(["launch.py"]) == 1
    assert capsys.readouterr().err == "error: there is no whole report: ValueError: not known\n"


def test_dry_run_reports_and_writes_nothing(start, tmp_path):
    out, _ = finished(start(*SMALL, "--dry_run", "--cpu_devices", 8, "--mesh", "4x2"))
    for text in (
        "mesh data=4 x model=2",
        "fc3.kernel",
        "conv1 output",
        "optimizer state",
        "all-reduce",
        "in theory",
        "compiled for cpu",
    ):
        assert text in out
    assert {path.name for path in tmp_path.iterdir()} == {"launch.py", "experiments"}


def test_a_signal_saves_and_the_printed_command_resumes(start):
    """SIGTERM ends the first run, SIGINT the one that its command starts."""
    arguments = [
        *SMALL,
        "--config.steps=1000000",
        "--config.optimizer.decay=constant",
        "--config.optimizer.warmup=0.0",
    ]
    resumed = ""
    for number in (signal.SIGTERM, signal.SIGINT):
        process, said = start(*arguments), ""
        while not (line := process.stdout.readline()).startswith("step "):
            assert process.poll() is None, process.communicate()
            said += line
        assert resumed in said
        process.send_signal(number)
        out, err = finished(process, code=75)
        assert f"{number.name}: saving what there is" in err
        step, command = re.search(
            r"saved at step (\d+)\. To resume: python launch\.py (.*)", out
        ).groups()
        arguments, resumed = shlex.split(command), f"at step {step} on mesh"
    command = command.replace("steps=1000000", f"steps={int(step) + 2}")
    out, _ = finished(start(*shlex.split(command)))
    assert resumed in out
    assert f"after {int(step) + 2} steps" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_that_waits_for_anothers_photographs(start, tmp_path, number):
    for place in ("train/a/1.png", "train/b/1.png", "val/a/1.png", "val/b/1.png"):
        (tmp_path / "pets" / place).parent.mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "pets" / place)
    root = tmp_path / "tfds/cnn_spmd_photographs"
    root.mkdir(parents=True)
    place = prepared.workspace_of(folder.find_source(tmp_path / "pets"), 32, root)
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        process = start(
            *OTHER_DATA,
            "--config.data.name=folder",
            "--config.data.dir=pets",
            "--config.data.image_size=32",
            "--config.batch_size=1",
            "--workdir",
            "r",
            TFDS_DATA_DIR=str(tmp_path / "tfds"),
        )
        for line in process.stderr:
            if line.startswith("waiting for another run, which prepares pets in "):
                break
        process.send_signal(number)
        _, err = finished(process, code=75)
    assert err == "Interrupted outside of the training loop: nothing to save.\n"
    assert not (tmp_path / "r").exists()


@pytest.fixture
def no_nohup():
    """Let processes hear a closed terminal, also where the tests run under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("swept", [[], ["--sweep", "seed=0,1", "--cpu_devices", "1"]])
@pytest.mark.usefixtures("no_nohup")
def test_a_closed_terminal_saves(start, tmp_path, swept):
    terminal, of_process = os.openpty()
    process = start(
        *SMALL,
        "--config.steps=1000000",
        "--config.optimizer.decay=constant",
        "--workdir",
        "r",
        *swept,
        terminal=of_process,
    )
    os.close(of_process)
    run, seen = tmp_path / "r" / ("01-seed=0" if swept else ""), b""
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").stat().st_size:
        assert process.poll() is None and time.monotonic() < deadline, seen
        while select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(60) == 75
    assert json.loads((run / "summary.json").read_text())["status"] == "interrupted"
    assert any((run / "checkpoints").glob("[0-9]*/SHA256.json"))
    if swept:
        rows = json.loads((tmp_path / "r/sweep.json").read_text())["runs"]
        assert [row["status"] for row in rows] == ["interrupted", "pending"]


def test_a_run_that_is_deaf_to_a_closed_terminal_stays_so():
    """As nohup makes it."""
    code = """if True:
        import signal
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from cnn_spmd.training import interrupt, unused
        print(interrupt.SIGNALS)"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True
    ).stdout
    assert "SIGTERM" in out
    assert "SIGHUP" not in out


def test_non_finite_loss_has_an_exit_code_of_its_own(start):
    _, err = finished(
        start(*SMALL, "--config.optimizer.warmup=0.0", "--config.optimizer.learning_rate=1e38"),
        code=3,
    )
    assert err.startswith("error: ")


def test_sigterm_before_training_is_told(start):
    network = ["--config.model.name=alexnet", "--config.model.width=64"]
    process = start(*OTHER_DATA, "--config.data.name=digits", *network)
    assert process.stdout.readline() == "Compiling ...\n"
    process.send_signal(signal.SIGTERM)
    _, err = finished(process, code=75)
    assert "nothing to save" in err or "saving what there is" in err


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_an_early_sigterm_is_heeded_where_ctrl_c_is_ignored(start, ignored):
    """As it is in a job that a script starts with &."""
    before = signal.signal(signal.SIGINT, ignored)
    try:
        process = start(
            *SMALL, "--config.steps=100000", "--sweep", "seed=0,1", "--cpu_devices", "1"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    while "1 of 2: run 1" not in process.stdout.readline():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGTERM)
    out, _ = finished(process, code=75)
    assert "To go on: python launch.py" in out


def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def refused(_):
        raise PermissionError(errno.EPERM, "Operation not permitted", "r/metrics.jsonl")

    monkeypatch.setattr(launch, "launch", refused)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch.main([]) == 1
    line = (
        "error: r/metrics.jsonl: Operation not permitted: mend it, and give the same command again"
    )
    assert capsys.readouterr().err == f"{line}\n"


@pytest.mark.parametrize("variable", ["JAX_ENABLE_X64", "JAX_DEBUG_NANS", "JAX_NUM_CPU_DEVICES"])
def test_a_variable_that_jax_refuses_is_named(start, variable):
    _, err = finished(start(*SMALL, **{variable: "banana"}), code=2)
    assert err.startswith("error: jax cannot be imported: ")
    assert variable.lower() in err.lower()
    assert err.count("\n") == 1


def test_a_current_folder_that_is_gone_and_links_in_a_circle(tmp_path, monkeypatch):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with (
        pytest.raises(UserError, match="links that go in a circle"),
        workdirs.locked(tmp_path / "a/x"),
    ):
        pass
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="--workdir=r: the current folder is gone"):
        workdirs.parse("r")


def test_a_full_disk_is_one_line_and_exit_code_1(monkeypatch, capsys):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(launch, "launch", full)
    monkeypatch.setattr(launch, "WORKDIR", types.SimpleNamespace(value="w"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --workdir=w: No space left on device")
    assert error.count("\n") == 1


def test_full_memory_is_one_line_and_exit_code_1(monkeypatch, capsys):
    config = configs.default()
    config.batch_size = 64
    monkeypatch.setattr(launch, "launch", lambda _: jax.numpy.zeros(10**13).block_until_ready())
    monkeypatch.setattr(launch, "CONFIG", types.SimpleNamespace(value=config))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert launch.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: batch_size=64, data.resident=auto: the memory of a device or of"
    )
    assert "Out of memory allocating 40000000000000 bytes" in error
    assert error.count("\n") == 1


def test_a_signal_whose_exception_was_lost_still_stops_the_run(monkeypatch):
    monkeypatch.setattr(interrupt, "_early_signals", [])
    with interrupt.Interrupt() as run:
        run.raise_if_requested()
    with pytest.raises(KeyboardInterrupt):
        interrupt.handle_early_signal(signal.SIGTERM, None)
    with interrupt.Interrupt() as run, pytest.raises(KeyboardInterrupt):
        run.raise_if_requested()


@pytest.mark.parametrize("function", [importlib._bootstrap._get_module_lock, lib._xla_gc_callback])
def test_an_early_signal_where_an_exception_is_lost_comes_again(function):
    """After an exception in an import, the thread that finds the data set hung."""
    came = threading.Event()
    outside = types.SimpleNamespace(f_code=function.__code__, f_globals={})
    frame = types.SimpleNamespace(f_globals=vars(interrupt), f_back=outside)
    handlers = {
        number: signal.signal(number, lambda *_: came.set())
        for number in (signal.SIGTERM, signal.SIGALRM)
    }
    try:
        interrupt.handle_early_signal(signal.SIGTERM, frame)
        assert came.wait(10)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_second_signal_stops_at_once():
    code = """if True:
        import time
        from cnn_spmd.training.interrupt import Interrupt
        with Interrupt():
            print("\x1b[?25lon", flush=True)  # as a progress bar hides the cursor
            time.sleep(60)"""
    terminal, of_process = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=of_process, stderr=subprocess.PIPE
    )
    os.close(of_process)
    with open(terminal, "rb", 0, closefd=False) as lines:
        assert lines.readline() == b"\x1b[?25lon\r\n"
    process.send_signal(signal.SIGINT)
    assert "SIGINT: saving" in process.stderr.readline() + process.stderr.readline()
    assert process.poll() is None
    since = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 128 + signal.SIGINT
    assert time.monotonic() - since < 5
    assert os.read(terminal, 4096) == interrupt.SHOW_CURSOR
    os.close(terminal)
    process.communicate()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_train_one_network(start, tmp_path):
    """Two processes of four devices log what one of eight logs: sharded, and streamed."""
    arguments = ["--config.parallelism=hybrid", "--config.mesh.data=4", "--config.mesh.model=2"]

    def pair(workdir, *more):
        cluster = dict(JAX_COORDINATOR_ADDRESS=f"localhost:{free_port()}", JAX_NUM_PROCESSES="2")
        return [
            start(
                *SMALL,
                *arguments,
                *more,
                "--cpu_devices",
                4,
                "--workdir",
                workdir,
                **cluster,
                JAX_PROCESS_ID=str(i),
            )
            for i in range(2)
        ]

    sharded = pair("sharded", "--config.data.resident=sharded")
    streamed = pair("streamed", "--config.data.resident=no")
    _, experiment_file, *fields = SMALL
    config, _ = experiment.parse_arguments(
        ["--config", str(ROOT / experiment_file), *fields, *arguments]
    )
    one = loop.train(config, tmp_path / "one")
    for process in (*sharded, *streamed):
        finished(process)
    for name, on_device in (("sharded", True), ("streamed", False)):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        assert (summary["processes"], summary["data_on_device"]) == (2, on_device)
        assert summary["eval"] == pytest.approx(one["eval"], rel=1e-6)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert (one["processes"], one["data_on_device"]) == (1, True)
    config.epochs = 2  # and one process resumes, with resident data
    assert loop.train(config, tmp_path / "sharded")["steps"] == 8


def test_makefile_runs_what_the_readme_says():
    for target, command in (
        ("train", "launch.py --config experiments/alexnet_cifar.py"),
        ("test", "-m pytest"),
    ):
        out = subprocess.run(
            ["make", "--dry-run", "--always-make", target, "ARGS=--mesh 1x1"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert f".venv/bin/python {command} --mesh 1x1\n" in out
        assert re.search(
            r"pip install --quiet --no-compile --editable '\.\[dev(,cuda12)?\]'\n", out
        )


def test_makefile_refuses_an_old_python(tmp_path):
    (tmp_path / "bin").mkdir()
    for name in ("python3", "python3.11", "python3.12", "python3.13"):
        path = tmp_path / "bin" / name
        path.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.0\nexit 1\n')
        path.chmod(0o755)
    for path in [ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("requirements*.txt")]:
        (tmp_path / path.name).symlink_to(path)
    result = subprocess.run(
        ["make", "test"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        env=dict(os.environ, PATH=f"{tmp_path}/bin:/usr/bin:/bin"),
    )
    assert result.returncode != 0
    assert "error: Python 3.11 or newer is needed; python3 is Python 3.9.0" in result.stderr


def test_nothing_is_left_behind():
    assert not (ROOT / "runs" / "a").exists()
    assert pathlib.Path(ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
