"""Every experiment and variant can be set up; recipes are those of the papers."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from conftest import ROOT

from cnn_spmd import config as configs
from cnn_spmd.data import dataset, synthetic
from cnn_spmd.errors import UserError
from cnn_spmd.training import build, optim
from experiments import (
    alexnet_2012_imagenet,
    alexnet_cifar,
    claims_2012_cifar,
    cuda_convnet_cifar,
    deeper_cifar,
    large_batch_cifar,
    owt_cifar,
    owt_imagenet,
    resnet_cifar,
)


@pytest.fixture(scope="module")
def few() -> dataset.Dataset:
    """CIFAR-10 by its shape and classes, with few images, and they random."""
    config = alexnet_cifar.get_config()
    config.data.synthetic.update(dict(train_examples=640, test_examples=16))
    data = dataclasses.replace(synthetic.load_synthetic(config.data), name="cifar10")
    assert (data.train_images.shape[1:], len(data.class_names)) == ((32, 32, 3), 10)
    return data


# Variant: epochs without batch 5, with it, at a tenth of the rate, at a hundredth; test views;
# weight decays.
EPOCHS = {
    "80sec": (0, 8, 2, 0, "one", dict(conv1=0.004, conv2=0.004, conv3=0.004, fc1=0.03, fc3=0.03)),
    "19pct": (0, 120, 10, 10, "one", dict(conv1=0.004, conv2=0.004, conv3=0.004, fc3=3)),
    "18pct": (0, 120, 10, 10, "one", dict(conv1=0.004, conv2=0.004, conv3=0.004, fc3=1)),
    "13pct": (
        100,
        40,
        10,
        10,
        "ten",
        dict(conv1=0, conv2=0, local3=0.004, local4=0.004, fc3=0.004),
    ),
    "11pct": (
        350,
        150,
        10,
        10,
        "ten",
        dict(conv1=0, conv2=0, local3=0.004, local4=0.004, fc3=0.01),
    ),
    "11pct_no_lrn": (
        350,
        150,
        10,
        10,
        "ten",
        dict(conv1=0, conv2=0, local3=0.004, local4=0.004, fc3=0.01),
    ),
}


@pytest.mark.parametrize("variant", EPOCHS)
def test_recipes_of_cuda_convnet(variant, few):
    without, full, tenth, hundredth, views, decays = EPOCHS[variant]
    config = cuda_convnet_cifar.get_config(variant)
    assert (config.data.held_out, config.data.held_out_steps) == (
        (10_000, without * 312) if without else (0, 0)
    )
    assert (config.eval.views, config.data.crop, config.data.crop_pad) == (
        views,
        24 if views == "ten" else 0,
        0,
    )
    changes = [0, without * 312 + full * 390, tenth * 390, hundredth * 390]
    assert config.steps == sum(changes)
    schedule = optim.make_schedule(config.optimizer, config.steps, config.batch_size)
    for step, rate in zip(np.cumsum(changes)[:3], (1e-3, 1e-4, 1e-5), strict=True):
        if step < config.steps:
            assert float(schedule(step)) == pytest.approx(rate)
            assert step == 0 or float(schedule(step - 1)) == pytest.approx(10 * rate)
    settings, data = config.optimizer, config.data
    assert (settings.bias_rate, settings.momentum, settings.nesterov, settings.clip_norm) == (
        2,
        0.9,
        False,
        0,
    )
    assert not settings.layer_rates
    assert (data.normalise, data.flip, data.colour_noise) == ("pixel_mean", views == "ten", 0)
    assert (config.batch_size, config.model.dropout, config.label_smoothing, config.dtype) == (
        128,
        0,
        0,
        "float32",
    )
    config.data.held_out = 0  # these images are too few
    functions = build.prepare(config, data=few).functions
    got = {
        layer: settings.weight_decays.get(layer, settings.weight_decay)
        for layer in functions.abstract_state.params
    }
    assert got == decays


@pytest.mark.parametrize(
    ("experiment", "variant"),
    [
        *((claims_2012_cifar, variant) for variant in claims_2012_cifar.VARIANTS),
        *((deeper_cifar, variant) for variant in deeper_cifar.VARIANTS),
    ],
)
def test_variants_can_be_set_up(experiment, variant, few):
    config = experiment.get_config(variant)
    assert variant in config.experiment
    build.prepare(config, data=few)


def test_variants_differ_from_their_control_in_what_they_say():
    """They differ in the network, or in its dropout, and in the experiment's name."""
    base = configs.flat(claims_2012_cifar.get_config("base").to_dict())
    for variant in claims_2012_cifar.VARIANTS[1:8]:
        config = configs.flat(claims_2012_cifar.get_config(variant).to_dict())
        what = "model.dropout" if variant == "no_dropout" else "model.name"
        assert {field for field in base if config[field] != base[field]} == {"experiment", what}, (
            variant
        )
    relu, tanh = (
        configs.flat(claims_2012_cifar.get_config(variant).to_dict())
        for variant in ("relu", "tanh")
    )
    differ = {field for field in relu if relu[field] != tanh[field]}
    assert (
        {"experiment", "model.name"}
        <= differ
        <= {"experiment", "model.name", "optimizer.learning_rate"}
    )


