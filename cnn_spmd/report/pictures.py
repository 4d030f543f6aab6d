"""Pictures of what a run learned, as in AlexNet's paper (Krizhevsky et al. 2012): the first layer's filters (figure 3), test
images with their five most probable classes (figure 4, left), and nearest neighbours by the last hidden layer (right).

They and pictures.json, which holds their captions and numbers, go into the run's folder; report/page.py shows them.
Shapes: K filters, H height, W width, C channels or classes; T test images, N training images, B batch, F activations.
"""

import bisect
import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx

from cnn_spmd.data import dataset
from cnn_spmd.data.feed import Feed
from cnn_spmd.errors import UserError
from cnn_spmd.report import plots
from cnn_spmd.report.canvas import Figure, FontProperties, TextPath
from cnn_spmd.training import build as setup
from cnn_spmd.training import runfiles
from cnn_spmd.training import workdir as workdirs
from cnn_spmd.training.checkpoint import Checkpoints
from cnn_spmd.training.step import Steps, TrainState
from cnn_spmd.training.terminal import say

TEST_IMAGES, TOP, QUERIES, NEIGHBOURS = 8, 5, 5, 6  # as many as in the paper's figure 4
FILTERS, COLUMNS = 128, 16  # shown at most, in a row
BATCH = 256
RIGHT, OTHER = "#E69F00", "#56B4E9"  # of plots.SCHEMES' palette, light enough for black letters


def draw(folder: pathlib.Path, data_dir: str | None = None) -> None:
    """Draws the run in `folder` from its newest checkpoint, on one device, whatever mesh it was trained on.

    data_dir: where its data set has moved to. Raises UserError, in one line, for what is no run or has no checkpoint, and
    where its data set is not to be had.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds no run (no config.json)")
    with workdirs.locked(folder, ""):  # a run that goes on there would lose what it is saving
        run, state = restore(folder, data_dir)
        shown_T, compared_T = choose(run.config.seed, len(run.data.test_images))
        say(
            f"Comparing {len(run.data.train_images):,} training images of {run.data.name} with {len(compared_T)} test "
            "images."
        )
        predicted = predictions(run, state.params, shown_T)
        near = neighbours(run, state.params, compared_T)
        kernel, filters_KHWC = first_layer(run, state.params)
        towers = nnx.merge(run.steps.graph, state.params).towers
        shown, size = min(len(filters_KHWC), FILTERS), "x".join(map(str, filters_KHWC.shape[1:]))
        made_by = f"{run.config.model.name} after step {int(state.step)}, {run.data.name}."
        captions = {
            "filters.png": (
                "The first layer's filters",
                (
                    f"{f'The first {shown} of the' if shown < len(filters_KHWC) else 'The'} {len(filters_KHWC)} filters of {size} "
                    f"weights ({kernel}), each scaled to its own range{'; the towers apart' if towers > 1 else ''}. {made_by}"
                ),
            ),
            "top5.png": (
                "Test images and their most probable classes",
                (
                    f"{len(predicted)} test images, the label above each, and its most probable classes with their probabilities "
                    f"in %; the right one is orange and bold. {made_by}"
                ),
            ),
            "neighbours.png": (
                "Nearest neighbours",
                (
                    f"Test images (left), and for each the training images whose {near[0]['width']} activations before the output "
                    f"layer are nearest (Euclidean distance), with their labels; another class than the test image's is in "
                    f"italics. {made_by}"
                ),
            ),
        }
        try:
            with plots.style():
                for name, fig in (
                    ("filters.png", filter_grid(filters_KHWC[:shown], towers)),
                    ("top5.png", prediction_bars(run.data, predicted)),
                    ("neighbours.png", neighbour_rows(run.data, near)),
                ):
                    with runfiles.atomic_write(folder / name) as temporary:
                        fig.savefig(temporary, format="png", dpi=200)
            runfiles.write_json(
                folder / "pictures.json",
                dict(
                    step=int(state.step),
                    filters=len(filters_KHWC),
                    predictions=predicted,
                    neighbours=near,
                    pictures=[
                        dict(file=name, title=title, caption=caption)
                        for name, (title, caption) in captions.items()
                    ],
                ),
            )
        except OSError as error:
            raise UserError(f"{folder}: cannot be written: {error.strerror}") from error


def restore(folder: pathlib.Path, data_dir: str | None) -> tuple[setup.Setup, TrainState]:
    """The run in `folder`, set up on the first device, and its newest whole state."""
    saved = runfiles.read_json(folder / "config.json")

    def the_same(run: setup.Setup) -> None:
        asked, found = saved["dataset"], run.data.name
        files, digest = run.data.files, run.data.digest  # no digest: they are still to be decoded
        other = digest and saved.get("data_digest", digest) != digest
        if found != asked or files != saved.get("data_files", files) or other:
            holds = found if found != asked else "other files or pixels of it"
            raise UserError(
                f"was trained on {asked}, but its data.dir={run.config.data.dir} holds "
                f"{holds}: give the former's place by --data_dir=PATH"
            )

    try:
        if data_dir is not None and saved["dataset"] in ("digits", "synthetic"):
            raise UserError(
                f"--data_dir={data_dir}: has no effect on {saved['dataset']}, expected none"
            )
        config = ml_collections.ConfigDict(
            {name: saved[name] for name in saved if name not in runfiles.NOT_CONFIG}
        )
        config.data = dict(skip_bad=0) | config.data.to_dict()  # which older runs do not have
        config.mesh.update(dict(data=1, model=1))
        config.parallelism, config.data.fallback = "data", ""
        if data_dir is not None:
            config.data.dir = data_dir
        run = setup.prepare(config, check=the_same)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: config.json is damaged or of another version ({' '.join(str(error).split())})"
        ) from error
    except UserError as error:
        moved = (
            "; where it has moved: --data_dir=PATH"
            if data_dir is None and str(error).startswith("data.dir=")
            else ""
        )
        raise UserError(
            f"{folder}: {str(error).replace('--config.data.dir=', '--data_dir=')}{moved}"
        ) from error
    state = None
    if any((folder / "checkpoints").glob("[0-9]*")):
        checkpoints = Checkpoints(
            folder.resolve() / "checkpoints", config.checkpoint.keep, saved.get("run", "")
        )
        state = checkpoints.restore(run.steps.abstract_state)
        checkpoints.close()
    if state is None:
        raise UserError(
            f"{folder}: holds no checkpoint that can be used: train it to its end first"
        )
    return run, state


# ---- Numbers


def choose(seed: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Which test images are shown with their classes, and which with their neighbours: a function of the run's seed."""
    order = np.random.Generator(np.random.Philox(key=[seed, examples])).permutation(examples)
    return np.sort(order[:TEST_IMAGES]), np.sort(order[-QUERIES:])


