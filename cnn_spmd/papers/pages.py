"""Make the pages of results/ from results/data.

`python -m cnn_spmd.papers --write` writes them; a test holds that they are up to date.
"""

import pathlib
import textwrap
from collections.abc import Callable, Sequence

from cnn_spmd.errors import UserError
from cnn_spmd.papers import headline, history, measured, published, tables, waiting
from cnn_spmd.papers.measured import DATA, MeasuredRow
from cnn_spmd.report import compare
from cnn_spmd.report.text import markdown_table
from cnn_spmd.training import runfiles

RESULTS = DATA.parent
COMMAND = "python -m cnn_spmd.papers --write"
HEAD = f"Generated from [data/](data) by `{COMMAND}`; do not edit."
HARDWARE = """H100 is an NVIDIA H100 80GB HBM3, H200 an NVIDIA H200. Each file in [data/](data) says
    config, commit, versions, hardware and seed."""
# Such runs lost the low 16 bits of each weight of a small layer at every step.
ROUNDED = """Runs in bfloat16 whose file lists the fast form `cast_once` were made with a fault
    (since mended): between steps they kept the weights of small layers in bfloat16, not in
    float32. They are to be made again."""
LARGE_BATCHES = "large_batches.svg"
DEVICES = "devices.svg"
SEEDS = "n is the number of seeds; mean ± one sample standard deviation."


def hardware() -> str:
    """Return what all pages say of the files in results/data."""
    texts = (path.read_text() for path in DATA.rglob("*.json"))
    is_rounded = any('"cast_once"' in text and '"bfloat16"' in text for text in texts)
    return f"{HARDWARE} {ROUNDED}" if is_rounded else HARDWARE


def joined(*parts: str) -> str:
    """Return the parts of a page with blank lines between, prose wrapped."""
    return "\n\n".join(part if is_laid_out(part) else filled(part) for part in parts if part) + "\n"


def filled(text: str) -> str:
    """Return prose on lines of at most 100 columns."""
    words = " ".join(text.split())
    return textwrap.fill(words, 100, break_long_words=False, break_on_hyphens=False)


def is_laid_out(part: str) -> bool:
    """Return whether a part's line breaks matter: a heading, table, picture or HTML."""
    return part.startswith(("#", "|", "!", "<"))


def commands(summary: str, *groups: tuple[str, Sequence[str]]) -> str:
    """Return a closed <details> block: per group a text, and commands in a code fence."""
    parts = [f"<details>\n<summary>{summary}</summary>"]
    for text, lines in groups:
        fence = "\n".join(map(wrapped_command, lines))
        parts.append(filled(text) + f"\n\n```bash\n{fence}\n```")
    return "\n\n".join([*parts, "</details>"])


def wrapped_command(command: str) -> str:
    """Return a shell command on lines of at most 96 columns, broken before flags."""
    first, *flags = " ".join(command.split()).split(" --")
    lines = [first]
    for flag in flags:
        if len(lines[-1]) + len(flag) < 87:
            lines[-1] += f" --{flag}"
        else:
            lines.append(f"--{flag}")
    return " \\\n    ".join(lines)


# ---- Pages


