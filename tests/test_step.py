"""The train step and the evaluation step: numbers, randomness, types."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from setups import (
    BATCH,
    CLASSES,
    NO_STATE,
    TEST_EXAMPLES,
    assert_close,
    gather,
    narrow,  # noqa: F401  (a fixture)
    network,
    on_devices,
    on_one,
    preprocessed,
    setup_of,
    trained,
)

from cnn_spmd.analysis import program
from cnn_spmd.data import feed, order, statistics
from cnn_spmd.data.feed import DeviceData


def normalised(setup, images: np.ndarray) -> jax.Array:
    """Return images less the training set's mean, over its deviation, by NumPy."""
    pixels = setup.data.train_images.astype(np.float64)
    return jnp.asarray((images - pixels.mean((0, 1, 2))) / pixels.std((0, 1, 2)), jnp.float32)


def logits_of(setup, images: jax.Array) -> np.ndarray:
    """Return the logits of a new network, by itself."""

    @jax.jit
    def forward(state, images):
        model = network(setup, state)
        return model.classify(model.features(images))

    return np.asarray(forward(setup.init(), images))


def sums_of(setup, state, mask_B: np.ndarray) -> dict:
    """Return the evaluation step's sums over the test images."""
    data = DeviceData(setup.data.test_images, setup.data.test_labels)
    return setup.functions.jit_eval()(state, data, np.arange(TEST_EXAMPLES), mask_B)


def expected_sums(probabilities_BC: np.ndarray, labels_B: np.ndarray) -> dict:
    """Return what the evaluation step sums, by NumPy."""
    own_B = probabilities_BC[np.arange(len(labels_B)), labels_B]
    rank_B = (probabilities_BC > own_B[:, None]).sum(1)
    return dict(
        loss=pytest.approx(-np.log(own_B).sum(), rel=1e-4),
        accuracy=(rank_B == 0).sum(),
        top5=(rank_B < 5).sum(),
        examples=len(labels_B),
    )


# ---- Numbers.


