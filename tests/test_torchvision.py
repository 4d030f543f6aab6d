"""Our AlexNet and torchvision's read each other's weights, and compute the same."""

import jax
import numpy as np
import pytest
from conftest import ROOT

from cnn_spmd import experiment, export
from cnn_spmd.errors import UserError
from cnn_spmd.models import alexnet
from cnn_spmd.training import build, initial, loop, restore, weights

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of pixels from 0 to 1


def alexnet_of(**changes):
    """Return the Setup of AlexNet for two images of 224x224, normalised as torchvision's."""
    fields = {
        "model.width": 16,
        "data.name": "synthetic",
        "data.synthetic.image_size": 224,
        "data.synthetic.train_examples": 2,
        "data.synthetic.test_examples": 2,
        "data.normalise": "torchvision",
        "data.crop_pad": 0,
        "batch_size": 2,
        "mesh.data": 1,
        "mesh.model": 1,
        "eval.views": "one",
    }
    return build.prepare(
        experiment.load_config(ROOT / "experiments" / "alexnet_cifar.py", fields | changes)
    )


def torchvision_scores(arrays, images_NHWC):
    """Compute torchvision's AlexNet in its own layouts, from its published layers."""
    x = images_NHWC.transpose(0, 3, 1, 2) / 255
    mean, std = np.array([MEAN, STD])[..., None, None]
    x = (x - mean) / std
    layers = [
        (0, 4, 2, True),
        (3, 1, 2, True),
        (6, 1, 1, False),
        (8, 1, 1, False),
        (10, 1, 1, True),
    ]
    for number, strides, padding, pool in layers:
        kernel, bias = (arrays[f"features.{number}.{kind}"] for kind in ("weight", "bias"))
        windows = (strides, strides), [(padding, padding)] * 2
        x = jax.lax.conv_general_dilated(x.astype(np.float32), kernel, *windows)
        x = jax.nn.relu(x + bias[:, None, None])
        if pool:
            x = jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 1, 3, 3), (1, 1, 2, 2), "VALID")
    x = x.reshape(len(x), -1)
    for number in (1, 4, 6):
        x = x @ arrays[f"classifier.{number}.weight"].T + arrays[f"classifier.{number}.bias"]
        x = jax.nn.relu(x) if number < 6 else x
    return jax.nn.log_softmax(x)


def test_torchvisions_names_and_layouts_give_the_same_scores(tmp_path, monkeypatch):
    """A narrow AlexNet goes out to a file of torchvision's, and in again as a start."""
    monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
    setup = alexnet_of()
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(0, 0.1, x.shape).astype(np.float32)
        for name, x in initial.arrays_of(setup.functions.abstract_state).items()
    }
    theirs = weights.to_torchvision(arrays)
    weights.write(tmp_path / "t.safetensors", theirs, {})
    restored = alexnet_of(init_from=str(tmp_path / "t.safetensors"))
    state = restored.init()
    for name, array in initial.arrays_of(state).items():
        np.testing.assert_array_equal(array, arrays[name])
    images = restored.data.test_images
    expected = torchvision_scores(theirs, images)
    np.testing.assert_allclose(
        jax.jit(setup.functions.scores)(state, images), expected, rtol=1e-4, atol=1e-4
    )
    assert np.ptp(expected) > 1
    with pytest.raises(UserError, match=r"model\.width=16, expected 4096"):
        export.refuse_unlike_torchvision(setup)


@pytest.mark.torch
def test_torchvision_loads_an_exported_alexnet(tmp_path):
    """A whole AlexNet, by torch on the CPU, and its own weights by a run of ours."""
    import safetensors.torch
    import torch
    import torchvision

    torch.manual_seed(0)
    reference = torchvision.models.alexnet(num_classes=10).eval()
    file = tmp_path / "start.safetensors"
    safetensors.torch.save_file(reference.state_dict(), file)
    setup = alexnet_of(**{"model.width": 4096, "init_from": str(file), "steps": 1})
    images = setup.data.test_images
    mean, std = (
        np.float32(255) * np.float32(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    inputs = torch.from_numpy(((images - mean) / std).transpose(0, 3, 1, 2).astype(np.float32))

    def compare(functions, state, network):
        with torch.no_grad():
            expected = network(inputs).log_softmax(-1).numpy()
        got = np.asarray(jax.jit(functions.scores)(state, images))
        np.testing.assert_allclose(got, expected, atol=1e-5)

    compare(setup.functions, setup.init(), reference)
    loop.train(setup.config, tmp_path / "run")
    (path, _) = export.export(tmp_path / "run", "torchvision")
    network = torchvision.models.alexnet(num_classes=10).eval()
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)
    restored = restore.on_one_device(tmp_path / "run")
    compare(restored.setup.functions, restored.state, network)
    assert not torch.equal(network.classifier[6].bias, reference.classifier[6].bias)
