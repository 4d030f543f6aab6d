"""Draw what a run learned, as in AlexNet's paper (Krizhevsky et al. 2012).

There are the first layer's filters (figure 3), and test images with their five most probable
classes (figure 4, left). There are nearest neighbours by the last hidden layer (figure 4, right).
The PNG files go into the run's folder with pictures.json, which holds their captions and numbers.
The report shows them.

Shapes: K filters, H height, W width, C channels or classes, T test images, N
training images, B batch, F activations.
"""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnn_spmd import config as configs
from cnn_spmd.data.streaming import Streamed
from cnn_spmd.errors import UserError
from cnn_spmd.report import drawings, plots
from cnn_spmd.report.canvas import Figure
from cnn_spmd.training import build, restore, runfiles, terminal, weights
from cnn_spmd.training.step import StepFunctions, TrainState

# As many as in the paper's figure 4.
TEST_IMAGES = 8
QUERIES = 5
NEIGHBOURS = 6
FILTERS = 128  # drawn at most
BATCH = 256  # training images per call of the program


def draw_pictures(folder: pathlib.Path, data_dir: str | None = None) -> list[pathlib.Path]:
    """Draw what the run in `folder` learned, from its newest checkpoint; return the PNG files.

    One device is enough, whatever the run's mesh was. data_dir: where the run's data set is now, if
    it has moved. Raises UserError for a folder that is no run or has no checkpoint, and where the
    data set is missing.
    """
    weights.refuse_no_run(folder)
    with restore.locked(folder):
        setup, state, *_ = restore.on_one_device(folder, data_dir)
        shown_T, compared_T = choose_images(setup.config.seed, len(setup.data.test_images))
        split = configs.evaluated_split(setup.config)
        terminal.say(
            f"Comparing {len(setup.data.train_images):,} training images of {setup.shown_data} "
            f"with {len(compared_T)} {split} images."
        )
        predicted = predictions(setup, state, shown_T)
        near = neighbours(setup, state, compared_T)
        kernel_name, filters_KHWC = first_layer(setup, state.params)
        towers = getattr(setup.functions.model(state.params, state.model_state), "towers", 1)
        captions = {
            "filters.png": filters_caption(kernel_name, filters_KHWC.shape, towers),
            "top5.png": predictions_caption(predicted, split),
            "neighbours.png": neighbours_caption(near, split),
        }
        source = f"{setup.config.model.name} after step {int(state.step)}, {setup.data.name}."
        numbers = dict(
            step=int(state.step),
            filters=len(filters_KHWC),
            predictions=predicted,
            neighbours=near,
            pictures=[
                dict(file=name, title=title, caption=f"{caption} {source}")
                for name, (title, caption) in captions.items()
            ],
        )
        with plots.style():
            pictures = {
                "filters.png": drawings.filter_grid(filters_KHWC[:FILTERS], towers),
                "top5.png": drawings.prediction_bars(setup.data, predicted),
                "neighbours.png": drawings.neighbour_rows(setup.data, near),
            }
            write_pictures(folder, pictures, numbers)
    return [folder / name for name in pictures]


def write_pictures(folder: pathlib.Path, pictures: Mapping[str, Figure], numbers: dict) -> None:
    """Write the PNG files and pictures.json; raise UserError where that fails."""
    try:
        for name, picture in pictures.items():
            with runfiles.atomic_write(folder / name) as temporary:
                picture.savefig(temporary, format="png", dpi=200)
        runfiles.write_json(folder / "pictures.json", numbers)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}") from error


def filters_caption(kernel_name: str, shape: tuple[int, ...], towers: int) -> tuple[str, str]:
    """Return title and caption of the filters, of shape [K, H, W, C]."""
    count, *window = shape
    which = f"The first {FILTERS} of the {count}" if count > FILTERS else f"The {count}"
    apart = "; the towers apart" if towers > 1 else ""
    return "The first layer's filters", (
        f"{which} filters of {'x'.join(map(str, window))} weights ({kernel_name}), each scaled to "
        f"its own range{apart}."
    )


def predictions_caption(predicted: list[dict], split: str) -> tuple[str, str]:
    """Return title and caption of the most probable classes; split: "test" or "validation"."""
    return f"{split.capitalize()} images and their most probable classes", (
        f"{len(predicted)} {split} images, the label above each, and its most probable classes "
        "with their probabilities in %; the right class is orange and bold."
    )


def neighbours_caption(near: list[dict], split: str) -> tuple[str, str]:
    """Return title and caption of the nearest neighbours; split: "test" or "validation"."""
    return "Nearest neighbours", (
        f"{split.capitalize()} images (left), and for each the training images whose "
        f"{near[0]['width']} activations before the output layer are nearest (Euclidean distance), "
        f"with their labels. Labels of another class than the {split} image's are in italics."
    )


# ---- Numbers


