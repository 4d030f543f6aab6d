"""Evaluation reports means over the whole split, whatever the metrics are called."""

import pytest
from run_helpers import lines, scalars

from cnn_spmd.training import evaluate, loop


def test_evaluation_that_misses_an_image_is_an_error():
    sums = [
        dict(loss=1.0, accuracy=3, top5=4, examples=16),
        dict(loss=1.0, accuracy=3, top5=4, examples=15),
    ]
    with pytest.raises(AssertionError, match="evaluated 31"):
        evaluate.means_of(sums, 32)


def test_every_sum_becomes_a_mean_under_its_name():
    sums = [
        dict(loss=6.0, accuracy=3, brier=0.5, examples=4),
        dict(loss=2.0, accuracy=1, brier=1.5, examples=4),
    ]
    means = dict(loss=1.0, accuracy=0.5, brier=0.25, examples=8)
    assert evaluate.means_of(sums, 8) == means


def test_a_metric_that_is_not_finite_is_left_out(monkeypatch):
    """A file of metrics could not hold it; the run goes on. A loss is for the callers."""
    said = []
    monkeypatch.setattr(
        evaluate.logging, "warning", lambda text, *values: said.append(text % values)
    )
    sums = [dict(loss=float("nan"), accuracy=3, brier=float("nan"), examples=4)]
    means = evaluate.means_of(sums, 4)
    assert means.keys() == {"loss", "accuracy", "examples"}
    assert said == ["METRICS['brier'] is nan over these images: left out."]


def test_a_metric_of_ones_own_is_in_every_file_of_a_run(config, tmp_path, monkeypatch):
    """Every sum reaches metrics.jsonl, TensorBoard and the summary."""
    means_of = evaluate.means_of
    monkeypatch.setattr(
        evaluate,
        "means_of",
        lambda sums, examples: means_of(
            [batch | dict(brier=2 * batch["examples"]) for batch in sums], examples
        ),
    )
    config.epochs = 1
    assert loop.train(config, tmp_path)["eval"]["brier"] == 2.0
    assert [line["brier"] for line in lines(tmp_path, "final")] == [2.0]
    assert scalars(tmp_path, "test/brier") == {4: 2.0}
