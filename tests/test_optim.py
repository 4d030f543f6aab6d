"""Optimizers and schedules compared with formulas, on meshes, and those of a user's own."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import (
    assert_close,
    gather,
    narrow,  # noqa: F401  (a fixture)
    setup_of,
)

from cnn_spmd import config as configs
from cnn_spmd.analysis import hlo
from cnn_spmd.errors import UserError
from cnn_spmd.training import build, optim

# Plain SGD at a constant rate of 1.
PLAIN = dict(
    warmup=0.0,
    decay="constant",
    learning_rate=1.0,
    momentum=0.0,
    nesterov=False,
    weight_decay=0.0,
    clip_norm=0.0,
)


def filled(tree, value: float):
    """Return a tree of the same shapes, each element `value`."""
    return jax.tree.map(functools.partial(jnp.full_like, fill_value=value), tree)


def optimizer_of(config, steps, batch_size=128):
    """Return the config's optimizer, with the config's learning rate by step."""
    schedule = optim.make_schedule(config.optimizer, steps, batch_size)
    return optim.make_optimizer(config.optimizer, schedule)


def params_after(optimizer, params, gradients):
    """Return the parameters after a step along each of `gradients`."""
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


# ---- Schedules.


@pytest.mark.parametrize("decay", ["linear", "polynomial", "cosine", "constant", "staged"])
def test_schedule(config, decay):
    config.optimizer.update(
        dict(
            learning_rate=0.4,
            warmup=0.25,
            decay=decay,
            power=3.0,
            stages=(0.3, 0.7),
            stage_factor=0.5,
        )
    )
    schedule = optim.make_schedule(config.optimizer, 100)
    rates = [float(schedule(step)) for step in (0, 10, 25, 62.5, 100)]
    later = dict(
        linear=[0.2, 0],
        polynomial=[0.05, 0],
        cosine=[0.2, 0],
        constant=[0.4, 0.4],
        staged=[0.2, 0.1],
    )
    np.testing.assert_allclose(rates, [0, 0.16, 0.4, *later[decay]], atol=1e-6)


def test_unknown_schedules_are_refused(config):
    config.optimizer.decay = "steps"
    expected = (
        r"optimizer\.decay=steps: unknown, expected one of linear, .*, constant, staged; if an"
    )
    with pytest.raises(UserError, match=expected):
        optim.make_schedule(config.optimizer, 100)


def test_a_schedule_of_ones_own(config, monkeypatch):
    """It gets the scaled rate and the steps after the warm-up, which is before it."""

    def halving(rate, settings, steps):
        return lambda count: rate * 0.5 ** (settings.options["halvings"] * count / steps)

    monkeypatch.setitem(optim.SCHEDULES, "halving", halving)
    config.optimizer.update(
        dict(
            decay="halving",
            options={"halvings": 2.0},
            learning_rate=0.1,
            warmup=0.2,
            scaling=1.0,
        )
    )
    schedule = optim.make_schedule(config.optimizer, 100, 4 * 128)
    rates = [float(schedule(step)) for step in (0, 10, 20, 60, 100)]
    np.testing.assert_allclose(rates, [0, 0.2, 0.4, 0.2, 0.1], rtol=1e-6)


@pytest.mark.parametrize("stages", [(0.5, 0.25), (0.5, 0.5), (0.0,), (1.5,), ("half",)])
def test_stages_that_are_refused(config, stages):
    config.optimizer.stages = stages
    with pytest.raises(UserError, match=r"optimizer\.stages=.* expected ascending shares"):
        optim.make_schedule(config.optimizer, 100)


def test_stages_are_exact_epochs(config):
    """Shares of the steps say 120 and 130 of 140 epochs of 390 steps, to the step."""
    config.optimizer.update(
        dict(
            learning_rate=1.0,
            warmup=0.0,
            decay="staged",
            stages=(120 / 140, 130 / 140),
            stage_factor=0.1,
        )
    )
    schedule = optim.make_schedule(config.optimizer, 140 * 390)
    begins = [epoch * 390 for epoch in (120, 130)]
    rates = [float(schedule(step)) for begin in begins for step in (begin - 1, begin)]
    np.testing.assert_allclose(rates, [1, 0.1, 0.1, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("warmup", "steps", "rates"),
    [
        # Stages begin at steps 0, 1 and 2.
        (0.0, 2, [0.1, 0.01]),
        # Two stages begin at step 0, and one after the end.
        (0.0, 1, [0.01]),
        (0.0, 4, [1, 0.1, 0.01, 0.001]),
        # The shares are those of the two steps after the warm-up.
        (0.5, 4, [0, 0.5, 0.1, 0.01]),
    ],
)
def test_every_stage_of_a_short_run_counts(config, warmup, steps, rates):
    config.optimizer.update(
        dict(
            learning_rate=1.0,
            warmup=warmup,
            decay="staged",
            stages=(0.25, 0.5, 0.75),
            stage_factor=0.1,
        )
    )
    schedule = optim.make_schedule(config.optimizer, steps)
    np.testing.assert_allclose([float(schedule(step)) for step in range(steps)], rates, rtol=1e-6)


@pytest.mark.parametrize(("scaling", "times"), [(0.0, 1), (0.5, 2), (1.0, 4)])
def test_the_rate_grows_with_the_batch(config, scaling, times):
    """Krizhevsky 2014, section 5: by k or its root for a batch k times 128.

    In the warm-up and in the decay.
    """
    config.optimizer.update(dict(learning_rate=0.1, warmup=0.5, decay="linear", scaling=scaling))
    schedule = optim.make_schedule(config.optimizer, 100, 4 * 128)
    rates = [float(schedule(step)) for step in (25, 50, 75)]
    np.testing.assert_allclose(rates, np.array([0.05, 0.1, 0.05]) * times, rtol=1e-6)


def test_the_warmup_is_rounded_to_whole_steps(config):
    """In floating point, 0.29 * 100 is a little less than 29."""
    config.optimizer.update(dict(learning_rate=0.4, warmup=0.29, decay="constant"))
    schedule = optim.make_schedule(config.optimizer, 100)
    assert float(schedule(28)) == pytest.approx(0.4 * 28 / 29)


# Of `setup_of`: 4 steps an epoch, 10 steps in all.
@pytest.mark.parametrize(
    ("given", "steps"), [({}, 0), (dict(warmup_steps=3), 3), (dict(warmup_epochs=1.5), 6)]
)
def test_the_warmup_in_steps_and_epochs(given, steps):
    """Epochs become steps; the first rate that is not lower is that after the warm-up."""
    setup = setup_of("simple_cnn", "data", (1, 1), optimizer=dict(given, decay="constant"))
    settings = setup.config.optimizer
    assert (settings.warmup_steps, settings.warmup_epochs) == (steps, 0)
    schedule = optim.make_schedule(settings, 10)
    rates = [float(schedule(step)) / settings.learning_rate for step in range(10)]
    expected = [min(1, step / steps if steps else 1) for step in range(10)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "value"), [("steps", 11), ("epochs", 2.75)])
def test_a_warmup_longer_than_the_run_is_refused(name, value):
    expected = rf"optimizer\.warmup_{name}={value}: .* of 11 steps, expected at most the run's 10:"
    with pytest.raises(UserError, match=expected):
        setup_of("simple_cnn", "data", (1, 1), optimizer={f"warmup_{name}": value})


def test_a_warmup_at_a_constant_rate(config):
    config.optimizer.update(
        dict(learning_rate=0.4, warmup_steps=3, warmup_factor=0.1, decay="constant")
    )
    schedule = optim.make_schedule(config.optimizer, 10)
    rates = [float(schedule(step)) for step in range(5)]
    assert rates == pytest.approx([0.04, 0.04, 0.04, 0.4, 0.4])


def test_two_warmups_are_refused(config):
    config.optimizer.update(dict(warmup=0.25, warmup_steps=3))
    expected = "optimizer.warmup=0.25, optimizer.warmup_steps=3: expected one of them, and 0 in"
    with pytest.raises(UserError, match=re.escape(expected)):
        configs.validate(config)


# ---- SGD.


@pytest.mark.parametrize(("nesterov", "decay_all"), [(True, False), (False, False), (False, True)])
def test_sgd_against_numpy(config, nesterov, decay_all):
    """As in Krizhevsky et al. 2012, section 5, also Nesterov.

    Biases and scales decay only with decay_all.
    """
    config.optimizer.update(
        dict(PLAIN, learning_rate=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    )
    config.optimizer.decay_all = decay_all
    optimizer = optimizer_of(config, 100)
    params = dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full(2, 3.0), scale=jnp.full(2, 3.0))
    gradients = (1.0, -0.5, 0.25)
    params = params_after(optimizer, params, [filled(params, each) for each in gradients])
    of_vectors = 0.01 if decay_all else 0.0
    for name, decay in (("kernel", 0.01), ("bias", of_vectors), ("scale", of_vectors)):
        weight, momentum = 3.0, 0.0
        for gradient in gradients:
            gradient += decay * weight
            momentum = 0.9 * momentum + gradient
            weight -= 0.1 * (gradient + 0.9 * momentum if nesterov else momentum)
        np.testing.assert_allclose(params[name], weight, rtol=1e-6, err_msg=name)


def test_rates_and_decays_of_layers_and_biases(config):
    """cuda-convnet's epsB = 2 epsW and wc by layer: two steps by hand.

    A parameter is a bias by its name, whatever its shape.
    """
    config.optimizer.update(
        dict(
            PLAIN,
            learning_rate=0.1,
            momentum=0.5,
            weight_decay=0.01,
            weight_decays=dict(fc3=0.2),
            bias_rate=2.0,
            layer_rates=dict(fc3=0.25),
        )
    )
    optimizer = optimizer_of(config, 100)
    layer = dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full((2, 2), 3.0))
    params = dict(local1=layer, fc3=layer)
    params = params_after(optimizer, params, [filled(params, 1.0)] * 2)
    for layer, name, rate, decay in (
        ("local1", "kernel", 0.1, 0.01),
        ("local1", "bias", 0.2, 0.0),
        ("fc3", "kernel", 0.025, 0.2),
        ("fc3", "bias", 0.05, 0.0),
    ):
        first = 1 + decay * 3
        weight = 3 - rate * first
        weight -= rate * (0.5 * first + 1 + decay * weight)
        got = params[layer][name]
        np.testing.assert_allclose(got, weight, rtol=1e-6, err_msg=f"{layer} {name}")


def test_a_gradient_is_no_longer_than_clip_norm(config):
    """Over all parameters: 3, 4 and 12 have the length 13; the direction stays."""
    params = {"fc1": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)}}
    grads = {"fc1": {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([12.0])}}
    for clip_norm, times in ((0.0, 1), (1.3, 0.1), (20.0, 1)):
        config.optimizer.update(dict(PLAIN, clip_norm=clip_norm))
        optimizer = optimizer_of(config, 10)
        layer = params_after(optimizer, params, [grads])["fc1"]
        np.testing.assert_allclose(layer["kernel"], [[-3 * times, -4 * times]], rtol=1e-6)
        np.testing.assert_allclose(layer["bias"], [-12 * times], rtol=1e-6)


def one_update(config, gradient, weight=0.0, batch_size=128, **settings):
    """Return what one step of plain SGD adds to a weight."""
    config.optimizer.update(PLAIN | settings)
    optimizer = optimizer_of(config, 10, batch_size)
    params = {"fc1": {"kernel": jnp.full((1, 1), weight)}}
    after = params_after(optimizer, params, [filled(params, gradient)])
    return float(after["fc1"]["kernel"][0, 0]) - weight


def test_the_decay_is_not_clipped(config):
    got = one_update(config, 13.0, 100.0, weight_decay=1.0, clip_norm=1.3)
    assert got == pytest.approx(-(1.3 + 100))


def test_scaling_reaches_the_optimizer(config):
    got = one_update(config, 1.0, batch_size=4 * 128, learning_rate=0.1, scaling=1.0)
    assert got == pytest.approx(-0.4)


# ---- The other optimizers, by hand.

STEPS = 4
RATES = 0.5 * (1 - np.arange(STEPS) / STEPS)  # linear decay from 0.5
MOMENTUM, BETA2, TRUST = 0.8, 0.9, 0.1


def lars_by_hand(weight, gradients, decay, combine=np.multiply):
    """You, Gitman, Ginsburg 2017, algorithm 1; a weight of zeros has the local rate eta."""
    velocity = 0.0
    for gradient, rate in zip(gradients, RATES, strict=True):
        of_weight, of_gradient = np.linalg.norm(weight), np.linalg.norm(gradient)
        local = TRUST
        if of_weight:
            local = TRUST * of_weight / (of_gradient + decay * of_weight)
        velocity = MOMENTUM * velocity + combine(rate, local) * (gradient + decay * weight)
        weight = weight - velocity
    return weight


def larc_by_hand(weight, gradients, decay):
    return lars_by_hand(weight, gradients, decay, np.minimum)


def adamw_by_hand(weight, gradients, decay, beta1=MOMENTUM, beta2=BETA2, nesterov=False):
    """Loshchilov and Hutter 2019, algorithm 2; optax has Dozat's form of Nesterov's momentum."""
    mean, square = 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        direction = corrected(mean, gradient, beta1, step, nesterov)
        direction /= np.sqrt(square / (1 - beta2**step)) + 1e-8
        weight = weight - rate * (direction + decay * weight)
    return weight


def corrected(mean, gradient, beta, step, nesterov):
    """Return a running mean, corrected for its start at 0; optionally in Nesterov's form."""
    if not nesterov:
        return mean / (1 - beta**step)
    ahead = beta * mean / (1 - beta ** (step + 1))
    return ahead + (1 - beta) * gradient / (1 - beta**step)


