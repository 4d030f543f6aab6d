"""Reports on runs and sweeps have their numbers and name what is damaged."""

import errno
import html
import json
import os
import pathlib
import re
import subprocess
import sys

import picture_checks
import pytest
from report_runs import (
    BROKEN,
    PROFILE,
    RUNS,
    a_run,
    cells_of,
    change,
    fifo,
    metrics,
    row_of,
    write_ranked_run,
    write_run,
    write_sweep,
    written,
)

from cnn_spmd import sweep_screen
from cnn_spmd.papers import meshes, published
from cnn_spmd.report import __main__ as report
from cnn_spmd.report import (
    bar_charts,
    canvas,
    compare,
    load,
    mesh_charts,
    plots,
    run_tables,
    settings,
    write_report,
)
from cnn_spmd.report import page as page_of_report
from cnn_spmd.training import loop, runfiles


@pytest.fixture
def drawn(monkeypatch):
    """Draw and check the pictures in this test; other tests go without."""
    picture_checks.check_all(monkeypatch)


@pytest.fixture(autouse=True)
def _undrawn(request, monkeypatch):
    if "drawn" not in request.fixturenames:
        picture_checks.draw_nothing(monkeypatch)


def test_a_sweeps_numbers_are_in_all_three_files(tmp_path, capsys):
    folder = write_sweep(tmp_path / "s", RUNS + BROKEN, command="python launch.py --mesh all")
    markdown, page, rows, errors = written(capsys, folder)
    assert not errors
    for run, row in zip(RUNS, rows, strict=False):
        got = run["figures"]
        rate = f"{got['images_per_second']:,.0f}" if got["images_per_second"] >= 100 else "99.5"
        times = [f"{got['step_milliseconds'][name]:,.3f}" for name in ("p10", "median", "p90")]
        expected = [
            run["name"],
            "completed",
            f"{100 * got['accuracy']:.2f}",
            f"{got['loss']:.4f}",
            rate,
            *times,
            f"{got['train_seconds']:.1f}",
            "3.2",
            str(got["seed"]),
            "",
        ]
        assert row_of(page, run["name"]) == expected
        assert "| " + " | ".join(expected) + " |" in markdown
        assert row["name"] == run["name"]
        assert float(row["images_per_second"]) == got["images_per_second"]
        assert float(row["step_milliseconds.p90"]) == got["step_milliseconds"]["p90"]
        assert int(row["ring_bytes.all-reduce"]) == 3_000_000 * got["mesh"]["data"]
    for run in BROKEN:
        assert row_of(page, run["name"])[1::10] == [run["status"], run["reason"]]
    assert "| two towers \\| need <2> devices |" in markdown
    assert [row["reason"] for row in rows[len(RUNS) :]] == [run["reason"] for run in BROKEN]
    for text in (
        "8 x NVIDIA H200, 32 host cores",
        "python launch.py --mesh all",
        "jax 0.11.2",
        "c" * 40,
    ):
        assert text in re.sub("<[^>]*>", "", page)
        assert text in markdown


def test_a_report_names_network_and_data(tmp_path, capsys):
    runs = [
        a_run(dataset="folder-1a2b"),
        a_run("8x1", seed=1, dataset="digits", fallback="cifar10"),
        a_run("4x2", status="failed"),
    ]
    sweep = write_sweep(tmp_path / "s", runs)
    config = dict(data=dict(name="folder", dir="/home/me/photos"))
    (sweep / runs[0]["name"] / "config.json").write_text(json.dumps(config))
    markdown, page, *_ = written(capsys, sweep)
    assert row_of(page, "network") == ["network", "alexnet, 1,000 parameters"]
    assert row_of(page, "data") == ["data", "photos; digits, which stands in for cifar10"]
    assert "| data | photos; digits, which stands in for cifar10 |" in markdown


@pytest.mark.usefixtures("drawn")
def test_a_run_without_a_speed_has_no_bar_for_its_step(tmp_path, capsys):
    runs = [a_run(), a_run("8x1", images_per_second=None, step_milliseconds=None)]
    _, page, *_ = written(capsys, write_sweep(tmp_path / "s", runs))
    chart = re.search(r"<h3>Step time</h3>.*?</figure>", page, re.DOTALL)[0]
    assert (">1x1 data</text>" in chart, ">8x1 data</text>" in chart, ">0.00</text>" in chart) == (
        True,
        False,
        False,
    )
    assert f"runs that had no step left to time: {runs[1]['name']}" in chart


def test_runs_without_a_speed_have_a_report(tmp_path, capsys):
    """Such a run was stopped after its last step, and then completed."""
    write_run(tmp_path / "r")
    summary = json.loads((tmp_path / "r/summary.json").read_text()) | dict(
        images_per_second=None, step_milliseconds=None
    )
    (tmp_path / "r/summary.json").write_text(json.dumps(summary))
    _, _, rows, _ = written(capsys, tmp_path / "r")
    assert rows[0]["images_per_second"] == ""


