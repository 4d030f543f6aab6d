"""Tables from measured runs. `python -m cnn_spmd.report` prints the README's results table from results/*.json.

A file in results/ is the summary.json of a run, copied there: config, commit, versions, hardware and figures.
"""

import collections
import json
import pathlib
import statistics

RESULTS = pathlib.Path(__file__).parent.parent / "results"


def results_table(folder: pathlib.Path = RESULTS) -> str:
    """A Markdown table, one row for the runs that differ in nothing but their seed; mean, and ± sample deviation."""
    groups = collections.defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        mesh = f"{run['mesh']['data']}x{run['mesh']['model']}"
        cpu = run["device_kind"] == "cpu"
        hardware = f"CPU, {run['host_cores']} cores" if cpu else f"{run['devices']} x {run['device_kind']}"
        groups[run["experiment"], run["dataset"], hardware, mesh, run["parallelism"]].append(run)
    lines = ["| experiment | data | hardware | mesh | parallelism | n | test accuracy, % | train, s | compile, s | images/s |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for key, runs in sorted(groups.items()):
        accuracy = mean([100 * run["eval"]["accuracy"] for run in runs], 2)
        seconds, compiling, rate = (mean([run[name] for run in runs], digits) for name, digits in
                                    (("train_seconds", 1), ("compile_seconds", 1), ("images_per_second", 0)))
        lines.append(f"| {' | '.join(key)} | {len(runs)} | {accuracy} | {seconds} | {compiling} | {rate} |")
    return "\n".join(lines)


def mean(values: list[float], digits: int) -> str:
    """The mean with thousands separated, and ± the sample standard deviation where there are several values."""
    text = f"{statistics.mean(values):,.{digits}f}"
    return text + (f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    print(results_table())
