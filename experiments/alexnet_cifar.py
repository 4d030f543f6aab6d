"""Train AlexNet on CIFAR-10, on every device there is.

  python launch.py --config experiments/alexnet_cifar.py          40 epochs
  python launch.py --config experiments/alexnet_cifar.py:fast     25 epochs
  python launch.py --config experiments/alexnet_cifar.py:best    100 epochs

The network has AlexNet's layers, five convolutions and three dense ones, with 3x3 windows for
images of 32x32. The recipe is today's: reflected crops, mirroring, label smoothing, Nesterov
momentum and a one-cycle schedule. Gradients are clipped, since some seeds diverge at this learning
rate without that.

Nobody published this network. For comparison, on CIFAR-10: the best of cuda-convnet's nets reaches
89% with random 24x24 crops and ten test views (cuda_convnet_cifar.py:11pct), and so does a net of
AlexNet's own paper (section 3.3, four layers). What this one reaches: results/cifar10.md.
"""

import ml_collections

import cnn_spmd.config
from cnn_spmd.errors import UserError

EPOCHS = {"": 40, "fast": 25, "best": 100}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the defaults (docs/config.md) with these fields changed."""
    if variant not in EPOCHS:
        raise UserError(
            f"experiments/alexnet_cifar.py:{variant}: unknown variant, expected fast, best, or none"
        )
    config = cnn_spmd.config.default()
    config.experiment = "alexnet_cifar" + (f"_{variant}" if variant else "")
    config.model.update(name="alexnet", dropout=0.25)  # model.width is 4096 by default
    # Where CIFAR-10 cannot be had: handwritten digits, scaled to 32x32, with the batch, epochs and
    # learning rate of the fields data.fallback_*.
    config.data.update(name="cifar10", fallback="digits", crop_pad=4, flip=True)
    config.parallelism = "hybrid"  # on the default mesh: data=1, model=all devices
    config.batch_size = 512
    config.epochs = EPOCHS[variant]
    config.label_smoothing = 0.1
    config.optimizer.update(
        learning_rate=0.25,
        warmup=0.25,  # the share of all steps
        decay="linear",
        momentum=0.9,
        nesterov=True,
        weight_decay=5e-4,
        clip_norm=1.0,
    )
    config.eval.update(every_epochs=10, views="mirrored")
    config.checkpoint.every_epochs = 20
    return config