def first_layer(run: setup.Setup, params: nnx.State) -> tuple[str, np.ndarray]:
    """The first kernel's name, and its filters [K, H, W, C], each scaled to 0 to 1."""
    for layer in ("conv1", "fc1"):
        if layer in params:
            break
    kernel = np.asarray(params[layer]["kernel"][...], np.float32)
    side = setup.image_size(run.config, run.data)
    kernel_HWCK = kernel if kernel.ndim == 4 else kernel.reshape(side, side, -1, kernel.shape[-1])
    kernel_KHWC = kernel_HWCK.transpose(3, 0, 1, 2)
    low, high = (bound(kernel_KHWC, (1, 2, 3), keepdims=True) for bound in (np.min, np.max))
    return f"{layer}.kernel", (kernel_KHWC - low) / np.maximum(high - low, 1e-12)


def predictions(run: setup.Setup, params: nnx.State, test_T: np.ndarray) -> list[dict]:
    """Label and most probable classes of test images, as the run's evaluation sees them (all its views)."""
    probabilities_TC = np.exp(
        jax.jit(run.steps.scores)(params, np.asarray(run.data.test_images[test_T]))
    )
    classes_TC = np.argsort(-probabilities_TC, -1, kind="stable")[:, :TOP]
    return [
        dict(
            test_image=int(index),
            label=int(run.data.test_labels[index]),
            classes=classes.tolist(),
            probabilities=[float(row[at]) for at in classes],
        )
        for index, row, classes in zip(test_T, probabilities_TC, classes_TC, strict=True)
    ]


def activations(steps: Steps, params: nnx.State, images_BHWC: jax.Array) -> jax.Array:
    """What reaches the output layer, of the centre crops: the last hidden dense layer where there is one; float32 [B, F]."""
    seen = {}
    place = dataclasses.replace(steps.place, record=lambda name, axes, x: seen.update({name: x}))
    dataclasses.replace(steps, views="one", place=place).scores(params, images_BHWC)
    return seen["fc3 input"].astype(jnp.float32)


