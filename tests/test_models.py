import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd import models
from cnn_spmd.errors import UserError
from cnn_spmd.models import alexnet, alexnet_2012, kernels, layers


def make(name, image_size, classes):
    return models.make(name, image_size=image_size, classes=classes, width=4096, dropout=0.5, dtype=jnp.float32,
                       rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("name", "image_size", "classes", "count"), [
    ("alexnet", 224, 1000, 61_100_840),  # Krizhevsky 2014, as torchvision counts it
    ("alexnet_2012", 224, 1000, 60_965_224),  # Krizhevsky 2014, section 5: 0.2% fewer than the one-tower net
    ("alexnet", 32, 10, 35_855_178),
    ("simple_cnn", 32, 10, 3 * 3 * 3 * 32 + 32 + 16 * 16 * 32 * 10 + 10)])
def test_parameter_count_and_shapes(name, image_size, classes, count):
    model = nnx.eval_shape(lambda: make(name, image_size, classes))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    logits = nnx.eval_shape(lambda model, x: model.classify(model.features(x)), model,
                            jnp.zeros((2, image_size, image_size, 3)))
    assert logits.shape == (2, classes)


def test_every_parameter_names_its_axes():
    for name, image_size in (("alexnet", 32), ("alexnet_2012", 64), ("simple_cnn", 32)):
        state = nnx.state(nnx.eval_shape(lambda name=name, size=image_size: make(name, size, 10)), nnx.Param)
        for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            assert len(leaf.axes) == leaf.ndim


@pytest.mark.parametrize(("name", "size"), [("alexnet", 31), ("alexnet_2012", 32), ("simple_cnn", 31), ("lenet", 32)])
def test_refuses(name, size):
    with pytest.raises(UserError, match=r"model\.name="):
        make(name, size, 10)


def pool_windows(size, window, strides, ceil):
    """Start and end of each window along one dimension, clipped at the edge; written from the definition."""
    starts = [start for start in range(0, size, strides) if start + window <= size]
    if ceil and starts[-1] + window < size:
        starts.append(starts[-1] + strides)
    return [(start, min(start + window, size)) for start in starts]


@pytest.mark.parametrize("levers", [(), ("pool_index",)])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(("size", "window", "strides"), [(8, 2, 2), (9, 3, 3), (9, 3, 2), (7, 2, 2), (8, 3, 2), (32, 3, 2),
                                                         (12, 5, 2), (8, 2, 3)])
def test_max_pool_against_numpy(size, window, strides, ceil, levers):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    windows = pool_windows(size, window, strides, ceil)
    expected = np.empty((2, len(windows), len(windows), 3), np.float32)
    for i, (top, bottom) in enumerate(windows):
        for j, (left, right) in enumerate(windows):
            expected[:, i, j] = x[:, top:bottom, left:right].max((1, 2))
    np.testing.assert_array_equal(layers.max_pool(x, window, strides, ceil, levers=levers), expected)
    weight = np.arange(expected.size, dtype=np.float32).reshape(expected.shape) % 7 + 1
    gradient = np.zeros_like(x)
    for (i, (top, bottom)), (j, (left, right)) in itertools.product(enumerate(windows), repeat=2):
        largest = x[:, top:bottom, left:right] == expected[:, i, j][:, None, None]
        gradient[:, top:bottom, left:right] += largest * weight[:, i, j][:, None, None]
    np.testing.assert_array_equal(
        jax.grad(lambda x: (layers.max_pool(x, window, strides, ceil, levers=levers) * weight).sum())(x), gradient)