@pytest.mark.parametrize("variant", resnet_cifar.VARIANTS)
def test_recipe_of_the_residual_networks(variant, few):
    """He et al. 2015, section 4.2: a tenth of the rate after 32,000 and 48,000 steps."""
    config = resnet_cifar.get_config(variant)
    assert config.experiment == f"resnet_cifar_{variant}"
    assert config.model.name in (variant, f"resnet_{variant}")
    assert (config.batch_size, config.steps, config.label_smoothing) == (128, 64_000, 0)
    data, settings = config.data, config.optimizer
    assert (data.normalise, data.crop_pad, data.flip, data.colour_noise) == (
        "pixel_mean",
        4,
        True,
        0,
    )
    assert (settings.momentum, settings.nesterov, settings.weight_decay) == (0.9, False, 1e-4)
    schedule = optim.make_schedule(settings, config.steps, config.batch_size)
    steps = (400, 31_999, 32_000, 47_999, 48_000, 63_999)
    rates = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
    assert [float(schedule(step)) for step in steps] == pytest.approx(rates)
    for step in (0, 399):
        assert float(schedule(step)) == pytest.approx(0.01)
    if variant in ("20", "plain_32"):
        build.prepare(config, data=few)


@pytest.fixture(scope="module")
def photographs() -> dataset.Dataset:
    """ImageNet by its shape and classes, with few images, and they random."""
    config = alexnet_2012_imagenet.get_config()
    config.data.synthetic.update(dict(train_examples=32, test_examples=1))
    return synthetic.load_synthetic(config.data)


@pytest.mark.parametrize(
    ("experiment", "variant", "parameters"),
    [
        (alexnet_2012_imagenet, "", 60_965_224),
        (alexnet_2012_imagenet, "imagenette", 60_965_224 - 990 * 4097),
        (owt_imagenet, "", 61_100_840),
        (owt_imagenet, "variable", 61_100_840),
        (owt_imagenet, "imagenette", 61_100_840 - 990 * 4097),
        (owt_imagenet, "imagenette,variable", 61_100_840 - 990 * 4097),
    ],
)
def test_imagenet(experiment, variant, parameters, photographs):
    """Published counts of parameters, crops of 224 from 256, and falls of the rate."""
    config = experiment.get_config(variant)
    assert config.data.name == ("imagenette" if "imagenette" in variant else "imagenet2012")
    assert (config.dense_microbatch, config.batch_size) == (
        128 if "variable" in variant else 0,
        128,
    )
    settings, owt = config.optimizer, experiment is owt_imagenet
    assert (settings.momentum, settings.nesterov, settings.weight_decay, settings.clip_norm) == (
        0.9,
        False,
        5e-4,
        0,
    )
    assert (settings.bias_rate, settings.scaling, config.epochs) == (2 if owt else 1, owt, 90)
    assert (config.model.dropout, config.label_smoothing, config.data.colour_noise) == (0.5, 0, 0.1)
    assert config.eval.views == ("one" if owt else "ten")
    config.batch_size, config.mesh.data, config.mesh.model = 32, 1, 2
    config.dense_microbatch //= 4
    classes = 10 if "imagenette" in variant else 1000
    data = dataclasses.replace(
        photographs,
        class_names=photographs.class_names[:classes],
        train_labels=photographs.train_labels % classes,
        test_labels=photographs.test_labels % classes,
    )
    got = build.prepare(config, data=data)
    assert sum(x.size for x in jax.tree.leaves(got.functions.abstract_state.params)) == parameters
    seen = got.functions.preprocessing
    assert seen.colour_CC is not None
    assert (seen.crop, seen.crop_pad, seen.flip) == (224, 0, True)
    k = 4 if owt else 1  # a batch k times 128: k times the rate
    schedule = optim.make_schedule(settings, 1000, 128 * 4)
    warmup = 50 if owt else 0
    steps = [
        round(warmup + share * (1000 - warmup)) for share in (0, 0.249, 0.251, 0.501, 0.751, 1)
    ]
    rates = [float(schedule(step)) / 0.01 / k for step in steps]
    factor = 250 ** (-1 / 3) if owt else 0.1
    assert rates == pytest.approx([1, 1, factor, factor**2, factor**3, factor**3])


