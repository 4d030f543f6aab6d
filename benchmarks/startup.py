"""Time what a user waits for: from the command to the first step, to the result, to a sweep's end.

  python benchmarks/startup.py --data_dir DIR        DIR holds the folder cifar-10-batches-bin
  python benchmarks/startup.py --data_dir DIR --processes 2     on two GPUs: also one process each
  python benchmarks/startup.py --quick --repeats 1   tries this script on a CPU, in minutes

Each measurement is a command of its own, as a user types it:

  cold      experiments/alexnet_cifar.py for a few steps, with an empty compilation cache
  warm      the same again, with the programs in the cache
  result    the whole experiment, to its final accuracy, with the programs in the cache
  processes as result, by --processes N processes of one GPU each instead of one process of all
  sweep     12 runs of 100 steps (4 learning rates x 3 seeds), with the programs in the cache

Before each kind but `cold`, a command that is not counted fills the cache.

`first_step_seconds` is summary.json's startup_seconds: from the start of the process to the end of
the first chunk. The others are seconds of a wall clock around the command. The script writes one
JSON file with all repeats and the medians, after each measurement.
"""

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from cnn_spmd.training import provenance, runfiles

ROOT = pathlib.Path(__file__).resolve().parent.parent
EXPERIMENT = "experiments/alexnet_cifar.py"
SWEEP = ("optimizer.learning_rate=0.05,0.1,0.15,0.2", "seed=0,1,2")
QUICK = ("--config.data.name=digits", "--config.model.width=16", "--config.batch_size=64")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_dir", default="", help="where CIFAR-10 is (config.data.dir)")
    add("--repeats", type=int, default=3, help="of each measurement (default: 3)")
    kinds = "cold,warm,result,processes,sweep"
    add("--only", default=kinds, help="what to measure (default: %(default)s)")
    add("--processes", type=int, default=1, help="for `processes` (default: 1, without it)")
    add("--quick", action="store_true", help="small settings, to try this script")
    add(
        "--output",
        type=pathlib.Path,
        help="default: results/data/startup/<device>[-x<count>].json; with --quick: no file",
    )
    args = parser.parse_args()
    if not args.quick and not args.data_dir:
        parser.error("--data_dir is needed, so that no download is timed; or give --quick")
    return args