def cifar10_page() -> str:
    """Return the page on our own networks and recipes."""
    runs = {path.stem: runfiles.read_json(path) for path in DATA.glob("alexnet_cifar-*.json")}
    digits = runs["alexnet_cifar-cpu-make_train"]
    launch = "python launch.py --config experiments/alexnet_"
    return joined(
        "# CIFAR-10",
        HEAD,
        """AlexNet's layers with 3x3 windows, for 32x32 images, and a recipe of today. No paper has
        published this network. AlexNet's paper reports 11% test error for a CIFAR-10 network of
        four layers with response norms (section 3.3); [papers.md](papers.md) has that and more.""",
        tables.results_table("cifar10"),
        f"""{SEEDS} Accuracy is on all 10,000 test images and their mirrors, in bfloat16. The
        training time leaves out compilation, evaluation and checkpoints. The compile time is
        that of the slowest seed: the other seeds found the program in the compilation cache. On
        H200s other runs used the same host. {hardware()}""",
        "[startup.md](startup.md) says how long a user waits, from the command to the result.",
        commands(
            "Commands",
            (
                "Epochs 40, 25 and 100; --config.seed=N for the seeds.",
                [
                    f"{launch}cifar.py --mesh 1x1",
                    f"{launch}cifar.py --mesh 2x1 --config.parallelism=data",
                    f"{launch}cifar.py --mesh 1x2",
                    f"{launch}cifar.py:fast --mesh 1x1",
                    f"{launch}cifar.py:best --mesh 1x1",
                ],
            ),
        ),
        "## Digits, on a CPU without a network",
        """`make train` trains on the handwritten digits of scikit-learn where it cannot download
        CIFAR-10.""",
        tables.results_table("digits"),
        f"""From a fresh clone `make train` took {digits["make_train_seconds"]:.0f} s in all,
        installation included. The first steps ended {digits["startup_seconds"]:.1f} s after
        `launch.py` was started, with empty caches.""",
        *imagenette_section(),
    )


def imagenette_section() -> list[str]:
    """Return the section on AlexNet as published, on ten of ImageNet's classes."""
    launch = "python launch.py --config experiments/alexnet_2012_imagenet.py:imagenette"
    return [
        "## Imagenette, ten of ImageNet's classes",
        """AlexNet as published in 2012, with two towers; ten crops of each of the 3,925 test
        images. ImageNet itself is not measured.""",
        tables.results_table("imagenette"),
        commands(
            "Command",
            (
                "The data are class folders of files whose shorter side is 224.",
                [f"{launch} --config.data.dir=imagenette2 --mesh 1x1"],
            ),
        ),
    ]


# Title of a table of figures -> what to know about it.
PAPER_NOTES = {
    "cuda-convnet's CIFAR-10 networks": (
        """Error is on the 10,000 test images, in float32. Seconds on other hardware say only how
        long the recipe takes today."""
    ),
    "Claims of AlexNet 2012, on CIFAR-10": (
        """Each row compares runs with control runs of the same seed: (error - control's error), or
        (epochs / control's epochs). These seeds show that ReLU is faster than tanh, by less
        than claimed, and that conv2 is worth about three points. They cannot distinguish from
        chance what overlapping pools, response norms, dropout, conv3, conv4 and the second tower
        are worth. Two of 11pct's pairs ran on one kind of card, so n is 2 there."""
    ),
    "AlexNet 2012 on ImageNet": "",
    "Residual and plain networks": "Error is on the 10,000 test images.",
    "Large batches": (
        """Each row compares runs with runs of batch 128 and the same seed: (error - error at 128).
        Published is for ImageNet, relative to a batch of 256 or more, so there is no
        difference."""
    ),
    "One weird trick": (
        """Batches are (convolutions, dense layers). Speedups are measured on random images; their
        n counts sweeps, whose learning rates and warm-ups differ, which no speed depends on."""
    ),
    "Speedup over one GPU": (
        """Each GPU has the same batch; random images. Speedups are relative to one GPU of the same
        kind."""
    ),
}


def papers_page() -> str:
    """Return the page with every published figure that this repository can measure."""
    parts = [
        "# Beside the papers",
        HEAD,
        f"""Every published figure that an experiment of this repository is set up to measure.
        Difference is measured minus published. {SEEDS} {hardware()}""",
    ]
    for title, rows in measured.measured_tables().items():
        parts += [f"## {title}", PAPER_NOTES[title], *figures_beside(rows)]
    return joined(*parts)