def muon_by_hand(weight, gradients, decay):
    """Jordan et al. 2024, of a matrix or convolution; the size is 0.2 as in Liu et al. 2025."""
    mean = 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, RATES, strict=True), 1):
        mean = MOMENTUM * mean + (1 - MOMENTUM) * gradient
        x = corrected(mean, gradient, MOMENTUM, step, True).reshape(-1, weight.shape[-1])
        x /= np.linalg.norm(x) + 1e-8
        for _ in range(5):
            square = x.T @ x
            x = 3.4445 * x + x @ (-4.7750 * square + 2.0315 * square @ square)
        direction = 0.2 * np.sqrt(max(x.shape)) * x.reshape(weight.shape)
        weight = weight - rate * (direction + decay * weight)
    return weight


BY_HAND = dict(lars=lars_by_hand, larc=larc_by_hand, adamw=adamw_by_hand, muon=muon_by_hand)
ADAMW_IN_MUON = functools.partial(adamw_by_hand, beta1=0.9, nesterov=True)


@pytest.mark.parametrize("name", BY_HAND)
def test_optimizers_by_hand(config, name):
    """Four steps of a falling rate, in float64; the biases begin at 0 and do not decay."""
    config.optimizer.update(
        dict(
            name=name,
            warmup=0.0,
            decay="linear",
            learning_rate=0.5,
            momentum=MOMENTUM,
            nesterov=name == "muon",
            beta2=BETA2,
            trust=TRUST,
            weight_decay=0.01,
            weight_decays=dict(fc3=0.2),
            clip_norm=0.0,
        )
    )
    random = np.random.default_rng(0)
    shapes = dict(conv1=(3, 3, 2, 4), fc1=(8, 6), fc3=(6, 3))
    params = {
        layer: dict(kernel=random.normal(size=shape), bias=np.zeros(shape[-1]))
        for layer, shape in shapes.items()
    }
    gradients = [jax.tree.map(lambda x: random.normal(size=x.shape), params) for _ in range(STEPS)]
    with jax.enable_x64(True):
        optimizer = optimizer_of(config, STEPS)
        got = params_after(optimizer, jax.tree.map(jnp.asarray, params), gradients)
    for layer, of_layer in params.items():
        for part, weight in of_layer.items():
            by_hand = BY_HAND[name]
            if name == "muon" and (part == "bias" or layer == "fc3"):
                by_hand = ADAMW_IN_MUON
            decay = {"bias": 0.0, "kernel": 0.2 if layer == "fc3" else 0.01}[part]
            expected = by_hand(weight, [each[layer][part] for each in gradients], decay)
            np.testing.assert_allclose(got[layer][part], expected, 1e-9, err_msg=f"{layer} {part}")


