import jax.numpy as jnp
import numpy as np
import pytest

from cnn_spmd import optim
from cnn_spmd.errors import UserError


@pytest.mark.parametrize("decay", ["linear", "cosine", "constant", "staged"])
def test_schedule(config, decay):
    config.optimizer.update(dict(learning_rate=0.4, warmup=0.25, decay=decay, stages=(0.3, 0.7), stage_factor=0.5))
    rates = [float(optim.make_schedule(config.optimizer, 100)(step)) for step in (0, 10, 25, 62.5, 100)]
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


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_against_numpy(config, nesterov):
    """Momentum, Nesterov and decay as Krizhevsky et al. 2012, section 5, has them; biases are not decayed."""
    config.optimizer.update(dict(learning_rate=0.1, warmup=0.0, decay="constant", momentum=0.9, nesterov=nesterov,
                                 weight_decay=0.01))
    optimizer = optim.make_optimizer(config.optimizer, 100)
    params = dict(kernel=jnp.full((2, 2), 3.0), bias=jnp.full((2,), 3.0))
    state = optimizer.init(params)
    expected, momenta = dict(kernel=3.0, bias=3.0), dict(kernel=0.0, bias=0.0)
    for gradient in (1.0, -0.5, 0.25):
        updates, state = optimizer.update({name: jnp.full_like(p, gradient) for name, p in params.items()}, state, params)
        params = {name: params[name] + updates[name] for name in params}
        for name, decay in (("kernel", 0.01), ("bias", 0.0)):
            g = gradient + decay * expected[name]
            momenta[name] = 0.9 * momenta[name] + g
            expected[name] -= 0.1 * (g + 0.9 * momenta[name] if nesterov else momenta[name])
    for name in params:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)