def runs_page(paths: Sequence[pathlib.Path], beside: str = "") -> str:
    """Return the page with the published figures that the runs in `paths` are about.

    beside: the published figure to show instead, as for measured.rows_beside.
    Raises UserError for a path without a run, and as measured.rows_beside.
    """
    runs, unfinished = measured.load_given(paths)
    tables, others = measured.tables_about(runs), measured.folders_beside_nothing(runs)
    if beside:
        rows = measured.rows_beside(beside, runs)
        tables, others = {f"Beside {beside}": rows} if rows else {}, {}
    parts = []
    if tables:
        parts += [
            "# These runs beside the papers",
            f"""Difference is measured minus published. {SEEDS} A figure that is not measured
            needs all the runs of its commands.""",
        ]
    for title, rows in tables.items():
        parts += [f"## {title}", *figures_beside(rows)]
    for reason, folders in others.items():
        parts.append(f"About no published figure ({reason}): {'; '.join(map(str, folders))}.")
    if unfinished:
        parts.append(f"Not completed, so left out: {'; '.join(unfinished)}.")
    return joined(*parts)


def figures_beside(rows: Sequence[MeasuredRow]) -> list[str]:
    """Return the table of some figures, and their commands and sources."""
    numbered = [(str(number), *row[:6]) for number, row in enumerate(rows, 1)]
    header = ["#", "figure", "published", "measured", "n", "difference", "hardware"]
    closed = commands("Commands and sources", *command_groups(rows))
    return [markdown_table(header, numbered), closed]


def command_groups(rows: Sequence[MeasuredRow]) -> list[tuple[str, list[str]]]:
    """Return text and commands for the rows that share a command and a source."""
    groups: dict[tuple[str, str], list[str]] = {}
    for number, row in enumerate(rows, 1):
        groups.setdefault((row.command, row.source), []).append(str(number))
    return [
        (f"Row {', '.join(numbers)}: {source}.", command.split("; "))
        for (command, source), numbers in groups.items()
    ]


def depth_page() -> str:
    """Return the page on accuracy by depth."""
    return joined(
        "# The deeper the better?",
        HEAD,
        """Networks of 2 to 16 layers with weights on CIFAR-10, all under the recipe of AlexNet
        (`experiments/deeper_cifar.py`), on one H200. From one_convolution on, all end in two
        hidden dense layers of 4096. [rates.md](rates.md) has the learning rates that were
        tried.""",
        tables.depth_table(measured.load_summaries(DATA / "claims")),
        f"{SEEDS} {hardware()}",
        "![Test accuracy by depth](depth.svg)",
        f"""Why convolutions: a neuron that sees a whole image has {weights_of_a_neuron(32):,}
        weights at 32x32x3 and {weights_of_a_neuron(200):,} at 200x200x3. A 3x3 filter has 27,
        at any size.""",
        commands(
            "Command",
            (
                "One run per network, here vgg_16; --config.seed=N for the seeds.",
                ["python launch.py --config experiments/deeper_cifar.py:vgg_16"],
            ),
        ),
        *residual_section(measured.load_single_runs()),
    )


def residual_section(runs: Sequence[dict]) -> list[str]:
    """Return the section on residual and plain networks; [] without such runs."""
    table = tables.residual_table(runs)
    if not table:
        return []
    return [
        "## Residual and plain networks",
        """CIFAR-10 under the recipe of He et al. 2015 (`experiments/resnet_cifar.py`). Published
        are table 6's test errors and parameters; for 110 layers, the mean of five runs. For the
        plain networks the paper has a plot only, in which the error grows with depth. The training
        time is that of all steps at these images/s. Runs that shared a GPU have the images/s of a
        short run alone.""",
        table,
        commands(
            "Command",
            (
                "One run per network; --config.seed=N for the seeds.",
                [
                    "python launch.py --config experiments/resnet_cifar.py:20",
                    "python launch.py --config experiments/resnet_cifar.py:plain_20",
                ],
            ),
        ),
    ]


def weights_of_a_neuron(side: int) -> int:
    """Return the weights of a neuron that sees all of a square colour image."""
    return side * side * 3


