"""README and guide show what the code prints, draws and does."""

import contextlib
import itertools
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
import types

import jax
import numpy as np
import photos
import pytest
from conftest import ROOT
from jax.sharding import NamedSharding, PartitionSpec
from test_launch import SMALL, finished, start  # noqa: F401  (start is a fixture)
from test_tfds import Imagenette

import cnn_spmd
from cnn_spmd import experiment, worker
from cnn_spmd.models import __main__ as networks
from cnn_spmd.models import alexnet
from cnn_spmd.report.__main__ import main as report_main
from cnn_spmd.report.write import write_report
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import build, log, unused

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = "experiments/alexnet_cifar.py"
GREY = np.full((28, 28, 3), 128, np.uint8)
NARROW = (8, 16, 24, 16, 16)  # channels of an AlexNet that compiles quickly


def fences(path, language):
    """Return the content of each fenced block of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def table_rows(text):
    """Return the cells of each row below the header of a Markdown table."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def section(title):
    """Return the text of a section of the README."""
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README.read_text(), re.DOTALL | re.M)[1]


# ---- Form


def test_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 150
    assert len(text.encode()) <= 10_000


def test_headline_has_at_most_six_rows():
    marked = re.findall(
        r"<!-- headline: begin -->\n(.*?)\n<!-- headline: end -->", README.read_text(), re.DOTALL
    )
    assert len(marked) == 1
    assert 1 <= len(table_rows(marked[0])) <= 6


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_fences_name_their_language(path):
    marks = re.findall("^ *```(.*)$", path.read_text(), re.MULTILINE)
    assert len(marks) % 2 == 0
    assert set(marks[::2]) <= {"bash", "python", "text"}
    assert set(marks[1::2]) <= {""}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_code_fits_a_page(path):
    """GitHub shows some 98 characters of a code block; longer lines scroll."""
    for language in ("bash", "python", "text"):
        for block in fences(path, language):
            assert max(map(len, block.splitlines())) <= 96, block


def anchors(path):
    """Return what GitHub calls the headings of a page in links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (?:\[(.*)\]\(.*\)|(.*))$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", "".join(each)).lower().replace(" ", "-") for each in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# ---- Content


def test_readme_has_the_placement_table():
    """Each cell of the README's table is what TABLE says, for every scheme."""

    def mesh_axes(row, logical_axis):
        axes = row.get(logical_axis, "-")
        return ", ".join([axes] if isinstance(axes, str) else axes)

    def images(row):
        height = f"; height: {row['image_height']}" if "image_height" in row else ""
        return mesh_axes(row, "conv_batch") + height

    def weights(row, layer):
        split = [
            f"{name}: {mesh_axes(row, axis)}"
            for name, axis in (("rows", f"{layer}_in"), ("columns", f"{layer}_out"))
            if axis in row
        ]
        return ", ".join(split) or "-"

    def at_rest(row):
        if "at_rest" not in row:
            return "as in use"
        gathered = "layer by layer" if "gather_again" in row else "for a whole step"
        return f"{mesh_axes(row['at_rest'], 'fc1_in')}; gathered {gathered}"

    expected = [
        [
            f"`{scheme}`",
            images(row),
            weights(row, "conv") if "group_in" not in row else f"towers: {row['group_in']}",
            mesh_axes(row, "dense_batch"),
            *(weights(row, layer) for layer in ("fc1", "fc2", "fc3")),
            mesh_axes(row, "output_batch"),
            at_rest(row),
        ]
        for scheme, row in TABLE.items()
    ]
    assert table_rows(section("Where every array lives")) == expected


@pytest.mark.parametrize(
    "name", ["alexnet_cifar-h200-1x1-hybrid-seed0", "alexnet_cifar-cpu-make_train"]
)
def test_readme_shows_the_last_line_of_a_measured_run(name):
    (path,) = (ROOT / "results").rglob(f"{name}.json")
    run = json.loads(path.read_text())
    line = (
        f"Done: {run['dataset']} test accuracy {run['eval']['accuracy']:.2%} after "
        f"{run['steps']} steps, {run['train_seconds']:.1f} s of training. Files: runs/"
    )
    assert any(block.startswith(line) for block in fences(README, "text"))


def test_pictures_are_drawn_from_the_table():
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_schemes.py"))
    for path, svg in drawing["pictures"]():
        assert path.read_text() == svg
        assert int(re.search(r'<svg [^>]*width="(\d+)"', svg)[1]) <= 800


