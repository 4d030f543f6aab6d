"""Draw docs/mesh.svg: what each device of a 4x2 mesh holds under `hybrid`.

    python docs/draw_mesh.py

It reads the placement table. The test in tests/test_docs.py draws the picture again and compares.
"""

import pathlib
from collections.abc import Iterator

from cnn_spmd.sharding.table import TABLE

SCHEME = "hybrid"
MESH = {"data": 4, "model": 2}

# One small picture per array: its label, its colour, and the logical axes of its rows and columns.
ARRAYS = (
    ("images", "activation", "conv_batch", None),
    ("conv1-5", "weight", "conv_in", "conv_out"),
    ("features", "activation", "dense_batch", None),
    ("fc1", "weight", "fc1_in", "fc1_out"),
    ("fc2", "weight", "fc2_in", "fc2_out"),
    ("fc3", "weight", "fc3_in", "fc3_out"),
)

SIDE = 44  # pixels of a small picture
PITCH = 56  # from one small picture to the next
LEFT = 72  # of the first device, after the labels of the rows
TOP = 68  # of the first device, below the labels of the columns
DEVICE = (344, 64)  # width and height of a device's box
GAP = 12  # between devices
WIDTH = LEFT + MESH["model"] * (DEVICE[0] + GAP) + 8
HEIGHT = TOP + MESH["data"] * (DEVICE[1] + GAP) + 44

# The panel has a background of its own, so that it can be read wherever the page's theme and the
# system's theme differ.
STYLE = """
  .panel { fill: #ffffff; stroke: #d0d7de }
  .device { fill: #f6f8fa; stroke: #d0d7de }
  .array { fill: none; stroke: #8c959f }
  .activation { fill: #2f6feb }
  .weight { fill: #d9730d }
  text { font: 12px sans-serif; fill: #1f2328 }
  .middle { text-anchor: middle }
  .strong { font-weight: bold }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #0d1117; stroke: #3d444d }
    .device { fill: #151b23; stroke: #3d444d }
    .array { stroke: #9198a1 }
    .activation { fill: #58a6ff }
    .weight { fill: #f0883e }
    text { fill: #f0f6fc }
  }
"""


def shard(logical_axis: str | None, device: dict[str, int]) -> tuple[int, int]:
    """Return which shard of a dimension the device holds, and the number of shards.

    device: the device's coordinates on the mesh, such as {"data": 3, "model": 0}.
    """
    mesh_axes = TABLE[SCHEME].get(logical_axis) or ()
    mesh_axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    index, count = 0, 1
    for axis in mesh_axes:
        index = index * MESH[axis] + device[axis]
        count *= MESH[axis]
    return index, count


def rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    """Return an SVG rectangle of the style `kind`."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


def label(text: str, x: float, y: float, kind: str = "middle") -> str:
    """Return an SVG text of the style `kind`."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'


def draw_device(device: dict[str, int], left: float, top: float) -> Iterator[str]:
    """Yield the box of one device: its shard of each array, filled in a square."""
    yield rectangle("device", left, top, *DEVICE)
    y = top + (DEVICE[1] - SIDE) / 2
    for i, (_, colour, rows_axis, columns_axis) in enumerate(ARRAYS):
        x = left + PITCH * i + 10
        row, rows = shard(rows_axis, device)
        column, columns = shard(columns_axis, device)
        width, height = SIDE / columns, SIDE / rows
        yield rectangle(colour, x + column * width, y + row * height, width, height)
        yield rectangle("array", x, y, SIDE, SIDE)


def draw() -> str:
    """Return the picture as SVG."""
    parts = [rectangle("panel", 0.5, 0.5, WIDTH - 1, HEIGHT - 1)]
    for model in range(MESH["model"]):
        left = LEFT + model * (DEVICE[0] + GAP)
        parts.append(label(f"model={model}", left + DEVICE[0] / 2, 28, "middle strong"))
        for i, (name, *_) in enumerate(ARRAYS):
            parts.append(label(name, left + PITCH * i + 10 + SIDE / 2, TOP - 10))
        for data in range(MESH["data"]):
            top = TOP + data * (DEVICE[1] + GAP)
            parts += draw_device(dict(data=data, model=model), left, top)
    for data in range(MESH["data"]):
        y = TOP + data * (DEVICE[1] + GAP) + DEVICE[1] / 2 + 4
        parts.append(label(f"data={data}", LEFT / 2, y, "middle strong"))
    y = HEIGHT - 22
    parts.append(rectangle("activation", LEFT, y - 10, 12, 12))
    parts.append(label("rows of the batch", LEFT + 18, y, ""))
    parts.append(rectangle("weight", LEFT + 150, y - 10, 12, 12))
    parts.append(label("weights (rows are inputs, columns are outputs)", LEFT + 168, y, ""))
    parts.append(label("filled: the shard that this device holds", LEFT + 466, y, ""))
    shape = "x".join(str(size) for size in MESH.values())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
            f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
            f"<title>What each device of a {shape} mesh holds under {SCHEME}</title>",
            f"<style>{STYLE}</style>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    pathlib.Path(__file__).with_name("mesh.svg").write_text(draw())