def batches_page() -> str:
    """Return the page on the cost of larger batches."""
    sweep = "python launch.py --config experiments/owt_"
    return joined(
        "# What larger batches cost",
        HEAD,
        """One weird trick's question (Krizhevsky 2014, section 5): test error in % for a batch k
        times as large as 128. The learning rate grows with k or with sqrt(k). The dense layers
        see the whole batch (as large), or 128 examples at a time and are updated after each
        (128). CIFAR-10 is `experiments/owt_cifar.py`. Imagenette, ten of ImageNet's classes, is
        the paper's network at 224x224 (`experiments/owt_imagenet.py:imagenette`, 90 epochs).""",
        tables.batch_table(measured.load_summaries(DATA / "claims")),
        f"Measured on one H200. {SEEDS} {hardware()}",
        """The learning rate should grow with k, as the paper says. On CIFAR-10, updating the dense
        layers after each 128 images makes up for all that a batch of 1024 costs; on
        photographs, for more than half of what 512 costs; in the paper, for less than half of
        what 1024 costs.""",
        commands(
            "Commands",
            (
                "With --config.optimizer.scaling=0.5 the rate grows with sqrt(k).",
                [
                    f"{sweep}cifar.py --sweep batch_size=128,256,512,1024 --sweep seed=0,1,2",
                    f"{sweep}cifar.py:variable --sweep batch_size=256,512,1024 --sweep seed=0,1,2",
                    f"{sweep}imagenet.py:imagenette --mesh 1x1 --config.batch_size=512",
                    f"{sweep}imagenet.py:variable,imagenette --mesh 1x1 --config.batch_size=512",
                ],
            ),
        ),
        *large_batch_section(measured.load_single_runs()),
    )


def large_batch_section(runs: Sequence[dict]) -> list[str]:
    """Return the section on batches of up to 8,192; [] without such runs."""
    table = tables.large_batch_table(runs)
    if not table:
        return []
    machines = {
        compare.machine(run) for run in runs if run["experiment"].startswith("large_batch_")
    }
    launch = "python launch.py --config experiments/large_batch_cifar.py:lars"
    return [
        "## Batches of up to 8,192",
        """Test error in % by network, rule and batch (`experiments/large_batch_cifar.py`). You et
        al. 2017 (arXiv 1708.03888) claim for AlexNet on ImageNet: accuracy falls from 57.6% at
        256 to 53.1% at 4K and 44.8% at 8K, if the learning rate grows with the batch after a
        warm-up. Batch norm reduces the gap at 8K from 14 points to 2.2. With LARS nothing is
        lost up to 8K.""",
        table,
        f"Measured on {', '.join(sorted(machines))}.",
        f"![Test error by batch size]({LARGE_BATCHES})",
        commands(
            "Command",
            (
                "The same for the other variants.",
                [f"{launch} --sweep batch_size=128,1024,4096,8192 --sweep seed=0,1,2"],
            ),
        ),
    ]


def rates_page() -> str:
    """Return the page on the learning rates that were tried."""
    claims, deeper = (
        runfiles.read_json(DATA / "rates" / f"{name}.json")["runs"]
        for name in ("claims_2012_relu_tanh", "deeper_cifar")
    )
    sweep = "python launch.py --config experiments/"
    return joined(
        "# Learning rates that were tried",
        HEAD,
        hardware(),
        "## ReLU and tanh",
        """Epochs to 25% training error on CIFAR-10, one seed on one H100; -: not within 20 epochs.
        relu was then run at 0.02, and tanh at 0.03, between the two rates that tie.""",
        tables.rates_table(claims, "claims_2012_", epochs_text),
        commands(
            "Command",
            (
                "The same for :tanh.",
                [
                    f"""{sweep}claims_2012_cifar.py:relu --config.epochs=20 --sweep
                    optimizer.learning_rate=.005,.01,.02,.05,.1"""
                ],
            ),
        ),
        "## Networks of different depth",
        """Test accuracy in % on CIFAR-10, one H200; one value per seed. All networks were then run
        at 0.25, the best rate from one_convolution on.""",
        tables.rates_table(deeper, "deeper_", lambda run: f"{100 * run['eval']['accuracy']:.2f}"),
        commands(
            "Command",
            (
                "The same for the other networks.",
                [
                    f"""{sweep}deeper_cifar.py:vgg_16 --config.seed=9 --sweep
                    optimizer.learning_rate=.05,.1,.25"""
                ],
            ),
        ),
    )