@pytest.mark.parametrize("scheme", TABLE)
def test_pictures_show_what_jax_places(scheme):
    """For each dimension the picture fills the shard that jax gives the device."""
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_schemes.py"))
    sizes = drawing["MESH"]
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes))
    row = TABLE[scheme]
    drawn = {axis for array in drawing["ARRAYS"] for axes in array[2:] for axis in axes}
    shown = {axis for axis in row if axis not in ("output_batch", "at_rest", "gather_again")}
    assert shown | set(row.get("at_rest", ())) <= drawn | {"group_in", "tower_in"}
    for axis, colour in itertools.product(drawn, ("activation", "weight")):
        split = drawing["mesh_axes"](scheme, colour, [axis])
        expected = row | row.get("at_rest", {}) if colour == "weight" else row
        sharding = NamedSharding(mesh, PartitionSpec(expected.get(axis)))
        held = sharding.devices_indices_map((64,))
        for (data, model), device in np.ndenumerate(mesh.devices):
            index, count = drawing["shard"](split, dict(data=data, model=model))
            (shard,) = held[device]
            assert shard.indices(64)[:2] == (64 // count * index, 64 // count * (index + 1))


def test_docs_list_every_network():
    text = (ROOT / "docs/networks.md").read_text()
    assert text == networks.page(), "python -m cnn_spmd.models > docs/networks.md"


# ---- Python


@pytest.fixture
def registries():
    """Undo what a test adds to the dicts that users may add to."""
    from cnn_spmd import models
    from cnn_spmd.data import registry
    from cnn_spmd.training import metrics, optim

    dicts = (
        models.NETWORKS,
        registry.DATASETS,
        optim.OPTIMIZERS,
        optim.SCHEDULES,
        metrics.METRICS,
        log.TRACKERS,
    )
    before = [dict(entries) for entries in dicts]
    yield
    for entries, old in zip(dicts, before, strict=True):
        entries.clear()
        entries.update(old)


def test_python_of_the_readme_runs(tmp_path, monkeypatch):
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    (code,) = fences(README, "python")
    names = {}
    exec(code.replace('"epochs": 4', '"epochs": 1'), names)
    assert len(names["metrics"]["loss"]) == 10
    assert names["report"]["collectives"]
    assert names["summary"]["status"] == "completed"
    assert [run["experiment"] for run in names["runs"]] == ["alexnet_cifar"]
    trained = names["trained"]
    assert trained.step == names["summary"]["steps"]
    assert trained.accuracy == names["summary"]["eval"]["accuracy"]


def test_python_of_running_predicts_what_the_run_evaluated(tmp_path, monkeypatch, capsys):
    """On the first eight test images; the page's lines are those of a list, and indented."""
    monkeypatch.chdir(tmp_path)
    small = {"data.name": "digits", "model.name": "simple_cnn", "batch_size": 64, "epochs": 1}
    cnn_spmd.train(cnn_spmd.load_config(ROOT / "experiments/alexnet_cifar.py", small), "runs/a")
    (code,) = re.findall(
        r"^  ```python\n(.*?)^  ```$", (ROOT / "docs/running.md").read_text(), re.DOTALL | re.M
    )
    capsys.readouterr()
    names = {}
    exec(textwrap.dedent(code.replace("[:8]", "")), names)
    shown = names["scores"](names["trained"].state, names["images"]).argmax(axis=-1)
    accuracy = np.mean(shown == names["trained"].setup.data.test_labels)
    assert accuracy == pytest.approx(names["trained"].accuracy, abs=1e-6)
    assert "'9')" in capsys.readouterr().out


EXAMPLES = {
    re.match(r'"""(\w+)\.py: ', code)[1]: code
    for code in fences(ROOT / "docs" / "extending.md", "python")
}


def train_example(name, folder):
    """Train an example of docs/extending.md for four steps on 4x2; return its summary."""
    path = folder / f"{name}.py"
    path.write_text(EXAMPLES[name])
    config = cnn_spmd.load_config(str(path), {"steps": 4, "mesh.data": 4, "mesh.model": 2})
    return cnn_spmd.train(config, folder / "run")


@pytest.fixture
def wandb(monkeypatch):
    """Stand in for Weights & Biases; return the calls that it receives."""
    calls = []
    run = types.SimpleNamespace(
        log=lambda scalars, step: calls.append((step, scalars)),
        finish=lambda: calls.append("finish"),
    )

    def init(**settings):
        calls.append(settings)
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_of_extending_run(name, tmp_path, registries, wandb, monkeypatch):
    """Each runs as it is, all of its config takes effect, and the report shows it."""
    monkeypatch.setattr(alexnet, "CHANNELS", NARROW)  # of my_scheme
    summary = train_example(name, tmp_path)
    assert bool(wandb) == (name == "my_tracker")
    assert summary["status"] == "completed"
    assert summary["experiment"] == name
    own = runpy.run_path(str(tmp_path / f"{name}.py"))["get_config"]().to_dict()
    assert flat(own).items() <= flat(json.loads(json.dumps(summary["config"]))).items()
    assert "error" not in json.loads((tmp_path / "run" / "program.json").read_text())
    assert cnn_spmd.load_runs(tmp_path)
    assert write_report([tmp_path / "run"])


def flat(tree, prefix=""):
    """Return nested dicts as one with dotted names; tuples are lists, as in JSON."""
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def test_examples_of_extending_are_short():
    assert EXAMPLES.keys() == {
        "my_network",
        "my_data",
        "my_optimizer",
        "my_schedule",
        "my_metric",
        "my_tracker",
        "my_scheme",
    }
    for name, code in EXAMPLES.items():
        assert len([line for line in code.splitlines() if line]) <= 40, name


def test_an_added_metric_shows_up_everywhere(tmp_path, registries):
    summary = train_example("my_metric", tmp_path)
    assert 0 <= summary["eval"]["brier"] <= 2
    run = tmp_path / "run"
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["split"], last["brier"]) == ("final", summary["eval"]["brier"])
    (events,) = run.glob("events.out.tfevents.*")
    assert b"test/brier" in events.read_bytes()
    write_report([run])
    for name in ("report.md", "report.csv", "report.html"):
        assert "brier" in (run / name).read_text(), name


