"""Define the evaluation metrics. To add one is to add an entry to METRICS.

A metric is a function of the log probabilities [B, C] of a batch of test images, and of their
labels [B]. It returns one value per image [B]. Evaluation reports its mean over all test images,
under its name, in metrics.jsonl, TensorBoard, summary.json and the report.

Shapes: B batch, C classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def rank_of_label(scores_BC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Count the classes that score above the label, int [B].

    Where scores are equal, the class with the lower number comes first. A NaN comes last.
    """
    own_B1 = jnp.take_along_axis(scores_BC, labels_B[:, None], axis=-1)
    before_BC = jnp.arange(scores_BC.shape[-1]) < labels_B[:, None]
    return (~(own_B1 >= scores_BC) | ((own_B1 == scores_BC) & before_BC)).sum(-1)


def accuracy(scores_BC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Return whether the label scores highest, bool [B]."""
    return rank_of_label(scores_BC, labels_B) == 0


def top5(scores_BC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Return whether the label is among the five highest scores, bool [B]."""
    return rank_of_label(scores_BC, labels_B) < 5


def loss(scores_BC: jax.Array, labels_B: jax.Array) -> jax.Array:
    """Return the cross-entropy without label smoothing, in nats, [B]."""
    return -jnp.take_along_axis(scores_BC, labels_B[:, None], axis=-1)[:, 0]


METRICS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "accuracy": accuracy,
    "top5": top5,
    "loss": loss,
}