def epochs_text(run: dict) -> str:
    """Return the epochs to 25% training error; "-" where it was not reached."""
    epochs = run["epochs_to_error"]
    return "-" if epochs is None else f"{epochs:.1f}"


def meshes_page() -> str:
    """Return the page of sweeps over meshes and schemes."""
    parts = [
        "# Meshes and schemes",
        HEAD,
        """Each section is one sweep. Speedup is relative to the one-device run of the same sweep,
        batch and scheme. Ring MB is what a device sends per step if each collective runs as a
        ring. MB per device are parameters and optimizer state. The first chunk of each run is
        left out; a chunk on a GPU has 20 steps. n is the number of seeds. Synthetic data are
        random 224x224 images of 1,000 classes, in bfloat16. The digits ran 12 steps in float32,
        which amplify rounding: hence the small differences in accuracy.""",
    ]
    for path in sorted((DATA / "sweeps").glob("*.json")):
        sweep = runfiles.read_json(path)
        dataset = next(run["figures"]["dataset"] for run in sweep["runs"] if run["figures"])
        title = f"{sweep['experiment']}, {dataset}, {compare.hardware_of(sweep)}"
        parts.append(f"## {title}")
        for panel, table in tables.sweep_tables(sweep).items():
            parts += [f"{panel[0].upper()}{panel[1:]}:", table]
        parts += unfinished_runs(sweep)
        picture = f"{path.stem}.png"
        if (RESULTS / picture).exists():
            parts.append(f"Charts of this sweep: [{picture}]({picture}).")
        hardware = sweep["hardware"]
        source = f"Commit {hardware['commit']}, jax {hardware['versions']['jax']}."
        parts.append(commands("Command", (source, [tables.sweep_command(sweep)])))
    return joined(*parts)


def unfinished_runs(sweep: dict) -> list[str]:
    """Return a sentence on each run of a sweep that did not complete."""
    return [
        f"{run['name']}: {run['status']}: {run['reason']}"
        for run in sweep["runs"]
        if run["status"] != "completed"
    ]


def pytorch_page() -> str:
    """Return the page of timings beside PyTorch."""
    one_gpu = runfiles.read_json(DATA / "speed" / "h100-x1.json")
    versions = one_gpu["peer_versions"]
    return joined(
        "# Beside PyTorch",
        HEAD,
        """Training steps of AlexNet at 224x224 in bfloat16, ours and PyTorch's in turn on one
        machine, each in a process of its own. PyTorch's step (`benchmarks/peer.py`) uses
        channels_last, bfloat16 autocast, torch.compile and fused SGD. Ours draws its batches,
        crops and mirrors from a data set on the device; PyTorch trains on one fixed batch.
        Neither clips gradients.""",
        tables.speed_table(),
        f"""Ratio is ours divided by PyTorch's. % is the share of the card's own bfloat16 rate in an
        8192^3 matrix product, at {one_gpu["flop_per_image"] / 1e9:.2f} GFLOP per image. The
        last two columns are our throughput relative to our one-GPU step and to our step with
        scheme `data`. PyTorch {versions["torch"]}, jax {one_gpu["versions"]["jax"]}.
        {hardware()}""",
        """PyTorch's rate is that of its fastest mode measured. On the H100 and on several GPUs
        (DDP) only plain torch.compile was measured; its host is the limit at 32 images per GPU
        and, with DDP, at 128. On one H200 CUDA graphs (`graphs`, its mode reduce-overhead) were
        measured, too. max-autotune is not measured: it searches for minutes.""",
        """The two-GPU rows were measured before fc2's sums were scattered in hybrid_alternating.
        The two batches on one H200 were timed at the same time, each on a card of its own. The
        rows on four GPUs are of three timings over at least 400 steps, the others of five over
        at least 30. [performance](../docs/performance.md) says what made our step fast.""",
        commands(
            "Command",
            (
                "--peer_modes names PyTorch's modes; this is the command on four GPUs.",
                ["python benchmarks/speed.py --gpus 4 --peer_modes compile"],
            ),
        ),
    )


