"""Define the evaluation metrics. To add one is to add an entry to METRICS.

A metric is a function of the log probabilities [B, C] of a batch of test images, and of their
labels [B]. It returns one value per image [B]. Evaluation reports its mean over all test images,
under its name, in metrics.jsonl, TensorBoard, summary.json and the report.

Shapes: B batch, C classes.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cnn_spmd.entries import Entries
from cnn_spmd.errors import UserError


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


# Other fields of a line of metrics.jsonl, whose names a metric cannot have.
RESERVED = (
    "step",
    "split",
    "examples",
    "schema",
    "dataset",
    "fallback",
    "skipped_images",
    "test_images_from_train",
    "learning_rate",
    "steps",
    "images_per_second",
    "train_seconds",
    "noise_scale",
    "trace",
    "gradient_norm2",
    "batches",
)

METRICS: Entries[str, Callable[[jax.Array, jax.Array], jax.Array]] = Entries(
    "METRICS", dict(accuracy=accuracy, top5=top5, loss=loss), RESERVED
)


def check_metric(name: str, values: jax.Array, examples: int) -> None:
    """Raise UserError for a metric that returns another shape than [examples]."""
    if jnp.shape(values) != (examples,):
        raise UserError(
            f"METRICS[{name!r}]: returns the shape {jnp.shape(values)}, expected one value per "
            f"example, ({examples},)"
        )
