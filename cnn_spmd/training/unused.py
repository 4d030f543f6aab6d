"""Refuse unknown names, and fields that were set by hand and that nothing in the config uses.

Otherwise a typing error, or a sweep over such a field, would show a comparison of equal runs.
"""

from collections.abc import Collection

import ml_collections

from cnn_spmd import config as configs
from cnn_spmd import models
from cnn_spmd.data import registry
from cnn_spmd.errors import UnknownName, UserError, unknown
from cnn_spmd.sharding.table import TABLE
from cnn_spmd.training import optim

# Field that chooses: what each of its values uses of the fields in this dict. A value that is not
# in it, such as the name of a network of one's own, may use all of them.
USES = {
    "model.name": models.USES,
    "data.name": registry.USES,
    "optimizer.name": optim.USES,
    "optimizer.decay": optim.SCHEDULE_USES,
}
# Field: the field without which it has no effect.
NEEDS = {
    "dense_updates": "dense_microbatch",
    "data.held_out": "data.held_out_steps",
    "data.held_out_steps": "data.held_out",
    "data.fallback_epochs": "data.fallback",
    "data.fallback_batch_size": "data.fallback",
    "data.fallback_learning_rate": "data.fallback",
    "optimizer.nesterov": "optimizer.momentum",
}


def refuse_unknown(config: ml_collections.ConfigDict, fields: Collection[str]) -> None:
    """Raise UserError for the first of some fields whose value is an unknown name.

    fields: dotted names. Only those of network, optimizer, decay, scheme and data set are checked.
    """
    names = {
        "model.name": models.NETWORKS,
        "optimizer.name": optim.OPTIMIZERS,
        "optimizer.decay": optim.SCHEDULES,
        "parallelism": [*TABLE, *config.placement],
    }
    for field in fields:
        if field in names and (value := configs.get(config, field)) not in names[field]:
            error = unknown if field == "parallelism" else UnknownName
            raise error(field, value, names[field])
        if field == "data.name":
            registry.loader_of(config.data)


def refuse(config: ml_collections.ConfigDict, given: Collection[str]) -> None:
    """Raise UserError for the first field of `given` that nothing in a config uses.

    given: the dotted names of the fields that were set by hand. A value that switches something
    off (0, False, empty) is fine, as it is off.
    """
    for field in given:
        value = configs.get(config, field) if field in configs.SCHEMA else None
        if value and (why := reason(config, field)):
            shown = value.to_dict() if isinstance(value, ml_collections.ConfigDict) else value
            raise UserError(f"{field}={shown}: {why}")
    if "epochs" in given and "steps" not in given and config.epochs and config.steps:
        raise UserError(
            f"epochs={config.epochs}: has no effect, as the experiment sets steps={config.steps}: "
            "give --config.steps=0 too"
        )


def reason(config: ml_collections.ConfigDict, field: str) -> str:
    """Say why a field has no effect and what would use it; empty where it has one."""
    for by, uses in USES.items():
        chosen = configs.get(config, by).partition(":")[0]  # "tfds" for tfds:NAME
        users = [name for name, fields in uses.items() if field in fields]
        if users and chosen in uses and chosen not in users:
            return f"{by}={chosen} does not use it; those that do: {', '.join(users)}"
    needed = NEEDS.get(field)
    if needed and not (value := configs.get(config, needed)):
        return f"has no effect with {needed}={value!r}, expected another value there"
    return ""
