"""What is claimed and measured: the tables' numbers, from runs that are known."""

import json

from cnn_spmd import claims


def test_steps_to_error():
    """10 steps an epoch, lines of 4 steps: the error of the last 12 steps counts, once there are so many."""
    accuracies = [0.9, 0.5, 0.6, 0.7, 0.8, 0.9]
    rows = [dict(step=4 * (i + 1), split="train", steps=4, accuracy=accuracy) for i, accuracy in enumerate(accuracies)]
    rows.insert(2, dict(step=8, split="eval", accuracy=1.0))
    assert claims.steps_to_error(rows, 0.25, 10) == 24  # of steps 13 to 24: (.7 + .8 + .9) / 3
    assert claims.steps_to_error(rows, 0.35, 10) == 12  # .667
    assert claims.steps_to_error(rows, 0.15, 10) is None
    assert claims.steps_to_error(rows, 0.15, 4) == 4
    assert claims.steps_to_error(rows[:2], 0.9, 10) is None  # not an epoch yet


def test_tables_on_known_runs(tmp_path):
    def write(variant, seed, accuracy=0.9, reached=None, prefix="claims_2012", **more):
        run = dict(experiment=f"{prefix}_{variant}", seed=seed, steps=40, epochs=4.0, eval=dict(accuracy=accuracy),
                   param_count=1000, train_seconds=2.0)
        (tmp_path / f"{prefix}-{variant}-{seed}.json").write_text(json.dumps(run | more))
        if reached:
            lines = [dict(step=step, split="train", steps=10, accuracy=float(step >= reached)) for step in (10, 20, 30, 40)]
            (tmp_path / f"{prefix}-{variant}-{seed}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    write("relu", 0, reached=10)
    write("tanh", 0, reached=40)
    write("relu", 1, reached=20)
    write("tanh", 1, reached=100)  # not within this run
    write("base", 0, 0.9)
    write("base", 1, 0.92)
    write("no_lrn", 0, 0.88)
    write("no_lrn", 1, 0.91)
    write("no_lrn", 2, 0.5)  # has no pair
    write("vgg_11", 0, 0.9, prefix="deeper")
    write("simple_cnn", 0, 0.7, prefix="deeper")
    rows = claims.claims_table(tmp_path).splitlines()[2:]
    assert rows[0] == ("| ReLU reaches 25% training error sooner than tanh (figure 1) | 6 times | "
                       "4.0 times (1.0 epochs, not 4.0) | 1 |")
    assert rows[1] == "| response norms help (3.3) | 1.4 (ImageNet) | 1.50 ± 0.71 (10.50%, not 9.00%) | 2 |"
    assert rows[2] == "| overlapping pools help (3.4) | 0.4 (ImageNet) |  | 0 |"
    assert claims.depth_table(tmp_path).splitlines()[2:] == [
        "| simple_cnn | 2 | 1 | 1,000 | 1 | 70.00 | 2.0 |", "| vgg_11 | 11 | 8 | 1,000 | 1 | 90.00 | 2.0 |"]
    picture = claims.depth_plot(tmp_path)
    assert ">simple_cnn<" in picture
    assert ">vgg_11<" in picture


def test_weights_of_a_neuron():
    """The talk's two figures."""
    assert (claims.weights_of_a_neuron(32), claims.weights_of_a_neuron(200)) == (3_072, 120_000)
