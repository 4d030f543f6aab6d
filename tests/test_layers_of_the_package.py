"""Imports point down, in one order of packages, and there is no circle."""

import ast
import functools
import subprocess
import sys

from conftest import ROOT

# Each package or module may import itself and those before it.
ORDER = (
    "errors",
    "entries",
    "plain_table",
    "config",
    "sharding",
    "layers",
    "models",
    "data",
    "analysis",
    "training",
    "experiment",
    "predict",
    "export",
    "calibrate",
    "worker",
    "plan",
    "sweep_screen",
    "sweep",
    "sweep_run",
    "papers.published",  # data only
    "report",
    "runs",
    "papers",
)


@functools.cache
def imports(path):
    """The modules of cnn_spmd that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules())
            found |= inner or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("cnn_spmd.")} & set(modules())


@functools.cache
def modules():
    """Every module of the package by its dotted name."""
    names = {}
    for path in (ROOT / "cnn_spmd").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def floor_of(module):
    """The place in ORDER of the longest entry that holds a module."""
    name = module.removeprefix("cnn_spmd.")
    fits = [entry for entry in ORDER if f"{name}.".startswith(f"{entry}.")]
    assert fits, f"{module} has no place in ORDER"
    return ORDER.index(max(fits, key=len))


def test_imports_point_down():
    inner = {module: path for module, path in modules().items() if module != "cnn_spmd"}
    upward = [
        f"{module} imports {other}"
        for module, path in inner.items()
        for other in imports(path)
        if floor_of(other) > floor_of(module)
    ]
    assert not upward


def test_there_is_no_circle():
    graph = {module: imports(path) - {module} for module, path in modules().items()}
    done = set()

    def visit(module, above):
        assert module not in above, f"a circle: {' -> '.join([*above, module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*above, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_reports_need_neither_jax_nor_tfds():
    code = "import sys, cnn_spmd.report.write; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert not {"jax", "tensorflow_datasets"} & set(out.split())
