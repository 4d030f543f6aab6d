"""Tables from measured runs. `python -m cnn_spmd.report` prints the README's tables from results/.

results/*.json are each the summary.json of a run, copied there: config, commit, versions, hardware and figures.
results/programs/*.json are reports of compiled programs, written by benchmarks/programs.py.
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


def programs_table(folder: pathlib.Path = RESULTS / "programs") -> str:
    """A Markdown table, one row a compiled program: what a device holds, and what a step moves (MB of 1e6 bytes)."""
    runs = [json.loads(path.read_text()) for path in folder.glob("*.json")]
    runs.sort(key=lambda run: (run["image_size"], run["devices"], run["compiler"]["platform"], run["model"],
                               list(run["mesh"].values()), run["parallelism"]))
    lines = ["| network | compiled for | mesh | parallelism | batch | parameters, MB a device | collectives | ring MB a step "
             "| theory |", "|---|---|---|---|---|---|---|---|---|"]
    for run in runs:
        counts = ", ".join(f"{sum(row['count'] for row in run['collectives'] if row['operation'] == operation)} {operation}"
                           for operation in sorted({row["operation"] for row in run["collectives"]}))
        lines.append(
            f"| {run['model']}, {run['image_size']}x{run['image_size']} | {run['devices']} x {run['compiler']['device_kind']} "
            f"| {run['mesh']['data']}x{run['mesh']['model']} | {run['parallelism']} | {run['batch_size']} "
            f"| {run['bytes_per_device']['parameters'] / 1e6:.1f} | {counts} | {run['totals']['ring_bytes'] / 1e6:.1f} "
            f"| {run['closed_form_ring_bytes'] / 1e6:.1f} |")
    return "\n".join(lines)


def mean(values: list[float], digits: int) -> str:
    """The mean with thousands separated, and ± the sample standard deviation where there are several values."""
    text = f"{statistics.mean(values):,.{digits}f}"
    return text + (f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    print(results_table(), programs_table(), sep="\n\n")