def test_an_added_tracker_gets_the_curves(tmp_path, registries, wandb):
    exec(EXAMPLES["my_tracker"], {})
    (tmp_path / "config.json").write_text('{"experiment": "e", "run": "12ab"}')
    file = log.MetricsFile(tmp_path, 0, {})
    file.write(3, "train", loss=1.5, steps=3)
    file.write(3, "final", accuracy=0.5)
    file.close()
    settings, *curves = wandb
    assert (settings["id"], settings["name"]) == ("12ab", tmp_path.name)
    assert curves == [(3, {"train/loss": 1.5}), (3, {"test/accuracy": 0.5}), "finish"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


# ---- Commands


def commands(program):
    """Return each command of the pages that starts with `program`, once."""
    blocks = [block for path in PAGES for block in fences(path, "bash")]
    # An indented line belongs to the command above it.
    parts = [part for block in blocks for part in re.split(r"\n(?=\S)", block.strip())]
    lines = [re.sub(r" *\\?\n +", " ", part) for part in parts]
    return [*dict.fromkeys(line for line in lines if line.startswith(program))]


def small(command, folder):
    """Return the arguments of a launch command, cut to a small run on eight devices.

    folder: where "/shared" is.
    """
    if "--plan" in command:  # as printed: it compiles nothing
        return shlex.split(command)[2:]
    # A sweep of two runs; micro-batches of a batch of 16; and a sweep that is only compiled.
    command = command.replace("--mesh all", "--mesh 2x1")
    command = command.replace("dense_microbatch=128", "dense_microbatch=8")
    command = command.replace("--workdir runs/rates", "--dry_run")
    command = command.replace("=0.01,0.03,0.1,0.3,1 --sweep seed=0,1,2", "=0.1")
    arguments = shlex.split(command.replace("/shared", str(folder / "shared")))[2:]
    # simple_cnn, which SMALL takes, has no hidden layers.
    arguments = [each for each in arguments if "model.width" not in each]
    devices = [] if "--cpu_devices" in arguments else ["--cpu_devices", "8"]
    return [*arguments, *devices, *SMALL[2:]]


class Commands:
    """Runs commands of launch.py in one folder and, as a sweep does, in one warm process.

    folder: has the repository's experiments.
    """

    def __init__(self, folder, process):
        self.folder, self.process = folder, process

    def run(self, *arguments):
        """Run launch.py with these arguments."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        with contextlib.chdir(self.folder):  # which a process that starts now is in
            code = self.process.run(arguments, log)
        assert code == 0, log.read_text()


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """Return the Commands of all tests here."""
    folder = tmp_path_factory.mktemp("commands")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    with worker.Worker(8) as process:
        yield Commands(folder, process)


def test_there_are_commands():
    assert len(commands("python launch.py")) >= 10
    assert len(commands("python -m cnn_spmd.report")) == 2


def different(lines):
    """Return the commands that still differ once they are cut to a small run.

    Those that need something trained are run by test_weights.py.
    """
    lines = [line for line in lines if not re.search("--evaluate|init_from", line)]
    fixed = {argument.partition("=")[0] for argument in SMALL}
    kept = {}
    for line in lines:
        flags = line.replace("/shared/", "").replace("--cpu_devices 8", "").split()
        kept.setdefault(tuple(f for f in flags if f.partition("=")[0] not in fixed), line)
    return list(kept.values())


def on_own_data(command):
    """Return whether a command needs files that are the user's, or a download."""
    return "data.dir=" in command or "tfds:" in command


@pytest.mark.parametrize(
    "command", different(line for line in commands("python launch.py") if not on_own_data(line))
)
def test_launch_commands_run(start, warm, tmp_path, command):  # noqa: F811
    """A sweep starts a process of its own for its runs."""
    arguments = small(command, tmp_path)
    if "--sweep" in arguments and "--dry_run" not in arguments:
        finished(start(*arguments))
    else:
        warm.run(*arguments)


class Flowers(Imagenette, skip_registration=True):
    """Stand in for what docs/data.md has TFDS prepare."""

    name = "oxford_flowers102"
    splits = (("train", 32), ("test", 11))


def test_commands_on_own_data_fit_the_network_as_printed(tmp_path, monkeypatch, tfds_directory):
    """Up to the first step: their fields are used, and images, crop and batch fit."""
    for i in range(40):
        photos.write_image(tmp_path / f"photos/{'cat' if i % 2 else 'dog'}/{i}.jpg", GREY)
    images, labels = np.stack([GREY[..., 0]] * 512), np.arange(512) % 10
    arrays = dict(x_train=images, y_train=labels, x_test=images, y_test=labels)
    np.savez(tmp_path / "mnist.npz", **arrays)
    Flowers(data_dir=tfds_directory, file_format="array_record").download_and_prepare()
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    seen = []
    for command in filter(on_own_data, commands("python launch.py")):
        config, given = experiment.parse_arguments(shlex.split(command)[2:])
        unused.refuse(config, given)
        assert unused.reason(config, "data.synthetic.classes")  # as the name is known
        setup = build.prepare(config, jax.devices()[:1])
        size = setup.data.train_images.shape[1]
        seen.append((config.data.name, config.model.name, size, setup.image_size))
    assert seen == [
        ("folder", "simple_cnn", 32, 32),
        ("folder", "alexnet", 256, 224),
        ("tfds:oxford_flowers102", "alexnet", 256, 224),
        ("npz", "alexnet", 32, 32),
    ]


def test_report_commands_run(warm, monkeypatch):
    """Each report command works on runs/a, once there is such a run."""
    train = next(line for line in commands("python launch.py") if line.endswith(" runs/a"))
    warm.run(*small(train, warm.folder))
    monkeypatch.chdir(warm.folder)
    for command in commands("python -m cnn_spmd.report"):
        assert report_main(shlex.split(command)[3:]) == 0, command
    assert (warm.folder / "runs" / "a" / "report.html").exists()
    assert (warm.folder / "runs" / "a" / "top5.png").exists()


def test_make_commands_name_fields_that_exist(warm):
    """The laptop's command compiles."""
    (line,) = [line for line in commands("make train") if "ARGS" in line]
    arguments = shlex.split(re.search('ARGS="(.*)"', line)[1])
    warm.run("--config", EXPERIMENTS, *arguments, "--mesh", "1x1", "--dry_run")


FEW = """
import dataclasses

from cnn_spmd.data import digits, registry
from cnn_spmd.models import alexnet

alexnet.CHANNELS = {}
few = digits.load_digits(None)
images, labels = few.train_images[:128], few.train_labels[:128]
few = dataclasses.replace(few, train_images=images, train_labels=labels)
registry.DATASETS.data["digits"] = lambda _: few
"""


def test_the_tour_runs(tmp_path):
    """Every code cell of docs/tour.ipynb, in order, in a process of its own.

    The network is narrow, the digits are few and the steps two.
    """
    cells = json.loads((ROOT / "docs/tour.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in code[1:] if "cs.train(" in "".join(cell["source"]))
    imports, *rest = ("".join(cell["source"]) for cell in code)
    script = "\n\n".join([imports, FEW.format(NARROW), *rest])
    assert "steps=20" in script
    result = subprocess.run(
        [sys.executable, "-c", script.replace("steps=20", "steps=2")],
        cwd=ROOT / "docs",
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | dict(MPLBACKEND="agg", TMPDIR=str(tmp_path)),
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("*/hybrid/summary.json"))
