"""A report opens with what varied and the best runs; its charts are whole."""

import itertools
import json
import re

import picture_checks
import pytest
from report_runs import a_run, change, row_of, write_run, write_sweep, written

from cnn_spmd.report import __main__ as report
from cnn_spmd.report import best_runs, compare, setting_charts, settings, write
from cnn_spmd.training import provenance

RATES, DROPOUTS, SEEDS = (0.003, 0.03, 0.3), (0.0, 0.5), (0, 1)
CONFIG = {
    "optimizer.learning_rate": 0.1,
    "label_smoothing": 0.1,
    "batch_size": 128,
    "steps": 100,
    "epochs": 25,  # which steps replace
    "data.name": "digits",
}


def a_learning_run(settings, accuracy, **more):
    """Return an entry of sweep.json on the digits."""
    name = ",".join(f"{key}={value}" for key, value in settings.items())
    figures = dict(
        dataset="digits",
        accuracy=accuracy,
        eval=dict(accuracy=accuracy, loss=1.0 - accuracy, top5=1.0),
        seed=settings.get("seed", 0),
        batch_size=128,
        epochs=4.0,
    )
    run = a_run(**figures, **more)
    run["figures"].update(figures if run["figures"] else {})
    return run | dict(name=name, mesh=None, settings=settings, command=f"python launch.py {name}")


def a_learning_sweep(folder, fields, accuracy_of):
    """Write a sweep over every combination of `fields`, evaluated twice."""
    combos = [
        dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())
    ]
    runs = [a_learning_run(combo, accuracy_of(combo)) for combo in combos]
    write_sweep(folder, runs, config=CONFIG)
    for run in runs:
        rows = []
        for step, share in ((50, 0.8), (100, 1.0)):
            accuracy = share * run["figures"]["accuracy"]
            rows.append(
                dict(step=step, split="train", loss=1.5, accuracy=accuracy, train_seconds=step / 10)
            )
            split = "final" if step == 100 else "eval"
            rows.append(dict(step=step, split=split, loss=1.0, accuracy=accuracy))
        path = folder / run["name"] / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def accuracy_of(combo):
    """Return an accuracy that is best at rate 0.03, dropout 0.5 and seed 1."""
    distance = abs(RATES.index(combo["optimizer.learning_rate"]) - 1)
    return 0.9 - 0.1 * distance + 0.02 * combo["model.dropout"] + 0.01 * combo["seed"]


THREE = {"optimizer.learning_rate": RATES, "model.dropout": DROPOUTS, "seed": SEEDS}


ALONE = "a single run tells nothing about significance"


@pytest.fixture
def drawn(monkeypatch):
    """Check each picture; return their labels."""
    return picture_checks.check_all(monkeypatch)


