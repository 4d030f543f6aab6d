import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd import models
from cnn_spmd.errors import UserError
from cnn_spmd.layers import common, conv, dense, kernels, local
from cnn_spmd.layers import conv as convolutions
from cnn_spmd.layers import norm as norms
from cnn_spmd.layers import pool as pools
from cnn_spmd.models import alexnet, alexnet_2012, cuda_convnet, stack
from cnn_spmd.sharding import placement
from experiments import alexnet_cifar


def make(name, image_size, classes):
    return models.make(
        name,
        image_size=image_size,
        classes=classes,
        width=4096,
        dropout=0.5,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize(
    ("name", "image_size", "classes", "count"),
    [
        ("alexnet", 224, 1000, 61_100_840),  # Krizhevsky 2014, as torchvision counts it
        (
            "alexnet_2012",
            224,
            1000,
            60_965_224,
        ),  # Krizhevsky 2014, section 5: 0.2% fewer than the one-tower net
        ("alexnet", 32, 10, 35_855_178),
        ("simple_cnn", 32, 10, 3 * 3 * 3 * 32 + 32 + 16 * 16 * 32 * 10 + 10),
        ("cuda_convnet_80sec", 32, 10, 145_578),  # as cuda-convnet's layer files make them
        ("cuda_convnet_19pct", 32, 10, 89_578),
        ("cuda_convnet_18pct", 32, 10, 89_578),
        ("cuda_convnet_13pct", 24, 10, 1_116_490),
        ("cuda_convnet_11pct", 24, 10, 2_112_970),
        ("cuda_convnet_11pct_no_lrn", 24, 10, 2_112_970),
        ("alexnet_2012_small", 32, 10, 35_708_810),
        ("alexnet_2012_small_one_tower", 32, 10, 34_656_330),
        ("alexnet_2012_small_no_conv2", 32, 10, 35_045_002),
        ("alexnet_2012_small_no_conv3", 32, 10, 34_602_506),
        ("alexnet_2012_small_no_conv4", 32, 10, 35_044_874),
        ("four_layers_relu", 32, 10, 89_578),
        ("four_layers_tanh", 32, 10, 89_578),
        ("fully_connected", 32, 10, 3072 * 4096 + 4096 + 4096 * 10 + 10),
        ("vgg_11", 32, 10, 28_144_010),
        ("vgg_16", 32, 10, 14_714_688 + 512 * 4096 + 4096 + 4096**2 + 4096 + 4096 * 10 + 10),
    ],
)  # torchvision's convolutions
def test_parameter_count_and_shapes(name, image_size, classes, count):
    model = nnx.eval_shape(lambda: make(name, image_size, classes))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    logits = nnx.eval_shape(
        lambda model, x: model.classify(model.features(x)),
        model,
        jnp.zeros((2, image_size, image_size, 3)),
    )
    assert logits.shape == (2, classes)


def test_every_parameter_names_its_axes():
    for name, image_size in (
        ("alexnet", 32),
        ("alexnet_2012", 64),
        ("simple_cnn", 32),
        ("cuda_convnet_11pct", 24),
    ):
        state = nnx.state(
            nnx.eval_shape(lambda name=name, size=image_size: make(name, size, 10)), nnx.Param
        )
        for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            assert len(leaf.axes) == leaf.ndim


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 31),
        ("alexnet_2012", 32),
        ("simple_cnn", 31),
        ("lenet", 32),
        ("cuda_convnet_80sec", 1),
    ],
)
def test_refuses(name, size):
    with pytest.raises(UserError, match=r"model\.name="):
        make(name, size, 10)


def pool_windows(size, window, strides, ceil):
    """Start and end of each window along one dimension, clipped at the edge; written from the definition."""
    starts = [start for start in range(0, size, strides) if start + window <= size]
    if ceil and starts[-1] + window < size and starts[-1] + strides < size:
        starts.append(starts[-1] + strides)
    return [(start, min(start + window, size)) for start in starts]


