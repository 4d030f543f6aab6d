"""The schema: defaults, the fields of older runs, load_config, docs/config.md."""

import json
import re

import pytest
from conftest import ROOT

from cnn_spmd import config as configs
from cnn_spmd import experiment, sweep
from cnn_spmd.errors import UserError
from cnn_spmd.report import compare, load
from cnn_spmd.training import build, loop, unused

ALEXNET = str(ROOT / "experiments/alexnet_cifar.py")


@pytest.fixture
def new_field(monkeypatch):
    """Return a function that adds a field, whose default is 0.5, to the schema."""
    return lambda: monkeypatch.setitem(
        configs.SCHEMA, "model.news", configs.Field(0.5, "is new", low=0.0)
    )


def test_docs_list_every_field():
    text = (ROOT / "docs/config.md").read_text()
    assert text == configs.page(), "python -m cnn_spmd.config > docs/config.md"


def test_every_field_has_a_valid_default_and_a_comment():
    configs.validate(configs.default())
    for name, field in configs.SCHEMA.items():
        assert 0 < len(field.help) <= 90, name
        assert type(field.default) in configs.TYPES, name
        assert (field.item is None) == (not isinstance(field.default, tuple | dict)), name
        for bound in (field.low, field.high, field.below):
            assert (
                bound is None or name.startswith("optimizer.") or type(bound) is type(field.default)
            ), name


def test_defaults_are_not_shared():
    configs.default().optimizer.layer_rates.fc1 = 2.0
    assert not configs.default().optimizer.layer_rates


def test_an_experiment_may_state_only_what_differs(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from ml_collections import ConfigDict\ndef get_config():\n"
        "    return ConfigDict(dict(experiment='own', model=dict(width=64)))"
    )
    config, given = experiment.parse_arguments(["--config", str(path), "--config.model.fast=False"])
    expected = configs.default()
    expected.update(experiment="own", model=dict(width=64, fast=False))
    assert config.to_dict() == expected.to_dict()
    assert given == {"model.fast"}


def test_load_config_is_what_the_command_line_does():
    flags = ["--config.model.width=64", "--config.optimizer.warmup=0", "--config.batch_size=32"]
    by_flags, _ = experiment.parse_arguments(["--config", f"{ALEXNET}:fast", *flags])
    overrides = {"model.width": 64, "optimizer.warmup": 0, "batch_size": 32}
    config = experiment.load_config(f"{ALEXNET}:fast", overrides)
    assert config.to_dict() == by_flags.to_dict()
    assert config.data.fallback_batch_size == 0  # the batch that is set by hand goes first
    assert isinstance(config.optimizer.warmup, float)


