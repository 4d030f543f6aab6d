"""The networks have the layers, the sizes and the parameters that they should."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd import models
from cnn_spmd.errors import UserError
from cnn_spmd.layers import common, conv, dense, norm, pool
from cnn_spmd.models import alexnet, cuda_convnet, resnet, stack
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import UNPLACED, Placement, Unplaced


def make(name, image_size, classes, **changes):
    settings = dict(width=4096, dropout=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0))
    return models.make(name, image_size=image_size, classes=classes, **{**settings, **changes})


def make_stack(net, **settings):
    return stack.Stack("s", net, dtype=jnp.float32, rngs=nnx.Rngs(0), **settings)


@pytest.mark.parametrize(
    ("name", "image_size", "classes", "count"),
    [
        # Krizhevsky 2014, as torchvision counts it.
        ("alexnet", 224, 1000, 61_100_840),
        # Krizhevsky 2014, section 5: 0.2% fewer than the one-tower network.
        ("alexnet_2012", 224, 1000, 60_965_224),
        ("alexnet", 32, 10, 35_855_178),
        ("simple_cnn", 32, 10, 3 * 3 * 3 * 32 + 32 + 16 * 16 * 32 * 10 + 10),
        # As cuda-convnet's layer files make them.
        ("cuda_convnet_80sec", 32, 10, 145_578),
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
        # He et al. 2015, table 6: 0.27, 0.46, 0.66, 0.85, 1.7 million.
        ("resnet_20", 32, 10, 269_722),
        ("resnet_32", 32, 10, 464_154),
        ("resnet_44", 32, 10, 658_586),
        ("resnet_56", 32, 10, 853_018),
        ("resnet_110", 32, 10, 1_727_962),
        # Shortcuts have no weights.
        ("plain_20", 32, 10, 269_722),
        # As without batch norm, which has no parameters here.
        ("alexnet_bn", 32, 10, 35_708_810),
        ("alexnet_bn", 224, 1000, 60_965_224),
        ("alexnet_bn", 227, 1000, 60_965_224),
        ("fully_connected", 32, 10, 3072 * 4096 + 4096 + 4096 * 10 + 10),
        # torchvision's convolutions, and dense layers of 4096.
        ("vgg_11", 32, 10, 28_144_010),
        ("vgg_16", 32, 10, 14_714_688 + 512 * 4096 + 4096 + 4096**2 + 4096 + 4096 * 10 + 10),
    ],
)
def test_parameter_count_and_shapes(name, image_size, classes, count):
    model = nnx.eval_shape(lambda: make(name, image_size, classes))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    logits = nnx.eval_shape(
        lambda model, x: model.classify(model.features(x)),
        model,
        jnp.zeros((2, image_size, image_size, 3)),
    )
    assert logits.shape == (2, classes)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("alexnet", 32),
        ("alexnet_2012", 64),
        ("simple_cnn", 32),
        ("cuda_convnet_11pct", 24),
        ("resnet_20", 32),
        ("alexnet_bn", 32),
    ],
)
def test_every_parameter_names_its_axes(name, image_size):
    state = nnx.state(nnx.eval_shape(lambda: make(name, image_size, 10)), nnx.Param)
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    assert [len(leaf.axes) for leaf in leaves] == [leaf.ndim for leaf in leaves]


def test_dense_parameters_are_those_of_the_layers_called_fc():
    state = nnx.state(nnx.eval_shape(lambda: make("cuda_convnet_80sec", 32, 10)), nnx.Param)
    for name, layer in state.items():
        for parameter in layer.values():
            marked = getattr(parameter, "part", None) == "dense"
            assert marked == name.startswith("fc"), name


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("alexnet", 31),
        ("alexnet_2012", 32),
        ("simple_cnn", 31),
        ("resnet_20", 30),
        ("lenet", 32),
        ("cuda_convnet_80sec", 1),
    ],
)
def test_refuses(name, size):
    with pytest.raises(UserError, match=r"model\.name="):
        make(name, size, 10)


def programs(name, size, **settings):
    model = nnx.eval_shape(lambda: make(name, size, 10, **settings))
    graph, params = nnx.split(model)

    def logits(params, x, key):
        model = nnx.merge(graph, params, copy=True)
        place = Placement(mesh.make(8, 1), "data")
        return model.classify(model.features(x, place, train=True), dropout_key=key)

    return str(jax.make_jaxpr(logits)(params, jnp.zeros((8, size, size, 3)), jax.random.key(0)))


# Of networks that differ in depth alone, one.
DEEP = re.compile(r"(resnet|plain)_(32|44|56|110)")


@pytest.mark.parametrize("name", [name for name in models.NETWORKS if not DEEP.match(name)])
def test_the_settings_that_networks_use_change_them(name):
    """Each that is used, by itself; the others do not, together."""
    size = 64 if name == "alexnet_2012" else 32
    plain = dict(width=64)
    program = programs(name, size, **plain)
    others = dict(width=32, dropout=0.25, batch_norm="per_device")
    for field in models.USES[name]:
        setting = field.removeprefix("model.")
        assert programs(name, size, **plain | {setting: others.pop(setting)}) != program
    assert programs(name, size, **plain | others) == program


def test_networks_of_the_claims_lack_what_they_say():
    def of(name: str, kind: type) -> list:
        return [spec for spec in models.STACKS[name] if isinstance(spec, kind)]

    whole, pools, norms = "alexnet_2012_small", stack.MaxPool, stack.ResponseNorm
    plain = f"{whole}_plain_pool"
    assert [(pool.window, pool.strides) for pool in of(whole, pools)] == [(3, 2)] * 3
    assert [(pool.window, pool.strides) for pool in of(plain, pools)] == [(2, 2)] * 3
    assert [(norm.size, norm.groups) for norm in of(whole, norms)] == [(5, 2)] * 2
    assert of(f"{whole}_no_lrn", norms) == []
    assert [spec.groups for spec in of(f"{whole}_one_tower", stack.Conv | norms)] == [1] * 7
    for name, activation in (("four_layers_relu", nnx.relu), ("four_layers_tanh", jnp.tanh)):
        assert [spec.activation for spec in of(name, stack.Conv)] == [activation] * 3
    for name in ("no_lrn", "plain_pool"):  # and nothing else
        kept = pools if name == "no_lrn" else norms
        assert of(f"{whole}_{name}", stack.Conv | kept) == of(whole, stack.Conv | kept)


def test_a_report_has_the_shapes_of_the_maps():
    """Also where a fast form has one column more, which the pool ignores (conv1)."""
    seen = {}

    class Recording(Unplaced):
        record = True

        def __call__(self, x, *axes, name=""):
            seen[name] = x.shape
            return x

    model = nnx.eval_shape(lambda: make("alexnet", 224, 5, width=16))
    x = jnp.zeros((2, 224, 224, 3))
    nnx.eval_shape(lambda model, x: model.features(x, Recording()), model, x)
    sides = [seen[f"conv{i} output"][1:3] for i in range(1, 6)]
    assert sides == [(55, 55), (27, 27), (13, 13), (13, 13), (13, 13)]


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
    written = make("alexnet", 32, 5, width=64)
    listed = make_stack(net, image_size=32, classes=5, width=64, dropout=0.5)
    x, key = jax.random.normal(jax.random.key(0), (2, 32, 32, 3)), jax.random.key(1)
    got, expected = (
        model.classify(model.features(x), dropout_key=key) for model in (listed, written)
    )
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("strides", [2, 3])
def test_a_stack_counts_the_windows_that_its_pools_have(strides):
    """Also with gaps between windows, where the last one may start beyond the edge."""
    net = (stack.MaxPool(2, strides, ceil=True), stack.AveragePool(2, strides), stack.Output())
    for size in range(4, 12):
        model = make_stack(net, image_size=size, classes=3, width=8, dropout=0.0)
        logits = model.classify(model.features(jnp.ones((1, size, size, 3))))
        assert logits.shape == (1, 3)


@pytest.mark.parametrize(("name", "size"), [("18pct", 32), ("11pct", 24)])
def test_order_of_cuda_convnets_layers(name, size):
    """Compare step by step. Larger first weights make the norms matter."""
    model = make(f"cuda_convnet_{name}", size, 10)
    model.conv1.kernel[...] *= 1000
    x = h = 50 * jax.random.normal(jax.random.key(0), (2, size, size, 3))

    def maximum(h):
        return pool.max_pool(h, 3, 2, ceil=True)

    def normalised(h):
        within, across = dict(size=3, alpha=5e-5 / 9, within_map=True), dict(size=9, alpha=1e-3 / 9)
        return norm.response_norm(h, beta=0.75, k=1.0, **(within if name == "18pct" else across))

    def average(h):
        return pool.average_pool(h, 3, 2)

    if name == "18pct":
        h = normalised(nnx.relu(maximum(model.conv1(h))))
        h = normalised(average(nnx.relu(model.conv2(h))))
        h = average(nnx.relu(model.conv3(h)))
    else:
        h = normalised(maximum(nnx.relu(model.conv1(h))))
        h = maximum(normalised(nnx.relu(model.conv2(h))))
        h = nnx.relu(model.local4(nnx.relu(model.local3(h))))
    got, expected = model.classify(model.features(x)), model.fc3(h.reshape(2, -1))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def randomise_averages(model):
    """Give each batch norm running averages that matter."""
    random = np.random.default_rng(0)
    for _, variable in nnx.to_flat_state(nnx.state(model, nnx.BatchStat)):
        variable[...] = jnp.asarray(random.uniform(0.1, 0.5, variable.shape), jnp.float32)
    return model


@pytest.mark.parametrize("shortcuts", [True, False])
def test_blocks_of_a_residual_network(shortcuts):
    """Compare step by step with He et al. 2015, figure 2 and option A of section 3.3."""
    model = resnet.ResNet(
        "r",
        8,
        shortcuts=shortcuts,
        image_size=8,
        classes=5,
        width=0,
        dropout=0.0,
        dtype=jnp.float32,
        rngs=nnx.Rngs(0),
    )
    randomise_averages(model)
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))

    def normalised(number, x):
        return getattr(model, f"norm{number}")("norm", getattr(model, f"conv{number}")(x))

    x = nnx.relu(normalised(1, images))
    for first, side, channels in ((2, 8, 16), (4, 4, 32), (6, 2, 64)):
        y = normalised(first + 1, nnx.relu(normalised(first, x)))
        assert y.shape == (2, side, side, channels)
        if shortcuts:
            halved = x if first == 2 else x[:, ::2, ::2]
            y = y.at[..., : halved.shape[-1]].add(halved)
        x = nnx.relu(y)
    got, expected = model.features(images), x.sum((1, 2)) / 4
    assert expected.std() > 0.1
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.classify(got), model.fc3(expected), rtol=1e-4, atol=1e-4)


def test_order_and_first_weights_of_alexnet_with_batch_norm():
    """The inputs of conv2 to conv5 are normalised; biases are those of the author's files."""
    model = randomise_averages(make("alexnet_bn", 32, 5, width=16))
    x = h = jax.random.normal(jax.random.key(0), (1, 32, 32, 3))

    def pooled(h):
        return pool.max_pool(h, 3, 2, ceil=True)

    h = model.norm1("norm1", pooled(nnx.relu(model.conv1(h))))
    h = model.norm2("norm2", pooled(nnx.relu(model.conv2(h))))
    h = model.norm3("norm3", nnx.relu(model.conv3(h)))
    h = model.norm4("norm4", nnx.relu(model.conv4(h)))
    h = pooled(nnx.relu(model.conv5(h))).reshape(1, -1)
    np.testing.assert_allclose(model.features(x), h, rtol=1e-4, atol=1e-5)
    assert h.std() > 0.01
    assert not hasattr(model, "norm5")
    names = ("conv1", "conv5", "fc1", "fc2", "fc3")
    starts = [float(getattr(model, name).bias[...].max()) for name in names]
    assert starts == pytest.approx([0.01, 0.01, 0.1, 0.1, 0.01])
    stds = [float(getattr(model, name).kernel[...].std()) for name in ("conv2", "fc1", "fc3")]
    assert stds == pytest.approx([0.01, 0.005, 0.01], rel=0.2)


