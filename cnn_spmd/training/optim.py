"""Make optimizers and schedules. To add one is to add an entry to a dict.

OPTIMIZERS: name -> function(settings, rate) that returns an optax transformation, or a tuple.
SCHEDULES: name -> function(rate, settings, steps) that returns an optax schedule.
`settings` is the config's `optimizer`; `settings.options` holds numbers that only an optimizer of
one's own knows.

Parameters may be split over devices. A norm or a product here is one of whole arrays: XLA adds the
collectives, so that every mesh computes the same update.
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from cnn_spmd.entries import Entries
from cnn_spmd.errors import UnknownName, UserError
from cnn_spmd.sharding.placement import named_variables

# Liu et al. 2025, "Muon is Scalable for LLM Training" (arXiv 2502.16982), section 2.2: the root
# mean square of an update by AdamW. Updates of that size let one rate serve both.
RMS_OF_ADAMW = 0.2


def sgd(settings: Any, rate: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    """Return SGD with (Nesterov) momentum and weight decay.

    As in Krizhevsky et al. 2012, section 5, the decay is added to the gradient: the learning rate
    scales it, and it passes through the momentum. `decay_of` says which parameters decay.
    """
    return (
        add_decay(settings),
        optax.sgd(rate, momentum=settings.momentum, nesterov=settings.nesterov),
    )


def lars(
    settings: Any, rate: optax.Schedule, combine: Callable = jnp.multiply
) -> tuple[optax.GradientTransformation, ...]:
    """Return LARS: SGD in which each parameter has a local rate, by its norm.

    You, Gitman, Ginsburg 2017 (arXiv 1708.03888), algorithm 1, with eta = `trust`, m = `momentum`:

      local = eta |w| / (|g| + decay |w|)
      v <- m v + rate local (g + decay w)
      w <- w - v

    Weight decay is sgd's. Where |w| is 0, local is eta: a bias that starts at 0 then takes a step
    of SGD at eta times the rate. The authors' code (nvcaffe) takes a local rate of 1 there, and its
    biases start above 0. Its local rate leaves out the decay. optax.lars has |g + decay w| as the
    denominator, and a local rate of 1 where |w| is 0.

    combine: makes a parameter's rate out of the rate and its local rate.
    """

    def update(grads, state, params):
        now = rate(state.count)

        def step(path, gradient, weight):
            decay = decay_of(settings, path)
            own = combine(now, local_rate(settings.trust, gradient, weight, decay))
            return -own * (gradient + decay * weight)

        steps = jax.tree_util.tree_map_with_path(step, grads, params)
        return steps, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    return (
        optax.GradientTransformation(init, update),
        optax.trace(settings.momentum, settings.nesterov),
    )


def local_rate(trust: float, gradient: jax.Array, weight: jax.Array, decay: float) -> jax.Array:
    """Return the local rate of a parameter [], as `lars` describes it."""
    of_weight, of_gradient = (jnp.sqrt(jnp.sum(jnp.square(x))) for x in (weight, gradient))
    denominator = of_gradient + decay * of_weight
    is_defined = (of_weight > 0) & (denominator > 0)
    return jnp.where(is_defined, trust * of_weight / denominator, trust)


def adamw(settings: Any, rate: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    """Return AdamW (Loshchilov and Hutter 2019), with `momentum` as its beta 1.

    The rate scales the decay, as it does in PyTorch and optax.
    """
    return (
        optax.scale_by_adam(b1=settings.momentum, b2=settings.beta2),
        add_decay(settings),
        optax.scale_by_learning_rate(rate),
    )


def muon(settings: Any, rate: optax.Schedule) -> tuple[optax.GradientTransformation, ...]:
    """Return Muon for hidden matrices and convolutions, and AdamW for all other parameters.

    Jordan et al. 2024 (github.com/KellerJordan/Muon): the momentum of a matrix is made nearly
    orthogonal by five Newton-Schulz iterations. A convolution [H, W, I, O] is taken as the matrix
    [H W I, O], as the authors do for CIFAR-10 (airbench). Biases and the output layer fc3 take
    AdamW, also as they do. Decay and rate are those of `adamw` for both. Where a matrix is split,
    XLA moves parts of it for each product: more bytes than the gradient takes.
    """

    def matrices(params):
        return jax.tree_util.tree_map_with_path(matrix_of, params)

    directions = optax.contrib.muon(
        -1.0,  # optax turns the sign, as after a whole step; here the decay comes first
        beta=settings.momentum,
        nesterov=settings.nesterov,
        adam_b2=settings.beta2,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=RMS_OF_ADAMW,
    )
    return directions, add_decay(settings), optax.scale_by_learning_rate(rate)


def matrix_of(path: tuple, weight: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
    """Return which axes of a parameter are a matrix's rows and columns; None: AdamW's."""
    if weight.ndim not in (2, 4) or is_bias(path) or path[0].key == "fc3":
        return None
    return optax.contrib.MuonDimensionNumbers(tuple(range(weight.ndim - 1)), weight.ndim - 1)


def add_decay(settings: Any) -> optax.GradientTransformation:
    """Return the transformation that adds to each gradient its weight's decay."""

    def add(path, gradient, weight):
        decay = decay_of(settings, path)
        return gradient + decay * weight if decay else gradient

    return optax.stateless(
        lambda grads, params: jax.tree_util.tree_map_with_path(add, grads, params)
    )