def test_entries_of_dicts_can_be_set_and_swept():
    config = experiment.load_config(ALEXNET, {"optimizer.layer_rates.fc3": 1})
    assert config.optimizer.layer_rates.to_dict() == dict(fc3=1.0)
    path = f"{ROOT / 'experiments/alexnet_2012_imagenet.py'}:imagenette"
    config, _ = experiment.parse_arguments(
        ["--config", path, "--config.optimizer.layer_rates.fc3=0.1"]
    )
    assert config.optimizer.layer_rates.fc3 == 0.1
    combos = [{"optimizer.layer_rates.fc3": value} for value in ("0.1", "0.2")]
    sweep.refuse_fields(combos, ["--config", path], 1)
    remedy = "all its entries: --config.optimizer.layer_rates='{\"fc1\": 2}'"
    with pytest.raises(UserError, match=re.escape(remedy)):
        experiment.parse_arguments(["--config", path, "--config.optimizer.layer_rates.fc1=2"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.widht": 3}, 'model.widht=3: no such field, .*did you mean "model.width"'),
        ({"model": dict(width=3)}, "model: is a section, expected a field such as model.name"),
        ({"model.width": "3"}, "model.width='3': expected an integer"),
        ({"optimizer.layer_rates.fc3": "x"}, "optimizer.layer_rates.fc3='x': expected a number"),
        ({"model.width": 0}, "model.width=0: expected from 1 to 1000000"),
        ({"dtype": "float16"}, "dtype=float16: unknown; .* Expected one of auto, float32"),
        ({"model.levers": ()}, r"model.levers=\(\): no such field, set model.fast to True"),
        (
            {"model.name": "simple_cnn", "model.dropout": 0.9},
            "model.dropout=0.9: model.name=simple_cnn does not use it; those that do: alexnet, ",
        ),
    ],
)
def test_overrides_that_are_refused(overrides, message):
    with pytest.raises(UserError, match=f"^{message}"):
        experiment.load_config(ALEXNET, overrides)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model.name": "simple_cnn", "model.width": 64}, "model.width=64: model.name=simple_cnn"),
        (
            {"model.name": "cuda_convnet_80sec", "model.dropout": 0.5},
            "model.dropout=0.5: model.name=cuda_convnet_80sec does not use it; those that do: ",
        ),
        ({"data.image_size": 64}, "data.image_size=64: data.name=cifar10 .*do: folder, imagenet"),
        ({"data.name": "digits", "data.dir": "x"}, "data.dir=x: data.name=digits does not use it"),
        ({"data.name": "digits", "data.flip": True}, "data.flip=True: data.name=digits"),
        ({"data.synthetic.classes": 3}, "data.synthetic.classes=3: .* those that do: synthetic"),
        (
            {"data.name": "synthetic", "data.fallback": "digits"},
            "data.fallback=digits: data.name=synthetic does not use it; those that do: cifar10",
        ),
        (
            {"data.fallback": "", "data.fallback_epochs": 3},
            "data.fallback_epochs=3: has no effect with data.fallback=''",
        ),
        ({"dense_updates": "sum"}, "dense_updates=sum: has no effect with dense_microbatch=0"),
        ({"data.held_out": 5}, "data.held_out=5: has no effect with data.held_out_steps=0"),
        ({"optimizer.stages": (0.5,)}, r"optimizer.stages=\(0.5,\): .* those that do: staged"),
        (
            {"optimizer.options": {"b2": 0.9}},
            r"optimizer.options=.*optimizer.name=sgd does not use it; those that do: an optimizer",
        ),
        (
            {"optimizer.momentum": 0.0, "optimizer.nesterov": True},
            "optimizer.nesterov=True: has no effect with optimizer.momentum=0.0",
        ),
    ],
)
def test_what_nothing_uses_is_refused_when_set_by_hand(given, message):
    with pytest.raises(UserError, match=f"^{message}"):
        experiment.load_config(ALEXNET, given)


@pytest.mark.parametrize(
    "given",
    [
        {"model.name": "simple_cnn", "model.dropout": 0.0},  # truly none
        {"data.name": "synthetic", "data.fallback": "", "data.synthetic.classes": 3},
        {"dense_microbatch": 128, "dense_updates": "sum"},
        {"optimizer.decay": "staged", "optimizer.stages": (0.5,)},
        {"model.name": "one_convolution", "model.width": 64, "model.dropout": 0.2},
    ],
)
def test_what_is_used_or_off_is_fine(given):
    experiment.load_config(ALEXNET, given)


def test_an_experiments_own_fields_are_not_refused():
    experiment.load_config(ALEXNET, {"model.name": "simple_cnn"})  # its dropout is .25


def test_epochs_beside_an_experiments_steps_are_refused():
    path = str(ROOT / "experiments/cuda_convnet_cifar.py")
    with pytest.raises(UserError, match=r"^epochs=3: .* steps=\d+: give --config\.steps=0"):
        experiment.load_config(path, {"epochs": 3})
    assert experiment.load_config(path, {"epochs": 3, "steps": 0}).epochs == 3