def test_speedup_is_over_one_device_of_the_same_settings_and_never_invented(tmp_path, capsys):
    markdown, page, rows, _ = written(capsys, write_sweep(tmp_path / "s", RUNS))
    assert row_of(page, "8x1", "data", "batch 128 per device")[3:6] == [
        "2",
        "50.50 ± 0.71",
        "5,500 ± 707",
    ]
    assert row_of(page, "8x1", "data", "batch 128 per device")[7:9] == ["5.50 ± 0.71", "68.8"]
    # hybrid has no one-device run of its own: it is relative to data's.
    assert row_of(page, "4x2", "hybrid", "batch 128 per device")[7:9] == ["7.12", "89.0"]
    assert row_of(page, "8x1", "data", "batch 32 per device")[7:9] == ["6.00", "75.0"]
    assert row_of(page, "1x1", "data", "batch 32 per device")[7:9] == ["1.00", "100.0"]
    assert row_of(page, "8x1", "data", "batch 64 per device")[7:9] == ["", ""]
    assert "No one-device run, so no speedup: batch 64 per device." in markdown
    assert [float(row["speedup"] or 0) for row in rows] == pytest.approx(
        [1, 5, 6, 7.1234, 1, 6.002, 0]
    )
    assert rows[1]["efficiency"] == "0.625"
    assert rows[6]["speedup"] == rows[6]["efficiency"] == ""


def test_the_hidden_share_has_a_column_which_is_empty_for_older_sweeps():
    older = a_run("1x2", hidden_share=None)
    del older["figures"]["hidden_share"]
    groups = compare.groups_of([a_run("2x1"), older])
    rows = map(run_tables.comparison_row, groups)
    assert [row["hidden, %"] for row in rows] == ["88", ""]


def test_predicted_steps_have_a_column_and_a_chart():
    """The chart needs a run with both; its caption has the errors of 10 and of 20 %."""
    runs = [a_run("2x1"), a_run("1x2"), a_run("1x1")]
    for run, factor in zip(runs, (1.1, 0.8, None), strict=True):
        measured = run["figures"]["step_milliseconds"]["median"]
        run["figures"]["predicted_milliseconds"] = factor and factor * measured
    groups = compare.groups_of(runs)
    rows = map(run_tables.comparison_row, groups)
    assert [bool(row["predicted, ms"]) for row in rows] == [
        mesh_charts.predicted_and_measured(group) is not None for group in groups
    ]
    sweep = dict(runs=runs, hardware={}, devices=2)
    chart = mesh_charts.prediction_chart(sweep, groups)
    assert "Median error 15.0%, worst 20.0%." in chart.caption
    assert len(chart.pictures) == 1


def test_runs_that_differ_in_what_they_learn_share_a_point():
    runs = [
        a_run(mesh, settings={"optimizer.learning_rate": rate}) | dict(config={}, metrics=[])
        for mesh in ("1x1", "2x1")
        for rate in (0.1, 0.2)
    ]
    sweep = dict(runs=runs, hardware={}, devices=2)
    for chart in mesh_charts.mesh_charts(sweep, settings.overview(sweep, None)):
        assert len(chart.pictures) == 1, chart.title
        assert "n = 1 run (seeds) per point" in chart.caption
        said = "differ in optimizer.learning_rate only, the first counts." in chart.caption
        assert said == (chart.title == "Throughput")


def test_a_fixed_batch_compares_with_the_same_batch_and_scheme(tmp_path):
    one, other = (dict(parallelism=name, batch_size=512) for name in ("data", "hybrid"))
    runs = [
        a_run("1x1", 100.0, settings=one),
        a_run("1x1", 200.0, "hybrid", settings=other),
        a_run("2x1", 300.0, settings=one),
        a_run("1x2", 300.0, "hybrid", settings=other),
        a_run("2x1", 300.0, settings=dict(one, batch_size=256)),
    ]
    for run in runs:
        run["settings"].pop("batch_per_device")
        run["figures"]["batch_size"] = run["settings"]["batch_size"]
    gains = {(group.mesh, group.panel): group.speedups() for group in compare.groups_of(runs)}
    assert gains == {
        ((1, 1), "batch 512"): [1.0],
        ((2, 1), "batch 512"): [3.0],
        ((1, 2), "batch 512"): [1.5],
        ((2, 1), "batch 256"): [],
    }


