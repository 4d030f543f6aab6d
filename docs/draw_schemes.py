"""Draw the schemes: what each device of a 4x2 mesh holds, and what moves when.

    python docs/draw_schemes.py

Writes docs/mesh.svg, what the devices hold under `hybrid`, and docs/schemes/NAME.svg for each row
of the placement table, with the collectives of a train step in their order. It reads the table and
the closed form (cnn_spmd/analysis/communication.py). tests/test_docs.py draws the pictures again
and compares.
"""

import pathlib
import sys
from collections.abc import Iterator, Sequence

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from cnn_spmd.sharding.table import TABLE

FOLDER = pathlib.Path(__file__).parent
SCHEME = "hybrid"  # of mesh.svg
MESH = {"data": 4, "model": 2}
# AlexNet for 32x32 images; two_tower needs a network of towers.
NETWORKS = {"two_tower": ("alexnet_2012", 224)}
NETWORK = ("alexnet", 32)
BATCH = 1024

# One small picture per array: its label, its colour, and the logical axes of its rows and columns.
# Where several are given, the first that the scheme splits is drawn.
ARRAYS = (
    ("images", "activation", ("conv_batch",), ("image_height",)),
    ("maps", "activation", ("conv_batch",), ("image_height", "conv_out", "group_out")),
    ("conv1-5", "weight", ("conv_in",), ("conv_out", "group_out")),
    ("features", "activation", ("dense_batch",), ("fc1_in",)),
    ("fc1", "weight", ("fc1_in",), ("fc1_out",)),
    ("fc2", "weight", ("fc2_in",), ("fc2_out",)),
    ("fc3", "weight", ("fc3_in",), ("fc3_out",)),
)

SIDE = 42  # pixels of a small picture
PITCH = 51  # from one small picture to the next
LEFT = 60  # of the first device, after the labels of the rows
TOP = 68  # of the first device, below the labels of the columns
DEVICE = (360, 62)  # width and height of a device's box
GAP = 8  # between devices
WIDTH = LEFT + MESH["model"] * (DEVICE[0] + GAP)
HEIGHT = TOP + MESH["data"] * (DEVICE[1] + GAP) + 44
LINE = 18  # height of a line of text
COLUMNS = (16, 110, 230, 340, WIDTH - 24)  # of the list of collectives

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
  .end { text-anchor: end }
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


def mesh_axes(scheme: str, colour: str, logical_axes: Sequence[str]) -> tuple[str, ...]:
    """Return the mesh axes that split a dimension; a weight's are those at rest."""
    row = TABLE[scheme]
    if colour == "weight":
        row = row | row.get("at_rest", {})
    found = next((row[axis] for axis in logical_axes if row.get(axis)), ())
    return (found,) if isinstance(found, str) else tuple(found)


def shard(split: Sequence[str], device: dict[str, int]) -> tuple[int, int]:
    """Return which shard of a dimension the device holds, and the number of shards.

    split: the mesh axes that split the dimension. device: the device's coordinates on the mesh,
    such as {"data": 3, "model": 0}.
    """
    index, count = 0, 1
    for axis in split:
        index = index * MESH[axis] + device[axis]
        count *= MESH[axis]
    return index, count


def rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    """Return an SVG rectangle of the style `kind`."""
    return f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"/>'