@pytest.mark.usefixtures("drawn")
def test_a_sweep_of_rate_dropout_and_seed_opens_with_its_answer(tmp_path, capsys):
    folder = a_learning_sweep(tmp_path / "s", THREE, accuracy_of)
    failed = a_learning_run(
        {"optimizer.learning_rate": 1.0, "model.dropout": 0.0, "seed": 0},
        0.0,
        status="failed",
        reason="the loss is not finite",
    )
    sweep = json.loads((folder / "sweep.json").read_text())
    change(folder / "sweep.json", runs=[*sweep["runs"], failed])
    markdown, page, *_ = written(capsys, folder)
    assert re.findall("<h3>(.*?)</h3>", page) == [
        "Best runs, by test accuracy (5 of 6 shown)",
        "Settings",
        "Test accuracy, % by setting",
        "Learning curves",
        "Time to an accuracy",
        "Runs compared",
        "All runs",
    ]
    assert "13 runs: 12 completed, 1 failed. What varies:" in page
    assert f"|\n\n{best_runs.ON_TEST}\n\nThe commands" in markdown
    assert row_of(page, "optimizer.learning_rate") == [
        "optimizer.learning_rate",
        "0.003, 0.03, 0.3, 1",
    ]
    assert "Best test accuracy: learning_rate=0.03, dropout=0.5, 91.50 ± 0.71 % (n = 2)" in page
    # The means are 1 % apart, and the standard error of the difference is 0.71 %: t = 1.41 with 2
    # degrees of freedom. Of the third, 9 % lower, it is 12.7.
    assert (
        "; dropout is the largest value tried; 1.00 points above the next, learning_rate=0.03, "
        "dropout=0, 90.50 ± 0.71 % (n = 2): not distinguishable (p = 0.29 by Welch&#x27;s t-test); "
        "not completed: learning_rate=1, dropout=0.</p>\n<p>± is one sample standard deviation"
    ) in page
    assert page.count("sample standard deviation") == 1
    # Columns of numbers have their names above the numbers; the others are to the left.
    assert '<th class="n">images/s</th>' in page
    assert "<th>run</th>" in page
    best = "python launch.py optimizer.learning_rate=0.03,model.dropout=0.5,seed=1"
    in_page = " ".join(f"<span>{word}</span>" for word in best.split())
    assert f"<pre><code>{in_page}\n" in page
    assert f"```bash\n{best}\n" in markdown
    # Seconds to 80 %, which half of the combinations reach.
    assert row_of(page, "0.03", "0.5", "2", "91.50 ± 0.71", "0.0850 ± 0.0071", "10.0 ± 0.0")
    header = "| learning_rate | dropout | n | test accuracy, % | test loss | training to 82 %, s |"
    assert header in markdown
    for name, value in (("batch size", "128"), ("steps", "100"), ("epochs", "4")):
        assert row_of(page, name) == [name, value]
    for text in (
        "Training loss, nats, with label smoothing 0.1",
        "Test loss, nats, without label smoothing",
        "learning_rate=0.03, dropout=0.5",
        "seed 1",
    ):
        assert f">{text}</text>" in page
    assert "speedup" not in page  # of one device
    assert "not measured, or a second run of a seed): 1 of the runs." in page
    assert "Left out, without metrics: optimizer.learning_rate=1.0," in page


def test_a_field_that_varies_from_zero_is_no_fact(tmp_path, capsys):
    folder = a_learning_sweep(tmp_path / "s", {"label_smoothing": (0.0, 0.1)}, lambda _: 0.9)
    markdown, *_ = written(capsys, folder)
    assert "| label_smoothing | 0, 0.1 |" in markdown
    assert "| label smoothing |" not in markdown


def test_settings_that_vary_and_those_that_change_with_them():
    runs = [
        a_learning_run(dict(epochs=epochs, steps=11 * epochs, seed=seed, name=name), 0.5)
        | dict(config={})
        for epochs, seed, name in ((10, 0, "b"), (2, 1, "a"), (2, 0, "b"), (10, 1, None))
    ]
    found = settings.varied(runs)
    assert [(each.name, each.values, each.along) for each in found] == [
        ("epochs", [2, 10], ["steps"]),
        ("seed", [0, 1], []),
        ("name", ["b", "a"], []),
    ]
    combos = settings.combinations(runs, found)
    assert [len(combination.runs) for combination in combos] == [1, 1, 1, 1]
    assert settings.legend_text(combos[0].values) == "epochs=10, name=b"
    assert settings.main_metric(runs, found) == "accuracy"
    of_speed = [each for each in found if each.name == "seed"] + [
        settings.Setting("parallelism", "parallelism", ["data", "fsdp"], [])
    ]
    assert settings.main_metric(runs, of_speed) == compare.SPEED


def test_a_scale_is_logarithmic_where_the_values_are():
    for values, expected in (
        ([0.001, 0.01, 0.1], True),
        ([32, 64, 128, 256], True),
        ([0.1, 0.2, 0.3], False),
        ([0.0, 0.01, 0.1], False),
        ([0.4, 0.5], False),
        ([0.01, 0.1], True),
    ):
        assert setting_charts.is_log_spaced(values) == expected, values