@pytest.mark.usefixtures("drawn")
def test_charts_say_what_they_show_and_what_is_left_out(tmp_path, capsys):
    _, page, *_ = written(capsys, write_sweep(tmp_path / "s", RUNS + BROKEN))
    figures = dict(re.findall(r"<h3>([^<]*)</h3>\n<figure>(.*?)</figure>", page, re.DOTALL))
    assert list(figures) == [
        "Throughput",
        "Speedup",
        "Step time",
        "Bytes moved by collectives",
        "Memory per device",
    ]
    for title, chart in figures.items():
        caption = html.unescape(chart.split("<figcaption>")[1])
        assert "8 x NVIDIA H200" in caption, title
        assert "n = 1" in caption, title
        assert "Left out" in caption, title
        assert BROKEN[1]["name"] in caption, title
        assert chart.count("<svg") == (2 if title == "Speedup" else 3), title
    for title in ("Throughput", "Speedup", "Step time"):
        assert (
            "n = 1 to 2 runs (seeds) per point, averaged, each over 9 steady chunks"
            in figures[title]
        )
        assert (
            f"runs refused: {BROKEN[0]['name']}; runs failed: {BROKEN[1]['name']}; runs pending:"
            in figures[title]
        )
    assert ">two towers | need &lt;2&gt; devices</td>" in page
    assert "no ideal and no speedup, with: batch 64 per device" in figures["Speedup"]
    assert (
        "Krizhevsky 2014, arXiv 1404.5997v2, 8 K20, PCIe 2.0, batch 128 per GPU"
        in figures["Speedup"]
    )
    assert ">8x1 data</text>" in figures["Memory per device"]
    assert ">286.8</text>" in figures["Memory per device"]  # parameters and optimizer
    assert ">12.1</text>" in figures["Bytes moved by collectives"]  # of 4x2


@pytest.mark.usefixtures("drawn")
def test_the_page_needs_nothing_else(tmp_path, capsys):
    _, page, *_ = written(capsys, write_sweep(tmp_path / "s", RUNS[:2], experiment="<b>&"))
    assert not re.search(r"<script|<img|<link|@import|\bsrc=|url\((?!#)|href=\"(?!#)", page)
    assert "<b>&" not in page
    assert len(page) < 400_000
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', page))
    assert referred <= set(re.findall(r' id="([^"]+)"', page))
    assert 'id="figure_1"' not in page  # the same in every picture
    # Each grey has another in dark mode, except the edges and hatches of coloured bars.
    greys = {grey for grey, _ in re.findall(r"stroke: (#(..)\2\2)", page)}
    assert {grey for grey in greys if f'="stroke: {grey}"' not in page_of_report.CSS} == {"#333333"}


def test_a_profile_is_split_and_its_kernels_are_listed(tmp_path, capsys):
    runs = [a_run("1x1", 1000.0), a_run("4x2", 4000.0, profile=PROFILE | dict(note="Of a CPU."))]
    markdown, page, rows, _ = written(capsys, write_sweep(tmp_path / "s", runs))
    assert "exposed communication and idle time. Of a CPU." in markdown
    assert "measured by a profile of 20 steps" in page
    assert "Grey bars are not split" in page  # the run without a profile
    expected = [
        runs[1]["name"],
        "20",
        "4.000",
        "2.750",
        "1.500",
        "0.625",
        "0.875",
        "0.375",
        "37.5",
        "21.9",
    ]
    assert row_of(page, *expected[:2]) == expected
    assert row_of(page, runs[1]["name"], "kernel<1>")[2:] == ["0.500", "12.5", "1", ""]
    assert row_of(page, "", "kernel<2>")[2:] == ["0.250", "6.2", "2", "yes"]
    assert not re.search(r"kernel<\d", page)
    assert "kernel<10>" in markdown
    assert "kernel<11>" not in markdown
    assert rows[1]["profile.exposed_milliseconds"] == "0.875"


