"""The simple noise scale: known noise, plain sums over batches, meshes, and a run's files."""

import itertools

import jax
import numpy as np
import pytest
from run_helpers import lines, rows
from setups import BATCH, begin, gather, indices_of, on_devices, setup_of

from cnn_spmd.errors import UserError
from cnn_spmd.training import loop
from cnn_spmd.training.noise_scale import NoiseScale, estimate


def test_known_noise():
    """Single gradients are normal with mean G and covariance s^2: tr(S) = 4000 s^2."""
    random = np.random.default_rng(0)
    mean, deviation, batch_size = random.normal(size=4000), 10.0, 32
    noise = random.normal(size=(10, 4000)) * deviation / np.sqrt(batch_size)
    of_each = np.square(mean + noise).sum(1)
    of_sum = np.square((mean + noise).sum(0)).sum()
    got = estimate(of_each, of_sum, batch_size)
    assert got["trace"] == pytest.approx(4000 * deviation**2, rel=0.02)
    assert got["gradient_norm2"] == pytest.approx(mean @ mean, rel=0.05)
    assert got["noise_scale"] == got["trace"] / got["gradient_norm2"]


def test_noise_that_hides_the_gradient():
    """Two opposite gradients: |G|^2 is estimated as -1, and there is no ratio."""
    assert estimate([1.0, 1.0], 0.0, 8) == dict(gradient_norm2=-1.0, trace=16.0, batches=2)


def test_noise_on_meshes():
    """The gradients' products and variance by hand; the same on every mesh.

    The run has 10 steps, so that after 9 the batches are those of its last three.
    """
    with jax.enable_x64(True):
        setup, many = (
            setup_of("simple_cnn", *mesh, noise_scale=3)
            for mesh in (("data", (1, 1)), ("model", (2, 2)))
        )
        for each in (setup, many):
            each.feeds[0].load()
        noise_of, noise_of_many = (NoiseScale(each).measure for each in (setup, many))
        state, state_of_many = begin(setup), begin(many)
        gradients_of = jax.jit(lambda *inputs: setup.functions.gradients(*inputs)[0])
        for after, first in ((0, 0), (9, 7)):
            gradients = []
            for step in range(first, first + 3):
                of_step = state._replace(step=np.int32(step))
                found = gradients_of(of_step, on_devices(setup), indices_of(setup, step))
                gradients.append(np.concatenate([each.ravel() for each in gather(found).values()]))
            variance = np.var(gradients, axis=0, ddof=1).sum()
            products = [a @ b for a, b in itertools.combinations(gradients, 2)]
            one = noise_of(state._replace(step=np.int32(after)))
            assert one["trace"] == pytest.approx(BATCH * variance, rel=1e-6)
            assert one["gradient_norm2"] == pytest.approx(np.mean(products), rel=1e-6)
            of_many = noise_of_many(state_of_many._replace(step=np.int32(after)))
            assert of_many == pytest.approx(one, rel=1e-6)


def test_a_run_measures_at_each_evaluation(config, tmp_path):
    """It trains as without; more batches than an epoch has are cut to an epoch."""
    loop.train(config, tmp_path / "without")
    config.noise_scale = 100
    loop.train(config, tmp_path / "with")
    noise = lines(tmp_path / "with", "noise")
    assert [(row["step"], row["batches"]) for row in noise] == [(4, 4), (8, 4)]
    assert all(row["trace"] > 0 for row in noise)
    assert not lines(tmp_path / "without", "noise")
    for split in ("train", "eval", "final"):
        assert rows(tmp_path / "with", split) == rows(tmp_path / "without", split)


def test_one_batch_is_refused():
    expected = "noise_scale=1: takes 1 batch, of 4 in an epoch and 10 in the run, expected 0 or at"
    with pytest.raises(UserError, match=expected):
        setup_of("simple_cnn", "data", (1, 1), noise_scale=1)