def test_train_loss_against_numpy():
    setup, data = on_one("simple_cnn")
    plain = preprocessed(setup, crop_pad=0, flip=False, colour_CC=None)
    _, got, _ = jax.jit(plain.gradients)(setup.init(), data, jnp.arange(BATCH))
    labels = setup.data.train_labels[:BATCH]
    logits = logits_of(setup, normalised(setup, setup.data.train_images[:BATCH]))
    targets = 0.9 * np.eye(CLASSES)[labels] + 0.1 / CLASSES
    expected = float(-(targets * jax.nn.log_softmax(logits)).sum(1).mean())
    assert float(got["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(got["accuracy"]) == (logits.argmax(1) == labels).mean()


def test_evaluation_against_numpy():
    """The mean softmax of an image and its mirror; a False mask leaves an image out."""
    setup, _ = on_one("alexnet")
    mask = np.arange(TEST_EXAMPLES) < 5
    x = normalised(setup, setup.data.test_images)
    probabilities = [jax.nn.softmax(logits_of(setup, view)) for view in (x, x[:, :, ::-1])]
    expected = expected_sums(np.mean(probabilities, 0)[mask], setup.data.test_labels[mask])
    assert sums_of(setup, setup.init(), mask) == expected


def test_ten_views_of_a_crop_against_numpy():
    """As cuda-convnet: crops less the mean image's middle, a mean of ten softmaxes."""
    data = dict(crop=24, crop_pad=0, normalise="pixel_mean", colour_noise=0.0)
    setup, train_data = on_one("simple_cnn", eval=dict(views="ten"), data=data)
    state = setup.init()
    # Pixels are large, and so would the logits be.
    state.params["fc3"]["kernel"][...] *= 0.01
    model = network(setup, state)
    images = setup.data.test_images.astype(np.float32)
    mean = setup.data.train_images.astype(np.float64).mean(0)[4:28, 4:28].astype(np.float32)
    corners = [(4, 4), (0, 0), (0, 8), (8, 0), (8, 8)]
    views = [images[:, top : top + 24, left : left + 24] for top, left in corners]
    views += [view[:, :, ::-1] for view in views]
    logits = [model.classify(model.features(view - mean)) for view in views]
    expected = expected_sums(
        np.mean([jax.nn.softmax(each) for each in logits], 0), setup.data.test_labels
    )
    assert sums_of(setup, state, np.ones(TEST_EXAMPLES, bool)) == expected

    batch, _, _ = setup.functions.batch(NO_STATE, train_data, jnp.arange(BATCH))
    assert batch.shape == (BATCH, 24, 24, 3)
    # Training images are neither scaled nor off centre.
    pixels = np.asarray(batch + mean)
    np.testing.assert_allclose(pixels, pixels.round(), atol=1e-4)


def test_several_steps_per_call_equal_single_steps():
    """A scan of three steps ends where three calls of one step end."""
    with jax.enable_x64(True):
        (losses, params), (scanned_losses, scanned) = (
            trained(setup_of("simple_cnn", "hybrid", (4, 2), steps_per_call=n), 3) for n in (1, 3)
        )
    np.testing.assert_allclose(scanned_losses, losses, rtol=1e-6)
    assert_close(scanned, params)
    assert losses[0] != losses[1] != losses[2]


def test_streamed_images_give_the_same_numbers_and_move_nothing_more():
    """To the last bit, in training (with crops, flips, dropout) and in evaluation."""
    (expected, moved), (streamed, streamed_moved) = map(results_where_resident, ("yes", "no"))
    assert expected["['examples']"] == TEST_EXAMPLES
    assert streamed.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(streamed[name], value, err_msg=name)
    assert streamed_moved
    assert all(row in moved for row in streamed_moved), (streamed_moved, moved)


def results_where_resident(resident: str) -> tuple[dict, list[tuple]]:
    """Return the numbers of two steps and an evaluation, and the collectives."""
    setup = setup_of(
        "simple_cnn",
        "hybrid",
        (4, 2),
        dtype="float32",
        data=dict(resident=resident),
        steps_per_call=2,
    )
    _, test_feed = setup.feeds
    test_feed.load()
    indices, mask = (array[0] for array in order.eval_indices(BATCH, TEST_EXAMPLES))
    (inputs,) = test_feed.calls([indices])
    mask = feed.put(mask, setup.place.sharding(("conv_batch",), mask.shape))
    sums = setup.functions.jit_eval()(setup.init(), *inputs, mask)
    losses, params = trained(setup, 2)
    report = program.report(setup.train_program(2), setup.place.mesh, 2)
    moved = [
        (row["operation"], row["axes"], row["count"], row["bytes"]) for row in report["collectives"]
    ]
    return params | gather(sums) | dict(losses=losses), moved


def test_colour_noise_against_numpy():
    """All pixels of an image get the same alpha_i sigma_i v_i, alpha ~ N(0, 0.1).

    sigma_i, v_i: the deviations and principal axes of the training pixels' covariance.
    """
    with jax.enable_x64(True):
        noisy, plain = (
            setup_of("simple_cnn", "data", (1, 1), data=dict(colour_noise=noise))
            for noise in (0.1, 0.0)
        )
        images = noisy.data.train_images
        images = images * np.uint8([1, 0, 0]) + images[..., ::-1] // 2
        data = DeviceData(images, noisy.data.train_labels)
        functions = preprocessed(noisy, colour_CC=0.1 * statistics.colour_axes(images))

        def added(step):
            """Return what noise adds to the pixels of a step."""
            state, indices = NO_STATE._replace(step=step), jnp.arange(BATCH)
            difference = (
                functions.batch(state, data, indices)[0]
                - plain.functions.batch(state, data, indices)[0]
            )
            return difference * functions.preprocessing.std

        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), 1), 2)
        alpha = np.asarray(jax.random.normal(key, (BATCH, 3, 1)))
        first, second = added(0), added(1)
    covariance = np.cov(images.reshape(-1, 3).astype(float), rowvar=False)
    variances, vectors = np.linalg.eigh(covariance)
    vectors *= np.sign(vectors[np.abs(vectors).argmax(0), range(3)])
    expected_BC1 = vectors @ (0.1 * alpha * np.sqrt(variances)[:, None])
    assert np.abs(expected_BC1).max(1).min() > 1
    expected = np.broadcast_to(expected_BC1[:, None, None, :, 0], second.shape)
    np.testing.assert_allclose(second, expected, atol=1e-3)
    # Another step has other noise.
    assert np.abs(first - second).max() > 1
    np.testing.assert_allclose(
        noisy.functions.preprocessing.colour_CC,
        0.1 * statistics.colour_axes(noisy.data.train_images),
    )


