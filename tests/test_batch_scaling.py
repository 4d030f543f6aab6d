"""A sweep of batch sizes has steps to a target, and their knee is that of a known curve."""

import json
import re

import picture_checks
import pytest
from report_runs import RUNS, a_run, row_of, write_sweep, written

from cnn_spmd.report import __main__ as report
from cnn_spmd.report import batch_scaling, batch_scaling_section, plots


def a_scaling_run(size, step, rate=0.1, seed=0, *, accuracy=0.914, noise=None, **more):
    """Return a run of a sweep of batch_size that has `accuracy` at `step`, and 0.05 before.

    noise: tr(S) and |G|^2 at `step`.
    """
    run = a_run(seed=seed, **(dict(dataset="digits") | more))
    run["settings"] = {"batch_size": size, "optimizer.learning_rate": rate, "seed": seed}
    run["name"] = ",".join(f"{key}={value}" for key, value in run["settings"].items())
    rows = [
        dict(step=step // 2, split="eval", accuracy=0.05),
        dict(step=step, split="train", accuracy=1.0),
        dict(step=step, split="eval", accuracy=accuracy),
        dict(step=2 * step, split="final", accuracy=accuracy),
    ]
    for at, (trace, norm) in {1: (1.0, 1.0), step: noise}.items() if noise else ():
        rows.append(dict(step=at, split="noise", trace=trace, gradient_norm2=norm))
    return run | dict(metrics=rows, config={})


# S = 100 (1 + 512 / B)
CURVE = {64: 900, 256: 300, 1024: 150, 4096: 112.5}


def test_the_knee_of_a_known_curve(monkeypatch):
    picture_checks.check_all(monkeypatch)
    knee = batch_scaling.fit_knee(CURVE)
    assert knee.batch == pytest.approx(512, rel=2e-3)
    assert knee.fewest_steps == pytest.approx(100, rel=2e-3)
    assert knee.miss < 1e-3
    assert batch_scaling.fit_knee({64: 900, 256: 300}) is None
    with plots.style():
        chart = batch_scaling_section.draw_steps(CURVE, knee, 1234.0)
    assert f"knee, {knee.batch:.0f}" in chart
    assert "noise scale, 1,234" in chart


def test_a_sweep_of_batch_sizes_has_steps_to_a_target(tmp_path, capsys, monkeypatch):
    """The best setting of each size counts, and the noise scale of its seeds."""
    picture_checks.draw_nothing(monkeypatch)
    runs = [a_scaling_run(size, round(steps)) for size, steps in CURVE.items()]
    runs += [
        a_scaling_run(64, 1200, rate=0.2, noise=(9e9, 1.0)),
        a_scaling_run(64, 1000, seed=1, noise=(300.0, 2.0)),
        a_scaling_run(64, 950, seed=2, noise=(900.0, -1.0)),
        a_scaling_run(256, 10, rate=0.2, accuracy=0.89),
        a_scaling_run(1024, 10, rate=0.4, status="failed"),
    ]
    runs[-1]["metrics"] = []
    folder = write_sweep(tmp_path / "s", runs)
    for run in runs:
        lines = "".join(json.dumps(row) + "\n" for row in run.pop("metrics"))
        (folder / run["name"]).mkdir(exist_ok=True)
        (folder / run["name"] / "metrics.jsonl").write_text(lines)
    (folder / "sweep.json").write_text(
        json.dumps(json.loads((folder / "sweep.json").read_text()) | dict(runs=runs))
    )
    markdown, page, *_ = written(capsys, folder)
    setting = "optimizer.learning_rate=0.1, seed=0"
    row = ["64", "900", "450", "57,600", "1.00", "1.00", setting, "4 of 4", "1,200"]
    assert row_of(page, "64", "900") == row
    row = ["1,024", "150", "75", "153,600", "6.00", "16.00", setting, "1 of 2", ""]
    assert row_of(page, "1,024") == row
    assert row_of(page, "256", "300")[7] == "1 of 2"
    assert "Target: a test error of 9 %, the lowest that every batch size reaches" in markdown
    (knee,) = re.findall(r"The knee is at batch (\d+): ", markdown)
    assert int(knee) == pytest.approx(512, rel=0.02)  # steps are whole
    assert "tr(S) / |G|^2 is 1,200 images" in markdown
    assert "<h3>Steps to the target by batch size</h3>" in page
    assert report.main([str(folder), "--target_error", "0.12"]) == 0
    assert "error of 12 %, set by --target_error." in (folder / "report.md").read_text()
    assert row_of((folder / "report.html").read_text(), "256", "10")


def scaling_of(runs, target_error=None):
    """Return the scaling of a sweep of these runs, and its section as one text."""
    sweep = dict(runs=runs, hardware={}, devices=1)
    scaling = batch_scaling.measure(sweep, target_error)
    return scaling, str(batch_scaling_section.section(sweep, target_error))


def test_a_target_that_is_not_reached_or_that_all_reach_alike(monkeypatch):
    picture_checks.draw_nothing(monkeypatch)
    runs = [a_scaling_run(size, 64_000 // size) for size in (64, 128, 256)]
    runs.append(a_scaling_run(512, 40, accuracy=0.2))
    scaling, text = scaling_of(runs)
    assert scaling.target == 0.2
    assert list(scaling.steps) == [64, 128, 256, 512]
    assert "set by batch 512, whose best error is 80.00 %" in text
    scaling, text = scaling_of(runs, 0.09)
    assert list(scaling.steps) == [64, 128, 256]
    assert "['512', '', '', '', '', '', '', '0 of 1', '']" in text
    assert "lies above batch 256, the largest" in text  # perfect scaling
    assert "There is no noise scale at the target" in text
    assert "first evaluation" not in text
    _, text = scaling_of([a_scaling_run(size, 500) for size in (64, 128, 256)], 0.09)
    assert "lies below batch 64, the smallest" in text  # a plateau
    _, text = scaling_of([a_scaling_run(size, 500) for size in (64, 128, 256)], 0.97)
    assert "The first evaluation already reached it, at batch 64, 128, 256." in text
    scaling, text = scaling_of([run | dict(config={"data.validation": 9}) for run in runs], 0.01)
    assert "Target: a validation error of 1 %" in text
    assert not scaling.steps
    assert "it takes 3 batch sizes that reach the target, here 0 do" in text


def test_only_sweeps_of_three_batch_sizes_have_steps_to_a_target(tmp_path, capsys, monkeypatch):
    picture_checks.draw_nothing(monkeypatch)
    sizes = (64, 128, 256)
    runs = [a_scaling_run(size, 500) for size in sizes]
    assert batch_scaling.measure(dict(runs=runs))
    for others in (
        runs[:2],
        [*runs[:2], a_scaling_run(256, 500, status="refused")],
        [*runs[:2], a_scaling_run(256, 500, model="resnet_20")],
        [a_scaling_run(size, 500, dataset="synthetic") for size in sizes],
    ):
        assert batch_scaling.measure(dict(runs=others)) is None
    (said,) = batch_scaling_section.section(dict(runs=runs[:2]), None)
    assert said.text == "The steps to a target need 3 batch sizes; this sweep has 2."
    assert not batch_scaling_section.section(dict(runs=runs[:1]), None)
    folder = write_sweep(tmp_path / "s", RUNS)
    assert "Steps to a target" not in written(capsys, folder)[0]
    assert report.main([str(folder), "--target_error", "0.1"]) == 2
    assert capsys.readouterr().err.startswith("error: --target_error=0.1: expected runs that ")
    assert report.main([str(folder), "--target_error", "10"]) == 2
    assert "--target_error=10: expected a share between 0 and 1" in capsys.readouterr().err