@pytest.mark.parametrize("variant", ["", "variable"])
def test_one_weird_tricks_question_on_cifar10(variant):
    """Its recipe on small images; data, length and checkpoints differ."""
    here, there = (
        configs.flat(get(variant).to_dict())
        for get in (owt_cifar.get_config, owt_imagenet.get_config)
    )
    differ = {
        field for field in here if here[field] != there[field] and not field.startswith("data.")
    }
    assert differ == {"experiment", "epochs", "eval.every_epochs", "checkpoint.every_epochs"}
    assert (here["epochs"], here["data.fallback"]) == (60, "")
    of_alexnet = configs.flat(alexnet_cifar.get_config().to_dict())
    assert [
        field for field in here if field.startswith("data.") and here[field] != of_alexnet[field]
    ] == ["data.fallback"]


# Published rates: of linear scaling for 128 and 512, of LARS and LARC for 1K and 8K.
RATES_OF_LARGE_BATCHES = {
    "linear": {128: 0.01},
    "linear_bn": {512: 0.08},
    "lars": {1024: 2, 8192: 10},
    "larc_bn_imagenette": {1024: 2, 8192: 10},
}


@pytest.mark.parametrize("variant", RATES_OF_LARGE_BATCHES)
def test_large_batches(variant, few):
    """Five epochs of warm-up to published rates, then a decay of power 2 over the others."""
    config = large_batch_cifar.get_config(variant)
    rule, *rest = variant.split("_")
    name = "imagenette" if "imagenette" in rest else "cifar"
    assert config.experiment == "_".join(["large_batch", name, rule, *["bn"] * ("bn" in rest)])
    assert config.data.name == name.replace("cifar", "cifar10")
    assert (config.model.name == "alexnet_bn") == ("bn" in rest)
    side = 256 if "imagenette" in rest else 32
    images = np.broadcast_to(np.zeros((), np.uint8), (50_000, side, side, 3))
    data = dataclasses.replace(few, train_images=images)
    for batch_size, rate in RATES_OF_LARGE_BATCHES[variant].items():
        steps_per_epoch = len(images) // batch_size
        config.batch_size = batch_size
        settings = configs.resolve(config, data, "cpu").optimizer
        schedule = optim.make_schedule(settings, 100 * steps_per_epoch, batch_size)
        rates = [float(schedule(epochs * steps_per_epoch)) for epochs in (2.5, 5, 52.5, 100)]
        assert rates == pytest.approx([rate / 2, rate, rate / 4, 0], rel=0.06)


@pytest.mark.parametrize("variant", ["lars", "larc_bn"])
def test_large_batches_can_be_set_up(variant, few):
    build.prepare(large_batch_cifar.get_config(variant), data=few)


@pytest.mark.parametrize("variant", ["sgd", "lars_larc", "imagenette_bn", "lars_", "bn_bn"])
def test_unknown_variants_of_large_batches(variant):
    with pytest.raises(
        UserError, match=f"large_batch_cifar.py:{variant}: unknown variant, .* larc"
    ):
        large_batch_cifar.get_config(variant)


@pytest.mark.parametrize("experiment", [alexnet_2012_imagenet, owt_imagenet])
def test_unknown_variants_of_imagenet(experiment):
    with pytest.raises(
        ValueError, match=r"imagenet.py:fast: unknown variant, expected .*imagenette"
    ):
        experiment.get_config("fast")


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.py")), ids=lambda p: p.stem)
def test_measured_figures_stand_in_the_results_pages_only(path):
    """An experiment names the page; means and spreads of runs are not typed again."""
    text = path.read_text()
    assert re.search(r"results/\w+\.md", text)
    assert "±" not in text
    assert "n = " not in text