@pytest.mark.parametrize("levers", [(), ("pool_index",)])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "strides"),
    [
        (8, 2, 2),
        (9, 3, 3),
        (9, 3, 2),
        (7, 2, 2),
        (8, 3, 2),
        (32, 3, 2),
        (12, 5, 2),
        (8, 2, 3),
        (9, 2, 3),
    ],
)
def test_max_pool_against_numpy(size, window, strides, ceil, levers):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    windows = pool_windows(size, window, strides, ceil)
    expected = np.empty((2, len(windows), len(windows), 3), np.float32)
    for i, (top, bottom) in enumerate(windows):
        for j, (left, right) in enumerate(windows):
            expected[:, i, j] = x[:, top:bottom, left:right].max((1, 2))
    np.testing.assert_array_equal(pools.max_pool(x, window, strides, ceil, levers=levers), expected)
    weight = np.arange(expected.size, dtype=np.float32).reshape(expected.shape) % 7 + 1
    gradient = np.zeros_like(x)
    for (i, (top, bottom)), (j, (left, right)) in itertools.product(enumerate(windows), repeat=2):
        largest = x[:, top:bottom, left:right] == expected[:, i, j][:, None, None]
        gradient[:, top:bottom, left:right] += largest * weight[:, i, j][:, None, None]
    np.testing.assert_array_equal(
        jax.grad(
            lambda x: (pools.max_pool(x, window, strides, ceil, levers=levers) * weight).sum()
        )(x),
        gradient,
    )


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "strides"), [(32, 15, 15), (32, 16, 16), (32, 16, 8), (40, 20, 20)]
)
def test_max_pool_of_wide_windows_against_flax(size, window, strides, biased):
    """Maxima lie everywhere in the windows, also where a byte has no code for them."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (32, size, size, 3), jnp.float64)
        bias_C = jnp.linspace(-4, 0, 3, dtype=jnp.float64)

        def ours(x, bias_C):
            return pools.max_pool(x, window, strides, bias_C=bias_C if biased else None)

        def theirs(x, bias_C):
            largest = nnx.max_pool(x, (window, window), (strides, strides))
            return nnx.relu(largest + bias_C) if biased else largest

        (got, pull), (expected, pull_expected) = (jax.vjp(f, x, bias_C) for f in (ours, theirs))
        gradient = jax.random.normal(jax.random.key(1), expected.shape, jnp.float64)
        for one, other in zip(
            (got, *pull(gradient)), (expected, *pull_expected(gradient)), strict=True
        ):
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
        assert bool((expected == 0).any()) == biased


def test_networks_of_the_claims_lack_what_they_say():
    def of(name: str, kind: type) -> list:
        return [spec for spec in models.STACKS[name] if isinstance(spec, kind)]

    whole, pools, norms_ = "alexnet_2012_small", stack.MaxPool, stack.ResponseNorm
    assert [(pool.window, pool.strides) for pool in of(whole, pools)] == [(3, 2)] * 3
    assert [(pool.window, pool.strides) for pool in of(f"{whole}_plain_pool", pools)] == [
        (2, 2)
    ] * 3
    assert [(norm.size, norm.groups) for norm in of(whole, norms_)] == [(5, 2)] * 2
    assert of(f"{whole}_no_lrn", norms_) == []
    assert [spec.groups for spec in of(f"{whole}_one_tower", stack.Conv | norms_)] == [1] * 7
    for name, activation in (("four_layers_relu", nnx.relu), ("four_layers_tanh", jnp.tanh)):
        assert [spec.activation for spec in of(name, stack.Conv)] == [activation] * 3
    for name in ("no_lrn", "plain_pool"):  # and nothing else
        kept = pools if name == "no_lrn" else norms_
        assert of(f"{whole}_{name}", stack.Conv | kept) == of(whole, stack.Conv | kept)


def test_max_pool_gives_the_gradient_of_equal_maxima_to_the_first_and_keeps_nan():
    x = jnp.ones((1, 5, 5, 1))
    gradient = jax.grad(lambda x: pools.max_pool(x, 3, 2).sum())(x)[0, :, :, 0]
    np.testing.assert_array_equal(
        gradient, np.pad([[1, 0, 1], [0, 0, 0], [1, 0, 1]], ((0, 2), (0, 2)))
    )
    for at in np.ndindex(3, 3):
        assert jnp.isnan(pools.max_pool(x.at[0, *at, 0].set(jnp.nan), 3, 2)[0, 0, 0, 0])


@pytest.mark.parametrize(
    ("name", "size", "lever"),
    [
        *(
            ("alexnet", 224, lever)
            for lever in (
                "space_to_depth",
                "pool_first",
                "pool_index",
                "column_groups",
                "own_gradients",
            )
        ),
        *(
            ("alexnet", 32, lever)
            for lever in ("pool_first", "pool_index", "column_groups", "own_gradients")
        ),
        ("alexnet_2012", 70, "space_to_depth"),
        ("alexnet_2012", 70, "own_gradients"),
        ("cuda_convnet_18pct", 32, "own_gradients"),
    ],
)
def test_levers_change_nothing(name, size, lever, monkeypatch):
    """Logits and every gradient with one lever are those of the plain network, in float64."""
    monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
    monkeypatch.setattr(alexnet_2012, "CHANNELS", (16, 32, 24, 32, 16))
    for plain, fast in zip(
        value_and_gradient(name, size, ()),
        value_and_gradient(name, size, ("space_to_depth", lever)),
        strict=True,
    ):
        assert (
            np.abs(fast - plain).max() < 1e-7 * np.abs(plain).max()
        )  # float32 parameters have float32 gradients


@pytest.mark.parametrize("size", [32, 224])
def test_all_levers_together_change_nothing(size, monkeypatch):
    monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
    for plain, fast in zip(
        *(value_and_gradient("alexnet", size, levers) for levers in ((), common.LEVERS)),
        strict=True,
    ):
        assert np.abs(fast - plain).max() < 1e-7 * np.abs(plain).max()


@functools.cache
def value_and_gradient(name, size, levers):
    with jax.enable_x64(True):
        model = models.make(
            name,
            image_size=size,
            classes=5,
            width=16,
            dropout=0.0,
            dtype=jnp.float64,
            levers=levers,
            rngs=nnx.Rngs(0),
        )
        graph, params = nnx.split(model)
        x = jax.random.normal(jax.random.key(0), (2, size, size, 3), jnp.float64)

        @jax.jit
        def value(params, x):
            return jax.value_and_grad(
                lambda p: (nnx.merge(graph, p).classify(nnx.merge(graph, p).features(x)) ** 2).sum()
            )(params)

        return [np.asarray(leaf) for leaf in jax.tree.leaves(value(params, x))]


@pytest.mark.parametrize(
    "pool",
    [
        None,
        dict(window=3, strides=2),
        dict(window=3, strides=2, ceil=True),
        dict(window=2, strides=3),
    ],
)
@pytest.mark.parametrize(
    ("size", "window", "strides"), [(20, 3, 1), (21, 5, 1), (27, 5, 4), (31, 5, 4)]
)
def test_groups_of_columns_leave_nothing_in_the_map(size, window, strides, pool):
    """Where the last group of columns reaches over the map's edge, no pool sees what is there."""
    layer = conv.conv(
        3, 4, window, strides=strides, dtype=jnp.float32, rngs=nnx.Rngs(0), bias_init=common.ONES
    )
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))

    def value(layer, levers):
        return (conv.conv_relu("conv1", layer, x, placement.UNPLACED, levers, pool) ** 2).sum()

    plain, fast = (
        nnx.value_and_grad(functools.partial(value, levers=levers))(layer)
        for levers in ((), common.LEVERS)
    )
    for one, other in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