def test_a_lone_run_has_its_command_and_no_empty_chart(tmp_path, capsys, monkeypatch):
    """An older run has its name instead; one on two devices has what it moves."""
    run = write_run(tmp_path / "run")
    change(run / "summary.json", dataset="digits")
    page = written(capsys, run)[1]
    assert "Training loss" in page
    assert "Test loss" not in page  # of one evaluation
    assert re.findall("<h3>(.*?)</h3>", page) == [
        "The run",
        "Settings",
        "Learning curves",
        "Runs compared",
        "All runs",
    ]
    assert row_of(page, "1", "50.00", "1.2500")[-1] == "run"
    titles = re.findall("<h3>(.*?)</h3>", written(capsys, write_run(tmp_path / "two", "2x1"))[1])
    assert titles[2:5] == ["Step time", "Bytes moved by collectives", "Memory per device"]
    arguments = ["--config", "e.py", "--workdir", "runs/a", "--mesh=1x1"]
    monkeypatch.setattr("sys.argv", ["there/launch.py", *arguments])
    change(run / "summary.json", command=provenance.command())
    command = "python launch.py --config e.py --mesh=1x1"
    assert f"```bash\n{command}\n```" in written(capsys, run)[0]
    monkeypatch.setattr("sys.argv", ["pytest", *arguments])
    assert provenance.command() is None


@pytest.mark.parametrize(
    ("fields", "pictures"),
    [
        (
            {
                "model.name": ("alexnet", "cuda_convnet_11pct", "resnet_110_with_a_long_name"),
                "seed": SEEDS,
            },
            4,
        ),
        (
            {
                "optimizer.learning_rate": (0.001, 0.002, 0.0025, 0.003, 0.3),
                "optimizer.weight_decay": (0.0, 1e-4, 5e-4),
                "batch_size": tuple(range(100, 1200, 300)),
            },
            10,
        ),
        ({"seed": tuple(range(6))}, 2),
    ],
    ids=["names", "many", "seeds"],
)
def test_pictures_are_whole(tmp_path, capsys, drawn, fields, pictures):
    def accuracy(combo):
        places = [fields[name].index(value) for name, value in combo.items()]
        return 0.2 + 0.1 * sum(places)

    page = written(capsys, a_learning_sweep(tmp_path / "s", fields, accuracy))[1]
    assert page.count("<svg") == len(drawn) == pictures
    assert "<figcaption></figcaption>" not in page


def test_one_evaluation_on_validation_images_is_named_so(tmp_path, capsys):
    """It has no time to an accuracy; seeds on one mesh have no speedup."""
    runs = [
        a_learning_run({"optimizer.learning_rate": rate, "seed": seed}, 0.45 + 0.4 * rate)
        for rate in (0.1, 0.3, 1.0)
        for seed in SEEDS
    ]
    folder = write_sweep(tmp_path / "s", runs, config=CONFIG | {"data.validation": 200})
    for run in runs:
        highest = 45.0 if run["settings"]["optimizer.learning_rate"] == 1.0 else 2.0
        rows = [
            dict(step=50, split="train", loss=highest, accuracy=0.1, train_seconds=1.0),
            dict(step=100, split="train", loss=1.0, accuracy=0.1, train_seconds=2.0),
            dict(step=100, split="final", loss=1.0, accuracy=0.5),
        ]
        path = folder / run["name"] / "metrics.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    markdown, page, rows, _ = written(capsys, folder)
    assert "| optimizer.learning_rate | 0.1, 0.3, 1 |" in markdown
    said = (
        "learning_rate=1, 85.00 ± 0.00 % (n = 2); learning_rate is the largest value tried; "
        "28.00 points above the next, learning_rate=0.3, 57.00 ± 0.00 % (n = 2): the runs of each "
        "are alike, so no test of significance applies"
    )
    assert f"Best validation accuracy: {said}." in markdown
    assert best_runs.ON_TEST not in markdown
    assert "test accuracy" not in page.lower()
    assert "training to" not in page
    assert "Higher losses are cut off." in page
    assert ">4</text>" in page  # twice 2.0
    assert ">40</text>" not in page
    assert not any("speedup" in row for row in rows)
    assert write.write_report([folder], 0.1)
    printed = capsys.readouterr()
    assert printed.out == f"Best validation accuracy: {said}\n{best_runs.DEVIATION}\n"
    assert "no run has two evaluations with their seconds" in printed.err