def label(text: str, x: float, y: float, kind: str = "middle") -> str:
    """Return an SVG text of the style `kind`."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{text}</text>'


def draw_device(scheme: str, device: dict[str, int], left: float, top: float) -> Iterator[str]:
    """Yield the box of one device: its shard of each array, filled in a square."""
    yield rectangle("device", left, top, *DEVICE)
    y = top + (DEVICE[1] - SIDE) / 2
    for i, (_, colour, of_rows, of_columns) in enumerate(ARRAYS):
        x = left + PITCH * i + 5
        row, rows = shard(mesh_axes(scheme, colour, of_rows), device)
        column, columns = shard(mesh_axes(scheme, colour, of_columns), device)
        width, height = SIDE / columns, SIDE / rows
        yield rectangle(colour, x + column * width, y + row * height, width, height)
        yield rectangle("array", x, y, SIDE, SIDE)


def draw_devices(scheme: str) -> Iterator[str]:
    """Yield the boxes of all devices, with labels and a legend."""
    for model in range(MESH["model"]):
        left = LEFT + model * (DEVICE[0] + GAP)
        yield label(f"model={model}", left + DEVICE[0] / 2, 28, "middle strong")
        for i, (name, *_) in enumerate(ARRAYS):
            yield label(name, left + PITCH * i + 5 + SIDE / 2, TOP - 10)
        for data in range(MESH["data"]):
            top = TOP + data * (DEVICE[1] + GAP)
            yield from draw_device(scheme, dict(data=data, model=model), left, top)
    for data in range(MESH["data"]):
        y = TOP + data * (DEVICE[1] + GAP) + DEVICE[1] / 2 + 4
        yield label(f"data={data}", LEFT / 2, y, "middle strong")
    y = HEIGHT - 22
    yield rectangle("activation", LEFT, y - 10, 12, 12)
    yield label("activations (rows are examples)", LEFT + 18, y, "")
    yield rectangle("weight", LEFT + 216, y - 10, 12, 12)
    yield label("weights (rows are inputs, columns are outputs)", LEFT + 234, y, "")
    yield label("filled: this device's shard", LEFT + 532, y, "")


def collectives(scheme: str) -> list[tuple[str, str, str, str, str]]:
    """Return what moves in a train step, in order: phase, operation, mesh axes, what, MB.

    MB are those that each device sends in a ring, in float32.
    """
    from cnn_spmd.training import build, program_report
    from experiments import alexnet_cifar

    name, side = NETWORKS.get(scheme, NETWORK)
    config = alexnet_cifar.get_config()
    config.update(dict(mesh=MESH, parallelism=scheme, batch_size=BATCH, dtype="float32"))
    config.model.name = name
    config.data.name = "synthetic"
    config.data.crop_pad = 0
    config.data.synthetic.update(dict(image_size=side, train_examples=BATCH, test_examples=8))
    rows, _ = program_report.theory_of(build.prepare(config))
    lines = {}
    for row in rows:
        of_weight = "." in row["what"]  # such as fc1.kernel; activations are such as "fc1 input"
        key = row["phase"], of_weight, row["operation"], "+".join(row["axes"])
        lines.setdefault(key, []).append(row)
    ordered = sorted(lines, key=lambda key: (key[0] == "backward", key[1] != (key[0] == "forward")))
    return [line(key, lines[key]) for key in ordered]


def line(key: tuple[str, bool, str, str], rows: Sequence[dict]) -> tuple[str, str, str, str, str]:
    """Return one line of the list: collectives of the same kind together."""
    phase, of_weight, operation, axes = key
    names = list(dict.fromkeys(row["what"].split(".")[0] for row in rows))
    if phase == "backward":
        names.reverse()
    what = ", ".join(names) if len(names) < 3 else f"{names[0]} to {names[-1]}"
    if of_weight:
        is_gradient = phase == "backward" and operation != "all-gather"
        kind = "biases" if all(row["what"].endswith(".bias") for row in rows) else "weights"
        what = f"gradients of {kind}, {what}" if is_gradient else f"{kind}, {what}"
    return phase, operation, axes, what, f"{sum(row['ring_bytes'] for row in rows) / 1e6:.2f}"


def draw_collectives(scheme: str) -> tuple[list[str], int]:
    """Return the list of collectives as SVG, and its height."""
    header = ("phase", "collective", "over", "of", "MB sent per device")
    rows = collectives(scheme) or [("", "nothing moves", "", "", "")]
    parts = []
    for number, row in enumerate([header, *rows]):
        style = "strong" if number == 0 else ""
        y = HEIGHT + 8 + number * LINE
        for x, text in zip(COLUMNS[:-1], row[:-1], strict=True):
            parts.append(label(text, x, y, style))
        parts.append(label(row[-1], COLUMNS[-1], y, f"end {style}".strip()))
    return parts, (len(rows) + 1) * LINE


def draw(scheme: str, moves: bool = True) -> str:
    """Return the picture of a scheme as SVG; moves: with the list of collectives."""
    below, more = draw_collectives(scheme) if moves else ([], 0)
    height = HEIGHT + more
    shape = "x".join(str(size) for size in MESH.values())
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>What each device of a {shape} mesh holds under {scheme}</title>",
            f"<style>{STYLE}</style>",
            rectangle("panel", 0.5, 0.5, WIDTH - 1, height - 1),
            *draw_devices(scheme),
            *below,
            "</svg>\n",
        ]
    )


def pictures() -> Iterator[tuple[pathlib.Path, str]]:
    """Yield each file and its picture."""
    yield FOLDER / "mesh.svg", draw(SCHEME, moves=False)
    for scheme in TABLE:
        yield FOLDER / "schemes" / f"{scheme}.svg", draw(scheme)


def main() -> None:
    """Write all pictures."""
    import math

    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", math.prod(MESH.values()))
    (FOLDER / "schemes").mkdir(exist_ok=True)
    for path, picture in pictures():
        path.write_text(picture)


if __name__ == "__main__":
    main()
