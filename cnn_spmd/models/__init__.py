"""The networks. Each is an nnx.Module called as model(x_NHWC, place=..., dropout_key=...) -> logits_BC."""

from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.models.alexnet import AlexNet
from cnn_spmd.models.simple_cnn import SimpleCNN

MODELS = {"alexnet": AlexNet, "simple_cnn": SimpleCNN}


def make(name: str, **settings) -> nnx.Module:
    """A model by its name; `settings`: image_size, classes, dropout, dtype, rngs.

    Raises UserError for an unknown name, or an image size that the model has no sizes for.
    """
    if name not in MODELS:
        raise UserError(f"model.name={name}: unknown, expected one of {', '.join(MODELS)}")
    return MODELS[name](**settings)
