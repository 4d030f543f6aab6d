"""Make optimizers and schedules. To add one is to add an entry to a dict.

OPTIMIZERS: name -> function(settings, rate) that returns optax transformations, a tuple of them.
SCHEDULES: name -> function(rate, settings, steps) that returns an optax schedule.
`settings` is the config's `optimizer`; `settings.options` holds numbers that only an optimizer of
one's own knows.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import optax

from cnn_spmd.errors import UserError


def sgd(settings: Any, rate: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    """Return SGD with (Nesterov) momentum, and weight decay on all except biases.

    As in Krizhevsky et al. 2012, section 5, the decay is added to the gradient: the learning rate
    scales it, and it passes through the momentum. `weight_decays` sets it by layer.
    """

    def add_decay(path, gradient, weight):
        if is_bias(path):
            return gradient
        return gradient + settings.weight_decays.get(path[0].key, settings.weight_decay) * weight

    return (
        optax.stateless(
            lambda grads, params: jax.tree_util.tree_map_with_path(add_decay, grads, params)
        ),
        optax.sgd(rate, momentum=settings.momentum, nesterov=settings.nesterov),
    )


def stages(rate: float, settings: Any, steps: int) -> optax.Schedule:
    """Multiply the rate by `stage_factor` at each of `stages`, shares of the steps."""
    return optax.piecewise_constant_schedule(rate, drops_of(settings, steps))


OPTIMIZERS: dict[str, Callable[..., tuple[optax.GradientTransformation, ...]]] = {"sgd": sgd}

SCHEDULES: dict[str, Callable[[float, Any, int], optax.Schedule]] = {
    "linear": lambda rate, settings, steps: optax.linear_schedule(rate, 0.0, steps),
    "cosine": lambda rate, settings, steps: optax.cosine_decay_schedule(rate, steps),
    "constant": lambda rate, settings, steps: optax.constant_schedule(rate),
    "staged": stages,
}

# The config's fields that only some of them use, by optimizer and by schedule.
USES = {
    "sgd": ("optimizer.momentum", "optimizer.nesterov"),
    "an optimizer of your own": ("optimizer.options",),
}
SCHEDULE_USES = {
    "linear": (),
    "cosine": (),
    "constant": (),
    "staged": ("optimizer.stages", "optimizer.stage_factor"),
}


def is_bias(path: tuple) -> bool:
    """Return whether a parameter's path, such as (fc1, bias), is that of a bias."""
    return "bias" in [getattr(key, "key", None) for key in path]


def drops_of(settings: Any, steps: int) -> dict[int, float]:
    """Map each step at which stages begin to the product of their factors.

    Several stages of a short run may begin at the same step.
    """
    begins = Counter(round(share * steps) for share in settings.stages)
    return {step: settings.stage_factor**count for step, count in begins.items()}


def make_schedule(settings: Any, steps: int, batch_size: int = 128) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up to the rate, then the decay.

    `warmup` is a share of all steps. The rate is `learning_rate` times (batch_size / 128) **
    `scaling`: a power of 1.0 is what Krizhevsky 2014 (section 5) found to work, 0.5 what its theory
    says, and 0.0 turns scaling off.
    Raises UserError for an unknown decay, and for stages that are not ascending shares.
    """
    if settings.decay not in SCHEDULES:
        expected = ", ".join(SCHEDULES)
        raise UserError(f"optimizer.decay={settings.decay}: unknown, expected one of {expected}")
    shares = {share for share in settings.stages if isinstance(share, float) and 0 < share < 1}
    if list(settings.stages) != sorted(shares):
        raise UserError(
            f"optimizer.stages={settings.stages}: expected ascending shares of the steps, such as "
            "(0.25, 0.5)"
        )
    rate = settings.learning_rate * (batch_size / 128) ** settings.scaling
    warmup = round(settings.warmup * steps)
    decay = SCHEDULES[settings.decay](rate, settings, max(steps - warmup, 1))
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), decay], [warmup])


def make_optimizer(
    settings: Any, steps: int, batch_size: int = 128, updates: int = 1
) -> optax.GradientTransformation:
    """Return the optimizer `settings.name`, with clipping and rates by layer.

    A gradient longer than `clip_norm`, over all parameters of the update, is scaled down to it.
    `layer_rates` multiplies the updates of some layers, and `bias_rate` those of all biases.
    updates: per step, each at 1/updates of the learning rate.
    Raises UserError for an unknown optimizer, or as make_schedule does.
    """
    if settings.name not in OPTIMIZERS:
        expected = ", ".join(OPTIMIZERS)
        raise UserError(f"optimizer.name={settings.name}: unknown, expected one of {expected}")
    schedule = make_schedule(settings, steps, batch_size)

    def rate(count):
        return schedule(count // updates) / updates

    def scale(path, update):
        by_layer = settings.layer_rates.get(path[0].key, 1.0)
        return update * (by_layer * (settings.bias_rate if is_bias(path) else 1.0))

    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    return optax.chain(
        *clip,
        *OPTIMIZERS[settings.name](settings, rate),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)),
    )