def choose_images(seed: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the test images that are shown and that are compared."""
    order = np.random.Generator(np.random.Philox(key=[seed, examples])).permutation(examples)
    return np.sort(order[:TEST_IMAGES]), np.sort(order[-QUERIES:])


def first_layer(setup: build.Setup, params: nnx.State) -> tuple[str, np.ndarray]:
    """Return the first kernel's name, and its filters [K, H, W, C], scaled to 0 to 1.

    It is the kernel that takes an image's 3 channels. Raises UserError for a network without one.
    """
    side = setup.image_size
    dense, kernels = 3 * side**2, {}
    for path, kernel in nnx.to_flat_state(params):
        if kernel.shape[:-1] == (dense,) or (kernel.ndim == 4 and kernel.shape[2] == 3):
            kernels[".".join(map(str, path))] = kernel
    if not kernels:
        raise UserError(
            f"model.name={setup.config.model.name}: no layer has a kernel [H, W, 3, K] or "
            f"[{dense}, K], expected one that --pictures can draw"
        )
    name, kernel = next(iter(kernels.items()))
    window = (side, side) if kernel.ndim == 2 else kernel.shape[:2]
    kernel_HWCK = np.asarray(kernel[...], np.float32).reshape(*window, 3, kernel.shape[-1])
    filters_KHWC = kernel_HWCK.transpose(3, 0, 1, 2)
    low = filters_KHWC.min((1, 2, 3), keepdims=True)
    high = filters_KHWC.max((1, 2, 3), keepdims=True)
    return name, (filters_KHWC - low) / np.maximum(high - low, 1e-12)


def predictions(setup: build.Setup, state: TrainState, test_T: np.ndarray) -> list[dict]:
    """Return label and most probable classes of test images, as evaluated."""
    images = np.asarray(setup.data.test_images[test_T])
    probabilities_TC = np.exp(jax.jit(setup.functions.scores)(state, images))
    classes_TC = np.argsort(-probabilities_TC, -1, kind="stable")[:, : drawings.TOP_CLASSES]
    return [
        dict(
            test_image=int(index),
            label=int(setup.data.test_labels[index]),
            classes=classes.tolist(),
            probabilities=[float(row[at]) for at in classes],
        )
        for index, row, classes in zip(test_T, probabilities_TC, classes_TC, strict=True)
    ]


def activations(functions: StepFunctions, state: TrainState, images_BHWC: jax.Array) -> jax.Array:
    """Return the input of the output layer for the centre crops, float32 [B, F].

    That is the last hidden dense layer's output, or the features where no dense layer is hidden.
    """
    seen = {}
    place = dataclasses.replace(
        functions.place, record=lambda name, axes, x: seen.update({name: x})
    )
    centre = dataclasses.replace(functions.preprocessing, views="one")
    functions = dataclasses.replace(functions, preprocessing=centre, place=place)
    functions.scores(state, images_BHWC)
    return seen["fc3 input"].astype(jnp.float32)


def neighbours(setup: build.Setup, state: TrainState, test_T: np.ndarray) -> list[dict]:
    """Return the training images with the nearest activations, nearest first.

    All training images are looked through.
    """
    distances_TN, width = training_distances(setup, state, setup.data.test_images[test_T])
    nearest_TN = np.argsort(distances_TN, -1, kind="stable")[:, :NEIGHBOURS]
    return [
        dict(
            test_image=int(index),
            label=int(setup.data.test_labels[index]),
            width=width,
            train_images=nearest.tolist(),
            labels=setup.data.train_labels[nearest].tolist(),
            distances=[float(row[at]) for at in nearest],
        )
        for index, row, nearest in zip(test_T, distances_TN, nearest_TN, strict=True)
    ]


def training_distances(
    setup: build.Setup, state: TrainState, test_THWC: np.ndarray
) -> tuple[np.ndarray, int]:
    """Return distances [T, N] to all training images, and the activations' number."""
    of_test = jax.jit(lambda state, images: activations(setup.functions, state, images))
    test_TF = of_test(state, np.asarray(test_THWC))

    @jax.jit
    def distances(state: TrainState, images_BHWC: jax.Array, test_TF: jax.Array) -> jax.Array:
        train_BF = activations(setup.functions, state, images_BHWC)
        # One test image at a time: [T, B, F] need not fit into memory.
        return jax.lax.map(lambda test_F: jnp.linalg.norm(train_BF - test_F, axis=-1), test_TF)

    images, labels = setup.data.train_images, setup.data.train_labels
    feed = Streamed(setup.place, images, labels)
    calls = -(-len(images) // BATCH)
    # The last batch is filled up with the last image.
    indices = np.minimum(np.arange(calls * BATCH, dtype=np.int32), len(images) - 1)
    found = [
        np.asarray(distances(state, data.images, test_TF))
        for data, _ in feed.calls(indices.reshape(calls, BATCH))
    ]
    return np.concatenate(found, 1)[:, : len(images)], test_TF.shape[1]