def decay_of(settings: Any, path: tuple) -> float:
    """Return the weight decay of a parameter: that of its layer.

    Biases and the scale of a batch norm have none, unless `decay_all`. The two decay together or
    not at all: where the scale alone shrinks, the bias outgrows it, and ReLUs stay on or off.
    """
    if not settings.decay_all and (is_bias(path) or is_named(path, "scale")):
        return 0.0
    return settings.weight_decays.get(path[0].key, settings.weight_decay)


def stages(rate: float, settings: Any, steps: int) -> optax.Schedule:
    """Multiply the rate by `stage_factor` at each of `stages`, shares of the steps.

    Several stages of a short run may begin at the same step.
    """
    begins = Counter(round(share * steps) for share in settings.stages)
    factors = {step: settings.stage_factor**count for step, count in begins.items()}
    return optax.piecewise_constant_schedule(rate, factors)


OPTIMIZERS: Entries[str, Callable[..., tuple[optax.GradientTransformation, ...]]] = Entries(
    "OPTIMIZERS",
    {
        "sgd": sgd,
        "lars": lars,
        "larc": functools.partial(lars, combine=jnp.minimum),  # clips the rate: min(rate, local)
        "adamw": adamw,
        "muon": muon,
    },
)

SCHEDULES: Entries[str, Callable[[float, Any, int], optax.Schedule]] = Entries(
    "SCHEDULES",
    {
        "linear": lambda rate, settings, steps: optax.linear_schedule(rate, 0.0, steps),
        "polynomial": lambda rate, settings, steps: optax.polynomial_schedule(
            rate, 0.0, settings.power, steps
        ),
        "cosine": lambda rate, settings, steps: optax.cosine_decay_schedule(rate, steps),
        "constant": lambda rate, settings, steps: optax.constant_schedule(rate),
        "staged": stages,
    },
)

# The config's fields that only some of them use, by optimizer and by schedule.
USES = {
    "sgd": ("optimizer.momentum", "optimizer.nesterov"),
    "lars": ("optimizer.momentum", "optimizer.nesterov", "optimizer.trust"),
    "larc": ("optimizer.momentum", "optimizer.nesterov", "optimizer.trust"),
    "adamw": ("optimizer.momentum", "optimizer.beta2"),
    "muon": ("optimizer.momentum", "optimizer.nesterov", "optimizer.beta2"),
    "an optimizer of your own": ("optimizer.options",),
}
SCHEDULE_USES = {
    "linear": (),
    "polynomial": ("optimizer.power",),
    "cosine": (),
    "constant": (),
    "staged": ("optimizer.stages", "optimizer.stage_factor"),
}


def is_bias(path: tuple) -> bool:
    """Return whether a parameter's path, such as (fc1, bias), is that of a bias."""
    return is_named(path, "bias")


def is_named(path: tuple, name: str) -> bool:
    """Return whether a name is part of a parameter's path."""
    return name in [getattr(key, "key", None) for key in path]


