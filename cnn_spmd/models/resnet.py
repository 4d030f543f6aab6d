"""Define the residual networks for CIFAR-10, and the plain ones beside them.

He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015 (1512.03385), section 4.2.

Shapes: N batch, H height, W width, C channels; B batch, F features of the dense layer.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers import conv
from cnn_spmd.layers.batch_norm import BatchNorm
from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.layers.dense import dense, logits
from cnn_spmd.sharding.placement import UNPLACED

# The channels of the three stages. Each stage after the first halves the side of the maps.
CHANNELS = (16, 32, 64)


def convolutions(depth: int) -> list[tuple[int, int]]:
    """Return the channels and the strides of each convolution, in order."""
    found, per_stage = [(CHANNELS[0], 1)], (depth - 2) // 3
    for stage, channels in enumerate(CHANNELS):
        found += [(channels, 2 if stage else 1), *[(channels, 1)] * (per_stage - 1)]
    return found


class ResNet(nnx.Module):
    """A 3x3 convolution, three stages of blocks of two, the mean over the map, a dense layer.

    A batch norm follows each convolution. A block adds its input to its result before the last
    ReLU. Where the number of channels grows, the shortcut takes every second pixel and adds
    channels of zeros (option A), so that it has no weights. A plain network has no shortcuts.
    """

    def __init__(
        self,
        name: str,
        depth: int,
        *,
        shortcuts: bool,
        image_size: int,
        classes: int,
        width: int,
        dropout: float,
        dtype,
        rngs: nnx.Rngs,
        fast_forms: tuple[str, ...] = FAST_FORMS,
        batch_norm: str = "global",
    ):
        """Build the layers: conv1 and norm1, conv2 and norm2, ..., fc3.

        depth: 6 n + 2 layers with weights, for n blocks per stage. batch_norm: "global" or
        "per_device". The other arguments are those of AlexNet.

        Raises UserError for images whose side is not a multiple of 4.
        """
        del width, dropout  # there is no hidden dense layer
        if image_size % 4:
            raise UserError(
                f"model.name={name}: images of {image_size}x{image_size}, expected a side that is "
                "a multiple of 4"
            )
        self.depth, self.shortcuts, self.fast_forms = depth, shortcuts, fast_forms
        common, channels_in = dict(dtype=dtype, rngs=rngs), 3
        for number, (channels, strides) in enumerate(convolutions(depth), 1):
            layer = conv.conv(channels_in, channels, 3, strides=strides, use_bias=False, **common)
            norm = BatchNorm(channels, per_device=batch_norm == "per_device")
            setattr(self, f"conv{number}", layer)
            setattr(self, f"norm{number}", norm)
            channels_in = channels
        self.fc3 = dense("fc3", channels_in, classes, **common)

    def features(self, images_NHWC: jax.Array, place=UNPLACED, train: bool = False) -> jax.Array:
        """Return the mean of the last maps: [N, H, W, 3] -> [B, F].

        The images have zero mean. train: use the statistics of the batch, not running averages.
        """
        x_NHWC = nnx.relu(self._normalised(1, images_NHWC, place, train))
        for number in range(2, self.depth - 1, 2):
            y_NHWC = nnx.relu(self._normalised(number, x_NHWC, place, train))
            y_NHWC = self._normalised(number + 1, y_NHWC, place, train)
            if self.shortcuts:
                y_NHWC += shortcut(x_NHWC, y_NHWC.shape)
            x_NHWC = place(nnx.relu(y_NHWC), *place.map_axes(y_NHWC.shape[1], "conv_out"))
        x_NHWC = place(x_NHWC, *place.map_axes(x_NHWC.shape[1], "conv_out"), name="mean input")
        return place(x_NHWC.mean((1, 2)), place.features_batch, "conv_out", name="mean output")

    def _normalised(self, number: int, x_NHWC: jax.Array, place, train: bool) -> jax.Array:
        """Apply a convolution and its batch norm."""
        name, norm = f"conv{number}", getattr(self, f"norm{number}")
        x_NHWC = conv.apply(name, getattr(self, name), x_NHWC, place, self.fast_forms)
        return norm(f"norm{number}", x_NHWC, place, train, self.fast_forms)

    def classify(
        self, x_BF: jax.Array, place=UNPLACED, dropout_key: jax.Array | None = None
    ) -> jax.Array:
        """Return the logits [B, classes] of the features."""
        return logits(self.fc3, x_BF, place)


def shortcut(x_NHWC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Return x with every `strides`-th pixel and channels of zeros, of this shape (option A)."""
    strides = x_NHWC.shape[1] // shape[1]
    channels = shape[3] - x_NHWC.shape[3]
    return jnp.pad(x_NHWC[:, ::strides, ::strides], ((0, 0), (0, 0), (0, 0), (0, channels)))


NETS = {
    f"{kind}_{depth}": functools.partial(
        ResNet, f"{kind}_{depth}", depth, shortcuts=kind == "resnet"
    )
    for kind, depths in (("resnet", (20, 32, 44, 56, 110)), ("plain", (20, 32, 44, 56)))
    for depth in depths
}