def test_activations_dropout_and_first_weights_of_a_stack():
    net = (
        stack.Conv(4, 3, std=0.5, activation=jnp.tanh),
        stack.Hidden(8, dropout=0.25),
        stack.Hidden(),
        stack.Output(0.5),
    )
    model = make_stack(net, image_size=16, classes=3, width=32, dropout=0.5)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    features = jnp.tanh(model.conv1(x)).reshape(2, -1)
    np.testing.assert_allclose(model.features(x), features, rtol=1e-5, atol=1e-6)
    hidden = nnx.relu(model.fc2(nnx.relu(model.fc1(features))))
    np.testing.assert_allclose(model.classify(features), model.fc3(hidden), rtol=1e-5, atol=1e-5)
    assert (model.fc1.kernel.shape[1], model.fc2.kernel.shape[1]) == (8, 32)
    assert model.hidden == (("fc1", 0.25), ("fc2", 0.5))
    assert float(model.conv1.kernel[...].std()) == pytest.approx(0.5, rel=0.2)
    assert [cuda_convnet.NETS["cuda_convnet_80sec"][i].std for i in (0, -1)] == [1e-4, 0.1]


class Residual(nnx.Module):
    """A network of one's own: a residual with batch norm, a layer norm, no biases."""

    def __init__(
        self, *, image_size, classes, width, dropout, dtype, rngs, fast_forms=common.FAST_FORMS
    ):
        del dropout
        self.fast_forms = fast_forms
        build = dict(use_bias=False, dtype=dtype, rngs=rngs)
        self.conv1 = conv.conv(3, 8, 3, **build)
        self.bn1 = nnx.BatchNorm(8, dtype=dtype, rngs=rngs)
        self.conv2 = conv.conv(8, 8, 3, **build)
        self.ln = nnx.LayerNorm(8 * image_size**2, dtype=dtype, rngs=rngs)
        self.fc1 = dense.dense("fc1", 8 * image_size**2, width, **build)
        self.fc3 = dense.dense("fc3", width, classes, **build)

    def features(self, images_NHWC, place=UNPLACED, train=False):
        x = conv.conv_relu("conv1", self.conv1, images_NHWC, place, self.fast_forms)
        branch = nnx.relu(self.bn1(x, use_running_average=not train))
        x = x + conv.apply("conv2", self.conv2, branch, place, self.fast_forms)
        return self.ln(dense.flatten(x, place))

    def classify(self, x_BF, place=UNPLACED, dropout_key=None):
        x_BF = dense.hidden(self.fc1, x_BF, place, 0.0, dropout_key, last=True)
        return dense.logits(self.fc3, x_BF, place)


