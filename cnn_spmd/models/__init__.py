"""Name the networks, and build one by its name.

A network is an nnx.Module with two methods, any graph of layers:

  features(images_NHWC, place, train) -> x_BF          the convolutions
  classify(x_BF, place, dropout_key) -> logits_BC      the dense layers

A parameter with metadata `axes` (a logical axis per dimension) lives where the placement table
says; one without is on every device. An optional attribute `towers` is the number of groups of its
grouped convolutions (1 if absent).
"""

import functools
from collections.abc import Callable

from flax import nnx

from cnn_spmd.entries import Entries
from cnn_spmd.errors import UnknownName, UserError
from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.models import alexnet_2012_small, alexnet_bn, cuda_convnet, resnet, stack, vgg
from cnn_spmd.models.alexnet import SIZES, AlexNet
from cnn_spmd.models.alexnet_2012 import AlexNet2012
from cnn_spmd.models.simple_cnn import SimpleCNN

# Networks that are lists of layers.
STACKS = cuda_convnet.NETS | alexnet_2012_small.NETS | vgg.NETS

# Name -> factory(*, image_size, classes, width, dropout, dtype, rngs, fast_forms) -> nnx.Module. An
# experiment may add networks of its own. Where USES names model.batch_norm, the factory takes it
# too, as batch_norm.
NETWORKS: Entries[str, Callable[..., nnx.Module]] = Entries(
    "NETWORKS",
    {
        "alexnet": AlexNet,
        "alexnet_2012": AlexNet2012,
        "simple_cnn": SimpleCNN,
        "alexnet_bn": alexnet_bn.alexnet_bn,
        **resnet.NETS,
        **{name: functools.partial(stack.Stack, name, net) for name, net in STACKS.items()},
    },
)

# Name -> the fields of the config that a network uses, of those that not all networks use. A
# network that is not here may use all of them.
USES: dict[str, tuple[str, ...]] = {
    "alexnet": ("model.width", "model.dropout"),
    "alexnet_2012": ("model.width", "model.dropout"),
    "simple_cnn": (),
    "alexnet_bn": stack.uses(alexnet_bn.layers(32)),
    **dict.fromkeys(resnet.NETS, ("model.batch_norm",)),
    **{name: stack.uses(net) for name, net in STACKS.items()},
}

# Name -> the sides of the images that a network takes, in pixels, if it takes only these.
SIDES = {"alexnet": tuple(sorted(SIZES))}


def make(name: str, batch_norm: str = "global", **settings) -> nnx.Module:
    """Build a network by its name; settings: the arguments of its factory in NETWORKS.

    batch_norm: model.batch_norm, for the networks that have one.

    Raises UserError for an unknown name or fast form, and for an image size that the network
    refuses.
    """
    if name not in NETWORKS:
        raise UnknownName("model.name", name, NETWORKS)
    for form in settings.get("fast_forms", ()):
        if form not in FAST_FORMS:
            raise UserError(f"fast_forms={form}: unknown, expected some of {', '.join(FAST_FORMS)}")
    if "model.batch_norm" in USES.get(name, ()):
        settings["batch_norm"] = batch_norm
    return NETWORKS[name](**settings)
