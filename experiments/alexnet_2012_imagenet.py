"""Train AlexNet as published in 2012, with the paper's data and recipe.

  python launch.py --config experiments/alexnet_2012_imagenet.py        two GPUs, one tower each
  python launch.py --config experiments/alexnet_2012_imagenet.py --mesh 1x1
                                          one GPU, the same numbers
  ... --config.data.dir=DIR               JPEG files in DIR/train/CLASS/* and DIR/val/CLASS/*
  ... --config.data.name=synthetic        random images of that size: placement and speed only
  ... --config experiments/alexnet_2012_imagenet.py:imagenette --config.data.dir=imagenette2
                                          ten of the classes

ImageNet comes from class folders, or from TFDS (imagenet2012, prepared from the two archives that
https://image-net.org gives to registered users). It takes 262 GB once prepared, and is streamed
from disk where the devices cannot hold it.

The paper (Krizhevsky, Sutskever, Hinton, NIPS 2012) reports, on ILSVRC-2012's validation images
with ten crops:

  1 CNN     40.7% top-1 and 18.2% top-5 error, after 90 epochs in five to six days on two GTX 580
  5 CNNs    38.1%           16.4%

What was measured here, which is :imagenette only: results/papers.md. eval.accuracy and eval.top5
are one minus the errors.

The recipe:
- Section 2: shorter side 256, centre 256x256, mean image subtracted.
- Section 4.1: random crops of 224, mirrored at random; colour noise 0.1; the softmax outputs of
  ten crops averaged (--config.eval.views=one: one crop).
- Section 5: batch 128, learning rate 0.01, momentum 0.9, weight decay 0.0005. The rate is divided
  by ten three times: in the paper when the validation error stood still, here at a quarter, half
  and three quarters. The paper does not say whether biases decay; here they do not.
"""

import ml_collections

import cnn_spmd.config
from cnn_spmd.errors import UserError


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return what differs from the defaults (docs/config.md), within all of them."""
    if variant not in ("", "imagenette"):
        raise UserError(
            f"experiments/alexnet_2012_imagenet.py:{variant}: unknown variant, expected imagenette "
            "or none"
        )
    config = cnn_spmd.config.default()
    config.experiment = f"alexnet_2012_{variant or 'imagenet'}"
    config.model.update(name="alexnet_2012", dropout=0.5)
    config.data.update(
        name=variant or "imagenet2012",
        image_size=256,
        crop=224,
        flip=True,
        colour_noise=0.1,
        normalise="pixel_mean",
    )
    config.data.synthetic.update(
        image_size=256, classes=1000, train_examples=8192, test_examples=1024
    )
    config.mesh.update(data=-1, model=2)
    config.parallelism = "two_tower"
    config.batch_size = 128
    config.epochs = 90
    config.optimizer.update(
        learning_rate=0.01,
        decay="staged",
        stages=(0.25, 0.5, 0.75),
        stage_factor=0.1,
        momentum=0.9,
        weight_decay=5e-4,
    )
    config.eval.update(every_epochs=5, views="ten")
    config.checkpoint.every_epochs = 5
    if variant == "imagenette":
        # Biases of one make the inputs of the output layer nearly equal for all images. Along that
        # direction the loss is curved by p (1 - p) |x|^2: with ten classes at even odds, ninety
        # times as much as with a thousand. At the paper's rate the loss then grows from the start.
        config.optimizer.layer_rates.fc3 = 0.01
    return config