@pytest.mark.usefixtures("drawn")
def test_pictures_do_not_depend_on_the_users_settings(tmp_path, capsys):
    """This process has other settings; another has a matplotlibrc and a wrong backend."""
    folder = write_sweep(tmp_path / "s", RUNS[:2])
    page = written(capsys, folder)[1]
    own = {"text.usetex": True, "font.size": 30, "axes.facecolor": "red", "savefig.bbox": "tight"}
    with canvas.matplotlib.rc_context(own):
        before = dict(canvas.matplotlib.rcParams)
        assert written(capsys, folder)[1] == page
        assert dict(canvas.matplotlib.rcParams) == before
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\n")
    variables = dict(
        MPLBACKEND="module://no.such.backend",
        PYTHONPATH=str(pathlib.Path(report.__file__).parents[2]),
    )
    made = subprocess.run(
        [sys.executable, "-m", "cnn_spmd.report", str(folder)],
        cwd=tmp_path,
        capture_output=True,
        env=os.environ | variables,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    assert (folder / "report.html").read_text() == page


def test_a_matplotlib_that_cannot_be_imported_is_one_line(tmp_path, capsys, monkeypatch):
    """Causes are a matplotlibrc that is no text, or no folder for its cache."""
    for name in ("canvas", "plots", "batch_scaling_section", "document"):
        monkeypatch.delitem(sys.modules, f"cnn_spmd.report.{name}", raising=False)
        monkeypatch.delattr(f"cnn_spmd.report.{name}", raising=False)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    class Broken:
        def find_spec(self, name, *_):
            if name == "matplotlib":
                raise ValueError("no such text")

    monkeypatch.delitem(sys.modules, "matplotlib")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert report.main([str(write_run(tmp_path / "run"))]) == 2
    assert capsys.readouterr().err == "error: matplotlib cannot be imported: no such text\n"
    assert os.environ["MPLBACKEND"] == "Agg"


@pytest.mark.parametrize(
    "broken",
    [
        "analysis.hlo.Module",
        "analysis.communication.closed_form",
        "sharding.placement.Placement.report",
    ],
)
def test_a_run_whose_report_fails_goes_on(config, tmp_path, capsys, monkeypatch, broken):
    """Its files have all fields, and reports leave out what is not known."""

    def breaks(*_, **__):
        raise ValueError("a form that\nis not known")

    monkeypatch.setattr(f"cnn_spmd.{broken}", breaks)
    config.epochs = 1
    assert loop.train(config, tmp_path / "run")["status"] == "completed"
    (warning,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert (
        warning
        == "warning: there is no whole report on this program: ValueError: a form that is not known"
    )
    program, summary = (
        json.loads((tmp_path / "run" / f"{name}.json").read_text())
        for name in ("program", "summary")
    )
    assert program["error"] == "ValueError: a form that is not known"
    assert program["closed_form_ring_bytes"] is None
    figures = runfiles.figures_of(tmp_path / "run")
    unread = broken != "analysis.communication.closed_form"
    assert (figures["ring_bytes"] is summary["collectives"] is None) == unread
    assert (program["placement"] == []) == (broken == "sharding.placement.Placement.report")
    rows = [dict(figures=each, seconds=1.0) for each in (figures, figures | dict(ring_bytes=1e6))]
    assert sweep_screen.figure_columns(rows).get("ring MB", [""])[0] == ("" if unread else "0.0")
    whole = write_run(tmp_path / "whole", "2x1", 4321.0)
    for folders in ([tmp_path / "run"], [tmp_path / "run", whole]):
        _, page, _, errors = written(capsys, *folders)
        assert not errors
        assert row_of(page, "run", "completed")
        several = len(folders) > 1  # meshes, which have charts
        assert ("Without a report on the program: run." in page) == (unread and several)


def test_error_bars_are_the_percentiles_of_the_step_time():
    below, above = mesh_charts.error_bars(compare.groups_of([a_run("4x2", 4000.0)]), [4000.0])
    assert (below, above) == (
        pytest.approx([4000 - 4000 / 1.2]),
        pytest.approx([4000 / 0.9 - 4000]),
    )


def test_no_point_is_cut_off(monkeypatch):
    seen = []

    def keep_limits(axes, label):
        seen.append(axes.get_ylim())

    monkeypatch.setattr(plots, "svg_with_legend", keep_limits)
    lone = a_run("1x1", 4000.0, step_milliseconds=dict(p10=31.99, median=32.0, p90=32.01))
    mesh_charts.draw_throughput(compare.groups_of([lone]))
    ((bottom, top),) = seen
    assert bottom == 0
    assert top > 1.04 * 4000


def test_step_time_split():
    def split(**more):
        return bar_charts.step_parts(compare.groups_of([a_run("4x2", 4000.0, **more)])[0])

    parts = split(profile=PROFILE)
    assert list(parts.values()) == [2.125, 0.625, 0.875, 0.375]
    assert sum(parts.values()) == PROFILE["step_milliseconds"]
    assert split() == {"step, not split": 256.0}


def test_on_a_cpu_nothing_is_split_and_papers_do_not_compare(tmp_path, capsys):
    runs = [a_run(mesh, 100.0, device_kind="cpu") for mesh in ("1x1", "2x1")]
    _, page, *_ = written(capsys, write_sweep(tmp_path / "s", runs, device_kind="cpu"))
    assert "8 devices simulated on one CPU, 32 cores" in page
    assert "Grey bars are not split" in page
    assert "Krizhevsky" not in page


def test_published_curves():
    assert published.curve_speedups(published.CURVES[0])[8] == 6.25
    by_name = {
        (curve["paper"][:7], curve["scheme"]): published.curve_speedups(curve)
        for curve in published.CURVES
    }
    assert by_name["OptCNN,", "layer-wise"][16] == pytest.approx(12.15, abs=0.01)
    assert by_name["FlexFlo", "FlexFlow"][16] == pytest.approx(11.12, abs=0.01)
    assert by_name["TensorF", "data"][8] == pytest.approx(5.97, abs=0.01)


def test_a_lone_run_and_several(tmp_path, capsys):
    one = write_run(tmp_path / "one", "1x1", 1000.0)
    (one / "profile.json").write_text(json.dumps(PROFILE))
    _, page, rows, errors = written(capsys, one)
    assert not errors
    assert row_of(page, "one", "completed")[4] == "1,000"
    assert "kernel&lt;1&gt;" in page
    assert rows[0]["peak_bytes"] == "400000000"
    seeds = [
        write_run(tmp_path / name, "2x1", speed, seed)
        for name, speed, seed in (("a", 1500.0, 0), ("b", 1700.0, 1))
    ]
    summary = json.loads((seeds[1] / "summary.json").read_text())
    # Fields that change no number.
    elsewhere = dict(dir="elsewhere", synthetic=dict(classes=3))
    summary["config"] |= dict(checkpoint=dict(keep=3), data=elsewhere)
    (seeds[1] / "summary.json").write_text(json.dumps(summary))
    changed = write_run(tmp_path / "c", "2x1", 900.0, rate=0.2)
    for folder in (one, *seeds, changed):
        change(folder / "summary.json", dataset="digits")  # which use no data.synthetic
    _, page, *_ = written(capsys, one, *seeds, changed)
    assert row_of(page, "2x1", "data", "batch 128, optimizer.learning_rate=0.1")[3:6:2] == [
        "2",
        "1,600 ± 141",
    ]
    assert row_of(page, "2x1", "data", "batch 128, optimizer.learning_rate=0.1")[7] == "1.60 ± 0.14"
    assert row_of(page, "2x1", "data", "batch 128, optimizer.learning_rate=0.2")[3:8:4] == ["1", ""]


def test_runs_that_differ_in_their_data_are_not_compared(tmp_path, capsys):
    """If only one of two runs says what its data are, the data may be the same."""
    digests = ("a" * 16, "b" * 16, "a" * 16)
    runs = [
        write_run(tmp_path / f"r{seed}", speed=1000.0 + 100 * seed, seed=seed) for seed in range(3)
    ]
    change(runs[0] / "summary.json", data_digest=digests[0])
    assert row_of(written(capsys, *runs)[1], "1x1")[3] == "3"
    for folder, digest in zip(runs, digests, strict=True):
        change(folder / "summary.json", data_digest=digest)
    page = written(capsys, *runs)[1]
    assert re.findall("<h2>(.*?)</h2>", page) == ["r0, r2", "r1"]
    compared = [row[:4] for row in cells_of(page) if row[:2] == ["1x1", "data"]]
    assert compared == [["1x1", "data", "batch 128", n] for n in "21"]
    assert row_of(written(capsys, runs[0], runs[2])[1], "1x1", "data", "batch 128")[3] == "2"


def test_figures_of_a_run(tmp_path):
    folder = write_run(tmp_path / "run", "4x2", 4000.0, batch_size=1024)
    assert runfiles.figures_of(folder) == a_run("4x2", 4000.0)["figures"]
    (folder / "profile.json").write_text(json.dumps(PROFILE))
    assert runfiles.figures_of(folder)["profile"] == PROFILE


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda run: (run / "summary.json").unlink(), "summary.json: No such file or directory"),
        (
            lambda run: (run / "summary.json").write_text('{"status": "compl'),
            "summary.json: damaged JSON (Unterminated string",
        ),
        (
            lambda run: (run / "program.json").write_text("[]"),
            "program.json: damaged JSON (not an object)",
        ),
        (lambda run: (run / "profile.json").write_text(""), "profile.json: damaged JSON"),
        (
            lambda run: (run / "summary.json").write_text('{"status": "running"}'),
            "summary.json says running",
        ),
        (
            lambda run: (run / "summary.json").write_text('{"status": "completed"}'),
            "summary.json: experiment is null or missing, expected text",
        ),
        (
            lambda run: change(run / "summary.json", images_per_second="fast"),
            'summary.json: images_per_second is "fast", expected a number',
        ),
        (
            lambda run: change(run / "summary.json", eval=dict(accuracy=[1], loss=1.0)),
            "summary.json: eval.accuracy is [1], expected a number",
        ),
        (
            lambda run: change(run / "summary.json", status=7),
            "summary.json: status is 7, expected text",
        ),
        (
            lambda run: change(run / "summary.json", mesh=None),
            "summary.json: mesh is null or missing, expected an object",
        ),
        (
            lambda run: change(run / "summary.json", collectives=[3]),
            "summary.json: collectives.* is 3, expected an object",
        ),
        (
            lambda run: change(run / "program.json", totals=dict(ring_bytes="9")),
            'program.json: totals.ring_bytes is "9", expected a number',
        ),
        (
            lambda run: (run / "profile.json").write_text('{"steps": []}'),
            "profile.json: steps is [], expected a number",
        ),
        (
            lambda run: (run / "profile.json").write_text(
                json.dumps(PROFILE | dict(top=[dict(name=3)]))
            ),
            "profile.json: top.*.milliseconds is null or missing, expected a number",
        ),
        (lambda run: fifo(run / "summary.json"), "summary.json: expected a regular file"),
    ],
)
def test_a_half_written_run_is_unfinished_and_the_others_are_reported(
    tmp_path, capsys, damage, reason
):
    broken, whole = write_run(tmp_path / "broken"), write_run(tmp_path / "whole", speed=4321.0)
    damage(broken)
    markdown, page, rows, errors = written(capsys, broken, whole)
    assert errors.startswith(f"warning: {broken}: unfinished: {reason}")
    assert errors.count("\n") == 1
    assert row_of(page, "broken")[1] == "unfinished"
    assert row_of(page, "broken")[-1].startswith(reason)
    assert f"unfinished: {reason}" in html.unescape(page)
    assert row_of(page, "whole")[4] == "4,321"
    assert [row["status"] for row in rows] == ["unfinished", "completed"]
    assert "unfinished" in markdown
    assert "without metrics" not in page  # its curves, as far as they go, are drawn


