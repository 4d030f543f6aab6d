"""Meshes: their names, their sizes, and a mesh axis more."""

import importlib

import jax
import numpy as np
import pytest
from setups import (
    OWN_ROWS,
    assert_close,
    narrow,  # noqa: F401  (a fixture)
    setup_of,
    trained,
)

from cnn_spmd import config as configs
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh, own_rows


def test_parse():
    assert mesh.parse("4x2") == dict(data=4, model=2)


@pytest.mark.parametrize(
    "text",
    ["4", "4x", "x2", "4x2x1", "0x8", "-1x8", "axb", "4*2", "", "65537x1", "9" * 5000 + "x1"],
)
def test_parse_refuses(text):
    with pytest.raises(UserError, match="--mesh="):
        mesh.parse(text)


@pytest.mark.parametrize(
    ("asked", "made"), [((-1, 1), (8, 1)), ((1, -1), (1, 8)), ((2, -1), (2, 4)), ((2, 2), (2, 2))]
)
def test_make(asked, made):
    found = mesh.make(*asked)
    assert found.axis_names == ("data", "model")
    assert tuple(found.shape.values()) == made


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 5), "needs 15 devices, but there are 8"),
        ((-1, -1), "at most one -1"),
        ((0, 8), "positive"),
        ((-2, 4), "positive"),
        ((3, -1), "3 does not divide the 8 devices"),
    ],
)
def test_make_refuses(shape, message):
    with pytest.raises(UserError, match=message) as error:
        mesh.make(*shape)
    assert f"mesh.data={shape[0]}, mesh.model={shape[1]}" in str(error.value)


DEEP = dict(
    conv_batch=("data", "model", "depth"),
    dense_batch=("data", "model"),
    output_batch=("data", "model"),
    fc1_out="depth",
    fc2_in="depth",
)


@pytest.fixture
def third_axis():
    """Add the mesh axis "depth" to the config's, and a row that uses it."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((configs, "MESH_AXES"), (own_rows, "ALL")):
            patch.setattr(module, name, ("data", "model", "depth"))
        patch.setitem(configs.SCHEMA, "mesh.depth", configs.SCHEMA["mesh.model"])
        importlib.reload(mesh)
        patch.setitem(OWN_ROWS, "deep", DEEP)
        yield
    importlib.reload(mesh)


def test_a_third_mesh_axis_has_a_name_and_sizes(third_axis):
    assert mesh.parse("2x1x4") == dict(data=2, model=1, depth=4)
    with pytest.raises(UserError, match="--mesh=4x2: expected DATAxMODELxDEPTH"):
        mesh.parse("4x2")
    assert mesh.make(2, 1, -1).shape == dict(data=2, model=1, depth=4)
    asked = r"mesh\.data=2, mesh\.model=3, mesh\.depth=2"
    with pytest.raises(UserError, match=f"{asked}: needs 12 devices"):
        mesh.make(2, 3, 2)


def test_a_third_mesh_axis_changes_no_number(third_axis):
    """Losses and parameters of one device; bytes of theory, over the new axis too."""
    with jax.enable_x64(True):
        expected_losses, expected = trained(setup_of("shallow", "data", (1, 1, 1)), 2)
        setup = setup_of("shallow", "deep", (2, 2, 2))
        losses, params = trained(setup, 2)
        report = setup.report()
    assert setup.place.mesh_name == "2x2x2"
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-9)
    assert_close(params, expected)
    held = {row["name"]: row["bytes_per_device"] * 2 == row["bytes"] for row in report["placement"]}
    assert {name for name, half in held.items() if half} == {"fc1.kernel", "fc1.bias", "fc2.kernel"}
    over_depth = {row["kind"] for row in report["communication"] if row["axes"] == ["depth"]}
    assert over_depth == {"gather", "reduce"}
    for row in report["communication"]:
        theory = pytest.approx(row["closed_form_bytes"], rel=0.02, abs=2000)
        assert row["compiled_bytes"] == theory, row