# ---- On meshes.


def updated(name, parallelism, shape):
    """Return parameters after two updates in float64 on a mesh, and the collectives of one."""
    settings = dict(name=name, learning_rate=0.1, trust=0.1, clip_norm=0.0)
    setup = setup_of("alexnet", parallelism, shape, optimizer=settings)
    functions, random = setup.functions, np.random.default_rng(0)
    optimizer = functions.make_optimizer(setup.schedule)
    abstract = functions.abstract_state.params

    def drawn():
        return jax.tree.map(
            lambda x: jax.device_put(random.normal(size=x.shape), x.sharding), abstract
        )

    params = drawn()
    state = jax.jit(optimizer.init)(params)
    update = jax.jit(functools.partial(functions.update, optimizer))
    compiled = update.lower(drawn(), state, params).compile()
    for _ in range(2):
        params, state = compiled(drawn(), state, params)
    module = hlo.Module(compiled.as_text(), dict(setup.place.mesh.shape))
    return gather(params), module.collectives()


@pytest.mark.parametrize("name", ["lars", "larc", "muon"])
def test_a_norm_of_a_split_weight_is_that_of_the_whole(name):
    """Updates under hybrid, dense_2d and of weights split at rest are those of one device.

    LARS and LARC add one scalar for the weight and one for the gradient, per split parameter and
    mesh axis.
    """
    # How many parameters mesh axes split: under hybrid the kernels and biases of fc1 and fc2, and
    # the kernel of fc3; under dense_2d the three kernels, and a bias as its kernel's columns; at
    # rest all kernels.
    split = {
        "hybrid": {("model",): 5},
        "dense_2d": {("model",): 3 + 2, ("data",): 3 + 1},
        "sharded_update": {("data", "model"): 8},
    }
    with jax.enable_x64(True):
        one, _ = updated(name, "data", (1, 1))
        many = {scheme: updated(name, scheme, (4, 2)) for scheme in split}
    for scheme, (params, collectives) in many.items():
        assert_close(params, one, 1e-12)
        if name == "muon":
            assert {each.operation for each in collectives} > {"all-reduce"}
            continue
        assert {each.operation for each in collectives} == {"all-reduce"}
        moved = collections.Counter()
        for each in collectives:
            moved[each.axes] += each.bytes
        scalars = 2 * np.dtype(float).itemsize
        assert moved == {axes: count * scalars for axes, count in split[scheme].items()}