def test_max_pool_gives_the_gradient_of_equal_maxima_to_the_first_and_keeps_nan():
    x = jnp.ones((1, 5, 5, 1))
    gradient = jax.grad(lambda x: layers.max_pool(x, 3, 2).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(gradient, np.pad([[1, 0, 1], [0, 0, 0], [1, 0, 1]], ((0, 2), (0, 2))))
    for at in np.ndindex(3, 3):
        assert jnp.isnan(layers.max_pool(x.at[0, *at, 0].set(jnp.nan), 3, 2)[0, 0, 0, 0])


@pytest.mark.parametrize(("name", "size", "lever"), [
    *(("alexnet", 224, lever) for lever in ("space_to_depth", "pool_first", "pool_index", "column_pairs")),
    ("alexnet", 32, "pool_first"), ("alexnet_2012", 70, "space_to_depth"), ("alexnet_2012", 70, "norm_kernel")])
def test_levers_change_nothing(name, size, lever, monkeypatch):
    """Logits and every gradient with one lever are those of the plain network, in float64."""
    monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
    monkeypatch.setattr(alexnet_2012, "CHANNELS", (16, 32, 24, 32, 16))
    with jax.enable_x64(True):
        got = []
        for levers in ((), ("space_to_depth", lever)):
            model = models.make(name, image_size=size, classes=5, width=16, dropout=0.0, dtype=jnp.float64, levers=levers,
                                rngs=nnx.Rngs(0))
            graph, params = nnx.split(model)
            x = jax.random.normal(jax.random.key(0), (2, size, size, 3), jnp.float64)

            @jax.jit
            def value(params, x, graph=graph):
                return jax.value_and_grad(lambda p: (nnx.merge(graph, p).classify(nnx.merge(graph, p).features(x)) ** 2).sum())(
                    params)

            got.append(jax.tree.leaves(value(params, x)))
        for plain, fast in zip(*got, strict=True):
            assert np.abs(fast - plain).max() < 1e-7 * np.abs(plain).max()  # float32 parameters have float32 gradients


@pytest.mark.parametrize(("name", "levers"), [
    ("alexnet", ["space_to_depth", "pool_first", "pool_index", "column_pairs"]), ("alexnet_2012", ["norm_kernel"])])
def test_a_lever_is_used(name, levers):
    """Each changes the program, where there is something for it: else the test above would compare like with like."""
    programs = set()
    for used in range(len(levers) + 1):
        model = nnx.eval_shape(lambda used=used: models.make(
            name, image_size=224, classes=5, width=16, dropout=0.0, dtype=jnp.float32, levers=tuple(levers[:used]),
            rngs=nnx.Rngs(0)))
        graph, params = nnx.split(model)
        gradient = jax.grad(lambda p, x, graph=graph: nnx.merge(graph, p).features(x).sum())
        programs.add(str(jax.make_jaxpr(gradient)(params, jnp.zeros((1, 224, 224, 3)))))
    assert len(programs) == len(levers) + 1
    with pytest.raises(UserError, match=r"model\.levers=magic: unknown"):
        models.make("alexnet", levers=("magic",))


@pytest.mark.parametrize(("size", "window", "padding"), [(27, 5, (2, 2)), (9, 4, (1, 2)), (7, 3, (0, 0))])
def test_gradient_in_pairs(size, window, padding):
    """Of columns, by autodiff and by two at a time; in float64."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, size, size, 6), jnp.float64)
        kernel = jax.random.normal(jax.random.key(1), (window, window, 6, 10), jnp.float64)
        expected, plain = jax.vjp(lambda *at: layers._convolve(*at, [padding] * 2), x, kernel)
        got, paired = jax.vjp(lambda *at: layers._paired_gradient(*at, padding), x, kernel)
        gradient = jax.random.normal(jax.random.key(2), got.shape, jnp.float64)
        for one, other in zip((got, *paired(gradient)), (expected, *plain(gradient)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture
def interpreted(monkeypatch):
    """GPU kernels, run by Pallas's interpreter."""
    call = kernels.pl.pallas_call
    monkeypatch.setattr(kernels.pl, "pallas_call", lambda *args, compiler_params, **settings: call(
        *args, interpret=True, **settings))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bias", [(), (jnp.linspace(-3, 1, 16),)])
@pytest.mark.parametrize(("size", "window", "strides", "ceil"), [(9, 3, 2, False), (8, 3, 2, True), (7, 5, 2, True)])
def test_pool_kernels_against_the_plain_form(size, window, strides, ceil, bias):
    pool = layers.Pool(window, strides, ceil, (size, size), lambda f, *arrays: f(*arrays))
    x = jax.random.normal(jax.random.key(0), (2, size, size, 16))
    expected, index = layers._plain_max_and_index(pool, x, *bias)
    got = kernels.max_and_index(x, *bias, window=window, strides=strides, counts=expected.shape[1:3])
    np.testing.assert_array_equal(got[0], expected)
    np.testing.assert_array_equal(got[1], index)
    gradient = jax.random.normal(jax.random.key(1), expected.shape)
    settings = dict(window=window, strides=strides, sizes=(size, size))
    np.testing.assert_allclose(kernels.unpool(index, gradient, **settings),
                               layers._plain_unpool(index, gradient, **settings), atol=1e-6)
    assert bool((index == kernels.NONE).any()) == bool(bias)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("channels", "width", "size"), [(16, 16, 5), (96, 48, 5), (32, 32, 9), (16, 8, 4)])
