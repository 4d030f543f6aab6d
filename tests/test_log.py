"""TensorBoard shows what metrics.jsonl holds, after a restart too."""

import shutil

from run_helpers import scalars, stop_after

from cnn_spmd.training import board, log, loop


def test_tensorboard_gets_what_the_file_gets(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(board.Board, "scalar", lambda _, *scalar: written.append(scalar))
    file = log.MetricsFile(tmp_path, 0, {})
    file.write(3, "train", loss=1.5)
    file.close()
    assert written == [("train/loss", 1.5, 3)]


def test_tensorboard_forgets_the_curve_of_a_run_that_starts_again(config, tmp_path):
    loop.train(config, tmp_path)
    assert list(scalars(tmp_path, "train/loss")) == list(range(1, 9))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "summary.json").unlink()
    stop_after(4, config, tmp_path)
    assert list(scalars(tmp_path, "train/loss")) == list(range(1, 5))