def test_the_closed_form_does_not_cover_muon_on_split_weights():
    """Its update moves matrices, which no rule describes; whole weights it moves as SGD does."""
    setup = setup_of("simple_cnn", "model", (1, 2), dtype="float32", optimizer=dict(name="muon"))
    reason = setup.report()["closed_form_not_covered"]
    assert reason == "optimizer.name=muon multiplies conv1.kernel, which is split, in its update"
    setup = setup_of("simple_cnn", "data", (2, 1), dtype="float32", optimizer=dict(name="muon"))
    (row,) = setup.report()["communication"]
    assert row["compiled_bytes"] == pytest.approx(row["closed_form_bytes"], abs=100)


# ---- Optimizers of a user's own.


def lion(settings, rate):
    """Lion, with a number of its own; one transformation, not a tuple."""
    return optax.lion(rate, b2=settings.options["b2"], weight_decay=settings.weight_decay)


@pytest.fixture
def known_lion(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "lion", lion)


OF_LION = dict(name="lion", options={"b2": 0.7}, weight_decay=0.1)


def test_an_optimizer_of_ones_own(config, known_lion):
    """Three steps of Lion by hand (Chen et al. 2023), with rates by layer."""
    config.optimizer.update(dict(PLAIN, **OF_LION, bias_rate=2.0, layer_rates=dict(fc3=0.25)))
    optimizer = optimizer_of(config, 10)
    layer = dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full(2, 3.0))
    params = dict(fc1=layer, fc3=layer)
    gradients = (1.0, -0.03, -0.5)
    params = params_after(optimizer, params, [filled(params, each) for each in gradients])
    for layer, name, rate in (
        ("fc1", "kernel", 1.0),
        ("fc1", "bias", 2.0),
        ("fc3", "kernel", 0.25),
        ("fc3", "bias", 0.5),
    ):
        weight, mean = 3.0, 0.0
        for gradient in gradients:
            direction = np.sign(0.9 * mean + 0.1 * gradient)
            weight -= rate * (direction + 0.1 * weight)
            mean = 0.7 * mean + 0.3 * gradient
        got = params[layer][name]
        np.testing.assert_allclose(got, weight, rtol=1e-5, err_msg=f"{layer} {name}")


