"""Write a trained network as a weights file: `python -m cnn_spmd.export RUN --to safetensors`.

RUN is a --workdir of launch.py, whose newest checkpoint is taken, or a weights file. Beside the
file, NAME.safetensors, stands NAME.md, which describes it: network, data, accuracy and commands.

--to safetensors: the parameters and the variables of the model state, under our names.
--to torchvision: those of `alexnet` for images of 224x224, such that torchvision.models.alexnet
loads them with load_state_dict and gives the same logits.

Either file can take the place of a run's folder in predict, in this command and with --evaluate,
and be what --config.init_from names.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from cnn_spmd import experiment
from cnn_spmd.data import augment
from cnn_spmd.errors import UserError
from cnn_spmd.training import environment, initial, restore, runfiles, weights
from cnn_spmd.training.build import Setup

# What --to chooses, and how the file is called where --out does not say it.
FORMS = {"safetensors": "weights.safetensors", "torchvision": "torchvision.safetensors"}
# What the images of a data set look like, where other pictures may well look otherwise.
LOOKS = {"digits": "light strokes on black that fill the frame"}
# Stands at the top of each page that we write.
WRITTEN_BY = "Written by `python -m cnn_spmd.export`"


def export(
    source: pathlib.Path,
    form: str,
    out: pathlib.Path | None = None,
    data_dir: str | None = None,
    adds: str | None = None,
) -> list[pathlib.Path]:
    """Write the newest state of what was trained, and a page on it; return both paths.

    source: the folder of a run, or a weights file. form: one of FORMS. out: the file to write; None
    stands for that of FORMS in the folder of the run, or of the source file. data_dir: where the
    run's data set is now, if it has moved. adds: the experiment that adds what the run needs. Files
    of another origin that have one of the names are kept as NAME.old.
    Raises UserError for a network that `form` cannot hold, and as restore.on_one_device.
    """
    is_file = weights.is_file(source)
    folder = source.parent if is_file else source
    out = out or folder / FORMS[form]
    if out.suffix != weights.SUFFIX:
        raise UserError(f"--out={out}: expected a name that ends in {weights.SUFFIX}")
    with restore.locked(source):
        restored = restore.on_one_device(source, data_dir)
        about = weights.read_about(source) if is_file else about_run(source, restored)
    arrays = {name: np.asarray(x) for name, x in initial.arrays_of(restored.state).items()}
    if form == "torchvision":
        refuse_unlike_torchvision(restored.setup)
        arrays = weights.to_torchvision(arrays)
    about["form"] = form
    if adds and experiment.EXPERIMENTS.resolve() not in pathlib.Path(adds).resolve().parents:
        about["adds"] = pathlib.Path(adds).name
    page = out.with_suffix(".md")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        runfiles.set_foreign_aside(out, f'"{weights.ABOUT}"')
        runfiles.set_foreign_aside(page, WRITTEN_BY)
        weights.write(out, arrays, about)
        with runfiles.atomic_write(page) as temporary:
            temporary.write_text(page_text(out.name, about))
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}") from error
    return [out, page]


def about_run(folder: pathlib.Path, restored: restore.Restored) -> dict:
    """Return what a weights file says of its run.

    config: what config.json holds, without data.dir, which is a place on this machine. step,
    accuracy (of test images, or of validation images where the run held some out; None: not
    measured at this step), class_names, mirror (whether a mirrored image keeps its class),
    image_size (of the data set's images, in pixels), mean and std (which normalise pixels),
    parameters (their number), and where the run was trained: hardware,
    versions and commit, and the weights that it started from.
    """
    setup, saved = restored.setup, weights.read_saved(folder)
    saved["data"]["dir"] = ""
    summary = runfiles.read_json(folder / "summary.json", required=False)
    preprocessing = setup.functions.preprocessing
    return dict(
        schema=runfiles.SCHEMA,
        step=restored.step,
        accuracy=restored.accuracy,
        config=saved,
        class_names=list(setup.data.class_names),
        mirror=setup.data.mirror,
        image_size=setup.data.train_images.shape[1],
        mean=np.asarray(preprocessing.mean).tolist(),
        std=np.asarray(preprocessing.std).tolist(),
        parameters=summary.get("param_count"),
        trained_on={name: summary.get(name) for name in runfiles.HARDWARE},
        init_from=summary.get("init_from"),
    )


def refuse_unlike_torchvision(setup: Setup) -> None:
    """Raise UserError for a network that is not torchvision's AlexNet."""
    config, side = setup.config, setup.image_size
    for field, value, expected in (
        ("model.name=", config.model.name, "alexnet"),
        ("model.width=", config.model.width, 4096),
        ("images of ", f"{side}x{side}", "224x224"),
    ):
        if value != expected:
            raise UserError(
                f"--to=torchvision: the run has {field}{value}, expected {expected}, as "
                "torchvision.models.alexnet has it"
            )


def page_text(name: str, about: dict) -> str:
    """Return the page on a weights file as Markdown; name: of the file."""
    config, hardware = about["config"], about["trained_on"]
    accuracy = about["accuracy"]
    split = "validation" if config["data"].get("validation") else "test"
    rows = {
        "experiment": config["experiment"],
        "network": config["model"]["name"],
        "parameters": about["parameters"] and f"{about['parameters']:,}",
        "names and layouts": about["form"],
        "data": config["dataset"],
        "digest of the data": config.get("data_digest"),
        "images": images_text(about),
        "classes": len(about["class_names"]),
        f"{split} accuracy": accuracy if accuracy is None else f"{accuracy:.2%}",
        f"views of a {split} image": augment.views_taken(config["eval"]["views"], about["mirror"]),
        "computed in": config["dtype"],
        "steps": f"{about['step']:,}",
        "seed": config["seed"],
        "started from": (about["init_from"] or {}).get("file", "its seed"),
        "trained on": hardware["device_kind"],
        "commit": hardware["commit"],
    }
    table = [f"| {field} | {'unknown' if x is None else x} |" for field, x in rows.items()]
    head = f"""# {name}

{WRITTEN_BY}, from what the file itself says. FILE stands
for its path.

| what | value |
|---|---|"""
    return "\n".join([head, *table, "", *commands(about.get("adds")), ""])


def images_text(about: dict) -> str:
    """Return what the images of a data set look like; about: of a weights file."""
    size, brightness = about["image_size"], np.mean(about["mean"])
    text = f"{size}x{size}, normalised by a mean pixel of {brightness:.0f} (0: black, 255: white)"
    looks = LOOKS.get(about["config"]["data"]["name"])
    return f"{text}; {looks}" if looks else text


def commands(adds: str | None) -> list[str]:
    """Return the commands for a weights file; adds: the experiment that each of them needs."""
    option = f" --config {adds}" if adds else ""
    again = "train again" if adds else "train it again, with the same config"
    return [
        *([f"{adds} adds what the network needs: give its path.", ""] if adds else []),
        "```bash",
        f"# Test it; classify images; {again}.",
        f"python launch.py --workdir FILE --evaluate{option}",
        f"python -m cnn_spmd.predict FILE IMAGE...{option}",
        f"python launch.py --config {adds or 'FILE'}",
        "```",
    ]


def parser() -> environment.Parser:
    """Return the parser of the command line."""
    made = environment.Parser("export", __doc__)
    made.add_argument("run", metavar="RUN", type=pathlib.Path, help="a run or a weights file")
    made.add_argument("--to", required=True, choices=FORMS, help="names and layouts of the arrays")
    made.add_argument(
        "--out",
        metavar="FILE",
        type=pathlib.Path,
        help="default: in RUN, " + " or ".join(FORMS.values()),
    )
    restore.add_arguments(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; 2: bad input, 130: Ctrl-C."""
    return environment.exit_code_of(lambda: export_and_print(parser().parse_args(argv)))


def export_and_print(arguments: argparse.Namespace) -> None:
    """Do what the command line says."""
    environment.prepare()
    environment.device_count()
    if arguments.config:
        experiment.load_file(arguments.config)
    paths = export(arguments.run, arguments.to, arguments.out, arguments.data_dir, arguments.config)
    print(*paths, sep="\n")


if __name__ == "__main__":
    environment.protect_streams()
    sys.exit(main())
