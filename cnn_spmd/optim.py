"""Learning-rate schedules and the optimizer."""

import jax
import optax

from cnn_spmd.errors import UserError

DECAYS = {  # (settings, steps after the warm-up)
    "linear": lambda settings, steps: optax.linear_schedule(settings.learning_rate, 0.0, steps),
    "cosine": lambda settings, steps: optax.cosine_decay_schedule(settings.learning_rate, steps),
    "constant": lambda settings, steps: optax.constant_schedule(settings.learning_rate),
    "staged": lambda settings, steps: optax.piecewise_constant_schedule(
        settings.learning_rate, {round(share * steps): settings.stage_factor for share in settings.stages}),
}


def make_schedule(settings, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up over `warmup` (a share of all steps) to `learning_rate`, then `decay`.

    "staged" multiplies by `stage_factor` at each of `stages`, ascending shares of the steps after the warm-up.
    Raises UserError for an unknown decay, and for stages that are no such shares.
    """
    if settings.decay not in DECAYS:
        raise UserError(f"optimizer.decay={settings.decay}: unknown, expected one of {', '.join(DECAYS)}")
    if list(settings.stages) != sorted({x for x in settings.stages if isinstance(x, float) and 0 < x < 1}):
        raise UserError(f"optimizer.stages={settings.stages}: expected ascending shares of the steps, such as (0.25, 0.5)")
    warmup = round(settings.warmup * steps)
    decay = DECAYS[settings.decay](settings, max(steps - warmup, 1))
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, settings.learning_rate, warmup), decay], [warmup])


def make_optimizer(settings, steps: int, parts: int = 1) -> optax.GradientTransformation:
    """SGD with (Nesterov) momentum; weight decay on weights only, biases (one dimension) are left out.

    As in Krizhevsky et al. 2012, section 5, the decay is added to the gradient: it is scaled by the learning rate and
    passes through the momentum. parts: updates in a step, each at 1/parts of the learning rate.
    """
    schedule = make_schedule(settings, steps)
    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params)),
        optax.sgd(lambda count: schedule(count // parts) / parts, momentum=settings.momentum, nesterov=settings.nesterov),
    )
