import pytest

from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh


def test_parse():
    assert mesh.parse("4x2") == (4, 2)


@pytest.mark.parametrize(
    "text",
    ["4", "4x", "x2", "4x2x1", "0x8", "-1x8", "axb", "4*2", "", "65537x1", "9" * 5000 + "x1"],
)
def test_parse_refuses(text):
    with pytest.raises(UserError, match="--mesh="):
        mesh.parse(text)


@pytest.mark.parametrize(
    ("asked", "got"), [((-1, 1), (8, 1)), ((1, -1), (1, 8)), ((2, -1), (2, 4)), ((2, 2), (2, 2))]
)
def test_make(asked, got):
    made = mesh.make(*asked)
    assert made.axis_names == ("data", "model")
    assert tuple(made.shape.values()) == got


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