def test_a_run_folder_with_nothing_whole_but_its_name(tmp_path, capsys):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text("{")
    _, page, _, errors = written(capsys, tmp_path / "r")
    assert [line.split(": ")[0] for line in errors.splitlines()] == ["warning", "warning"]
    assert row_of(page, "r")[1] == "unfinished"


def test_a_killed_sweep_finds_the_run_that_had_finished(tmp_path, capsys):
    runs = [
        a_run("1x1", 1000.0),
        dict(a_run("2x1", 1900.0), status="running", figures={}),
        dict(a_run("4x1", 1900.0), status="running", figures={}),
    ]
    folder = write_sweep(tmp_path / "s", runs)
    write_run(folder / runs[1]["name"], "2x1", 1900.0)
    _, page, _, errors = written(capsys, folder)
    assert row_of(page, runs[1]["name"])[1:5:3] == ["completed", "1,900"]
    assert row_of(page, runs[2]["name"])[1] == "unfinished"
    unfinished = folder / runs[2]["name"]
    assert errors == (
        f"warning: {unfinished}: unfinished: summary.json: No such file or directory\n"
    )


def test_a_cut_last_line_of_metrics_is_named_and_the_rest_is_read(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])
    _, page, _, errors = written(capsys, folder)
    assert errors == f"warning: {path}: 1 damaged line left out, 5 read\n"
    assert "1 damaged line left out, 5 read" in page
    assert "<h3>Learning curves</h3>" in page