@pytest.mark.parametrize("fast_forms", [(), common.FAST_FORMS])
@pytest.mark.parametrize("parallelism", ["data", "model", "hybrid"])
def test_a_network_of_ones_own_is_the_same_on_a_mesh(parallelism, fast_forms, monkeypatch):
    """Residuals, norms, layers without bias, parameters without axes."""
    monkeypatch.setitem(models.NETWORKS, "residual", Residual)
    graph, params, rest = nnx.split(
        make("residual", 8, 4, width=16, fast_forms=fast_forms), nnx.Param, ...
    )
    x = jax.random.normal(jax.random.key(0), (8, 8, 8, 3))

    def train(place):
        def loss(params):
            model = nnx.merge(
                graph, params, rest, copy=True
            )  # of this trace, as the norm updates it
            logits = model.classify(model.features(x, place, train=True), place)
            return (logits**2).sum(), nnx.state(model, nnx.BatchStat)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    expected = jax.tree.leaves(train(UNPLACED))
    got = jax.tree.leaves(train(Placement(mesh.make(2, 2), parallelism)))
    assert len(got) == 1 + 2 + 8  # loss, batch statistics, gradients
    for one, other in zip(got, expected, strict=True):
        assert np.abs(one - other).max() < 1e-4 * np.abs(other).max()