def make_schedule(settings: Any, steps: int, batch_size: int = 128) -> optax.Schedule:
    """Return the learning rate by step: a warm-up to the rate, then the decay.

    The warm-up takes `warmup_steps`, or the share `warmup` of all steps; config.resolve has turned
    `warmup_epochs` into steps. It is linear from 0, or constant at `warmup_factor` times the rate.
    The rate is `learning_rate` times (batch_size / 128) ** `scaling`: a power of 1.0 is what
    Krizhevsky 2014 (section 5) found to work, 0.5 what its theory says, and 0.0 turns scaling off.
    Raises UserError for an unknown decay, and for stages that are not ascending shares.
    """
    if settings.decay not in SCHEDULES:
        raise UnknownName("optimizer.decay", settings.decay, SCHEDULES)
    shares = {share for share in settings.stages if isinstance(share, float) and 0 < share < 1}
    if list(settings.stages) != sorted(shares):
        raise UserError(
            f"optimizer.stages={settings.stages}: expected ascending shares of the steps, such as "
            "(0.25, 0.5)"
        )
    rate = settings.learning_rate * (batch_size / 128) ** settings.scaling
    warmup = settings.warmup_steps or round(settings.warmup * steps)
    decay = SCHEDULES[settings.decay](rate, settings, max(steps - warmup, 1))
    if not warmup:
        return decay
    if settings.warmup_factor:
        ramp = optax.constant_schedule(rate * settings.warmup_factor)
    else:
        ramp = optax.linear_schedule(0.0, rate, warmup)
    return optax.join_schedules([ramp, decay], [warmup])


def make_optimizer(settings: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    """Return the optimizer `settings.name`, with clipping and rates by layer.

    A gradient longer than `clip_norm`, over all parameters of the update, is scaled down to it.
    `layer_rates` multiplies the updates of some layers, and `bias_rate` those of all biases.
    rate: the learning rate by the number of updates that were done.
    Raises UserError for an unknown optimizer, and for what is no optimizer.
    """

    def scale(path, update):
        by_layer = settings.layer_rates.get(path[0].key, 1.0)
        return update * (by_layer * (settings.bias_rate if is_bias(path) else 1.0))

    clip = [optax.clip_by_global_norm(settings.clip_norm)] if settings.clip_norm else []
    return optax.chain(
        *clip,
        *transformations(settings, rate),
        optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates)),
    )


def transformations(settings: Any, rate: optax.Schedule) -> Sequence[optax.GradientTransformation]:
    """Return what the entry `settings.name` of OPTIMIZERS makes. Raises as `make_optimizer`."""
    if settings.name not in OPTIMIZERS:
        raise UnknownName("optimizer.name", settings.name, OPTIMIZERS)
    made = OPTIMIZERS[settings.name](settings, rate)
    if isinstance(made, optax.GradientTransformation):  # one, not a tuple of some
        return (made,)
    for each in made if made and isinstance(made, tuple | list) else (made,):
        if not isinstance(each, optax.GradientTransformation):
            raise UserError(
                f"optimizer.name={settings.name}: returns {type(each).__name__}, expected an optax "
                "transformation, or a tuple of some"
            )
    return made


def refuse_other_updates(settings: Any, params: Any) -> None:
    """Raise UserError where an optimizer of a user's own makes no update for each parameter.

    optax would broadcast an update of another shape, and cast one of another dtype, in silence.
    params: the network's, with shapes and dtypes in place of arrays.
    """
    if settings.name in OPTIMIZERS.built_in:
        return
    made = optax.chain(*transformations(settings, lambda _: jnp.zeros(())))
    updates = jax.eval_shape(lambda grads: made.update(grads, made.init(grads), grads)[0], params)
    problem = f"optimizer.name={settings.name}: its update"
    if jax.tree.structure(updates) != jax.tree.structure(params):
        raise UserError(f"{problem} is no tree as the parameters are: expected an array for each")
    arrays = map(jax.tree.leaves, (updates, params))
    for (name, _), got, param in zip(named_variables(params), *arrays, strict=True):
        if (got.shape, got.dtype) != (param.shape, param.dtype):
            raise UserError(
                f"{problem} of {name} is {got.dtype} {got.shape}, expected {param.dtype} "
                f"{param.shape} as the parameter is"
            )