@pytest.mark.parametrize(
    ("batch", "norm", "following"),
    [(128, "global", "0.3"), (64, "global", "0.1"), (128, "per_device", "0.1")],
)
def test_the_next_best_is_another_training_and_no_other_mesh(
    tmp_path, capsys, batch, norm, following
):
    """The mesh changes what is learned through the batch, 128 on two devices, or the norm only."""
    runs = []
    for mesh, size, rate, accuracy in (
        ("1x1", batch, 0.1, 0.8),
        ("1x2", 128, 0.1, 0.9),
        ("1x2", 128, 0.3, 0.5),
    ):
        run = a_learning_run({"optimizer.learning_rate": rate}, accuracy, mesh=mesh)
        run["figures"]["batch_size"] = size
        runs.append(run | dict(name=f"{mesh}-{rate}"))
    config = {"model.batch_norm": norm}
    markdown = written(capsys, write_sweep(tmp_path / "s", runs, config=config))[0]
    (said,) = re.findall("^Best test accuracy: .*", markdown, re.MULTILINE)
    assert re.search(rf" above the next, [^;]*learning_rate={following}", said)
    assert ("differ in nothing but mesh or scheme" in said) == (following == "0.3")


def test_accuracies_of_test_and_validation_images_are_apart(tmp_path, capsys):
    """Lone runs have sections of their own; a sweep of both gets a warning."""
    runs = [write_run(tmp_path / name) for name in ("a", "b", "c")]
    config = json.loads((runs[1] / "summary.json").read_text())["config"]
    config["data"] = dict(validation=200)
    change(runs[1] / "summary.json", dataset="digits_validation", config=config)
    markdown, page, _, errors = written(capsys, *runs)
    assert not errors
    assert re.findall("<h2>(.*?)</h2>", page) == ["a, c", "b"]
    assert "| validation accuracy, % |" in markdown
    assert " or validation" not in page
    fields = {"data.validation": (0, 200)}
    folder = a_learning_sweep(tmp_path / "s", fields, lambda combo: 0.5)
    for run in json.loads((folder / "sweep.json").read_text())["runs"]:
        held_out = dict(data=dict(validation=run["settings"]["data.validation"]))
        (folder / run["name"] / "config.json").write_text(json.dumps(held_out))
    said = "data.validation varies: accuracies of test and of validation images do not compare"
    assert said in written(capsys, folder)[3]


def test_runs_of_several_experiments_and_a_sweep_have_a_joint_table(tmp_path, capsys):
    """A field that the experiment's name stands for is not listed, one that was set by hand is."""
    folder = a_learning_sweep(
        tmp_path / "s",
        {"optimizer.learning_rate": (0.1, 0.3)},
        lambda combo: combo["optimizer.learning_rate"],
    )
    runs = [write_run(tmp_path / name, rate=rate) for name, rate in (("a", 0.2), ("b", 0.4))]
    for run, experiment in zip(runs, ("one", "other"), strict=True):
        config = json.loads((run / "summary.json").read_text())["config"]
        config |= dict(experiment=experiment, label_smoothing=0.1 * (experiment == "one"))
        command = f"python launch.py --config.optimizer.learning_rate={experiment}"
        change(run / "summary.json", dataset="digits", config=config, command=command)
    markdown = written(capsys, folder, *runs)[0]
    lines = markdown.splitlines()
    at = lines.index("## All given, on digits")
    assert lines[at + 2] == (
        "Best of all on digits: a, 50.00 % (n = 1); 0.00 points above the best of the others, b, "
        f"50.00 % (n = 1): {ALONE}."
    )
    assert [line.split(" | ")[:3] for line in lines[at + 6 : at + 10]] == [
        ["| a", "one", "optimizer.learning_rate=0.2"],
        ["| b", "other", "optimizer.learning_rate=0.4"],
        ["| s", "", "optimizer.learning_rate=0.3"],
        ["| s", "", "optimizer.learning_rate=0.1"],
    ]
    start = lines.index("| run | experiment | learning_rate | label_smoothing |")
    assert lines[start + 2 : start + 4] == ["| a | one | 0.2 | 0.1 |", "| b | other | 0.4 | 0 |"]
    assert "| learning rate |" not in markdown[markdown.index("## a, b") :]