def test_every_choice_names_fields_that_there_are():
    for by, uses in unused.USES.items():
        assert by in configs.SCHEMA
        assert {field for fields in uses.values() for field in fields} <= configs.SCHEMA.keys()
    assert {*unused.NEEDS, *unused.NEEDS.values()} <= configs.SCHEMA.keys()


def test_a_run_from_before_a_field_resumes(config, tmp_path, new_field, capsys):
    config.epochs = 1
    loop.train(config, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["model"]["levers"] = ["pool_first"]  # which the schema no longer has
    (tmp_path / "config.json").write_text(json.dumps(saved))
    new_field()
    configs.fill(config)
    config.epochs = 2
    summary = loop.train(config, tmp_path)
    assert (summary["status"], summary["steps"]) == ("completed", 8)
    assert f"Resumed {tmp_path} at step 4 on mesh 1x1, steps 4 -> 8" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["model"]["news"] == 0.5
    config.model.news = 0.7
    with pytest.raises(UserError, match=r"\(model\.news: 0\.5 -> 0\.7\)"):
        loop.train(config, tmp_path)


def test_seeds_from_before_and_after_a_field_are_averaged(tmp_path, new_field, config):
    before = configs.as_json(config)
    new_field()
    configs.fill(config)
    config.seed = 1
    after = configs.as_json(config)
    assert compare.recipe(dict(config=before)) == compare.recipe(dict(config=after))
    after["model"]["news"] = 0.7
    assert compare.recipe(dict(config=before)) != compare.recipe(dict(config=after))


def test_reports_ignore_a_field_that_the_schema_no_longer_has(tmp_path, config):
    for name, levers in (("a", []), ("b", ["pool_first"])):
        saved = configs.as_json(config)
        saved["model"]["levers"] = levers
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(saved))
    (sweep,) = load.sweeps_of_lone_runs({tmp_path / name: name for name in "ab"}, [])
    assert [run["settings"].keys() for run in sweep["runs"]] == [{"parallelism", "batch_size"}] * 2


def test_a_saved_config_is_completed_and_cut_to_the_schema():
    saved = configs.as_json(configs.default()) | dict(run="a", dataset="digits")
    saved["model"] = dict(name="vgg_8", levers=[])
    del saved["optimizer"]
    found = configs.complete(saved)
    expected = configs.as_json(configs.default())
    expected["model"]["name"] = "vgg_8"
    assert found == expected
    assert configs.complete({"model.name": "vgg_8"}) == expected
    with pytest.raises(UserError, match=r"^optimizer=3: expected a dict"):
        configs.complete(dict(optimizer=3))


def test_plain_forms_are_those_without_fast_ones(config):

    def text(**fast_forms):
        return build.prepare(config, **fast_forms).lower_train(1).as_text()

    config.model.fast = True
    fast = text()
    config.model.fast = False
    plain = text()
    assert plain == text(fast_forms=())
    assert plain != fast


def test_an_experiment_without_variants(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()")
    with pytest.raises(UserError, match=f"^--config={path}:big: {path} has no variants"):
        experiment.load_config(f"{path}:big")
    assert experiment.load_config(path).experiment == "experiment"


@pytest.mark.parametrize(
    "entry",
    [
        "training.metrics.METRICS['accuracy']",
        "training.metrics.METRICS['learning_rate']",
        "training.optim.OPTIMIZERS['sgd']",
        "training.optim.SCHEDULES['linear']",
        "models.NETWORKS['alexnet']",
        "data.registry.DATASETS['digits']",
    ],
)
def test_an_experiment_cannot_replace_what_is_built_in(entry, tmp_path):
    """The run would be recorded as one of the built-in network, and so on."""
    module, name = entry.rsplit(".", 1)
    path = tmp_path / "mine.py"
    entries, key = name.removesuffix("]").split("[")
    message = f"{name}: is a built-in name, expected another one"
    for code in (f"{name} = print", f"{entries} |= {{{key}: print}}"):
        path.write_text(f"from cnn_spmd.{module} import {entries}\n{code}\n")
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            experiment.load_file(str(path))
