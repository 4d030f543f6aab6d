"""Optimizers and schedules compared with formulas, and those of a user's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from setups import setup_of

from cnn_spmd.errors import UserError
from cnn_spmd.training import optim

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


def params_after(optimizer, params, gradients):
    """Return the parameters after a step along each of `gradients`."""
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


# ---- Schedules.


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant", "staged"])
def test_schedule(config, decay):
    config.optimizer.update(
        dict(learning_rate=0.4, warmup=0.25, decay=decay, stages=(0.3, 0.7), stage_factor=0.5)
    )
    schedule = optim.make_schedule(config.optimizer, 100)
    rates = [float(schedule(step)) for step in (0, 10, 25, 62.5, 100)]
    later = dict(linear=[0.2, 0], cosine=[0.2, 0], constant=[0.4, 0.4], staged=[0.2, 0.1])[decay]
    np.testing.assert_allclose(rates, [0, 0.16, 0.4, *later], atol=1e-6)


def test_unknown_schedules_are_refused(config):
    config.optimizer.decay = "steps"
    expected = r"optimizer\.decay=steps: unknown, expected one of linear, cosine, constant, staged$"
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


# ---- SGD.


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_against_numpy(config, nesterov):
    """As in Krizhevsky et al. 2012, section 5, also Nesterov; biases do not decay."""
    config.optimizer.update(
        dict(PLAIN, learning_rate=0.1, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    )
    optimizer = optim.make_optimizer(config.optimizer, 100)
    params = dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full((2,), 3.0))
    gradients = (1.0, -0.5, 0.25)
    params = params_after(optimizer, params, [filled(params, each) for each in gradients])
    for name, decay in (("kernel", 0.01), ("bias", 0.0)):
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
    optimizer = optim.make_optimizer(config.optimizer, 100)
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
        optimizer = optim.make_optimizer(config.optimizer, 10)
        layer = params_after(optimizer, params, [grads])["fc1"]
        np.testing.assert_allclose(layer["kernel"], [[-3 * times, -4 * times]], rtol=1e-6)
        np.testing.assert_allclose(layer["bias"], [-12 * times], rtol=1e-6)


def one_update(config, gradient, weight=0.0, batch_size=128, **settings):
    """Return what one step of plain SGD adds to a weight."""
    config.optimizer.update(PLAIN | settings)
    optimizer = optim.make_optimizer(config.optimizer, 10, batch_size)
    params = {"fc1": {"kernel": jnp.full((1, 1), weight)}}
    after = params_after(optimizer, params, [filled(params, gradient)])
    return float(after["fc1"]["kernel"][0, 0]) - weight


def test_the_decay_is_not_clipped(config):
    got = one_update(config, 13.0, 100.0, weight_decay=1.0, clip_norm=1.3)
    assert got == pytest.approx(-(1.3 + 100))


def test_scaling_reaches_the_optimizer(config):
    got = one_update(config, 1.0, batch_size=4 * 128, learning_rate=0.1, scaling=1.0)
    assert got == pytest.approx(-0.4)


# ---- Optimizers of a user's own.


def adamw(settings, rate):
    """AdamW, with a number of its own."""
    return (optax.adamw(rate, b2=settings.options["b2"], weight_decay=settings.weight_decay),)


@pytest.fixture
def known_adamw(monkeypatch):
    monkeypatch.setitem(optim.OPTIMIZERS, "adamw", adamw)


OF_ADAMW = dict(name="adamw", options={"b2": 0.9}, weight_decay=0.1)


def test_an_optimizer_of_ones_own(config, known_adamw):
    """Two steps of AdamW by hand (Loshchilov and Hutter 2019), with rates by layer."""
    config.optimizer.update(dict(PLAIN, **OF_ADAMW, bias_rate=2.0, layer_rates=dict(fc3=0.25)))
    optimizer = optim.make_optimizer(config.optimizer, 10)
    layer = dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full(2, 3.0))
    params = dict(fc1=layer, fc3=layer)
    gradients = (1.0, -0.5)
    params = params_after(optimizer, params, [filled(params, each) for each in gradients])
    for layer, name, rate in (
        ("fc1", "kernel", 1.0),
        ("fc1", "bias", 2.0),
        ("fc3", "kernel", 0.25),
        ("fc3", "bias", 0.5),
    ):
        weight, mean, square = 3.0, 0.0, 0.0
        for step, gradient in enumerate(gradients, 1):
            mean = 0.9 * mean + 0.1 * gradient
            square = 0.9 * square + 0.1 * gradient**2
            direction = mean / (1 - 0.9**step) / (np.sqrt(square / (1 - 0.9**step)) + 1e-8)
            weight -= rate * (direction + 0.1 * weight)
        got = params[layer][name]
        np.testing.assert_allclose(got, weight, rtol=1e-5, err_msg=f"{layer} {name}")


def test_an_optimizer_of_ones_own_trains_on_a_mesh(known_adamw):
    """Its state lies where the weights do, and the numbers are those of one device."""

    def trained(parallelism, shape):
        setup = setup_of("simple_cnn", parallelism, shape, optimizer=OF_ADAMW)
        state, metrics = setup.train(setup.init(), 2)
        return state, metrics["loss"]

    with jax.enable_x64(True):
        (one, expected), (many, losses) = trained("data", (1, 1)), trained("hybrid", (2, 2))
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    kernel = many.params["fc3"]["kernel"][...]
    assert not kernel.sharding.is_fully_replicated
    for name in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(many.optimizer, name)
        assert moments["fc3"]["kernel"][...].sharding == kernel.sharding
    np.testing.assert_allclose(kernel, one.params["fc3"]["kernel"][...], rtol=1e-4, atol=1e-6)


def test_unknown_optimizers_are_refused(config, known_adamw):
    config.optimizer.name = "adam"
    expected = r"optimizer\.name=adam: unknown, expected one of sgd, adamw$"
    with pytest.raises(UserError, match=expected):
        optim.make_optimizer(config.optimizer, 10)
