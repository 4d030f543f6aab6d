"""Epochs to an error and accuracy by depth, from runs that are known; the claims themselves: test_papers.py."""

import json

from cnn_spmd.papers import claims


def test_steps_to_error():
    """10 steps an epoch, lines of 4 steps: the error of the last 12 steps counts, once there are so many."""
    accuracies = [0.9, 0.5, 0.6, 0.7, 0.8, 0.9]
    rows = [
        dict(step=4 * (i + 1), split="train", steps=4, accuracy=accuracy)
        for i, accuracy in enumerate(accuracies)
    ]
    rows.insert(2, dict(step=8, split="eval", accuracy=1.0))
    assert claims.steps_to_error(rows, 0.25, 10) == 24  # of steps 13 to 24: (.7 + .8 + .9) / 3
    assert claims.steps_to_error(rows, 0.35, 10) == 12  # .667
    assert claims.steps_to_error(rows, 0.15, 10) is None
    assert claims.steps_to_error(rows, 0.15, 4) == 4
    assert claims.steps_to_error(rows[:2], 0.9, 10) is None  # not an epoch yet


def test_depth_on_known_runs(tmp_path):
    for name, accuracy in (("vgg_11", 0.9), ("simple_cnn", 0.7)):
        run = dict(experiment=f"deeper_{name}", eval=dict(accuracy=accuracy), param_count=1000)
        (tmp_path / f"{name}.json").write_text(json.dumps(run))
    runs = claims.read(tmp_path)
    assert claims.depth_table([*runs, dict(experiment="another")]).splitlines()[2:] == [
        "| simple_cnn | 2 | 1 | 1,000 | 1 | 70.00 |",
        "| vgg_11 | 11 | 8 | 1,000 | 1 | 90.00 |",
    ]
    picture = claims.depth_plot(runs)
    assert ">simple_cnn<" in picture
    assert ">vgg_11<" in picture
    assert picture.count(">0.0 M<") == 2


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
    assert claims.batch_table(
        runs, {("as large", 128): 42.33, ("128", 512): 42.44}
    ).splitlines() == [
        "| data | rate times, dense batch | batch 128 | batch 256 | batch 512 |",
        "|---|---|---|---|---|",
        "| ILSVRC-2012, published | k, as large | 42.33 (n = 1) |  |  |",
        "| ILSVRC-2012, published | k, 128 |  |  | 42.44 (n = 1) |",
        "| CIFAR-10 | k, as large | 15.00 ± 7.07 (n = 2) | 30.00 (n = 1) |  |",
        "| CIFAR-10 | sqrt(k), as large |  | 40.00 (n = 1) |  |",
        "| CIFAR-10 | sqrt(k), 128 |  | 50.00 (n = 1) |  |",
        "| Imagenette | k, 128 |  |  | 60.00 (n = 1) |",
    ]


def test_weights_of_a_neuron():
    """The talk's two figures."""
    assert (claims.weights_of_a_neuron(32), claims.weights_of_a_neuron(200)) == (3_072, 120_000)