def test_a_report_has_the_shapes_of_the_maps():
    """Also where a pool leaves out columns that a fast form has more (55, not 56, of conv1's)."""
    seen = {}

    class Recording(placement.Unplaced):
        record = True

        def __call__(self, x, *axes, name=""):
            seen[name] = x.shape
            return x

    model = nnx.eval_shape(
        lambda: models.make(
            "alexnet",
            image_size=224,
            classes=5,
            width=16,
            dropout=0.0,
            dtype=jnp.float32,
            rngs=nnx.Rngs(0),
        )
    )
    nnx.eval_shape(
        lambda model, x: model.features(x, Recording()), model, jnp.zeros((2, 224, 224, 3))
    )
    assert [seen[f"conv{i} output"][1:3] for i in range(1, 6)] == [
        (55, 55),
        (27, 27),
        (13, 13),
        (13, 13),
        (13, 13),
    ]


def test_a_lever_is_used():
    """Each changes the program, where there is something for it: else the test above would compare like with like."""
    levers, programs = (
        ("space_to_depth", "pool_first", "pool_index", "column_groups", "own_gradients"),
        set(),
    )
    for used in range(len(levers) + 1):
        model = nnx.eval_shape(
            lambda used=used: models.make(
                "alexnet",
                image_size=224,
                classes=5,
                width=16,
                dropout=0.0,
                dtype=jnp.float32,
                levers=levers[:used],
                rngs=nnx.Rngs(0),
            )
        )
        graph, params = nnx.split(model)
        gradient = jax.grad(lambda p, x, graph=graph: nnx.merge(graph, p).features(x).sum())
        programs.add(str(jax.make_jaxpr(gradient)(params, jnp.zeros((1, 224, 224, 3)))))
    assert len(programs) == len(levers) + 1
    assert alexnet_cifar.get_config().model.fast  # a run takes them all
    with pytest.raises(UserError, match=r"levers=magic: unknown"):
        models.make("alexnet", levers=("magic",))