class Bench:
    """A folder for the runs and caches, and what was measured so far."""

    def __init__(self, args: argparse.Namespace, folder: pathlib.Path):
        self.args = args
        self.folder = folder
        self.count = 0
        self.result: dict = {}

    def measure(self, name: str, cache: str, *flags: str, processes: int = 1) -> dict:
        """Run launch.py with these flags; return its seconds, and what its summary says.

        processes: how many run it together, with one GPU each. One process has all GPUs.
        """
        self.count += 1
        workdir = self.folder / f"{name}-{self.count}"
        shared = QUICK if self.args.quick else (f"--config.data.dir={self.args.data_dir}",)
        command = [sys.executable, "launch.py", f"--config={EXPERIMENT}", *shared, *flags]
        caches = ("XDG_CACHE_HOME", "TFDS_DATA_DIR", "CUDA_CACHE_PATH")
        environment = os.environ | dict.fromkeys(caches, str(self.folder / cache))
        since = time.perf_counter()
        started = [
            subprocess.Popen(
                [*command, f"--workdir={workdir}"],
                cwd=ROOT,
                env=environment | (of_process(i, processes) if processes > 1 else {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(processes)
        ]
        errors = [process.communicate()[1] for process in started]
        seconds = round(time.perf_counter() - since, 2)
        for process, text in zip(started, errors, strict=True):
            if process.returncode:
                lines = text.strip().splitlines() or ["no message"]
                raise SystemExit(f"{name}: exit code {process.returncode}: {lines[-1]}")
        print(f"{name}: {seconds} s", flush=True)
        summary = workdir / "summary.json"
        if not summary.exists():
            return dict(seconds=seconds) | sweep_figures(workdir)
        return dict(seconds=seconds) | figures_of(runfiles.read_json(summary))

    def record(self, name: str, row: dict) -> None:
        """Add a measurement, and write the file."""
        self.result.setdefault(name, []).append(row)
        medians = {
            field: self.median(kind, of)
            for field, kind, of in (
                ("cold_first_step_seconds", "cold", "first_step_seconds"),
                ("warm_first_step_seconds", "warm", "first_step_seconds"),
                ("warm_result_seconds", "result", "seconds"),
                ("processes_result_seconds", "processes", "seconds"),
                ("sweep_12_runs_seconds", "sweep", "seconds"),
            )
            if kind in self.result
        }
        if self.args.quick and self.args.output is None:
            return
        hardware = row["hardware"]
        slug = "-".join(hardware["device_kind"].lower().split())
        slug += f"-x{hardware['count']}" * (hardware["count"] > 1)
        path = self.args.output or ROOT / "results" / "data" / "startup" / f"{slug}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        runfiles.write_json(
            path, medians | dict(hardware=hardware, **provenance.provenance(), repeats=self.result)
        )

    def median(self, name: str, field: str) -> float:
        """Return the median of a field over the repeats."""
        return round(statistics.median(row[field] for row in self.result[name]), 2)


def of_process(index: int, count: int) -> dict[str, str]:
    """Return the environment of one of `count` processes that train together, a GPU each."""
    return dict(
        CUDA_VISIBLE_DEVICES=str(index),
        JAX_COORDINATOR_ADDRESS="localhost:9911",
        JAX_NUM_PROCESSES=str(count),
        JAX_PROCESS_ID=str(index),
    )


def hardware_of(found: dict) -> dict:
    """Return on what a run or a sweep ran."""
    return dict(
        device_kind=found["device_kind"], count=found["devices"], host_cores=found["host_cores"]
    )


def figures_of(summary: dict) -> dict:
    """Return what a run's summary says of its start-up and its result."""
    return dict(
        hardware=hardware_of(summary),
        first_step_seconds=summary["startup_seconds"],
        stages=summary["startup"],
        compile_seconds=summary["compile_seconds"],
        programs_from_cache=summary["programs_from_cache"],
        step_milliseconds=summary["step_milliseconds"],
        train_seconds=summary["train_seconds"],
        images_per_second=summary["images_per_second"],
        steps=summary["steps"],
        accuracy=summary["eval"]["accuracy"],
    )


def sweep_figures(folder: pathlib.Path) -> dict:
    """Return what sweep.json says of each run's seconds."""
    sweep = runfiles.read_json(folder / "sweep.json")
    runs = sweep["runs"]
    hardware = sweep["hardware"]
    return dict(
        hardware=hardware_of(hardware | dict(devices=sweep["devices"])),
        runs=len(runs),
        run_seconds=[run["seconds"] for run in runs],
        train_seconds=[run["figures"]["train_seconds"] for run in runs],
        compile_seconds=[run["figures"]["compile_seconds"] for run in runs],
    )


def main() -> None:
    """Measure what --only names, and write the file."""
    args = parse_arguments()
    only = args.only.split(",")
    few = ("--config.steps=8",) if args.quick else ("--config.steps=300",)
    whole = few if args.quick else ()
    hundred = ("--config.steps=4",) if args.quick else ("--config.steps=100",)
    sweep = [*hundred, *(flag for field in SWEEP for flag in ("--sweep", field))]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, pathlib.Path(folder))
        if "cold" in only:
            for i in range(args.repeats):
                bench.record("cold", bench.measure("cold", f"cache-{i}", *few))
        elif "warm" in only:
            bench.measure("cache", "cache-0", *few)
        for name, flags, processes in (
            ("warm", few, 1),
            ("result", whole, 1),
            ("processes", whole, args.processes),
            ("sweep", sweep, 1),
        ):
            if name not in only or (name == "processes" and processes == 1):
                continue
            if name != "warm":  # other programs than those of `few`
                bench.measure(f"{name}-cache", "cache-0", *flags, processes=processes)
            for _ in range(args.repeats):
                bench.record(name, bench.measure(name, "cache-0", *flags, processes=processes))


if __name__ == "__main__":
    main()
