import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cnn_spmd.errors import UserError
from cnn_spmd.training import optim


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant", "staged"])
def test_schedule(config, decay):
    config.optimizer.update(
        dict(learning_rate=0.4, warmup=0.25, decay=decay, stages=(0.3, 0.7), stage_factor=0.5)
    )
    rates = [
        float(optim.make_schedule(config.optimizer, 100)(step)) for step in (0, 10, 25, 62.5, 100)
    ]
    later = dict(linear=[0.2, 0], cosine=[0.2, 0], constant=[0.4, 0.4], staged=[0.2, 0.1])[decay]
    np.testing.assert_allclose(rates, [0, 0.16, 0.4, *later], atol=1e-6)


def test_schedule_refuses(config):
    config.optimizer.decay = "steps"
    with pytest.raises(UserError, match=r"optimizer\.decay=steps"):
        optim.make_schedule(config.optimizer, 100)


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
    rates = [
        float(schedule(step)) for epoch in (120, 130) for step in (epoch * 390 - 1, epoch * 390)
    ]
    np.testing.assert_allclose(rates, [1, 0.1, 0.1, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("warmup", "steps", "rates"),
    [
        (0.0, 2, [0.1, 0.01]),  # stages begin at steps 0, 1 and 2
        (0.0, 1, [0.01]),  # twice at step 0, and once after the end
        (0.0, 4, [1, 0.1, 0.01, 0.001]),
        (0.5, 4, [0, 0.5, 0.1, 0.01]),
    ],
)  # the shares are those of the two steps after the warm-up
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
    """Krizhevsky 2014, section 5: by k or its root for a batch k times 128, in the warm-up and in what follows."""
    config.optimizer.update(dict(learning_rate=0.1, warmup=0.5, decay="linear", scaling=scaling))
    schedule = optim.make_schedule(config.optimizer, 100, 4 * 128)
    np.testing.assert_allclose(
        [float(schedule(step)) for step in (25, 50, 75)],
        np.array([0.05, 0.1, 0.05]) * times,
        rtol=1e-6,
    )


def test_rates_and_decays_of_layers_and_biases(config):
    """cuda-convnet's epsB = 2 epsW and wc a layer: by hand, two steps; a bias is one by its name, whatever its shape."""
    config.optimizer.update(
        dict(
            learning_rate=0.1,
            warmup=0.0,
            decay="constant",
            momentum=0.5,
            nesterov=False,
            weight_decay=0.01,
            weight_decays=dict(fc3=0.2),
            bias_rate=2.0,
            layer_rates=dict(fc3=0.25),
            clip_norm=0.0,
        )
    )
    optimizer = optim.make_optimizer(config.optimizer, 100)
    params = {
        layer: dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full((2, 2), 3.0))
        for layer in ("local1", "fc3")
    }
    state, ones = optimizer.init(params), jax.tree.map(jnp.ones_like, params)
    for _ in range(2):
        updates, state = optimizer.update(ones, state, params)
        params = optax.apply_updates(params, updates)
    for layer, name, rate, decay in (
        ("local1", "kernel", 0.1, 0.01),
        ("local1", "bias", 0.2, 0.0),
        ("fc3", "kernel", 0.025, 0.2),
        ("fc3", "bias", 0.05, 0.0),
    ):
        first = 1 + decay * 3
        weight = 3 - rate * first
        weight -= rate * (0.5 * first + 1 + decay * weight)
        np.testing.assert_allclose(
            params[layer][name], weight, rtol=1e-6, err_msg=f"{layer} {name}"
        )


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_against_numpy(config, nesterov):
    """Momentum, Nesterov and decay as Krizhevsky et al. 2012, section 5, has them; biases are not decayed."""
    config.optimizer.update(
        dict(
            learning_rate=0.1,
            warmup=0.0,
            decay="constant",
            momentum=0.9,
            nesterov=nesterov,
            weight_decay=0.01,
            clip_norm=0.0,
        )
    )
    optimizer = optim.make_optimizer(config.optimizer, 100)
    params = dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full((2,), 3.0))
    state = optimizer.init(params)
    expected, momenta = dict(kernel=3.0, bias=3.0), dict(kernel=0.0, bias=0.0)
    for gradient in (1.0, -0.5, 0.25):
        updates, state = optimizer.update(
            {name: jnp.full_like(p, gradient) for name, p in params.items()}, state, params
        )
        params = {name: params[name] + updates[name] for name in params}
        for name, decay in (("kernel", 0.01), ("bias", 0.0)):
            g = gradient + decay * expected[name]
            momenta[name] = 0.9 * momenta[name] + g
            expected[name] -= 0.1 * (g + 0.9 * momenta[name] if nesterov else momenta[name])
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)


def test_a_gradient_is_no_longer_than_clip_norm(config):
    """Over all parameters together: 3, 4 and 12 have the length 13; the direction stays."""
    config.optimizer.update(
        dict(
            warmup=0.0,
            decay="constant",
            learning_rate=1.0,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
        )
    )
    params = {"fc1": {"kernel": jnp.zeros((1, 2)), "bias": jnp.zeros(1)}}
    grads = {"fc1": {"kernel": jnp.array([[3.0, 4.0]]), "bias": jnp.array([12.0])}}

    def update(clip_norm):
        config.optimizer.clip_norm = clip_norm
        optimizer = optim.make_optimizer(config.optimizer, 10)
        return optimizer.update(grads, optimizer.init(params), params)[0]["fc1"]

    for clip_norm, times in ((0.0, 1), (1.3, 0.1), (20.0, 1)):
        np.testing.assert_allclose(
            update(clip_norm)["kernel"], [[-3 * times, -4 * times]], rtol=1e-6
        )
        np.testing.assert_allclose(update(clip_norm)["bias"], [-12 * times], rtol=1e-6)


def one_update(config, gradient, weight=0.0, batch_size=128, **settings):
    """What plain SGD at rate 1 adds to a weight."""
    config.optimizer.update(
        dict(
            warmup=0.0,
            decay="constant",
            learning_rate=1.0,
            momentum=0.0,
            nesterov=False,
            weight_decay=0.0,
            clip_norm=0.0,
        )
        | settings
    )
    optimizer, params = (
        optim.make_optimizer(config.optimizer, 10, batch_size),
        {"fc1": {"kernel": jnp.full((1, 1), weight)}},
    )
    updates, _ = optimizer.update(
        {"fc1": {"kernel": jnp.full((1, 1), gradient)}}, optimizer.init(params), params
    )
    return float(updates["fc1"]["kernel"][0, 0])


def test_the_decay_is_not_clipped(config):
    assert one_update(config, 13.0, 100.0, weight_decay=1.0, clip_norm=1.3) == pytest.approx(
        -(1.3 + 100)
    )


def test_scaling_reaches_the_optimizer(config):
    assert one_update(
        config, 1.0, batch_size=4 * 128, learning_rate=0.1, scaling=1.0
    ) == pytest.approx(-0.4)


def test_the_warmup_is_rounded_to_whole_steps(config):
    config.optimizer.update(
        dict(learning_rate=0.4, warmup=0.29, decay="constant")
    )  # .29 * 100 is a little less than 29
    assert float(optim.make_schedule(config.optimizer, 100)(28)) == pytest.approx(0.4 * 28 / 29)
