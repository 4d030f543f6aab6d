"""The files of a run are read where they are missing, cut, damaged or old."""

import json
import os

import pytest
from run_helpers import lines, stop_after

from cnn_spmd.errors import UserError
from cnn_spmd.training import loop, one_checkpoint, runfiles
from cnn_spmd.training.dry_run import dry_run

FILES = ("config.json", "program.json", "summary.json", "profile.json")


def test_damaged_lines_of_metrics(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(runfiles.logging, "warning", lambda *message: said.append(message))
    good = '{"step": 1, "split": "train"}'
    bad = [
        "garbage",
        "5",
        '{"step": 1}',
        '{"step": "x", "split": "eval"}',
        '{"step": null, "split": "train"}',
    ]
    (tmp_path / "m").write_text("\n".join([good, *bad, good, '{"st']))
    assert len(runfiles.read_metrics_rows(tmp_path / "m")) == 2
    assert [message[2] for message in said] == [2, 3, 4, 5, 6]
    assert {message[1] for message in said} == {tmp_path / "m"}


@pytest.mark.parametrize("content", [None, b"", b"[1]", b'{"a": ', b"\xff"])
def test_a_file_that_need_not_be_there_may_be_missing_or_damaged(tmp_path, content, monkeypatch):
    warned = []
    monkeypatch.setattr(runfiles.logging, "warning", lambda *message: warned.append(message))
    path = tmp_path / "summary.json"
    if content is not None:
        path.write_bytes(content)
    assert runfiles.read_json(path, required=False) == {}
    assert len(warned) == (content is not None)
    with pytest.raises(UserError, match="No such file" if content is None else "damaged JSON"):
        runfiles.read_json(path)


def test_a_kill_while_a_file_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    runfiles.write_json(path, dict(a=1))
    with pytest.raises(KeyboardInterrupt), runfiles.atomic_write(path) as temporary:
        temporary.write_text("{")
        raise KeyboardInterrupt
    assert runfiles.read_json(path) == dict(a=1)
    assert [file.name for file in tmp_path.iterdir()] == ["summary.json"]


def test_the_disk_holds_a_file_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    """Otherwise a power cut leaves an empty config.json or manifest, and the run cannot go on."""
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "arrays").write_text("")
    one_checkpoint.Checkpoint(tmp_path / "1").write_manifest("run", 1, None)
    runfiles.write_json(tmp_path / "config.json", {})
    files = [tmp_path / name for name in ("1/arrays", "1/SHA256.json", "config.json")]
    assert flushed == [file.stat().st_ino for file in files]


def test_every_file_of_a_run_has_a_schema_number(config, tmp_path):
    config.update(dict(profile=1, epochs=1))
    loop.train(config, tmp_path / "run")
    dry_run(config, tmp_path / "dry")
    files = [tmp_path / "run" / name for name in FILES] + [tmp_path / "dry/program.json"]
    for path in files:
        assert runfiles.read_json(path)["schema"] == runfiles.SCHEMA, path
    for split in ("train", "final"):
        schemas = {line["schema"] for line in lines(tmp_path / "run", split)}
        assert schemas == {runfiles.SCHEMA}


def test_a_run_whose_files_have_no_schema_number_resumes(config, tmp_path):
    """Runs were written so before there were schema numbers."""
    stop_after(4, config, tmp_path)
    for name in ("config.json", "program.json", "summary.json"):
        content = runfiles.read_json(tmp_path / name)
        del content["schema"]
        runfiles.write_json(tmp_path / name, content)
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        del row["schema"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert loop.train(config, tmp_path)["steps"] == 8
    assert [line["step"] for line in lines(tmp_path, "train")] == list(range(1, 9))
    assert runfiles.figures_of(tmp_path)["steps"] == 8
