"""Evaluation metrics: those that there are, and one of a user's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from flax import nnx
from setups import NO_STATE, TEST_EXAMPLES, on_one

from cnn_spmd.data.feed import DeviceData
from cnn_spmd.errors import UserError
from cnn_spmd.training import metrics


class Scores:
    """Stand in for a network; it gives every image the same scores."""

    def __init__(self, scores_C):
        self.scores_C = scores_C

    def features(self, x_NHWC, place, train=False):
        return x_NHWC

    def classify(self, x_NHWC, place, dropout_key=None):
        return jnp.tile(self.scores_C, (len(x_NHWC), 1))


@pytest.fixture
def sums_of(monkeypatch):
    """Return eval_step's sums for scores [C] and labels [8]; 3 of these are padding."""
    setup, _ = on_one("simple_cnn")

    def sums(scores_C, labels_B):
        monkeypatch.setattr(nnx, "merge", lambda *_, **__: Scores(scores_C))
        data = DeviceData(jnp.asarray(setup.data.test_images), jnp.asarray(labels_B))
        indices = jnp.arange(TEST_EXAMPLES)
        return setup.functions.eval_step(NO_STATE, data, indices, indices < 5)

    return sums


@pytest.mark.parametrize("label", range(10))
@pytest.mark.parametrize("scores", ["falling", "equal", "nan"])
def test_what_counts_as_right(label, scores, sums_of):
    """The first of equal scores counts, a NaN and padding never do."""
    rows = dict(falling=-jnp.arange(10.0), equal=jnp.zeros(10), nan=jnp.full(10, jnp.nan))
    sums = sums_of(rows[scores], np.full(8, label))
    right = scores != "nan"
    assert (sums["accuracy"], sums["top5"], sums["examples"]) == (
        5 * (right and label < 1),
        5 * (right and label < 5),
        5,
    )


def test_a_metric_of_ones_own_is_summed(monkeypatch, sums_of):
    """It sees log probabilities and labels; padding is left out, even if not finite."""

    def label_probability(scores_BC, labels_B):
        chosen_B = jnp.take_along_axis(scores_BC, labels_B[:, None], axis=1)[:, 0]
        return jnp.where(labels_B == 9, jnp.nan, jnp.exp(chosen_B))

    monkeypatch.setitem(metrics.METRICS, "label_probability", label_probability)
    labels = np.array([0, 1, 2, 3, 0, 9, 9, 9])
    sums = sums_of(-jnp.arange(10.0), labels)
    assert sums.keys() == {"examples", "accuracy", "top5", "loss", "label_probability"}
    probabilities = np.exp(-np.arange(10.0)) / np.exp(-np.arange(10.0)).sum()
    expected = probabilities[labels[:5]].sum()
    assert float(sums["label_probability"]) == pytest.approx(expected, rel=1e-5)
    assert float(sums["loss"]) == pytest.approx(-np.log(probabilities[labels[:5]]).sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "metric", "message"),
    [
        (
            "mean",
            lambda scores, labels: scores.mean(),
            r"METRICS\['mean'\]: returns the shape \(\)",
        ),
    ],
)
def test_metrics_that_are_refused(monkeypatch, name, metric, message):
    monkeypatch.setitem(metrics.METRICS, name, metric)
    setup, data = on_one("simple_cnn")
    with pytest.raises(UserError, match=message):
        jax.eval_shape(setup.functions.eval_step, setup.init(), data, None, np.ones(64, bool))


def test_names_that_no_metric_can_have_are_the_fields_of_metrics_jsonl():
    page = (ROOT / "docs/running.md").read_text()
    table = page.partition("### metrics.jsonl")[2].partition("###")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\|(.*?)\|", table, re.M)))
    assert len(named) > 10
    assert named == [name for name in named if name in metrics.METRICS.built_in]