def test_pictures_of_what_was_learned(tmp_path, capsys):
    """They are in reports on a run and on a sweep; damage is named and left out."""
    run = write_run(tmp_path / "run")
    assert "<img" not in written(capsys, run)[1]
    (run / "a.png").write_bytes(b"pixels")
    said = dict(pictures=[dict(file="a.png", title="<b>'s filters", caption="of 3x3 & more")])
    (run / "pictures.json").write_text(json.dumps(said))
    sweep = write_sweep(tmp_path / "s", RUNS[:1])
    for name in ("a.png", "pictures.json"):
        (sweep / RUNS[0]["name"] / name).write_bytes((run / name).read_bytes())
    for folder, name in ((run, "run"), (sweep, RUNS[0]["name"])):
        _, page, _, errors = written(capsys, folder)
        assert not errors
        assert f"<h3>{html.escape(said['pictures'][0]['title'])}: {name}</h3>" in page
        assert '<img alt="&lt;b&gt;&#x27;s filters" src="data:image/png;base64,cGl4ZWxz">' in page
        assert "<figcaption>of 3x3 &amp; more</figcaption>" in page
    for damage in ((run / "a.png").unlink, lambda: (run / "pictures.json").write_text("{}")):
        damage()
        _, page, _, errors = written(capsys, run)
        assert errors.startswith(
            f"warning: {run}: pictures are left out, draw them again with --pictures ("
        )
        assert errors.count("\n") == 1
        assert "<img" not in page


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            dict(file="../secret", title="t", caption="c"),
            "file=../secret: expected a name without a folder",
        ),
        (dict(file="a.png", title="t", caption=3), "pictures.*.caption is 3, expected text"),
        (dict(file="pipe", title="t", caption="c"), "pipe: expected a regular file"),
        (3, "pictures.* is 3, expected an object"),
    ],
)
def test_pictures_that_are_none_of_the_runs_are_left_out(tmp_path, capsys, row, reason):
    run = write_run(tmp_path / "run")
    for path in (tmp_path / "secret", run / "a.png"):
        path.write_bytes(b"pixels")
    os.mkfifo(run / "pipe")
    (run / "pictures.json").write_text(json.dumps(dict(pictures=[row])))
    _, page, _, errors = written(capsys, run)
    assert "<img" not in page
    assert reason in errors
    assert errors.count("\n") == 1


def test_metrics_of_another_kind_are_left_out(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "split": "train", "loss": "high"}\n' + metrics()
    )
    assert "metrics.jsonl: 1 damaged line left out, 6 read" in written(capsys, run)[3]
    fifo(run / "metrics.jsonl")
    assert written(capsys, run)[3] == f"warning: {run / 'metrics.jsonl'}: expected a regular file\n"


def test_a_name_that_is_not_utf8_is_escaped(tmp_path):
    paths = write_report([write_run(tmp_path / os.fsdecode(b"run\xff"))])
    assert all(b"run\\udcff" in path.read_bytes() for path in paths)


