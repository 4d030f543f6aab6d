"""Folders that hold no run, another run, or damaged files are refused by name."""

import fcntl
import json
import os
import pathlib
import re
import shutil

import pytest
from run_helpers import stop_after

from cnn_spmd.errors import UserError
from cnn_spmd.training import loop
from cnn_spmd.training import workdir as workdirs


def test_workdirs_that_are_refused(config, tmp_path):
    (tmp_path / "file").write_text("precious")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=re.escape(f"--workdir={workdir}: cannot be written")):
            loop.train(config, workdir)
    assert (tmp_path / "file").read_text() == "precious"
    with pytest.raises(UserError, match="is not empty and holds no run"):
        loop.train(config, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_a_workdir_of_another_config_is_refused(config, tmp_path):
    loop.train(config, tmp_path)
    before = (tmp_path / "config.json").read_text()
    config.optimizer.learning_rate = 0.002
    config.seed = 1
    config.mesh.data = 2
    with pytest.raises(
        UserError, match=r"\(optimizer\.learning_rate: 0\.001 -> 0\.002; seed: 0 -> 1\)"
    ):
        loop.train(config, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    for damaged in (before[:50], "[]", ""):
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            loop.train(config, tmp_path)


def test_two_runs_in_one_workdir(config, tmp_path):
    loop.train(config, tmp_path)
    with (tmp_path / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is using it"):
            loop.train(config, tmp_path)


def test_a_lock_that_another_run_removes_protects_nothing(tmp_path, monkeypatch):
    """A run that checks its folder and leaves removes the lock, which this one has opened."""
    monkeypatch.setattr(fcntl, "flock", lambda lock, _: os.unlink(lock.name))
    with pytest.raises(UserError, match="another run is using it"), workdirs.locked(tmp_path / "a"):
        pass


def test_a_run_that_was_killed_as_it_wrote_its_first_file_can_begin(tmp_path):
    (tmp_path / "config.json.tmp").write_text("{")
    with workdirs.locked_run(tmp_path, {}) as old_summary:
        assert old_summary == {}


def test_a_damaged_summary_is_made_anew(config, tmp_path):
    first = loop.train(config, tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    assert loop.train(config, tmp_path)["eval"] == first["eval"]


@pytest.mark.parametrize("evaluation", [None, dict(accuracy=None), [1]])
def test_a_summary_of_another_form_is_made_anew(config, tmp_path, evaluation):
    first = loop.train(config, tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(first | dict(eval=evaluation)))
    assert loop.train(config, tmp_path)["eval"] == first["eval"]


def test_pipes_and_byte_order_marks_in_a_run_folder(config, tmp_path):
    stop_after(4, config, tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text("\ufeff" + text)  # as some editors do
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is no regular file"):
        loop.train(config, tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    assert loop.train(config, tmp_path)["steps"] == 8


@pytest.mark.parametrize("name", ["run[1]", "run\\1", "a*", "b?", "gs:"])
def test_paths_in_which_no_checkpoint_could_be_read_are_refused(
    config, tmp_path, name, monkeypatch
):
    """The bad name may be above the run, or that of the current folder."""
    (tmp_path / name).mkdir()
    for workdir in (tmp_path / name / "a", tmp_path / name / "run"):
        with pytest.raises(UserError, match="no checkpoint could be read again from"):
            loop.train(config, workdir)
    monkeypatch.chdir(tmp_path / name)
    with pytest.raises(UserError, match="--workdir=run: no checkpoint could be read again from"):
        loop.train(config, pathlib.Path("run"))
    assert not list((tmp_path / name).iterdir())


@pytest.mark.parametrize("name", ["a b é日本 {x},y/-w", "x~$HOME 100% '\" #&|;/new\nline"])
def test_other_paths_hold_runs_that_resume(config, tmp_path, name):
    stop_after(4, config, tmp_path / name)
    assert loop.train(config, tmp_path / name)["steps"] == 8


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl", "checkpoints"])
def test_a_file_where_a_folder_should_be_and_the_reverse_is_named(config, tmp_path, name):
    stop_after(4, config, tmp_path)
    path = tmp_path / name
    (shutil.rmtree if path.is_dir() else path.unlink)(*([path] if path.is_dir() else []))
    path.write_text("") if name == "checkpoints" else path.mkdir()
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: is no .*, expected a") as error:
        loop.train(config, tmp_path)
    assert "\n" not in str(error.value)
