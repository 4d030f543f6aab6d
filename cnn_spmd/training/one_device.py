"""Time the training step of a network on one device, on random images, as a run does it."""

from collections.abc import Sequence

import jax
import ml_collections

from cnn_spmd import config as configs
from cnn_spmd.data import registry
from cnn_spmd.errors import UserError, one_line
from cnn_spmd.training import build, prediction
from cnn_spmd.training.clock import Clock
from cnn_spmd.training.setup import Setup
from cnn_spmd.training.terminal import say
from cnn_spmd.training.timetable import split_into_chunks

EXAMPLES = 4096  # random images, unless a batch is larger; the device holds them
CHUNKS = 4  # that count, after a first one that also fills caches


def setups(
    config: ml_collections.ConfigDict, batches: Sequence[int], device: jax.Device
) -> list[Setup]:
    """Return a Setup on one device for each batch size.

    Random images stand in for the config's: as large, and of as many classes.
    Raises UserError for a config that does not work there.
    """
    found = registry.find(config.data).preview
    config = config.copy_and_resolve_references()
    # The longest run there can be: neither its schedule nor its evaluations cut a chunk short.
    config.update(dict(steps=10**7, noise_scale=0, parallelism="data", mesh=dict(data=1, model=1)))
    config.update(dict(eval=dict(every_epochs=0), checkpoint=dict(every_epochs=0)))
    config.data.update(dict(name="synthetic", resident="yes", validation=0, held_out_steps=0))
    config.data.synthetic.update(
        dict(
            image_size=found.train_images.shape[1],
            classes=len(found.class_names),
            train_examples=max(EXAMPLES, *batches),
            test_examples=1,
        )
    )
    configs.validate(config)
    data, made = registry.load(config.data), []
    for batch in batches:
        config.batch_size = batch
        made.append(build.prepare(config, [device], data))
    return made


def measure(setups: Sequence[Setup]) -> dict[str, object]:
    """Return what the step depends on, and its points (batch, seconds).

    setups: of one network, by batch size.
    Raises UserError for a batch that does not fit in memory.
    """
    points = []
    for setup in setups:
        batch = setup.config.batch_size
        try:
            seconds = step_seconds(setup)
        except jax.errors.JaxRuntimeError as error:
            raise UserError(f"--batches: {batch} fails, expected less: {one_line(error)}") from None
        points.append([batch, float(f"{seconds:.5g}")])
        say(f"step of {setup.config.model.name} on {batch} images: {1e3 * seconds:,.3f} ms")
    return prediction.network_of(setups[0]) | dict(points=points)


def step_seconds(setup: Setup) -> float:
    """Return the median seconds of a step, over chunks, by the clock of a run."""
    steps = setup.config.steps_per_call
    train, state = setup.train_program(steps), setup.init()
    setup.feeds[0].load()
    jax.block_until_ready(state)
    clock, running = Clock(), None
    chunks = split_into_chunks(0, [steps * (CHUNKS + 1)], steps)
    for _, inputs in setup.inputs(chunks):
        state, metrics = train(state, *inputs)
        end = clock.watch(metrics)
        if running:  # the host launches a chunk before the one before it has ended
            clock.finish(steps, running)
        running = end
    clock.finish(steps, running)
    return clock.step_milliseconds()["median"] / 1e3
