"""The networks. Each is an nnx.Module in two parts: features(x_NHWC, place) -> x_BF, the convolutions, and
classify(x_BF, place, dropout_key) -> logits_BC, the dense layers; `towers` is how many groups its convolutions have.
"""

import functools

from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers.common import LEVERS
from cnn_spmd.models import alexnet_2012_small, cuda_convnet, vgg
from cnn_spmd.models.alexnet import AlexNet
from cnn_spmd.models.alexnet_2012 import AlexNet2012
from cnn_spmd.models.simple_cnn import SimpleCNN
from cnn_spmd.models.stack import Stack, uses

STACKS = cuda_convnet.NETS | alexnet_2012_small.NETS | vgg.NETS
MODELS = {
    "alexnet": AlexNet,
    "alexnet_2012": AlexNet2012,
    "simple_cnn": SimpleCNN,
    **{name: functools.partial(Stack, name, net) for name, net in STACKS.items()},
}

# The config's fields that only some networks use, by network. One that is not here uses all of
# them.
USES = {
    "alexnet": ("model.width", "model.dropout"),
    "alexnet_2012": ("model.width", "model.dropout"),
    "simple_cnn": (),
    **{name: uses(net) for name, net in STACKS.items()},
}


def make(name: str, **settings) -> nnx.Module:
    """A model by its name; `settings`: image_size, classes, width (of the hidden dense layers), dropout, dtype, levers, rngs.

    Raises UserError for an unknown name or lever, or an image size that the model has no sizes for.
    """
    if name not in MODELS:
        raise UserError(f"model.name={name}: unknown, expected one of {', '.join(MODELS)}")
    if unknown := [lever for lever in settings.get("levers", ()) if lever not in LEVERS]:
        raise UserError(f"levers={unknown[0]}: unknown, expected some of {', '.join(LEVERS)}")
    return MODELS[name](**settings)