def neighbours(run: setup.Setup, params: nnx.State, test_T: np.ndarray) -> list[dict]:
    """For each test image the training images whose activations are nearest, of all of them, nearest first."""
    of_test_TF = jax.jit(lambda params, images: activations(run.steps, params, images))(
        params, np.asarray(run.data.test_images[test_T])
    )

    @jax.jit
    def distances(params, images_BHWC, of_test_TF):
        of_batch_BF = activations(run.steps, params, images_BHWC)
        return jax.lax.map(
            lambda test_F: jnp.sqrt(jnp.square(of_batch_BF - test_F).sum(-1)), of_test_TF
        )

    feed, examples = (
        Feed(run.place, run.data.train_images, run.data.train_labels, resident=False),
        len(run.data.train_images),
    )
    batches = np.minimum(
        np.arange(-(-examples // BATCH) * BATCH, dtype=np.int32), examples - 1
    ).reshape(-1, BATCH)
    distances_TN = np.concatenate(
        [np.asarray(distances(params, data.images, of_test_TF)) for data, _ in feed.calls(batches)],
        1,
    )[:, :examples]
    nearest_TN = np.argsort(distances_TN, -1, kind="stable")[:, :NEIGHBOURS]
    return [
        dict(
            test_image=int(index),
            label=int(run.data.test_labels[index]),
            width=of_test_TF.shape[1],
            train_images=nearest.tolist(),
            labels=run.data.train_labels[nearest].tolist(),
            distances=[float(row[at]) for at in nearest],
        )
        for index, row, nearest in zip(test_T, distances_TN, nearest_TN, strict=True)
    ]


# ---- Figures


def filter_grid(filters_KHWC: np.ndarray, towers: int) -> Figure:
    """The filters in rows, large enough to see their pixels; a block a tower."""
    scale = max(1, 64 // filters_KHWC.shape[1])
    filters_KHWC = filters_KHWC.repeat(scale, 1).repeat(scale, 2)
    side, gap = filters_KHWC.shape[1], 6
    blocks = []
    for filters in np.array_split(filters_KHWC, towers):
        rows = -(-len(filters) // COLUMNS)
        block = np.ones((rows * (side + gap) - gap, COLUMNS * (side + gap) - gap, 3), np.float32)
        for number, pixels in enumerate(filters):
            top, left = ((side + gap) * at for at in divmod(number, COLUMNS))
            block[top : top + side, left : left + side] = pixels
        blocks.append(block)
    width, heights = plots.WIDTH, [len(block) for block in blocks]
    fig = Figure(
        figsize=(
            width,
            width * sum(heights) / blocks[0].shape[1] + (0.3 * towers if towers > 1 else 0.06),
        )
    )
    for number, (block, axes) in enumerate(
        zip(blocks, fig.subplots(towers, squeeze=False, height_ratios=heights)[:, 0], strict=True)
    ):
        axes.imshow(block, interpolation="nearest")
        axes.axis("off")
        if towers > 1:
            axes.set_title(f"tower {number + 1}")
    return fig


def prediction_bars(data: dataset.Dataset, predicted: list[dict]) -> Figure:
    """Two columns of test images, the bars beside each."""
    rows = -(-len(predicted) // 2)
    fig = Figure(figsize=(plots.WIDTH, 1.05 * rows))
    grid = fig.subplots(rows, 4, squeeze=False, width_ratios=[1, 1.5, 1, 1.5])
    for axes in grid.flat:
        axes.axis("off")
    for row, (picture, bars) in zip(predicted, grid.reshape(-1, 2), strict=False):
        show(
            picture,
            data.test_images[row["test_image"]],
            data.class_names[row["label"]],
            0.19,
            weight="bold",
            fontsize=8,
        )
        for at, (label, share) in enumerate(zip(row["classes"], row["probabilities"], strict=True)):
            right = label == row["label"]
            bars.barh(at, share, 0.82, color=RIGHT if right else OTHER)
            style = dict(fontsize=7, va="center", weight="bold" if right else "normal")
            bars.text(0.02, at, short(data.class_names[label], 0.22, **style), **style)
            bars.text(1.18, at, f"{100 * share:.0f}", ha="right", **style)
        bars.set(xlim=(0, 1.18), ylim=(TOP - 0.5, -0.5))
    return fig


def neighbour_rows(data: dataset.Dataset, near: list[dict]) -> Figure:
    """A row a test image: itself, and its neighbours."""
    fig = Figure(figsize=(plots.WIDTH, 0.78 * len(near)))
    grid = fig.subplots(
        len(near), 2 + NEIGHBOURS, squeeze=False, width_ratios=[1, 0.15] + [1] * NEIGHBOURS
    )
    for axes in grid.flat:
        axes.axis("off")
    for row, (picture, _, *others) in zip(near, grid, strict=True):
        show(
            picture,
            data.test_images[row["test_image"]],
            data.class_names[row["label"]],
            0.12,
            weight="bold",
            fontsize=7,
        )
        for axes, index, label in zip(others, row["train_images"], row["labels"], strict=False):
            show(
                axes,
                data.train_images[index],
                data.class_names[label],
                0.12,
                weight="normal",
                fontsize=7,
                style="normal" if label == row["label"] else "italic",
            )
    return fig


def show(axes, image_HWC: np.ndarray, label: str, share: float, **style) -> None:
    axes.imshow(image_HWC, interpolation="nearest")
    axes.set_title(short(label, share, **style), loc="center", pad=2, **style)


def short(text: str, share: float, *, fontsize: float, weight: str = "normal", **_) -> str:
    """As much of the text, in letters of this size, as fits into a share of the figure's width."""

    def width(
        text: str,
    ) -> float:  # in points; of "$" this would see formulas, and of blanks nothing
        if not text.strip():
            return 0.0
        return (
            TextPath((0, 0), text.replace("$", "S"), fontsize, prop=FontProperties(weight=weight))
            .get_extents()
            .width
        )

    room, longest = share * 72 * plots.WIDTH, 16  # of a long name only a beginning is measured
    while longest < len(text) and width(text[:longest]) <= room:
        longest *= 2
    if width(text[:longest]) <= room:
        return text
    lengths = range(1, min(longest, len(text)))
    kept = bisect.bisect_right(lengths, room, key=lambda length: width(f"{text[:length]}…"))
    return f"{text[:kept]}…"
