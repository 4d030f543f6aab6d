"""Report on a compiled train step: what a device holds, and what moves."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cnn_spmd.analysis import communication, coverage, program
from cnn_spmd.data.sharded import Sharded
from cnn_spmd.errors import UserError
from cnn_spmd.sharding.placement import axes_of, is_weight, named_variables
from cnn_spmd.training import microbatch


def report_of(setup: Any, compiled: jax.stages.Compiled, n: int) -> dict:
    """Report what a compiled program of n steps holds and moves per step, JSON-ready.

    setup: a Setup. An error in the report never ends a run: what is not known is then null or
    empty, and `error`, which is absent otherwise, says why.
    """
    config, place, abstract = setup.config, setup.place, setup.functions.abstract_state
    report = dict(
        parallelism=config.parallelism,
        devices=place.mesh.size,
        model=config.model.name,
        batch_size=config.batch_size,
        dtype=config.dtype,
        **setup.data_fields,
        data_on_device=config.data.resident != "no",
        data_resident=config.data.resident,
        image_bytes_per_device=setup.image_bytes_per_device,
        streamed_bytes_per_device=setup.streamed_bytes_per_device,
        param_count=sum(leaf.size for leaf in jax.tree.leaves(abstract.params)),
        placement=[],
        activations=[],
        bytes_per_device=dict(
            parameters=program.bytes_per_device(abstract.params),
            optimizer=program.bytes_per_device(abstract.optimizer),
        ),
        compiler_options=setup.compiler_options,
        **program.compiler_of(place.mesh),
        **program.UNKNOWN,
        **_beside_theory(None, None, None),
    )
    if held := program.bytes_per_device(abstract.model_state):
        report["model_state_bytes_per_device"] = held
    try:
        report["placement"] = [
            place.report(name, axes_of(x), x.shape, x.dtype.itemsize, weight=is_weight(x))
            for name, x in setup.variables
        ]
        report["activations"] = [place.report(*each, setup.itemsize) for each in setup.activations]
        report |= program.report(compiled, place.mesh, n)
        collectives = report["collectives"]
        report |= _beside_theory(collectives, *theory_of(setup, collectives))
    except Exception as error:
        report["error"] = " ".join(f"{type(error).__name__}: {error}".split())
    return report


def _beside_theory(
    collectives: list[dict] | None, theory: list[dict] | None, reason: str | None
) -> dict:
    """Return the fields on the closed form; reason: why it does not cover the run."""
    known = collectives is not None
    return dict(
        closed_form=theory,
        closed_form_not_covered=reason,
        communication=communication.compare(collectives, theory) if known else None,
        closed_form_ring_bytes=None if theory is None else sum(row["ring_bytes"] for row in theory),
    )


def theory_of(setup: Any, compiled: Sequence[dict] = ()) -> tuple[list[dict] | None, str | None]:
    """Return the rows of the closed form, or None and why it does not cover the run.

    setup: a Setup. compiled: the collectives of the program, where it is compiled.
    """
    config, place, functions = setup.config, setup.place, setup.functions
    activations, variables = setup.activations, setup.variables
    network = functions.abstract_model
    reason = coverage.covers(place, network, _images(setup), activations, variables, compiled)
    if reason is None and config.optimizer.name == "muon":
        reason = _split_by_muon(functions.abstract_state.params)
    if reason is not None:
        return None, reason
    micro_batches = config.batch_size // (config.dense_microbatch or config.batch_size)
    updates = micro_batches if microbatch.updates_each(functions.microbatch) else 1
    feed, _ = setup.feeds
    exchanged = feed.exchanged_bytes if isinstance(feed, Sharded) else 0
    rows = communication.closed_form(
        place, activations, variables, setup.itemsize, updates, exchanged, micro_batches
    )
    return rows, None


def _split_by_muon(params: nnx.State) -> str | None:
    """Say which split kernel Muon's update multiplies with itself; None: no kernel is split."""
    for name, leaf in named_variables(params):
        if leaf.ndim > 1 and not leaf.get_value().sharding.is_fully_replicated:
            return f"optimizer.name=muon multiplies {name}, which is split, in its update"
    return None


def layouts_of_activations(setup: Any) -> list[tuple[str, tuple, tuple]]:
    """Return (name, logical axes, shape) of each layer's input and output, in order.

    setup: a Setup. JAX traces the network with abstract arrays, and `place` records each activation
    that has a name. Raises UserError where one is not divisible as the scheme asks, and for logits
    of another shape than [batch, classes].
    """
    seen = []
    place = dataclasses.replace(
        setup.place, record=lambda name, axes, x: seen.append((name, axes, x.shape))
    )
    logits = nnx.eval_shape(
        lambda model, x: model.classify(model.features(x, place), place),
        setup.functions.abstract_model,
        _images(setup),
    )
    expected = setup.config.batch_size, len(setup.data.class_names)
    if logits.shape != expected:
        raise UserError(
            f"classify: returns the shape {logits.shape}, expected [batch, classes], {expected}"
        )
    return seen


def _images(setup: Any) -> jax.ShapeDtypeStruct:
    """Return the shape of a batch as the network takes it."""
    side = setup.image_size
    return jax.ShapeDtypeStruct((setup.config.batch_size, side, side, 3), jnp.float32)
