"""Compile the train step of a config and report on the program, without training."""

import contextlib
import pathlib
from collections.abc import Sequence

import ml_collections

from cnn_spmd import config as configs
from cnn_spmd.analysis import program
from cnn_spmd.data import registry
from cnn_spmd.data.dataset import Dataset, Unread
from cnn_spmd.errors import UserError
from cnn_spmd.training import build
from cnn_spmd.training.terminal import say
from cnn_spmd.training.workdir import locked_run, write_run_file


def dry_run(
    config: ml_collections.ConfigDict,
    workdir: pathlib.Path | None,
    devices: Sequence | None = None,
    data: Dataset | Unread | None = None,
) -> dict:
    """Compile the train step, print the report and return it.

    workdir: write the report there as program.json. devices: compile for these, which may be those
    of a machine that is not here (analysis/target.py); None means the devices of this machine.
    data: the config's data set, where it is found already. Photographs are counted, not decoded.
    Raises UserError for bad input, and for a workdir that holds a run.
    """
    configs.validate(config)
    setup = build.prepare(config, devices, (data or registry.find(config.data)).preview)
    build.say_choices(config, setup)
    with contextlib.ExitStack() as stack:
        if workdir:
            stack.enter_context(locked_run(workdir, setup.saved_config))
            if (workdir / "config.json").exists():
                raise UserError(
                    f"--workdir={workdir}: holds a run, which a dry run leaves alone: "
                    "give a new folder"
                )
        report = setup.report()
        say(program.as_text(report | dict(dataset=setup.shown_data)))
        if workdir:
            write_run_file(workdir / "program.json", setup.data_fields | report)
    return report