def test_where_columns_are_grouped():
    """Of images, and for the gradient by up to 64 maps of odd width."""

    def program(size, window, channels, levers):
        layer = conv.conv(channels, 4, window, dtype=jnp.float32, rngs=nnx.Rngs(0))
        return str(
            jax.make_jaxpr(
                jax.grad(
                    lambda x: conv.conv_relu("conv1", layer, x, placement.UNPLACED, levers).sum()
                )
            )(jnp.zeros((1, size, size, channels)))
        )

    for size, window, channels, grouped in (
        (32, 3, 3, True),
        (27, 5, 64, True),
        (27, 5, 65, False),
        (28, 5, 64, False),
    ):
        fast = program(size, window, channels, ("space_to_depth", "column_groups"))
        assert (fast != program(size, window, channels, ())) == grouped


def test_pool_first_adds_the_bias_after_the_pool(monkeypatch):
    seen, layer = [], conv.conv(3, 4, 3, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for module in (conv, pools):
        monkeypatch.setattr(module, "bias_relu", lambda x, bias_C: seen.append(x.shape[1:3]) or x)
    for levers in (("own_gradients", "pool_first"), ("own_gradients",)):
        conv.conv_relu(
            "conv1",
            layer,
            jnp.zeros((1, 8, 8, 3)),
            placement.UNPLACED,
            levers,
            dict(window=2, strides=2),
        )
    assert seen == [(4, 4), (8, 8)]


@pytest.mark.parametrize(
    ("size", "window", "padding"), [(27, 5, (2, 2)), (9, 4, (1, 2)), (7, 3, (0, 0))]
)
def test_gradient_in_pairs(size, window, padding):
    """Of columns, by autodiff and by two at a time; in float64."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, size, size, 6), jnp.float64)
        kernel = jax.random.normal(jax.random.key(1), (window, window, 6, 10), jnp.float64)
        expected, plain = jax.vjp(lambda *at: convolutions.convolve(*at, [padding] * 2), x, kernel)
        got, paired = jax.vjp(lambda *at: convolutions.paired_gradient(*at, padding), x, kernel)
        gradient = jax.random.normal(jax.random.key(2), got.shape, jnp.float64)
        for one, other in zip((got, *paired(gradient)), (expected, *plain(gradient)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)


@pytest.fixture
def interpreted(monkeypatch):
    """GPU kernels, run by Pallas's interpreter."""
    call = kernels.pl.pallas_call
    monkeypatch.setattr(
        kernels.pl,
        "pallas_call",
        lambda *args, compiler_params, **settings: call(*args, interpret=True, **settings),
    )


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bias", [(), (jnp.linspace(-3, 1, 16),)])
@pytest.mark.parametrize(("size", "window", "strides", "ceil"), [(9, 3, 2, False), (7, 4, 2, True)])
def test_pool_kernels_against_the_plain_form(size, window, strides, ceil, bias):
    pool = pools.Pool(window, strides, ceil, (size, size), lambda f, *arrays: f(*arrays))
    x = jax.random.normal(jax.random.key(0), (2, size, size, 16))
    expected, index = pools._plain_max_and_index(pool, x, *bias)
    got = kernels.max_and_index(
        x, *bias, window=window, strides=strides, counts=expected.shape[1:3]
    )
    np.testing.assert_array_equal(got[0], expected)
    np.testing.assert_array_equal(got[1], index)
    gradient = jax.random.normal(jax.random.key(1), expected.shape)
    settings = dict(window=window, strides=strides, sizes=(size, size))
    np.testing.assert_allclose(
        kernels.unpool(index, gradient, **settings),
        pools._plain_unpool(index, gradient, **settings),
        atol=1e-6,
    )
    assert bool((index == kernels.NONE).any()) == bool(bias)


@pytest.mark.usefixtures("interpreted")
def test_pool_kernels_on_equal_maxima_nan_and_several_blocks_of_channels():
    pool, settings = (
        pools.Pool(3, 2, False, (9, 9), lambda f, *arrays: f(*arrays)),
        dict(window=3, strides=2),
    )
    x = (
        jax.random.randint(jax.random.key(0), (2, 9, 9, 96), 0, 4)
        .astype(jnp.float32)
        .at[0, 4, 4, ::5]
        .set(jnp.nan)
    )
    expected, index = pools._plain_max_and_index(pool, x)
    got = kernels.max_and_index(x, **settings, counts=(4, 4))
    np.testing.assert_array_equal(got[0], expected)
    np.testing.assert_array_equal(got[1], index)
    gradient = jax.random.normal(jax.random.key(1), expected.shape)
    np.testing.assert_allclose(
        kernels.unpool(index, gradient, **settings, sizes=(9, 9)),
        pools._plain_unpool(index, gradient, **settings, sizes=(9, 9)),
        atol=1e-6,
    )


@pytest.mark.usefixtures("interpreted")
def test_unpool_sums_in_float32():
    index, gradient = (
        jnp.array([8, 6, 2, 0], jnp.uint8),
        jnp.array([1, 1, 1, 256], jnp.bfloat16),
    )  # all chose pixel 2, 2
    got = kernels.unpool(
        index.reshape(1, 2, 2, 1), gradient.reshape(1, 2, 2, 1), window=3, strides=2, sizes=(5, 5)
    )
    assert got[0, 2, 2, 0] == jnp.bfloat16(259)  # in bfloat16 one by one: 256


@pytest.mark.parametrize(
    ("size", "window", "strides"), [(8, 3, 2), (9, 3, 2), (32, 3, 2), (5, 2, 2), (9, 2, 3)]
)
def test_average_pool_divides_by_the_area_inside(size, window, strides):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    windows = pool_windows(size, window, strides, ceil=True)
    weight = rng.normal(size=(2, len(windows), len(windows), 3)).astype(np.float32)
    expected, gradient = np.empty_like(weight), np.zeros_like(x)
    for i, (top, bottom) in enumerate(windows):
        for j, (left, right) in enumerate(windows):
            expected[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
            gradient[:, top:bottom, left:right] += weight[:, i, j][:, None, None] / (
                (bottom - top) * (right - left)
            )
    np.testing.assert_allclose(
        pools.average_pool(x, window, strides), expected, rtol=1e-5, atol=1e-6
    )
    got = jax.grad(lambda x: (pools.average_pool(x, window, strides) * weight).sum())(x)
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("within_map", [False, True])
@pytest.mark.parametrize(
    ("size", "alpha", "beta", "k"), [(5, 2e-5, 0.75, 2.0), (4, 0.3, 0.75, 1.0), (3, 0.5, 0.5, 1.5)]
)
def test_response_norm_against_numpy(size, alpha, beta, k, within_map):
    """Forward from the formula of AlexNet 2012, section 3.3, in loops; backward from its derivative, by hand."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 2, 6, 5, 7))

    def window(at, end):
        return range(max(0, at - (size - 1) // 2), min(end, at + size // 2 + 1))

    def neighbours(i, j, c):
        if within_map:
            return [(a, b, c) for a in window(i, 6) for b in window(j, 5)]
        return [(i, j, d) for d in window(c, 7)]

    expected, gradient = np.empty_like(x), np.zeros_like(x)
    for n, i, j, c in np.ndindex(x.shape):
        base = k + alpha * sum(x[n][at] ** 2 for at in neighbours(i, j, c))
        expected[n, i, j, c] = x[n, i, j, c] / base**beta
        gradient[n, i, j, c] += weight[n, i, j, c] / base**beta
        for at in neighbours(i, j, c):
            gradient[n][at] -= (
                weight[n, i, j, c]
                * x[n, i, j, c]
                * beta
                * base ** (-beta - 1)
                * 2
                * alpha
                * x[n][at]
            )

    def norm(x):
        return norms.response_norm(x, size=size, alpha=alpha, beta=beta, k=k, within_map=within_map)

    x = x.astype(np.float32)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        jax.grad(lambda x: (norm(x) * weight).sum())(x), gradient, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("within_map", [False, True])
def test_response_norm_of_bfloat16_is_computed_in_float32(within_map):
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8), jnp.bfloat16)
    norm = functools.partial(
        norms.response_norm, size=5, alpha=1.0, beta=0.75, k=1.0, within_map=within_map
    )
    got, gradient = jax.vjp(norm, x)
    assert {got.dtype, gradient(x)[0].dtype} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(got, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_towers_do_not_see_each_other():
    """AlexNet 2012 up to conv2, conv4 and conv5: a tower's channels depend on its own half of the input alone."""
    model = make("alexnet_2012", 64, 10)
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 96)).astype(np.float32)
    other = np.concatenate([x[..., :48], -x[..., 48:]], -1)
    for f in (
        lambda x: conv.conv_relu("conv2", model.conv2, x, placement.UNPLACED),
        lambda x: norms.response_norm_of_towers(
            x, 2, placement.UNPLACED, "norm1", size=5, alpha=1.0, beta=0.75, k=2.0
        ),
    ):
        a, b = np.asarray(f(x)), np.asarray(f(other))
        half = a.shape[-1] // 2
        np.testing.assert_array_equal(a[..., :half], b[..., :half])
        assert not np.array_equal(a[..., half:], b[..., half:])


