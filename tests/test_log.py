"""TensorBoard shows what metrics.jsonl holds, after a restart too."""

import shutil

from run_helpers import scalars, stop_after

from cnn_spmd.training import log, loop, terminal


def test_tags_name_what_a_curve_shows():
    """The last evaluation is on the curve of the others; what counts has no curve."""
    train = dict(loss=1.5, learning_rate=0.1, images_per_second=9.0, steps=2, train_seconds=3.0)
    assert log.tagged("train", train) == {
        "train/loss": 1.5,
        "train/learning_rate": 0.1,
        "speed/images_per_second": 9.0,
    }
    for split in ("eval", "final"):
        assert log.tagged(split, dict(accuracy=0.5, examples=40)) == {"test/accuracy": 0.5}
    assert log.tagged("noise", dict(trace=1.0, batches=4)) == {"noise/trace": 1.0}


def test_the_time_that_a_run_still_takes_has_hours(capsys):
    progress = terminal.Progress(9)
    progress.update(9, loss=1.0, accuracy=0.5, images_per_second=3.0, eta=212674)
    assert capsys.readouterr().out.endswith("3 images/s  ETA 59:04:34\n")


def test_tensorboard_forgets_the_curve_of_a_run_that_starts_again(config, tmp_path):
    loop.train(config, tmp_path)
    assert list(scalars(tmp_path, "train/loss")) == list(range(1, 9))
    assert list(scalars(tmp_path, "test/accuracy")) == [4, 8]
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "summary.json").unlink()
    stop_after(4, config, tmp_path)
    assert list(scalars(tmp_path, "train/loss")) == list(range(1, 5))
