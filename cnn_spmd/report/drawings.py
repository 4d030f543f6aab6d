"""Draw images, filters and predictions with matplotlib, for pictures.py.

Shapes: K filters, H height, W width, C channels. Draw within plots.style().
"""

import bisect
from collections.abc import Sequence

import numpy as np

from cnn_spmd.data.dataset import Dataset
from cnn_spmd.report import plots
from cnn_spmd.report.canvas import Axes, Figure, FontProperties, TextPath

TOP_CLASSES = 5  # per image, as in the paper's figure 4
FILTERS_PER_ROW = 16
GAP = 6  # pixels between two filters
MOST_LETTERS = 64  # more do not fit above an image or on a bar
# Two of plots.SCHEMES' colours, light enough for black letters.
RIGHT = "#E69F00"
WRONG = "#56B4E9"


def filter_grid(filters_KHWC: np.ndarray, towers: int) -> Figure:
    """Return the filters in rows, enlarged; one block per tower."""
    scale = max(1, 64 // filters_KHWC.shape[1])
    enlarged = filters_KHWC.repeat(scale, 1).repeat(scale, 2)
    blocks = [filter_block(filters) for filters in np.array_split(enlarged, towers)]
    heights = [len(block) for block in blocks]
    titles = 0.3 * towers if towers > 1 else 0.06  # inches
    height = plots.WIDTH * sum(heights) / blocks[0].shape[1] + titles
    fig = Figure(figsize=(plots.WIDTH, height))
    column = fig.subplots(towers, squeeze=False, height_ratios=heights)[:, 0]
    for number, (block, axes) in enumerate(zip(blocks, column, strict=True), 1):
        axes.imshow(block, interpolation="nearest")
        axes.axis("off")
        if towers > 1:
            axes.set_title(f"tower {number}")
    return fig


def filter_block(filters_KHWC: np.ndarray) -> np.ndarray:
    """Return one image [H, W, 3] of all filters, with white gaps between them."""
    count, height, width, _ = filters_KHWC.shape
    rows = -(-count // FILTERS_PER_ROW)
    missing = rows * FILTERS_PER_ROW - count
    gaps = ((0, missing), (0, GAP), (0, GAP), (0, 0))
    padded = np.pad(filters_KHWC, gaps, constant_values=1)
    grid = padded.reshape(rows, FILTERS_PER_ROW, height + GAP, width + GAP, 3)
    return grid.swapaxes(1, 2).reshape(rows * (height + GAP), -1, 3)[:-GAP, :-GAP]


def blank_grid(rows: int, row_height: float, ratios: Sequence[float]) -> tuple[Figure, np.ndarray]:
    """Return a picture and its parts [rows, columns], without axes.

    row_height: in inches. ratios: of the columns' widths.
    """
    fig = Figure(figsize=(plots.WIDTH, row_height * rows))
    grid = fig.subplots(rows, len(ratios), squeeze=False, width_ratios=ratios)
    for axes in grid.flat:
        axes.axis("off")
    return fig, grid


def prediction_bars(data: Dataset, predicted: list[dict]) -> Figure:
    """Return test images in two columns, each with bars of its class probabilities."""
    fig, grid = blank_grid(-(-len(predicted) // 2), 1.05, [1, 1.5, 1, 1.5])
    for row, (picture, bars) in zip(predicted, grid.reshape(-1, 2), strict=False):
        label = data.class_names[row["label"]]
        show_image(
            picture, data.test_images[row["test_image"]], label, 0.19, weight="bold", fontsize=8
        )
        draw_probabilities(bars, data, row)
    return fig


def draw_probabilities(axes: Axes, data: Dataset, row: dict) -> None:
    """Draw a bar, the class and the probability in % for each class of a prediction."""
    for at, (label, share) in enumerate(zip(row["classes"], row["probabilities"], strict=True)):
        right = label == row["label"]
        axes.barh(at, share, 0.82, color=RIGHT if right else WRONG)
        style = dict(fontsize=7, va="center", weight="bold" if right else "normal")
        axes.text(0.02, at, shortened(data.class_names[label], 0.22, **style), **style)
        axes.text(1.18, at, f"{100 * share:.0f}", ha="right", **style)
    axes.set(xlim=(0, 1.18), ylim=(TOP_CLASSES - 0.5, -0.5))


def neighbour_rows(data: Dataset, near: list[dict]) -> Figure:
    """Return one row per test image: the image itself, and its neighbours."""
    most = max(len(row["train_images"]) for row in near)
    fig, grid = blank_grid(len(near), 0.78, [1, 0.15, *[1] * most])
    for row, (picture, _, *others) in zip(near, grid, strict=True):
        image, label = data.test_images[row["test_image"]], data.class_names[row["label"]]
        show_image(picture, image, label, 0.12, weight="bold", fontsize=7)
        for axes, index, label in zip(others, row["train_images"], row["labels"], strict=False):
            style = "normal" if label == row["label"] else "italic"
            image, name = data.train_images[index], data.class_names[label]
            show_image(axes, image, name, 0.12, weight="normal", fontsize=7, style=style)
    return fig


def show_image(axes: Axes, image_HWC: np.ndarray, label: str, share: float, **style) -> None:
    """Draw an image, and above it its label, shortened to `share` of the width."""
    axes.imshow(image_HWC, interpolation="nearest")
    axes.set_title(shortened(label, share, **style), loc="center", pad=2, **style)


def shortened(text: str, share: float, *, fontsize: float, weight: str = "normal", **_) -> str:
    """Return the text, cut so that it fits into this share of a picture's width."""
    room = share * 72 * plots.WIDTH  # points
    if len(text) <= MOST_LETTERS and text_width(text, fontsize, weight) <= room:
        return text

    def width_of(length: int) -> float:
        return text_width(f"{text[:length]}…", fontsize, weight)

    kept = bisect.bisect_right(range(1, min(MOST_LETTERS, len(text))), room, key=width_of)
    return f"{text[:kept]}…"


def text_width(text: str, fontsize: float, weight: str) -> float:
    """Return the width of a text in points."""
    if not text.strip():  # matplotlib measures blanks as nothing, or fails
        return 0.0
    plain = text.replace("$", "S")  # matplotlib would see a formula
    path = TextPath((0, 0), plain, fontsize, prop=FontProperties(weight=weight))
    return path.get_extents().width