def test_grouped_convolution_against_xla():
    model = make("alexnet_2012", 64, 10)
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 96)).astype(np.float32)
    got = conv.conv_relu("conv2", model.conv2, x, placement.UNPLACED)
    np.testing.assert_allclose(got, nnx.relu(model.conv2(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "zeros"), [(3, (1, 1)), (4, (1, 2))])
def test_local_against_a_plain_loop(window, zeros):
    layer = local.Local(5, 3, 4, window, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert not layer.bias[...].any()
    layer.bias[...] = jax.random.normal(jax.random.key(0), (5, 5, 4))
    kernel, bias = (np.asarray(x[...]) for x in (layer.kernel, layer.bias))
    assert (kernel.shape, bias.shape) == ((5, 5, window**2, 3, 4), (5, 5, 4))
    assert kernel.std() == pytest.approx(
        (2 / (window**2 * 3)) ** 0.5, rel=0.1
    )  # He et al.: of the inputs of one output
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    padded, expected = np.pad(x, ((0, 0), zeros, zeros, (0, 0))), np.empty((2, 5, 5, 4), np.float32)
    for n, i, j, d in np.ndindex(expected.shape):
        inputs = padded[n, i : i + window, j : j + window]
        expected[n, i, j, d] = (
            inputs * kernel[i, j, ..., d].reshape(window, window, 3)
        ).sum() + bias[i, j, d]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_stack_is_the_network_written_out(monkeypatch):
    """AlexNet's list of layers gives AlexNet's numbers to the last bit, dropout too."""
    monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
    pool = stack.MaxPool(2, 2)
    net = (
        stack.Conv(8, 3),
        pool,
        stack.Conv(16, 3),
        pool,
        stack.Conv(24, 3),
        stack.Conv(16, 3),
        stack.Conv(16, 3),
        pool,
        stack.Hidden(),
        stack.Hidden(),
        stack.Output(),
    )
    settings = dict(image_size=32, classes=5, width=64, dropout=0.5, dtype=jnp.float32)
    written, listed = (
        models.make("alexnet", **settings, rngs=nnx.Rngs(0)),
        stack.Stack("s", net, **settings, rngs=nnx.Rngs(0)),
    )
    x, key = jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), jax.random.key(1)
    got, expected = (
        model.classify(model.features(x), dropout_key=key) for model in (listed, written)
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("name", "size"), [("18pct", 32), ("11pct", 24)])
def test_order_of_cuda_convnets_layers(name, size):
    """The nets with norms, step by step; with the first weights larger, so that the norms matter."""
    model = make(f"cuda_convnet_{name}", size, 10)
    model.conv1.kernel[...] *= 1000
    x = h = 50 * jax.random.normal(jax.random.key(0), (2, size, size, 3))

    def maximum(h):
        return pools.max_pool(h, 3, 2, ceil=True)

    def norm(h):
        settings = (
            dict(size=3, alpha=5e-5 / 9, within_map=True)
            if name == "18pct"
            else dict(size=9, alpha=0.001 / 9)
        )
        return norms.response_norm(h, beta=0.75, k=1.0, **settings)

    def average(h):
        return pools.average_pool(h, 3, 2)

    if name == "18pct":
        h = norm(nnx.relu(maximum(model.conv1(h))))
        h = norm(average(nnx.relu(model.conv2(h))))
        h = average(nnx.relu(model.conv3(h)))
    else:
        h = norm(maximum(nnx.relu(model.conv1(h))))
        h = maximum(norm(nnx.relu(model.conv2(h))))
        h = nnx.relu(model.local4(nnx.relu(model.local3(h))))
    np.testing.assert_allclose(
        model.classify(model.features(x)), model.fc3(h.reshape(2, -1)), rtol=1e-4, atol=1e-5
    )


def test_activations_dropout_and_first_weights_of_a_stack():
    net = (
        stack.Conv(4, 3, std=0.5, activation=jnp.tanh),
        stack.Hidden(8, dropout=0.25),
        stack.Hidden(),
        stack.Output(0.5),
    )
    model = stack.Stack(
        "s",
        net,
        image_size=16,
        classes=3,
        width=32,
        dropout=0.5,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    features = jnp.tanh(model.conv1(x)).reshape(2, -1)
    np.testing.assert_allclose(model.features(x), features, rtol=1e-5, atol=1e-6)
    hidden = nnx.relu(model.fc2(nnx.relu(model.fc1(features))))
    np.testing.assert_allclose(model.classify(features), model.fc3(hidden), rtol=1e-5, atol=1e-5)
    assert (model.fc1.kernel.shape[1], model.fc2.kernel.shape[1]) == (8, 32)
    assert [spec.dropout for _, spec in model.hidden] == [0.25, 0.5]
    assert float(model.conv1.kernel[...].std()) == pytest.approx(0.5, rel=0.2)
    assert [cuda_convnet.NETS["cuda_convnet_80sec"][i].std for i in (0, -1)] == [1e-4, 0.1]


def test_dropout():
    x = jnp.ones((100, 1000))
    dropped = np.asarray(dense.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.01
    assert dense.dropout(x, 0.25, None) is x