def test_an_optimizer_of_ones_own_trains_on_a_mesh(known_lion):
    """Its state lies where the weights do, and the numbers are those of one device."""

    def trained(parallelism, shape):
        setup = setup_of("simple_cnn", parallelism, shape, optimizer=OF_LION)
        state, metrics = setup.train(setup.init(), 2)
        return state, metrics["loss"]

    with jax.enable_x64(True):
        (one, expected), (many, losses) = trained("data", (1, 1)), trained("hybrid", (2, 2))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    kernel = many.params["fc3"]["kernel"][...]
    assert not kernel.sharding.is_fully_replicated
    moments = optax.tree_utils.tree_get(many.optimizer, "mu")
    assert moments["fc3"]["kernel"][...].sharding == kernel.sharding
    np.testing.assert_allclose(kernel, one.params["fc3"]["kernel"][...], rtol=1e-4, atol=1e-6)


def of_updates(change):
    """Return an optimizer whose updates are changed gradients."""
    return lambda *_: optax.stateless(lambda grads, _: jax.tree.map(change, grads))


@pytest.mark.parametrize(
    ("mine", "problem"),
    [
        (lambda *_: None, "returns NoneType, expected an optax transformation, or a tuple of some"),
        (lambda *_: (), "returns tuple, expected"),
        (lambda *_: lambda grads: grads, "returns function, expected"),
        (lambda *_: [optax.sgd(0.1), optax.sgd], "returns function, expected"),
        (
            of_updates(jnp.mean),
            r"its update of conv1.bias is float32 \(\), expected float32 \(32,\)",
        ),
        (of_updates(lambda grad: grad.astype(jnp.float16)), "its update of conv1.bias is float16"),
        (of_updates(lambda grad: jnp.sign(grad).astype(int)), r"its update of .* is int32 \(32,\)"),
        (
            lambda *_: optax.stateless(lambda *_: 0.0),
            "its update is no tree as the parameters are: ",
        ),
    ],
)
def test_what_is_no_optimizer_is_refused(config, mine, problem, monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "mine", mine)
    config.optimizer.name = "mine"
    with pytest.raises(UserError, match=f"^optimizer.name=mine: {problem}"):
        build.prepare(config)


def test_any_transformations_of_optax_make_an_optimizer(config, monkeypatch):
    def by_rank(params):
        return jax.tree.map(lambda param: "many" if param.ndim > 1 else "one", params)

    def parts(settings, rate):
        each = dict(many=optax.contrib.muon(rate), one=optax.adamw(rate))
        return optax.partition(each, by_rank)

    monkeypatch.setitem(optim.OPTIMIZERS, "muons", optim.muon)
    monkeypatch.setitem(optim.OPTIMIZERS, "parts", parts)
    for name in ("muons", "parts"):
        config.optimizer.name = name
        build.prepare(config)


def test_unknown_optimizers_are_refused(config, known_lion):
    config.optimizer.name = "adam"
    expected = r"optimizer\.name=adam: unknown; .*adamw.* Expected one of sgd, .*, muon, lion; if"
    with pytest.raises(UserError, match=expected):
        optimizer_of(config, 10)