def test_a_second_run_of_a_seed_does_not_count(tmp_path, capsys):
    """It is a repeat; n, the mean and the test of significance are over seeds."""
    runs = []
    for name, rate, seed, accuracy in (
        ("a", 0.2, 0, 0.5),
        ("b", 0.2, 0, 0.9),
        ("c", 0.2, 1, 0.7),
        ("d", 0.1, 0, 0.4),
        ("e", 0.1, 0, 0.4),
    ):
        runs.append(write_run(tmp_path / name, rate=rate, seed=seed))
        more = dict(dataset="digits", seed=seed, eval=dict(accuracy=accuracy, loss=1.0))
        change(runs[-1] / "summary.json", **more)
    markdown = written(capsys, *runs)[0]
    said = (
        "Best test accuracy: a, b, c, 60.00 ± 14.14 % (n = 2); 20.00 points above the next, d, e,"
    )
    assert f"{said} 40.00 % (n = 1): {ALONE}." in markdown


def test_a_folder_of_runs_and_sweeps_ranks_what_compares(tmp_path, capsys):
    """Each best is of one data set, and names what is open; lone runs have no edges."""
    folder = tmp_path / "all"
    fields = {"optimizer.learning_rate": (0.1, 0.3), "seed": SEEDS}
    sweep = a_learning_sweep(folder / "s", fields, lambda combo: 0.9)
    entries = json.loads((sweep / "sweep.json").read_text())["runs"]
    entries[0]["command"] += " --config.data.fallback= --config.seed=0"
    for entry in entries[1:]:
        entry |= dict(status="pending", figures={})
    change(sweep / "sweep.json", runs=entries)
    for name, data, batch in (("a", "digits", 64), ("b", "digits", 128), ("c", "npz", 256)):
        change(write_run(folder / name, batch_size=batch) / "summary.json", dataset=data)
    (tmp_path / "report.md").touch()
    assert report.main([str(tmp_path / "report.md"), str(folder)]) == 0
    printed = capsys.readouterr()
    *said, _, _, _ = printed.out.splitlines()
    next_b = f"0.00 points above the next, b, 50.00 % (n = 1): {ALONE}"
    assert f"warning: {tmp_path}/report.md: is left out, as it is a file\n" in printed.err
    assert said == [
        "s: Best test accuracy: learning_rate=0.1, 90.00 % (n = 1); "
        "learning_rate is the smallest value tried; not completed: learning_rate=0.1 (1 of 2 runs) "
        "and learning_rate=0.3 (2 of 2 runs)",
        f"a, b: Best test accuracy: a, 50.00 % (n = 1); {next_b}",
        "c: Test accuracy: 50.00 % (n = 1)",
        "Best of all on digits: s, learning_rate=0.1, 90.00 % (n = 1); 40.00 points above the "
        f"best of the others, a, 50.00 % (n = 1): {ALONE}",
    ]
    markdown = (folder / "report.md").read_text()
    assert markdown.startswith("# cnn_spmd: alexnet on digits, npz\n")
    assert "| run | batch_size |\n|---|---|\n| a | 64 |\n| b | 128 |" in markdown
    assert "seed=0 --config.seed=0\n" in markdown
    # The completed run alone has it: n counts it, too.
    assert "| 0.1 | 1 | 90.00 | 0.1000 | 10.0 | 1,000 |\n\n" in markdown


