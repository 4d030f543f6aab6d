"""Test commands with closed streams, bad settings, no home, and repeated warnings."""

import os
import pathlib
import pwd
import re
import shutil
import subprocess
import sys

import jax
import pytest
from conftest import ROOT

from cnn_spmd.errors import UserError
from cnn_spmd.training import environment


@pytest.mark.parametrize(
    ("command", "code", "where"),
    [
        # absl ends --help with exit code 1.
        ("launch.py --help", 1, "| true"),
        ("launch.py --help", 1, ">&-"),
        ("launch.py --help", 1, "<&- >&- 2>&-"),
        ("launch.py --help", 1, ">/dev/full"),
        ("-m cnn_spmd.papers", 0, "| true"),
        ("-m cnn_spmd.papers", 0, ">/dev/null"),
        ("-m cnn_spmd.report --help", 0, "| true"),
    ],
)
def test_a_command_that_prints_ends_well_wherever_it_prints(command, code, where):
    """It may print to no reader, to a closed descriptor or to a full disk, in ASCII."""
    shell = f"set -o pipefail; {sys.executable} {command} {where}"
    result = subprocess.run(
        ["bash", "-c", shell],
        cwd=ROOT,
        env=os.environ | dict(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (code, "")


@pytest.mark.parametrize(
    ("command", "where", "reason"),
    [
        ("-m cnn_spmd.papers", ">/dev/full", "No space left on device"),
        ("-m cnn_spmd.papers", ">&-", "Bad file descriptor"),
    ],
)
def test_tables_that_cannot_be_written_are_an_error(command, where, reason):
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} {command} {where}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (
        1,
        f"error: the output cannot be written: {reason}\n",
    )


def test_text_beyond_the_encoding_is_escaped():
    code = (
        "from cnn_spmd.training import environment; environment.protect_streams(); print('2 ± 1')"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | dict(PYTHONIOENCODING="ascii"),
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert out == "2 \\xb1 1\n"


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_random_seed_offset", 3),
        ("jax_default_matmul_precision", "bfloat16"),
        ("jax_numpy_dtype_promotion", "strict"),
        ("jax_numpy_rank_promotion", "raise"),
    ],
)
def test_a_setting_that_changes_numbers_is_reset_with_a_warning(name, other, monkeypatch, caplog):
    before = getattr(jax.config, name)
    monkeypatch.setenv(name.upper(), str(other))
    jax.config.update(name, other)
    try:
        environment.reset_jax_settings()
        assert getattr(jax.config, name) == before
    finally:
        jax.config.update(name, before)
    environment.reset_jax_settings()
    (message,) = caplog.messages
    assert message == (
        f"{name.upper()}={other} has no effect: it is {before}, so that the same command gives the "
        "same numbers."
    )


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("--xla_nosuch=1", "Unknown flag in XLA_FLAGS: --xla_nosuch=1"),
        (
            "--xla_gpu_autotune_level=x",
            "Couldn't interpret value x for flag xla_gpu_autotune_level",
        ),
        ("nosuch", 'Could not open file "nosuch" .*'),
        ("--xla_gpu_autotune_level=2", None),
        ("", None),
    ],
)
def test_xla_flags_that_xla_cannot_read_are_refused_in_one_line(value, reason, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", value)
    if reason is None:
        environment.refuse_bad_xla_flags()
        return
    with pytest.raises(UserError) as error:
        environment.refuse_bad_xla_flags()
    assert re.fullmatch(
        f"XLA_FLAGS={value}: {reason}: mend or unset that variable", str(error.value)
    )


@pytest.mark.parametrize("home", [None, "/nowhere/at/all"])
def test_a_command_without_a_home_gets_a_temporary_one(home, monkeypatch, caplog):
    def unknown(_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(environment.atexit, "register", lambda *_, **__: None)
    monkeypatch.setenv("HOME", home or "")  # so that monkeypatch restores it
    if home is None:
        monkeypatch.delenv("HOME")
    environment.ensure_home()
    made = pathlib.Path("~/tensorflow_datasets").expanduser().parent
    assert made.is_dir()
    environment.ensure_home()
    assert pathlib.Path.home() == made
    shutil.rmtree(made)
    assert len(caplog.messages) == 1
    assert "There is no home directory" in caplog.text


def test_a_cache_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch, caplog):
    before = jax.config.jax_compilation_cache_dir
    (tmp_path / "file").touch()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    environment.cache_programs()
    assert jax.config.jax_compilation_cache_dir == before
    (message,) = caplog.messages
    assert message.startswith(f"{tmp_path}/file/cnn_spmd: Not a directory: compiled programs are ")
    assert "JAX_COMPILATION_CACHE_DIR" in message


def test_each_warning_is_one_line():
    code = """if True:
        import logging, sys, types, warnings
        import absl.logging
        from absl import app
        import jax
        from cnn_spmd.training import environment
        environment.print_plain_lines()
        absl.logging.warning("early")
        environment.print_each_warning_once()
        def main(_):
            logging.getLogger("jax._src.compiler").warning("from jax")
            logging.getLogger("orbax").warning("from orbax")
            absl.logging.warning("from us")
            warnings.warn("from\\nPython")
            hint = "absl.logging.warning('TFDS hint'); absl.logging.error('TFDS error')"
            tfds = compile("import absl.logging; " + hint, "/lib/tensorflow_datasets/a.py", "exec")
            exec(tfds)
        app.run(main, argv=["x"])"""
    err = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | dict(JAX_LOGGING_LEVEL="WARNING"),
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    lines = err.splitlines()
    assert lines.pop(4).startswith("UserWarning: from Python (")
    others = ["warning: early", *(f"warning: from {each}" for each in ("jax", "orbax", "us"))]
    assert lines == [*others, "error: TFDS error"], err
