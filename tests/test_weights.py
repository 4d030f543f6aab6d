"""What was trained is evaluated, asked and exported; runs start from what was exported."""

import json
import os
import pathlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from absl import flags
from conftest import ROOT
from PIL import Image
from test_docs import commands, small
from test_launch import finished, start  # noqa: F401  (start is a fixture)

import launch
from cnn_spmd import experiment, export, predict
from cnn_spmd import models as networks
from cnn_spmd.data import digits, registry
from cnn_spmd.errors import UnknownName, UserError
from cnn_spmd.training import build, evaluate, initial, loop, restore, weights

SHIPPED = sorted((ROOT / "results" / "weights").glob("*.safetensors"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Train the digits on 1x2; return the run's folder."""
    folder = tmp_path_factory.mktemp("weights") / "run"
    config = experiment.load_config(
        ROOT / "experiments" / "alexnet_cifar.py",
        {
            "model.name": "simple_cnn",
            "model.fast": False,
            "data.name": "digits",
            "batch_size": 32,
            "steps": 40,
            "optimizer.learning_rate": 0.02,
            "parallelism": "hybrid",
            "mesh.data": 1,
            "mesh.model": 2,
        },
    )
    config.data.dir = "elsewhere"  # which the digits do not read
    loop.train(config, folder)
    return folder


@pytest.fixture(scope="module")
def exported(run):
    """Export the run; return the weights file."""
    path, page = export.export(run, "safetensors", run.parent / "w" / "digits.safetensors")
    assert page.read_text() == export.page_text(path.name, weights.read_about(path))
    return path


def evaluated(source, **changes):
    """Evaluate a run or a weights file with its own config and some changes."""
    place = source if weights.is_file(source) else source / "config.json"
    config = experiment.load_config(place, changes)
    return evaluate.evaluate_saved(source, config)


def accuracy_of(run):
    return json.loads((run / "summary.json").read_text())["eval"]["accuracy"]


def test_commands_after_training_run(run, start, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As in the guide; evaluation on another mesh leaves the run's other files alone."""
    folder = shutil.copytree(run, tmp_path / "runs" / "a")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (test,) = [line for line in commands("python launch.py --workdir") if "runs/a" in line]
    out, _ = finished(
        start(*shlex.split(test)[2:], "--config", "experiments/resnet_cifar.py",
              "--cpu_devices=4", "--mesh", "2x2", "--config.batch_size=16")
    )  # fmt: skip
    accuracy = accuracy_of(folder)
    assert accuracy > 0.7
    assert "--evaluate takes the config of runs/a/config.json, not that of experiments/resn" in out
    assert f"digits:\naccuracy {accuracy:.2%} (recorded: {accuracy:.2%}), loss" in out
    assert "; mesh 2x2, hybrid, float32\n" in out
    (line,) = map(json.loads, (folder / evaluate.FILE).read_text().splitlines())
    assert line["accuracy"] == pytest.approx(accuracy)
    assert (line["step"], line["examples"], line["batch_size"]) == (40, 360, 16)
    assert line["views"] == "one"  # mirrored digits are other classes
    assert line["mesh"] == dict(data=2, model=2)
    assert before == {path: path.read_bytes() for path in before}

    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "dog.png"):
        Image.new("RGB", (50, 40)).save(name)
    for name in ("a.md", "a.safetensors"):
        pathlib.Path(name).write_text("somebody's own")
    for module, name in ((predict, "predict"), (export, "export")):
        (command,) = commands(f"python -m cnn_spmd.{name} runs/a")
        assert module.main(shlex.split(command)[3:]) == 0
        assert re.search(r"^cat.jpg|^a.safetensors", capsys.readouterr().out)
    for name in ("a.md.old", "a.safetensors.old"):
        assert pathlib.Path(name).read_text() == "somebody's own"
    (begin,) = [line for line in commands("python launch.py") if "init_from" in line]
    config, _ = experiment.parse_arguments(small(begin, tmp_path))
    build.prepare(config).init()
    assert "Started from a.safetensors: it sets 4 of the network's 4 arrays.\n" in (
        capsys.readouterr().out
    )


def test_a_weights_file_stands_for_its_run(run, exported):
    result = evaluated(exported, **{"mesh.data": 2, "mesh.model": 1})
    assert result["accuracy"] == weights.read_about(exported)["accuracy"] == accuracy_of(run)
    assert not (exported.parent / evaluate.FILE).exists()
    assert weights.read_about(exported)["config"]["data"]["dir"] == ""
    arrays, _ = weights.read(exported)
    assert {name: array.shape for name, array in arrays.items()} == {
        "conv1.kernel": (3, 3, 3, 32),
        "conv1.bias": (32,),
        "fc3.kernel": (8192, 10),
        "fc3.bias": (10,),
    }


def test_predictions_are_those_of_the_evaluation(run, exported, tmp_path, capsys, monkeypatch):
    """Test images are files; the run and its weights file, which needs no data set, predict."""
    data = digits.load_digits(None)
    paths = [tmp_path / f"{i}.png" for i in range(20)]
    for path, image in zip(paths, data.test_images, strict=False):
        Image.fromarray(image).save(path)
    by_run = predict.predict(run, paths)
    capsys.readouterr()
    monkeypatch.setattr(registry, "find", lambda _: pytest.fail("looks for the data set"))
    assert predict.main([str(exported), *map(str, paths), "--json"]) == 0
    out, error = capsys.readouterr()
    by_file = json.loads(out)
    said = "trained on digits, grey images of 32x32 pixels; it knows 10 classes: 0, 1, 2, 3, 4, 5,"
    assert f"{exported}: {said}" in error
    assert [row["image"] for row in by_file] == [str(path) for path in paths]
    best = [row["classes"][0] for row in by_file]
    right = sum(
        int(row["class"]) == label for row, label in zip(best, data.test_labels, strict=False)
    )
    assert right >= 14
    capsys.readouterr()
    setup, state, *_ = restore.on_one_device(exported)
    scores = np.exp(setup.functions.scores(state, data.test_images[:20]))
    for row, same, expected in zip(by_file, by_run, scores, strict=True):
        assert [each["index"] for each in row["classes"]] == np.argsort(-expected)[:5].tolist()
        for got in (row, same):
            got = [each["probability"] for each in got["classes"]]
            np.testing.assert_allclose(got, np.sort(expected)[:-6:-1], rtol=1e-4)
    assert predict.main([str(exported), str(paths[0])]) == 0
    assert re.match(rf"{paths[0]}\n +\d+\.\d\d%  \d\n", capsys.readouterr().out)


def test_a_run_on_validation_images_is_tested_on_the_test_split(config, tmp_path):
    """Its images are normalised as in the run, and no other images are taken."""
    config.data.update(dict(name="digits", validation=200, normalise="pixel_mean"))
    config.update(dict(steps=2, epochs=0))
    loop.train(config, tmp_path)
    folder, mean = tmp_path / "config.json", build.prepare(config).functions.preprocessing.mean
    tested = evaluated(tmp_path, **{"data.validation": 0})
    assert (tested["dataset"], tested["examples"]) == ("digits", 360)
    saved = weights.read_saved(tmp_path)
    asked = experiment.load_config(folder, {"data.validation": 0})
    restored = restore.restore(tmp_path, asked, saved)
    np.testing.assert_array_equal(restored.setup.functions.preprocessing.mean, mean)
    assert restored.accuracy is None
    with pytest.raises(UserError, match=r"^data.validation=100: expected 200, as in the run, or 0"):
        evaluated(tmp_path, **{"data.validation": 100})


def test_evaluation_leaves_a_damaged_checkpoint_where_it_is(config, tmp_path):
    config.epochs = 2
    config.checkpoint.every_epochs = 1
    loop.train(config, tmp_path)
    older, newest = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    (tmp_path / "checkpoints" / str(newest) / "SHA256.json").write_text("{")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert evaluated(tmp_path)["step"] == older
    after = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    assert after.pop(tmp_path / evaluate.FILE)
    assert after == before


def test_a_header_with_another_letter_is_damage(exported, tmp_path):
    path = tmp_path / "a.safetensors"
    content = exported.read_bytes()
    assert b'config\\":' in content
    path.write_bytes(content.replace(b'config\\":', b'config\\";', 1))
    for read in (weights.read, weights.read_about):
        with pytest.raises(UserError, match="is damaged: it does not hold what was written"):
            read(path)


def test_inverted_images_are_named(exported, tmp_path, capsys):
    image = digits.load_digits(None).test_images[0]
    paths = [tmp_path / name for name in ("light.png", "dark.png")]
    for path, pixels in zip(paths, (image, 255 - image), strict=True):
        Image.fromarray(pixels).save(path)
    light, dark = map(str, paths)
    found = {}
    for invert, wrong, remedy in (([], dark, "add --invert"), (["--invert"], light, "leave --inv")):
        assert predict.main([str(exported), light, dark, "--json", *invert]) == 0
        out, error = capsys.readouterr()
        found[wrong] = json.loads(out)
        (warning,) = [line for line in error.splitlines() if "warning" in line]
        assert warning.startswith(f"warning: {wrong}: its mean pixel is 186, but the network")
        assert f" about 78 (0: black, 255: white): {remedy}" in warning
        assert [row["warning"] for row in found[wrong] if row["warning"]] == [
            warning.removeprefix(f"warning: {wrong}: ")
        ]
    assert found[dark][0]["classes"] == found[light][1]["classes"]


def test_empty_transparent_and_coloured_images_are_named(exported, tmp_path, capsys):
    """A small digit, black on white; a digit, black on a transparent ground; and red alone."""
    digit = 255 - digits.load_digits(None).test_images[0]
    small, clear = tmp_path / "small.png", tmp_path / "clear.png"
    Image.fromarray(np.pad(digit, ((80, 88), (84, 84), (0, 0)), constant_values=255)).save(small)
    alpha = 255 - digit[..., :1]
    Image.fromarray(np.concatenate([0 * digit, alpha], -1)).save(clear)
    remedies = "cut out the object, as the image looks mostly empty"
    for invert in ([], ["--invert"]):
        assert predict.main([str(exported), str(small), str(clear), "--json", *invert]) == 0
        of_small, of_clear = (row["warning"] for row in json.loads(capsys.readouterr().out))
        assert of_small.endswith(
            f"white): {remedies if invert else f'add --invert, and {remedies}'}"
        )
        first, _, rest = of_clear.partition("; ")
        assert first == "white is put behind its transparent pixels"
        assert rest.endswith("add --invert") != bool(invert)
    Image.fromarray(np.concatenate([255 + 0 * digit, alpha], -1)).save(clear)  # white strokes
    (found,) = predict.predict(str(exported), [str(clear)])
    assert found["warning"].endswith("; nothing is on it: all its pixels are alike")
    Image.new("RGB", (50, 40), "red").save(small)
    (found,) = predict.predict(exported, [small])
    assert found["warning"].endswith("it is in colour, but the network was trained on grey images")


def test_a_network_of_an_experiment_names_the_experiment(run, exported, tmp_path, monkeypatch):
    """A run has it in its command, a weights file in what was given to export."""
    monkeypatch.delitem(networks.NETWORKS, "simple_cnn")
    folder = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    summary = json.loads((run / "summary.json").read_text())
    summary["command"] = "python launch.py --config my_network.py:wide --config.seed=1"
    (folder / "summary.json").write_text(json.dumps(summary))
    arrays, about = weights.read(exported)
    file = tmp_path / "a.safetensors"
    weights.write(file, arrays, about | dict(adds="mine.py"))
    for source, adds in ((folder, "=my_network.py:wide"), (file, ", the path of your mine.py")):
        with pytest.raises(UserError) as refused:
            restore.on_one_device(source)
        remedy = f"if an experiment adds it, give that experiment by --config{adds}"
        said = f"{source}: model.name=simple_cnn: unknown; {remedy}"
        assert str(refused.value) == said
        values, argument = flags.FlagValues(), source if source == file else source / "config.json"
        experiment.define_flag(values, ["", f"--config={argument}"])
        experiment.parse_flags(values, ["", f"--config={argument}"])
        with monkeypatch.context() as patch:
            patch.setattr(launch.flags, "FLAGS", values)
            unknown = UnknownName("model.name", "simple_cnn", networks.NETWORKS)
            assert str(launch.explained(unknown)) == said


def test_the_page_names_the_experiment_that_adds_the_network(exported):
    about = weights.read_about(exported)
    page = export.page_text("a.safetensors", about | dict(adds="mine.py"))
    assert "\npython launch.py --workdir FILE --evaluate --config mine.py\n" in page
    assert "\npython launch.py --config mine.py\n" in page
    assert "| views of a test image | one |" in page
    assert "; light strokes on black that fill the frame |" in page
    about["config"]["data"]["validation"] = 200
    page = export.page_text("a.safetensors", about)
    assert f"| validation accuracy | {about['accuracy']:.2%} |" in page
    assert "test accuracy" not in page


def test_a_run_starts_from_weights_for_other_classes(exported, config, tmp_path, capsys):
    """And goes on without the file."""
    file = shutil.copy(exported, tmp_path / "start.safetensors")
    config.update(dict(init_from=str(file), steps=1, epochs=0))
    config.optimizer.learning_rate = 1e-30
    config.data.synthetic.classes = 7
    record = loop.train(config, tmp_path / "run")["init_from"]
    assert record["fresh_layers"] == ["fc3"]
    assert "fc3 is left at its fresh initialization: the file has 10 classes, the" in (
        capsys.readouterr().out
    )
    file.unlink()
    config.steps = 2
    assert loop.train(config, tmp_path / "run")["init_from"] == record
    config.init_from = ""
    fresh = build.prepare(config).init()
    state = restore.on_one_device(tmp_path / "run").state
    found, seeded = map(initial.arrays_of, (state, fresh))
    arrays, _ = weights.read(exported)
    np.testing.assert_array_equal(found["conv1.kernel"], arrays["conv1.kernel"])
    np.testing.assert_array_equal(found["fc3.kernel"], seeded["fc3.kernel"])
    assert found["fc3.kernel"].shape == (8192, 7)


def test_classes_of_other_names_are_named(exported, config):
    config.init_from = str(exported)
    for names, text in (("0123456789", ""), ("abcdefghij", " fc3 is kept, although the file's")):
        setup = build.prepare(config)
        found = initial.read(
            config.init_from, config.model.name, setup.functions.abstract_state, tuple(names)
        )
        assert found.text.partition("arrays.")[2].startswith(text)
        assert bool(text) == ("classes (0, ...) have other names" in found.text)


BAD_START = {
    "w.pth": "w.pth: is a pickle, which could run any code when it is loaded; where you trust it",
    "none.safetensors": "none.safetensors: does not exist, expected a weights file",
    "w.npz": "w.npz: expected a file whose name ends in .safetensors",
    "damaged.safetensors": "damaged.safetensors: cannot be read as safetensors (Safetensor",
    "flipped.safetensors": "flipped.safetensors: is damaged: it does not hold what was written",
    "text.safetensors": "text.safetensors: is damaged: it does not hold what was written",
    "lacks.safetensors": "lacks.safetensors: lacks conv1.bias and 1 more, expected the arrays",
    "more.safetensors": "more.safetensors: holds what the network lacks: norm1.mean, expected",
    "shape.safetensors": "shape.safetensors: conv1.bias is of shape (31,), expected (32,)",
}


@pytest.mark.parametrize(("name", "message"), BAD_START.items(), ids=list(BAD_START))
def test_other_weights_are_refused_before_anything_is_compiled(
    exported, config, tmp_path, monkeypatch, name, message
):
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda *_, **__: pytest.fail("compiled"))
    arrays, about = weights.read(exported)
    changes = {
        "lacks": {name: array for name, array in arrays.items() if "conv1" not in name},
        "more": arrays | {"norm1.mean": np.zeros(1)},
        "shape": arrays | {"conv1.bias": np.zeros(31)},
    }
    for kind, changed in changes.items():
        weights.write(tmp_path / f"{kind}.safetensors", changed, about)
    content = exported.read_bytes()
    (tmp_path / "damaged.safetensors").write_bytes(content[:1000])
    (tmp_path / "flipped.safetensors").write_bytes(
        content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
    )
    (tmp_path / "text.safetensors").write_bytes(content.replace(b"simple_cnn", b"simple_cnm", 1))
    config.init_from = str(tmp_path / name)
    with pytest.raises(UserError) as refused:
        loop.train(config, tmp_path / "run")
    assert str(refused.value).startswith(f"init_from={tmp_path}/{message}")
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_named(exported, config):
    config.init_from, config.model.name = str(exported), "fully_connected"
    message = "the file holds simple_cnn, but the config has model.name=fully_connected: set --con"
    with pytest.raises(UserError, match=re.escape(f"init_from={exported}: {message}")):
        build.prepare(config).init()


def test_what_cannot_be_exported_or_asked_is_one_line(run, exported, tmp_path, capsys):
    with pytest.raises(UserError, match=r"^--config.seed: belongs to what was trained, expected"):
        evaluate.refuse_changes(["mesh.data", "seed"])
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    meant = f"did you mean the weights file {exported}?"
    commands = (
        (
            export,
            [run, "--to", "torchvision"],
            "--to=torchvision: the run has model.name=simple_cnn",
        ),
        (export, [run, "--to", "safetensors", "--out", "a.bin"], "--out=a.bin: expected a name"),
        (export, [tmp_path, "--to", "safetensors"], f"{tmp_path}: holds no run"),
        (
            predict,
            [run.parent, bad],
            f"{run.parent}: holds no run (no config.json); give one of th",
        ),
        (predict, [exported, bad], f"{bad}: cannot be read (is no JPEG, PNG or WebP image): give"),
        (predict, [exported, bad, run], f"{run}: is a network, expected an image: predict takes"),
        (predict, [exported, exported], f"{exported}: is a network, expected an image: predict"),
        (predict, [exported, "nope.png"], "nope.png: cannot be read (No such file or directory): "),
        (predict, [exported, bad, "--config", "a.py"], "--config=a.py: no such experiment"),
        (predict, ["w.pt", bad], "w.pt: is a pickle, which could run any code"),
        (
            predict,
            [exported.with_suffix(""), bad],
            f"{exported.with_suffix('')}: does not exist, expected the folder of a run; {meant}",
        ),
        (
            predict,
            [exported.with_suffix(".md"), bad],
            f"{exported.with_suffix('.md')}: holds no run (no config.json); {meant}",
        ),
        (predict, [exported], "the following arguments are required: IMAGE; see --help"),
        (export, [run], "the following arguments are required: --to; see --help"),
    )
    for module, arguments, message in commands:
        assert module.main([*map(str, arguments)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {message}")


def test_shipped_networks_have_their_pages_and_load():
    """Those of the digits are evaluated; `pytest -m cifar10` evaluates the others."""
    assert SHIPPED
    for path in SHIPPED:
        about = weights.read_about(path)
        assert path.with_suffix(".md").read_text() == export.page_text(path.name, about)
        assert path.stat().st_size < 1e7, path
        assert about["accuracy"], path
        assert re.fullmatch("[0-9a-f]{40}", about["trained_on"]["commit"]), path
        setup = restore.on_one_device(path).setup
        assert setup.config.model.name in networks.NETWORKS
    of_digits = [path for path in SHIPPED if weights.read_saved(path)["dataset"] == "digits"]
    assert of_digits
    for path in of_digits:
        expected = weights.read_about(path)["accuracy"]
        assert evaluated(path)["accuracy"] == pytest.approx(expected, abs=1 / 360 + 1e-6), path


@pytest.mark.cifar10
def test_shipped_networks_have_their_accuracy_on_cifar10():
    """CIFAR10_DIR may say where CIFAR-10 is (data.dir).

    Weights of bfloat16 runs may round differently here, by which a few images change class.
    """
    place = {"data.dir": os.environ.get("CIFAR10_DIR", "")}
    of_cifar10 = [path for path in SHIPPED if weights.read_saved(path)["dataset"] == "cifar10"]
    assert of_cifar10, "results/weights/ holds no network of CIFAR-10"
    for path in of_cifar10:
        got = evaluated(path, **place)["accuracy"]
        assert got == pytest.approx(weights.read_about(path)["accuracy"], abs=5e-4), path