# ---- Randomness.


@pytest.mark.parametrize("name", ["alexnet", "simple_cnn"])
def test_randomness_is_a_function_of_seed_and_step(name):
    setup, data = on_one(name)
    # AlexNet is left with dropout alone.
    changes = dict(crop_pad=0, flip=False) if name == "alexnet" else {}
    functions, first = preprocessed(setup, **changes), setup.init()

    @jax.jit
    def loss_of(state):
        return functions.gradients(state, data, jnp.arange(BATCH))[1]["loss"]

    def loss(seed, step):
        return float(loss_of(first._replace(step=jnp.int32(step), seed=jnp.uint32(seed))))

    assert loss(0, 3) == loss(0, 3)
    assert len({loss(0, 3), loss(0, 4), loss(1, 3)}) == 3


def test_another_seed_rate_or_length_is_the_same_program():
    """The training differs, but nothing is compiled again."""
    setups = [
        setup_of("simple_cnn", "data", (2, 2), dtype="float32", **changes)
        for changes in (
            {},
            dict(seed=1),
            dict(optimizer=dict(warmup=0.5, learning_rate=0.04, decay="cosine"), steps=20),
        )
    ]
    assert len({setup.lower_train(2).as_text() for setup in setups}) == 1
    runs = [setup.train(setup.init(), 4)[1]["loss"] for setup in setups]
    assert runs[0][0] == runs[2][0] != runs[1][0]  # of the same, and of other parameters
    assert runs[0][-1] != runs[2][-1]


# ---- Types and memory.


def dtypes_of_products(jaxpr):
    """Yield the dtypes of all convolutions and matrix products of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            yield equation.outvars[0].aval.dtype
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from dtypes_of_products(value.jaxpr)


def test_bfloat16_computes_on_float32_parameters():
    setup = setup_of("simple_cnn", "data", (1, 1), dtype="bfloat16")
    abstract, data = setup.functions.abstract_state, on_devices(setup)

    def gradients(state):
        return setup.functions.gradients(state, data, jnp.arange(4))

    assert {leaf.dtype for leaf in jax.tree.leaves(abstract.params)} == {jnp.dtype("float32")}
    jaxpr = jax.make_jaxpr(gradients)(setup.init())
    assert set(dtypes_of_products(jaxpr.jaxpr)) == {jnp.dtype("bfloat16")}
    grads, metrics, _ = jax.eval_shape(gradients, abstract)
    assert {x.dtype for x in jax.tree.leaves((metrics, grads))} == {jnp.dtype("float32")}


def test_the_softmax_is_in_float32(monkeypatch):
    class Constant:
        def features(self, x, place, train=False):
            return x

        def classify(self, x, place, key=None):
            return jnp.tile(jnp.arange(10, dtype=jnp.bfloat16) / 3, (len(x), 1))

    setup, data = on_one("simple_cnn", label_smoothing=0.0)
    monkeypatch.setattr(nnx, "merge", lambda *_, **__: Constant())
    monkeypatch.setattr("cnn_spmd.training.step._refuse_changes", lambda *_: None)
    logits = np.arange(10, dtype=jnp.bfloat16) / jnp.bfloat16(3)
    expected = jax.nn.log_softmax(logits.astype(np.float32))
    scores = setup.functions.scores(NO_STATE, data.images[:2])
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores[0], expected, rtol=1e-5)
    loss, _ = setup.functions.loss(None, None, data.images[:2], jnp.zeros(2, int), None)
    assert float(loss) == pytest.approx(-float(expected[0]), rel=1e-5)


def test_the_state_is_donated_and_stays_where_it_is():
    setup = setup_of("simple_cnn", "hybrid", (4, 2), dtype="float32")
    compiled, abstract = setup.train_program(1), setup.functions.abstract_state
    assert program.memory(compiled)["alias_bytes"] >= program.bytes_per_device(abstract)
    placed = jax.tree.map(
        lambda got, leaf: got.is_equivalent_to(leaf.sharding, leaf.ndim),
        compiled.output_shardings[0],
        abstract,
    )
    assert jax.tree.all(placed)
