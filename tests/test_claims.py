"""Epochs to an error, accuracy by depth, error by batch size, from known runs."""

import json

import jax.numpy as jnp
import pytest
from flax import nnx

from cnn_spmd import models
from cnn_spmd.papers import batches, depth, pictures, summaries


def test_steps_to_error():
    """10 steps per epoch, lines of 4 steps: the newest 12 steps count."""
    accuracies = [0.9, 0.5, 0.6, 0.7, 0.8, 0.9]
    rows = [
        dict(step=4 * (i + 1), split="train", steps=4, accuracy=accuracy)
        for i, accuracy in enumerate(accuracies)
    ]
    rows.insert(2, dict(step=8, split="eval", accuracy=1.0))
    # Steps 13 to 24: (.7 + .8 + .9) / 3.
    assert summaries.steps_to_error(rows, 0.25, 10) == 24
    assert summaries.steps_to_error(rows, 0.35, 10) == 12  # .667
    assert summaries.steps_to_error(rows, 0.15, 10) is None
    assert summaries.steps_to_error(rows, 0.15, 4) == 4
    assert summaries.steps_to_error(rows[:2], 0.9, 10) is None  # less than an epoch


def test_depth_on_known_runs(tmp_path):
    for name, accuracy in (("vgg_11", 0.9), ("simple_cnn", 0.7)):
        run = dict(experiment=f"deeper_{name}", eval=dict(accuracy=accuracy), param_count=1000)
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    runs = summaries.load_summaries(tmp_path)
    assert depth.depth_table([*runs, dict(experiment="another")]).splitlines()[2:] == [
        "| simple_cnn | 2 | 1 | 1,000 | 1 | 70.00 |",
        "| vgg_11 | 11 | 8 | 1,000 | 1 | 90.00 |",
    ]
    picture = pictures.accuracy_by_depth(runs)
    assert ">simple_cnn<" in picture
    assert ">vgg_11<" in picture
    assert picture.count(">0.0 M<") == 2


@pytest.mark.parametrize("name", depth.DEEPER)
def test_depths_are_those_of_the_networks(name):
    settings = dict(image_size=32, classes=10, width=4096, dropout=0.0, dtype=jnp.float32)
    made = nnx.eval_shape(lambda: models.make(name, **settings, rngs=nnx.Rngs(0)))
    layers = list(nnx.state(made, nnx.Param))
    convolutions = [layer for layer in layers if layer.startswith("conv")]
    assert depth.DEEPER[name] == (len(layers), len(convolutions))


def test_errors_by_batch_on_known_runs():
    def run(accuracy, batch, scaling=1.0, micro=0):
        return dict(
            experiment="owt_cifar" + "_variable" * bool(micro),
            batch_size=batch,
            eval=dict(accuracy=accuracy),
            config=dict(dense_microbatch=micro, optimizer=dict(scaling=scaling)),
        )

    runs = [
        run(0.9, 128),
        run(0.8, 128),
        run(0.7, 256),
        run(0.6, 256, 0.5),
        run(0.5, 256, 0.5, 128),
        dict(run(0.4, 512, 1.0, 128), experiment="owt_imagenette_variable"),
        dict(experiment="another"),
    ]
    paper = {("as large", 128): 42.33, ("128", 512): 42.44}
    assert batches.batch_table(runs, paper).splitlines() == [
        "| data | rate times, dense batch | n | batch 128 | batch 256 | batch 512 |",
        "|---|---|---|---|---|---|",
        "| ILSVRC-2012, published | k, as large | 1 | 42.33 |  |  |",
        "| ILSVRC-2012, published | k, 128 | 1 |  |  | 42.44 |",
        "| CIFAR-10 | k, as large | 2/1 | 15.00 ± 7.07 | 30.00 |  |",
        "| CIFAR-10 | sqrt(k), as large | 1 |  | 40.00 |  |",
        "| CIFAR-10 | sqrt(k), 128 | 1 |  | 50.00 |  |",
        "| Imagenette | k, 128 | 1 |  |  | 60.00 |",
    ]
    published = batches.published_batch_errors()
    assert published["as large", 1024] == 43.28
    assert published["128", 1024] == 42.86
