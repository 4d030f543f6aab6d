"""The list of runs below a folder, as a table and as CSV."""

import csv
import io
import json

import pytest

from cnn_spmd import config as configs
from cnn_spmd import runs


def write_run(folder, accuracies, status="completed", **fields):
    """Write the files of a run, evaluated every 10 steps."""
    folder.mkdir(parents=True)
    config = configs.default().to_dict() | dict(epochs=2)
    config["optimizer"] |= dict(learning_rate=fields.pop("learning_rate", 0.1))
    config["data"] |= dict(name="digits")
    summary = dict(
        status=status,
        experiment="e",
        dataset="digits",
        device_kind="cpu",
        mesh=dict(data=4, model=2),
        epochs=2.0,
        commit="abc",
        started="2026-01-01T00:00:00+00:00",
        startup=[dict(stage="imports", begin=0, end=1)],
        eval=dict(accuracy=accuracies[-1]) if accuracies else None,
        config=config | fields,
    )
    (folder / "summary.json").write_text(json.dumps(summary))
    rows = [
        dict(step=10 * n, split="eval", accuracy=accuracy)
        for n, accuracy in enumerate(accuracies, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two runs of a sweep, a stopped one, and one of which only config.json is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "runs"
    write_run(path / "s/01-learning_rate=0.1", [0.5, 0.9, 0.8])
    write_run(path / "s/02-learning_rate=0.01", [0.7], learning_rate=0.01, steps_per_call=7)
    write_run(path / "stopped", [], "interrupted", seed=3, parallelism="a_scheme_with_a_long_name")
    cut = json.loads((path / "s/01-learning_rate=0.1/summary.json").read_text())["config"]
    (path / "cut").mkdir()
    (path / "cut/config.json").write_text(json.dumps(cut))
    return path


def test_the_table_of_runs(folder, capsys):
    assert runs.main([]) == 0  # of "runs"
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "4 runs in runs; accuracy: the best on the test split"
    assert max(map(len, lines[:5])) <= 80
    assert [line.split() for line in lines[:5]] == [
        ["run", "learning_rate", "seed", "status", "accuracy", "MB"],
        ["s/01-learning_rate=0.1", "0.1", "0", "completed", "90.00%", "0.0"],
        ["s/02-learning_rate=0.01", "0.01", "0", "completed", "70.00%", "0.0"],
        ["cut", "0.1", "0", "unfinished", "0.0"],
        ["stopped", "0.1", "3", "interrupted", "0.0"],
    ]
    assert lines[5:] == [
        "They also differ in parallelism, steps_per_call: see --csv.",
        "cut is unfinished: runs/cut/summary.json: No such file or directory",
    ]


def test_runs_of_several_experiments_name_them_first(folder, capsys, monkeypatch):
    """The split has a column where both are there; what does not fit is wrapped."""
    monkeypatch.setenv("COLUMNS", "100")
    for rate in (1, 2, 3):
        write_run(
            folder / f"v{rate}",
            [0.1 * rate],
            learning_rate=rate,
            weight=rate,
            model=dict(name="simple_cnn"),
            data=dict(name="digits", validation=200),
            dropout_of_a_long_name=rate,
        )
    assert runs.main([]) == 0
    title, header, *lines = capsys.readouterr().out.splitlines()
    assert title == "7 runs in runs; accuracy: the best on the test or validation split"
    assert header.split()[:2] == ["run", "model"]
    assert header.split()[-4:] == ["status", "split", "accuracy", "MB"]
    assert [line.split()[-3:-1] for line in lines[:3]] == [
        ["test", "90.00%"],
        ["test", "70.00%"],
        ["validation", "30.00%"],
    ]
    assert max(map(len, lines)) <= 100


def test_runs_of_several_folders_have_their_data_and_a_line_each(folder, capsys, monkeypatch):
    """Without a terminal no name is folded; in one, names break after a part."""
    monkeypatch.delenv("COLUMNS")
    name = "a_sweep_of_a_long_name/01-optimizer.learning_rate=1.0,seed=0"
    write_run(folder / name, [0.6], learning_rate=1.0, batch_size=64)
    path = folder / name / "summary.json"
    summary = json.loads(path.read_text())
    summary["config"]["data"] = dict(name="folder", dir="/x/pets/train")
    path.write_text(json.dumps(summary | dict(dataset="folder-01234567", data_digest="0123456789")))
    for seed in (1, 2):  # of more values than the batch size, which stands before it
        write_run(folder / f"more/{seed}", [], seed=seed)
    (folder / "empty").mkdir()
    arguments = [f"runs/{name}" for name in ("a_sweep_of_a_long_name", "s", "s", "more", "empty")]
    assert runs.main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("warning: runs/empty: holds no run")
    title, *lines = printed.out.splitlines()
    assert title.startswith(f"5 runs in {', '.join(arguments)};")
    assert [line.split()[:4] for line in (*lines[:3], lines[5])] == [
        ["run", "data", "learning_rate", "batch_size"],
        ["runs/s/01-learning_rate=0.1", "digits", "0.1", "512"],
        ["runs/s/02-learning_rate=0.01", "digits", "0.01", "512"],
        [f"runs/{name}", "pets", "1", "64"],
    ]
    assert "data_digest" not in " ".join(lines)
    summary["config"]["data"] = dict(name="digits")
    path.write_text(json.dumps(summary | dict(data_digest="f" * 16)))
    other = folder / "s/01-learning_rate=0.1/summary.json"
    other.write_text(json.dumps(json.loads(other.read_text()) | dict(data_digest="e" * 16)))
    assert runs.main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()[1:]
    assert header.split()[:4] == ["run", "learning_rate", "batch_size", "data_digest"]
    assert lines[0].split()[3] == "e" * 8
    lines = runs.folded(name, 40).splitlines()
    assert lines == ["a_sweep_of_a_long_name/", "01-optimizer.learning_rate=1.0,seed=0"]


def test_a_csv_of_runs(folder, capsys):
    assert runs.main(["runs", "--csv", "-"]) == 0
    out = capsys.readouterr().out
    rows = [*csv.DictReader(io.StringIO(out))]
    assert [row["folder"] for row in rows] == [
        "cut",
        "s/01-learning_rate=0.1",
        "s/02-learning_rate=0.01",
        "stopped",
    ]
    best = rows[1]
    expected = {
        "config.optimizer.learning_rate": "0.1",
        "epochs": "2.0",
        "commit": "abc",
        "started": "2026-01-01T00:00:00+00:00",
        "best.accuracy": "0.9",
        "best.step": "20",
        "eval.accuracy": "0.8",
    }
    assert {name: best[name] for name in expected} == expected
    assert int(best["bytes_on_disk"]) == sum(
        path.stat().st_size for path in (folder / "s/01-learning_rate=0.1").iterdir()
    )
    assert "startup" not in best
    assert runs.main(["runs", "--csv", "runs.csv"]) == 0
    assert (folder.parent / "runs.csv").read_text() == out
    capsys.readouterr()
    assert runs.main(["runs", "--csv", "runs"]) == 2
    assert capsys.readouterr().err.startswith("error: --csv=runs: cannot be written: ")
    assert runs.main(["nowhere"]) == 2
    assert capsys.readouterr().err == "error: nowhere: does not exist\n"
