"""load_runs gives one flat dict per run."""

import json

import pytest
from report_runs import write_ranked_run, write_run, write_sweep

from cnn_spmd.config import flat
from cnn_spmd.errors import UserError
from cnn_spmd.report import load_runs


def test_load_runs_gives_one_flat_dict_per_run(tmp_path):
    sweep = write_sweep(tmp_path / "s", [])
    write_ranked_run(sweep / "seed=0")
    write_run(sweep / "seed=1", "4x2", 4000.0, seed=1, rate=0.2)
    write_run(tmp_path / "alone", status="interrupted")
    rows = load_runs(tmp_path)
    assert [row["folder"] for row in rows] == ["alone", "s/seed=0", "s/seed=1"]
    assert [row["status"] for row in rows] == ["interrupted", "completed", "completed"]
    for row in rows:
        assert not [name for name, value in row.items() if isinstance(value, dict)]
        assert None not in row.values()
    last = rows[2]
    expected = {
        "config.optimizer.learning_rate": 0.2,
        "config.batch_size": 128,
        "mesh.data": 4,
        "seed": 1,
        "images_per_second": 4000.0,
        "eval.accuracy": 0.51,
        "eval.loss": 2.25,
        "versions.jax": "0.11.2",
        "peak_bytes": 400_000_000,
        "ring_bytes": 3_000_000 * 4 + 70_000 * 2,
        "closed_form_ring_bytes": 3_100_000 * 4,
        "hidden_share": 0.875,
    }
    assert {name: last[name] for name in expected} == expected
    assert rows[1]["eval.mean_rank"] == 2.5
    assert "eval.mean_rank" not in last
    assert "collectives" not in last
    assert load_runs(str(tmp_path / "alone"))[0]["folder"] == "."


def test_load_runs_keeps_every_field_of_a_summary(tmp_path):
    run = write_run(tmp_path / "run")
    summary = flat(json.loads((run / "summary.json").read_text()))
    lacking = summary.keys() - load_runs(run)[0].keys()
    assert lacking == {"collectives", *(name for name in summary if summary[name] is None)}


def damage_both(run):
    """Damage config.json and summary.json."""
    for name in ("config.json", "summary.json"):
        (run / name).write_text("{")


def test_load_runs_says_what_is_unfinished(tmp_path):
    """Where summary.json is damaged, config.json is read; damage costs one file only."""
    for name, damage in (
        ("a", lambda run: (run / "summary.json").unlink()),
        ("b", lambda run: (run / "summary.json").write_text("{")),
        ("c", lambda run: (run / "program.json").write_text("[]")),
        ("d", damage_both),
    ):
        damage(write_run(tmp_path / name))
    *unfinished, damaged, empty = load_runs(tmp_path)
    for row in unfinished:
        assert row["status"] == "unfinished"
        assert "summary.json" in row["reason"]
        assert row["config.optimizer.learning_rate"] == 0.1
    assert damaged["status"] == "completed"
    assert "ring_bytes" not in damaged
    assert empty.keys() >= {"folder", "status", "reason", "ring_bytes"}
    assert not [name for name in empty if name.startswith("config.")]
    (running,) = load_runs(write_run(tmp_path / "e", status="running"))
    assert running["status"] == "running"
    assert "unless a kill ended it" in running["reason"]


def test_load_runs_refuses_a_folder_without_runs(tmp_path):
    with pytest.raises(UserError, match=r"holds no run \(no config.json, no summary.json\)"):
        load_runs(tmp_path)
    with pytest.raises(UserError, match="none: does not exist"):
        load_runs(tmp_path / "none")