def programs_page() -> str:
    """Return the page of compiled programs."""
    parts = [
        "# What a step moves",
        HEAD,
        """Train steps as compiled, in float32, for the CPU and for NVIDIA H100 80GB HBM3; the
        GPU's compiler needs no GPU. Ring MB is what a device sends per step if each collective
        runs as a ring. The closed form is that of `cnn_spmd/analysis/communication.py` (Gholami
        et al. 2018): it counts a reduce-scatter, which the GPU's compiler makes, where the
        CPU's makes an all-reduce of twice the cost. Where weights are split, a few bytes more
        are summed for the norm by which gradients are clipped. MB per device are parameters;
        peak is XLA's account of the whole program, which it does not give for CPUs.
        Hidden is the share of the communication's time that the schedule of the GPU's program can
        hide behind computing, by the estimate of `cnn_spmd/analysis/schedule.py`, as if each link
        were NVLink; "-": not estimated. In parentheses is the share with
        `collectives_in_flight=4`, where XLA's own limit is 1. What the column cannot see:
        [performance](../docs/performance.md#what-the-schedule-can-hide).""",
    ]
    programs = tables.load_programs()
    parts += [
        "## The schemes side by side",
        """224x224 images on eight H100s, and columns of the tables below. What each scheme does is
        in [parallelism](../docs/parallelism.md), what timings there are in [meshes](meshes.md).""",
        tables.schemes_table(programs),
        "## What papers claim",
        """PaSE (IPDPS 2021) says that a dense split over two axes halves what one weird trick
        moves in the dense layers. That depends on the global batch: dense_2d sums activations,
        hybrid sums weights. Xu et al. (2020) divide the update by the number of devices. Biases
        are not divided here, and a kernel whose size does not divide is split over fewer.""",
        tables.claims_table(programs),
    ]
    for title, table in tables.program_tables(programs).items():
        parts += [f"## {title}", table]
    parts.append(
        commands(
            "Commands",
            (
                """All of them; needs requirements.txt. Then the same for any config: here 64 hosts
                of 8 H100s, on a laptop.""",
                [
                    "python benchmarks/programs.py",
                    "python launch.py --config experiments/alexnet_cifar.py --dry_run"
                    " --target h100:64x8",
                ],
            ),
        )
    )
    return joined(*parts)


def startup_page() -> str:
    """Return the page on what a user waits for."""
    measured = runfiles.read_json(DATA / "startup" / "nvidia-h200.json")
    return joined(
        "# From the command to the result",
        HEAD,
        """`python launch.py --config experiments/alexnet_cifar.py` on CIFAR-10, which is unpacked
        already. The first step is the end of the first chunk (97 steps), after the start of the
        process. Caches are those of XLA's programs and kernels; result and sweep found theirs
        filled. All commands ran one after another on one machine.""",
        waiting.waiting_table(),
        f"""A run of the sweep took {waiting.run_overhead(measured):.1f} s beyond its
        steps (median). The 12 runs are 4 learning rates x 3 seeds. {hardware()}""",
        "## Where the time goes",
        """Seconds after the command. Stages overlap: threads read the data, start the device, take
        its memory, compile and copy, while Python imports and traces.
        [running](../docs/running.md) says what each stage is.""",
        waiting.stages_table(measured),
        "## Streamed images",
        """AlexNet in bfloat16 on images of 256x256, cropped to 224x224: either all images are on
        the device, or the host streams those of each chunk. Medians of three.""",
        waiting.streaming_table(),
        commands(
            "Commands",
            (
                "DIR holds the folder cifar-10-batches-bin.",
                [
                    "python benchmarks/startup.py --data_dir DIR",
                    "python benchmarks/streaming.py",
                ],
            ),
        ),
    )


def predictions_page() -> str:
    """Return the page of predicted steps beside measured ones."""
    return joined(
        "# Predicted beside measured",
        HEAD,
        """Milliseconds per train step by the model of `cnn_spmd/analysis/cost.py`
        ([planning](../docs/planning.md)). An error is predicted divided by measured, minus 1.""",
        *sweep_predictions(),
        *estimates_section(),
        *devices_section(),
        *history_sections(),
    )