def test_a_diverged_mean_stands_at_the_edge_of_the_axis(tmp_path, capsys, drawn):
    fields = {"optimizer.learning_rate": (0.01, 0.1, 1.0, 10.0)}
    shares = dict(zip(fields["optimizer.learning_rate"], (0.95, 0.96, 0.94, 0.1), strict=True))
    folder = a_learning_sweep(
        tmp_path / "s", fields, lambda combo: shares[combo["optimizer.learning_rate"]]
    )
    page = written(capsys, folder)[1]
    assert drawn
    assert ">10.0 (below)</text>" in page
    assert "The axis begins at 91: triangles at its edge stand for lower means." in page


def test_one_rule_says_what_is_significant_in_a_sweep_and_across_sweeps(tmp_path, capsys):
    """The test is Welch's; it needs a spread. A folder without runs does not count.

    Two sweeps whose folders share their name are called by more of their paths.
    """
    best, near, nearer = [0.98, 0.99, 0.97], [0.955, 0.97, 0.97], [0.96, 0.985, 0.97]
    far, alike = [0.8, 0.81, 0.79], [0.7, 0.7]
    for name, accuracies in (("one/s", [near, best, far, nearer]), ("two/s", [far, nearer])):
        fields = {"optimizer.learning_rate": range(len(accuracies)), "seed": (0, 1, 2)}
        a_learning_sweep(
            tmp_path / name,
            fields,
            lambda combo, of=accuracies: of[combo["optimizer.learning_rate"]][combo["seed"]],
        )
    (tmp_path / "no_run").mkdir()
    assert report.main([str(tmp_path / name) for name in ("no_run", "one/s", "two/s")]) == 0
    assert not [*(tmp_path / "no_run").iterdir()]
    one, two, both, deviation, count, *_ = capsys.readouterr().out.splitlines()
    shown = "learning_rate=1, 98.00 ± 1.00 % (n = 3); 0.83 points above "
    near = "97.17 ± 1.26 % (n = 3): not distinguishable (p = 0.42 by Welch's t-test)"
    assert one == (
        f"one/s: Best test accuracy: {shown}the next, learning_rate=3, {near}; also not "
        "distinguishable from the best: learning_rate=0"
    )
    assert two.endswith("80.00 ± 1.00 % (n = 3): distinguishable (p < 0.001 by Welch's t-test)")
    assert both == (
        f"Best of all on digits: one/s, {shown}the best of the others, two/s, learning_rate=1, "
        f"{near}"
    )
    assert deviation == best_runs.DEVIATION
    assert count == f"One report on 18 runs, in {tmp_path / 'one/s'}:"
    assert best_runs.verdict(best, alike).startswith("distinguishable")


def test_images_of_ones_own_are_called_by_their_place():
    """One data set in two places is one; two of one name have the names with their digests."""

    def names(*runs):
        made = [
            dict(
                figures=dict(dataset=f"{kind}-{digest}"),
                config={"data.name": kind, "data.dir": place},
                digest=digest,
            )
            for kind, place, digest in runs
        ]
        return {name: len(group) for name, group in compare.by_data(made).items()}

    same = [("folder", "/x/photos", "1"), ("folder", "/y/mine/train", "1")]
    assert names(*same, ("npz", "/x/shapes.npz", "2")) == {"photos": 2, "shapes.npz": 1}
    other = ("folder", "/z/photos/train", "2")
    assert names(*same, other) == {"folder-1": 2, "folder-2": 1}
    assert names(other, ("folder", "", "3")) == {"photos": 1, "folder-3": 1}