def test_files_that_no_report_wrote_are_kept(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    names = ("report.md", "report.csv", "report.html")
    for name in names:
        (run / name).write_text("somebody's own")
    for _ in range(2):  # the second report replaces the first one
        assert report.main([str(run)]) == 0
    assert {path.name for path in run.glob("*.old*")} == {f"{name}.old" for name in names}
    assert (run / "report.md.old").read_text() == "somebody's own"
    assert (run / "report.md").read_text().startswith("# cnn_spmd")


def test_a_report_is_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    """This holds, too, where a FIFO has its name or that of the temporary file."""
    run = write_run(tmp_path / "run")
    for name in ("report.md", "report.csv.tmp"):
        fifo(run / name)
    old = written(capsys, run)[0]

    def full(path, text, **_):
        path.write_bytes(text[:9].encode())
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(pathlib.Path, "write_text", full)
    assert report.main([str(run)]) == 2
    assert (
        capsys.readouterr().err
        == f"error: {run / 'report.md'}: cannot be written: No space left on device\n"
    )
    assert (run / "report.md").read_text() == old
    assert not list(run.glob("*.tmp"))


def test_a_run_that_stopped_says_where(tmp_path, capsys):
    _, page, *_ = written(capsys, write_run(tmp_path / "run", status="interrupted"))
    assert row_of(page, "run")[1::10] == ["interrupted", "stopped after step 100"]
    assert "<h3>Throughput</h3>" not in page
    assert "<h3>Learning curves</h3>" in page


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    def refused(folder):
        assert report.main([str(folder)]) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert printed.err.count("\n") == 1
        return printed.err

    assert report.main([]) == 2
    required = "error: the following arguments are required: RUN_OR_SWEEP; see --help\n"
    assert capsys.readouterr().err == required
    assert refused(tmp_path / "none") == f"error: {tmp_path / 'none'}: does not exist\n"
    assert "holds neither a sweep (sweep.json) nor a run" in refused(tmp_path)
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(tmp_path / "file")
    for text, reason in (("{", "damaged JSON"), ('{"runs": []}', "not a sweep")):
        (tmp_path / "sweep.json").write_text(text)
        assert reason in refused(tmp_path)
    (tmp_path / "sweep.json").unlink()
    for runs, reason in (
        (None, "runs is null or missing, expected a list"),
        ([None], "runs.* is null or missing, expected an object"),
        ([dict(name=3, status="completed")], "runs.*.name is 3, expected text"),
        (
            [dict(name="r", status="completed", figures=3)],
            "runs.*.figures is 3, expected an object",
        ),
    ):
        path = write_sweep(tmp_path / f"sweep of {runs}", []) / "sweep.json"
        change(path, runs=runs)
        assert refused(path.parent) == f"error: {path}: {reason}\n"
    folder = write_run(tmp_path / "run")
    (folder / "report.md").mkdir()
    assert refused(folder) == f"error: {folder / 'report.md'}: cannot be written: Is a directory\n"


def test_the_tables_of_a_sweep(tmp_path):
    """One table per batch, smallest first; accuracies unless the images are random."""
    runs = [*RUNS[:3], a_run(speed=500.0, batch=32), BROKEN[0]]
    sweep = json.loads((write_sweep(tmp_path / "s", runs) / "sweep.json").read_text())
    panels = meshes.sweep_panels(sweep)
    made = {panel[0].panel: meshes.sweep_table(panel) for panel in panels}
    header = "| mesh | scheme | n | MB per device | images/s | step, ms (p10 to p90) | speedup |"
    assert list(made) == ["batch 32 per device", "batch 128 per device"]
    assert made["batch 32 per device"].splitlines() == [
        f"{header} ring MB per step |",
        "|" + "---|" * 8,
        "| 1x1 | data | 1 | 286.8 | 500 | 64.000 (57.600 to 76.800) | 1.00 | 3.1 |",
    ]
    assert made["batch 128 per device"].splitlines()[2:] == [
        "| 1x1 | data | 1 | 286.8 | 1,000 | 128.000 (115.200 to 153.600) | 1.00 | 3.1 |",
        "| 8x1 | data | 2 | 286.8 | 5,500 ± 707 | 187.733 (168.960 to 225.280) |"
        " 5.50 ± 0.71 | 24.1 |",
    ]
    (said,) = meshes.unfinished_runs(sweep)
    assert said == f"{BROKEN[0]['name']}: refused: two towers | need <2> devices"
    for run in sweep["runs"]:
        run["figures"].update(dataset="digits")
    digits = meshes.sweep_table(meshes.sweep_panels(sweep)[1])
    assert digits.startswith(f"{header} ring MB per step | test accuracy, % |")
    assert "5.50 ± 0.71 | 24.1 | 50.50 ± 0.71 |" in digits


def test_the_fastest_of_a_sweep_of_gpus(tmp_path):
    """By the median step, on the most GPUs; with fewer than three, a reader sees it."""
    speeds = (("1x1", 1000.0), ("1x2", 2000.0), ("2x2", 3200.0), ("4x1", 2500.0), ("1x4", 4000.0))
    runs = [a_run(mesh, speed) for mesh, speed in speeds]
    sweep = json.loads((write_sweep(tmp_path / "s", runs) / "sweep.json").read_text())
    for run in sweep["runs"]:
        run["figures"].update(device_kind="NVIDIA H200")
    (panel,) = meshes.sweep_panels(sweep)
    said = "The shortest step of these rows on 4 GPUs: 1x4 `data`. Next: 2x2 `data` (+25.0 %), "
    assert meshes.fastest_text(panel) == f"{said}4x1 `data` (+60.0 %)."
    assert not meshes.fastest_text(panel[:-1])
    row = "| 4 x NVIDIA H200 | 128 | 1x4 `data` | 128.000 | 4.00 | - |"
    assert meshes.fastest_table([sweep | dict(devices=4)]).splitlines()[-1] == row


# ---- Metrics that a user registers


@pytest.mark.usefixtures("drawn")
def test_a_registered_metric_is_in_every_part_of_the_report(tmp_path, capsys):
    """A column in both tables and in the CSV file, and curves of its own."""
    runs = [
        write_ranked_run(tmp_path / "a", seed=0, mean_rank=2.5),
        write_ranked_run(tmp_path / "b", seed=1, mean_rank=3.5),
        write_run(tmp_path / "c", seed=2),
    ]
    change(runs[2] / "summary.json", dataset="digits")
    markdown, page, rows, errors = written(capsys, *runs)
    assert not errors
    tables_of_page = [line for line in markdown.splitlines() if "test mean_rank |" in line]
    assert len(tables_of_page) == 2
    assert "| test accuracy, % | test top5, % | test mean_rank |" in tables_of_page[0]
    assert "| test loss | test top5, % | test mean_rank | images/s |" in tables_of_page[1]
    assert row_of(page, "1x1", "data")[5:7] == ["87.50 ± 0.00", "3.0000 ± 0.7071"]
    assert row_of(page, "a", "completed")[4:6] == ["87.50", "2.5000"]
    assert row_of(page, "c", "completed")[4:6] == ["", ""]
    assert [row["eval.mean_rank"] for row in rows] == ["2.5", "3.5", ""]
    assert ">Test mean_rank</text>" in page
    assert "examples" not in markdown


def test_a_registered_metric_of_a_finished_sweep_is_in_its_report(tmp_path, capsys):
    """sweep.json holds what figures_of returned when the run ended."""
    run = write_ranked_run(tmp_path / "a")
    entry = a_run(eval=runfiles.figures_of(run)["eval"])
    _, page, rows, _ = written(capsys, write_sweep(tmp_path / "s", [entry, a_run("2x1")]))
    assert row_of(page, "1x1", "data", "batch 128 per device")[6] == "2.5000"
    assert [row["eval.mean_rank"] for row in rows] == ["2.5", ""]


def test_a_registered_metric_is_in_the_terminals_table_of_a_sweep():
    evaluated = dict(accuracy=0.5, loss=1.0, mean_rank=2.53, top5=0.875)
    runs = [a_run(eval=evaluated), a_run("2x1", status="failed")]
    assert sweep_screen.figure_columns(runs)["mean_rank"] == ["2.53", ""]
    assert sweep_screen.figure_columns(runs)["top5"] == ["87.50%", ""]
    # A narrow terminal has room for the first columns only.
    assert list(sweep_screen.figure_columns(runs))[:2] == ["accuracy", "mean_rank"]


def test_a_metric_that_is_no_number_is_damage(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    change(run / "summary.json", eval=dict(accuracy=0.5, loss=1.0, mean_rank="high"))
    assert 'eval.* is "high", expected a number' in written(capsys, run)[3]


# ---- What a report needs


def test_a_report_needs_neither_jax_nor_tfds(tmp_path):
    """Importing cnn_spmd.report, loading runs, and a whole report from any folder."""
    run = write_run(tmp_path / "run")
    code = (
        "import sys, cnn_spmd.report; from cnn_spmd.report import __main__ as command; "
        f"cnn_spmd.report.load_runs({str(run)!r}); assert command.main([{str(run)!r}]) == 0; "
        "print(*sys.modules)"
    )
    root = pathlib.Path(report.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | dict(PYTHONPATH=str(root)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not {"jax", "tensorflow_datasets"} & set(done.stdout.split())
    assert (run / "report.html").is_file()


def test_the_folder_of_a_refused_run_is_noted(tmp_path):
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused/.lock").touch()
    notes = []
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    (sweep,) = load.load_sweeps([tmp_path / "refused", tmp_path / "run"], notes)
    assert [run["name"] for run in sweep["runs"]] == ["run"]
    (said,) = [note for note in notes if note.startswith(f"{tmp_path}/refused: ")]
    assert "holds neither a sweep (sweep.json) nor a run " in said
    assert said.endswith("; it is left out")