def sweep_predictions() -> list[str]:
    """Return the sections on our own sweeps."""
    parts = ["## Our sweeps of several H200s"]
    parts.append(
        """AlexNet at 224 pixels in bfloat16, at 32, 128 and 512 images per device. The step of one
        GPU is the sweep's own. The times of collectives were measured between two H200s, in a loop
        of their own. Two numbers, `gap` and `hidden_share`, were chosen on the rows of two GPUs.
        They were committed before the rows of four GPUs were predicted: those are the test. Two
        things were known before: what `data` costs on 4x1, and the errors of a simpler model over
        both sweeps."""
    )
    for name in ("alexnet-224-2xh200", "alexnet-224-4xh200"):
        predictions = runfiles.read_json(DATA / "predictions" / f"{name}.json")["predictions"]
        gpus = predictions[0]["devices"]
        held_out = "chosen on these rows" if gpus == 2 else "held out"
        parts += [
            f"### {gpus} GPUs, {held_out}",
            tables.predictions_table(predictions),
            tables.prediction_errors(predictions),
        ]
    ahead = runfiles.read_json(DATA / "predictions" / "unmeasured.json")["predictions"]
    parts.append("### Not measured yet")
    parts.append(
        """What the shipped card of the H200 predicts for all schemes, milliseconds per step. It was
        committed before anybody measured it."""
    )
    for devices in (2, 4):
        rows = [row for row in ahead if row["devices"] == devices]
        rows.sort(key=lambda row: (row["batch_per_device"], row["predicted_milliseconds"]))
        parts += [f"{devices} H200s:", tables.predictions_table(rows)]
    return parts


def estimates_section() -> list[str]:
    """Return the section on steps of one GPU that nobody had to measure."""
    predictions = runfiles.read_json(DATA / "predictions" / "estimates.json")["predictions"]
    parts = [
        "## One GPU, without a measured step",
        """A network whose step is not in the card is estimated from the card's rates
        ([planning](../docs/planning.md#a-step-that-nobody-measured)). Two constants were fitted to
        8 rows. The form of the model was settled with all rows in view, so that the errors of other
        networks may be larger. AlexNet 2012 sees 224 of the 256 pixels and has 10 classes here.
        vgg_16's run shared its GPU most of the time: its measured step is the lower decile.""",
    ]
    for title, fitted in (("Fitted", True), ("Held out", False)):
        rows = [row for row in predictions if row["fitted"] is fitted]
        parts += [f"### {title}", tables.estimates_table(rows), tables.estimate_errors(rows)]
    command = ("Needs no GPU.", ["python benchmarks/estimates.py"])
    return [*parts, commands("Command", command)]


def devices_section() -> list[str]:
    """Return the section on more GPUs than anybody here has."""
    return [
        "## One to 512 H100s",
        """AlexNet at 224 pixels in bfloat16 on hosts of 8 H100s, each scheme at its best mesh, as
        `--plan` predicts it. Nobody has measured this: times across hosts come from data sheets
        and defaults, and up to 8 GPUs from collectives between two.""",
        tables.devices_table(devices_predictions()),
        """For each batch: the fastest mesh and scheme, its milliseconds, and how many times as fast
        as `data` one weird trick (`hybrid`) and the fastest are. Above 1 it pays.""",
        f"![Predicted images/s per GPU, relative to one GPU]({DEVICES})",
    ]


def devices_predictions() -> list[dict]:
    """Return what benchmarks/predictions.py predicted for machines that are not here."""
    return runfiles.read_json(DATA / "predictions" / "devices.json")["predictions"]


