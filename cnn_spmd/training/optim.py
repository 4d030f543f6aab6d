"""Learning-rate schedules and the optimizer."""

from collections import Counter

import jax
import optax

from cnn_spmd.errors import UserError

DECAYS = {  # (learning rate, settings, steps after the warm-up)
    "linear": lambda rate, settings, steps: optax.linear_schedule(rate, 0.0, steps),
    "cosine": lambda rate, settings, steps: optax.cosine_decay_schedule(rate, steps),
    "constant": lambda rate, settings, steps: optax.constant_schedule(rate),
    "staged": lambda rate, settings, steps: optax.piecewise_constant_schedule(
        rate, drops_of(settings, steps)
    ),
}

# The config's fields that only some of them use, by optimizer and by decay.
USES = {
    "sgd": ("optimizer.momentum", "optimizer.nesterov"),
    "your own": ("optimizer.options",),
}
DECAY_USES = dict.fromkeys(DECAYS, ()) | {"staged": ("optimizer.stages", "optimizer.stage_factor")}


def drops_of(settings, steps: int) -> dict[int, float]:
    """Map each step at which stages begin to the product of their factors.

    Several stages of a short run may begin at the same step.
    """
    begins = Counter(round(share * steps) for share in settings.stages)
    return {step: settings.stage_factor**count for step, count in begins.items()}


def make_schedule(settings, steps: int, batch_size: int = 128) -> optax.Schedule:
    """Learning rate by step: linear warm-up over `warmup` (a share of all steps) to `learning_rate`, then `decay`.

    With `scaling`, learning_rate is that of a batch of 128, and a batch k times as large has k**scaling times that: 1.0 is
    what Krizhevsky 2014 (section 5) found to work, .5 what its theory says; 0.0 takes it as it is given.
    "staged" multiplies by `stage_factor` at each of `stages`, ascending shares of the steps after the warm-up.
    Raises UserError for an unknown decay, and for stages that are no such shares.
    """
    if settings.decay not in DECAYS:
        raise UserError(
            f"optimizer.decay={settings.decay}: unknown, expected one of {', '.join(DECAYS)}"
        )
    if list(settings.stages) != sorted(
        {x for x in settings.stages if isinstance(x, float) and 0 < x < 1}
    ):
        raise UserError(
            f"optimizer.stages={settings.stages}: expected ascending shares of the steps, such as (0.25, 0.5)"
        )
    rate, warmup = (
        settings.learning_rate * (batch_size / 128) ** settings.scaling,
        round(settings.warmup * steps),
    )
    decay = DECAYS[settings.decay](rate, settings, max(steps - warmup, 1))
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), decay], [warmup])


def make_optimizer(
    settings, steps: int, batch_size: int = 128, parts: int = 1
) -> optax.GradientTransformation:
    """SGD with (Nesterov) momentum; weight decay on weights only, biases are left out.

    As in Krizhevsky et al. 2012, section 5, the decay is added to the gradient: it is scaled by the learning rate and
    passes through the momentum. `weight_decays` has other decays for some layers, `layer_rates` multiples of the learning
    rate, and `bias_rate` is a further multiple for all biases. A gradient longer than `clip_norm`, over all parameters
    of the update, is scaled down to it first. parts: updates in a step, each at 1/parts of the rate.
    """
    schedule = make_schedule(settings, steps, batch_size)

    def decayed(path, gradient, weight):
        layer, bias = _layer_and_bias(path)
        return (
            gradient
            if bias
            else gradient + settings.weight_decays.get(layer, settings.weight_decay) * weight
        )

    def scaled(path, update):
        layer, bias = _layer_and_bias(path)
        return update * (
            settings.layer_rates.get(layer, 1.0) * (settings.bias_rate if bias else 1.0)
        )

    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    return optax.chain(
        *clip,
        optax.stateless(
            lambda grads, params: jax.tree_util.tree_map_with_path(decayed, grads, params)
        ),
        optax.sgd(
            lambda count: schedule(count // parts) / parts,
            momentum=settings.momentum,
            nesterov=settings.nesterov,
        ),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scaled, updates)),
    )


def _layer_and_bias(path: tuple) -> tuple[str, bool]:
    """Of a parameter's path, such as fc1, bias: the layer's name, and whether it is a bias."""
    names = [getattr(key, "key", None) for key in path]
    return names[0], "bias" in names