def test_norm_kernel_against_the_plain_form(channels, width, size):
    settings = dict(size=size, alpha=0.2, beta=0.75, k=1.5)
    x, gradient = jax.random.normal(jax.random.key(0), (2, 2, 5, 3, channels))
    expected, backward = jax.vjp(layers.Norm(tuple(settings.items()), width, None).plain, x)
    np.testing.assert_allclose(kernels.response_norm(x, **settings, width=width), expected, atol=1e-6)
    np.testing.assert_allclose(kernels.response_norm(x, gradient, **settings, width=width), backward(gradient)[0], atol=1e-6)


@pytest.mark.parametrize(("size", "window", "strides"), [(8, 3, 2), (9, 3, 2), (32, 3, 2), (5, 2, 2)])
def test_average_pool_divides_by_the_area_inside(size, window, strides):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    windows = pool_windows(size, window, strides, ceil=True)
    weight = rng.normal(size=(2, len(windows), len(windows), 3)).astype(np.float32)
    expected, gradient = np.empty_like(weight), np.zeros_like(x)
    for i, (top, bottom) in enumerate(windows):
        for j, (left, right) in enumerate(windows):
            expected[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
            gradient[:, top:bottom, left:right] += weight[:, i, j][:, None, None] / ((bottom - top) * (right - left))
    np.testing.assert_allclose(layers.average_pool(x, window, strides), expected, rtol=1e-5, atol=1e-6)
    got = jax.grad(lambda x: (layers.average_pool(x, window, strides) * weight).sum())(x)
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("within_map", [False, True])
@pytest.mark.parametrize(("size", "alpha", "beta", "k"), [(5, 2e-5, 0.75, 2.0), (5, 0.3, 0.75, 1.0), (3, 0.5, 0.5, 1.5)])
def test_response_norm_against_numpy(size, alpha, beta, k, within_map):
    """Forward from the formula of AlexNet 2012, section 3.3, in loops; backward from its derivative, by hand."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 2, 6, 5, 7))
    half = size // 2

    def neighbours(i, j, c):
        if within_map:
            return [(a, b, c) for a in range(max(0, i - half), min(6, i + half + 1))
                    for b in range(max(0, j - half), min(5, j + half + 1))]
        return [(i, j, d) for d in range(max(0, c - half), min(7, c + half + 1))]

    expected, gradient = np.empty_like(x), np.zeros_like(x)
    for n, i, j, c in np.ndindex(x.shape):
        base = k + alpha * sum(x[n][at] ** 2 for at in neighbours(i, j, c))
        expected[n, i, j, c] = x[n, i, j, c] / base**beta
        gradient[n, i, j, c] += weight[n, i, j, c] / base**beta
        for at in neighbours(i, j, c):
            gradient[n][at] -= weight[n, i, j, c] * x[n, i, j, c] * beta * base ** (-beta - 1) * 2 * alpha * x[n][at]

    def norm(x):
        return layers.response_norm(x, size=size, alpha=alpha, beta=beta, k=k, within_map=within_map)

    x = x.astype(np.float32)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: (norm(x) * weight).sum())(x), gradient, rtol=1e-4, atol=1e-5)


def test_towers_do_not_see_each_other():
    """AlexNet 2012 up to conv2, conv4 and conv5: a tower's channels depend on its own half of the input alone."""
    model = make("alexnet_2012", 64, 10)
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 96)).astype(np.float32)
    other = np.concatenate([x[..., :48], -x[..., 48:]], -1)
    for f in (lambda x: layers.conv_relu("conv2", model.conv2, x, layers.UNPLACED),
              lambda x: layers.response_norm_of_towers(x, 2, layers.UNPLACED, "norm1", size=5, alpha=1.0, beta=0.75, k=2.0)):
        a, b = np.asarray(f(x)), np.asarray(f(other))
        half = a.shape[-1] // 2
        np.testing.assert_array_equal(a[..., :half], b[..., :half])
        assert not np.array_equal(a[..., half:], b[..., half:])


def test_grouped_convolution_against_xla():
    model = make("alexnet_2012", 64, 10)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 96)).astype(np.float32)
    got = layers.conv_relu("conv2", model.conv2, x, layers.UNPLACED)
    np.testing.assert_allclose(got, nnx.relu(model.conv2(x)), rtol=1e-5, atol=1e-5)


def test_dropout():
    x = jnp.ones((100, 1000))
    dropped = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.01
    assert layers.dropout(x, 0.25, None) is x