def history_sections() -> list[str]:
    """Return the sections on what papers measured on several GPUs."""
    optcnn = ", ".join(f"{error:+}" for error in published.OPTCNN_ERRORS.values())
    return [
        "## One weird trick on K20s",
        """Table 1 of Krizhevsky 2014, on up to eight K20 by PCIe 2.0, predicted from its step on
        one GPU. Batches are (convolutions, dense layers). All other numbers come from data sheets
        and the paper (`cnn_spmd/analysis/cards/k20.json`): 208 GB/s of memory, 6 GB/s by PCIe.
        None was fitted to this table. But the table was known when the two schedules were chosen,
        among several that were worked out, so these rows are no held-out test.""",
        history.one_weird_trick_table(),
        """By turns is the scheme that the paper measured (its scheme b): one GPU after the other
        sends the dense layers' inputs of its 128 images to all others. At once is our `hybrid`:
        all GPUs send these inputs at the same time. At once is also what by turns costs if all
        turns except one hide behind the dense layers, which the paper says is possible. In rows
        with a dense batch of 128, a GPU updates its dense weights once per 128 images.""",
        """The measured steps are longer than both. By turns rests on assumptions: a GPU sends a
        copy to each of the others through its own link, nothing hides, and the way between the two
        groups of four is as fast as within a group (it is slower). The authors' later code
        (cuda-convnet2) sends one copy through the host's memory, at a cost that nobody published.
        So the small error on eight GPUs may be luck.""",
        f"""PALEO (Qi et al. 2017) predicts from FLOPs, from 46% of the K20's peak and from 75% of
        8 GB/s; it leaves out the update. Its hours need {published.PALEO_IMAGES:,} images per
        epoch. With ILSVRC-2012's {published.IMAGENET_TRAIN:,} the errors are
        {", ".join(history.paleo_errors())} %.""",
        "## AlexNet on P100s",
        """Each cell: measured, predicted (error). The links are those of
        `cnn_spmd/analysis/cards/p100.json`; OptCNN's and FlexFlow's nodes have four GPUs and one
        InfiniBand of 100 Gb/s. Batches are per GPU; the values of OptCNN and FlexFlow are read
        off figures.""",
        history.curves_table(),
        f"""These systems scale worse than their links allow: what they add to one GPU's step is
        more than twice what the model adds. A data sheet does not describe their software, so such
        a prediction says how fast a step could be. Of their own models, OptCNN reports errors of
        {optcnn} % on 1, 2, 4, 8 and 16 GPUs, and FlexFlow of less than 30 %. Both measure each
        layer on the system that they predict.""",
        commands(
            "Command",
            (
                "Needs no GPU. The files have the terms of each prediction and the calibration.",
                ["python benchmarks/history.py"],
            ),
        ),
    ]


# File in results/ -> the function that makes it.
PAGES: dict[str, Callable[[], str]] = {
    "cifar10.md": cifar10_page,
    "papers.md": papers_page,
    "depth.md": depth_page,
    "batches.md": batches_page,
    "rates.md": rates_page,
    "meshes.md": meshes_page,
    "pytorch.md": pytorch_page,
    "programs.md": programs_page,
    "startup.md": startup_page,
    "predictions.md": predictions_page,
}


def print_pages() -> None:
    """Print all pages. Raises UserError where there are no results."""
    require_results()
    print(*(make() for make in PAGES.values()), sep="\n")


def write_pages() -> list[pathlib.Path]:
    """Write all pages, their pictures and README's headline table; return what changed.

    Raises UserError where there are no results.
    """
    from cnn_spmd.papers import pictures  # loads matplotlib, which the pages do not need

    require_results()
    readme = RESULTS.parent / "README.md"
    texts = {RESULTS / name: make() for name, make in PAGES.items()}
    runs = measured.load_single_runs()
    texts[RESULTS / "depth.svg"] = pictures.depth(runs)
    texts[RESULTS / DEVICES] = pictures.devices(devices_predictions())
    if tables.large_batch_errors(runs):
        texts[RESULTS / LARGE_BATCHES] = pictures.large_batches(runs)
    texts[readme] = headline.with_headline(readme.read_text())
    changed = [
        path for path, text in texts.items() if not path.exists() or path.read_text() != text
    ]
    for path in changed:
        with runfiles.atomic_write(path) as temporary:
            temporary.write_text(texts[path])
    return changed


def require_results() -> None:
    """Raise UserError where results/data is missing, as in an installed copy."""
    if not DATA.is_dir():
        raise UserError(f"{DATA}: does not exist: use a checkout, or give the folders of runs")
