"""Train AlexNet in batches of 128 to 8,192, by three rules for the learning rate.

  python launch.py --config experiments/large_batch_cifar.py:lars_bn --config.batch_size=4096
      --config.optimizer.learning_rate=1.6    the best that was found at 4,096
  ... --config experiments/large_batch_cifar.py:linear             another rule, another network
  ... --config experiments/large_batch_cifar.py:lars_imagenette --config.data.dir=imagenette2
                                          photographs of ten classes instead of CIFAR-10
  ... --config.eval.every_epochs=1 --noise_scale 5
                                          for the steps to a target error, and the noise scale

A variant names some of: a rule, bn, imagenette; in this order, with "_" between them:

  linear      momentum SGD; the rate grows with the batch (the default)
  lars        a local rate per parameter, eta |w| / (|g| + decay |w|), times the rate
  larc        the same local rate, but at most the rate: min(rate, local)
  bn          AlexNet-BN (batch norm on the inputs of conv2 to conv5) instead of AlexNet 2012,
              which has response norms
  imagenette  Imagenette at 224 pixels

Every batch trains for 100 epochs, as in the authors' files. Published, ILSVRC-2012, top-1 accuracy
in % (You, Gitman, Ginsburg 2017, arXiv 1708.03888, as quoted in github.com/lcy-seso/LearningNotes):

  batch                          256      4K      8K
  AlexNet, linear               57.6    53.1    44.8

Linear scaling of AlexNet diverges above the rate for a batch of 2K. With batch norm, the gap at 8K
falls from 14 points to 2.2 without LARS (14 is the paper's own figure; the table gives 12.8). With
LARS nothing is lost up to 8K (abstract). results/batches.md has what was measured on CIFAR-10, and
whether these claims hold there.

The recipe is that of the authors' files (nvcaffe, models/alexnet_bn): momentum 0.9, weight decay
5e-4, dropout 0.5, polynomial decay of power 2, eta 0.001. What differs: their warm-up takes 4 to 10
epochs, here it takes 5 for every batch; and the local rate is the paper's, not that of their code
(cnn_spmd/training/optim.py, lars). Images are those of alexnet_cifar.py or owt_imagenet.py.

The rates are published ones, too. linear: 0.01 for AlexNet at 128 (owt_imagenet.py), 0.08 for
AlexNet-BN at 512. lars and larc: 2 at 1K, 10 at 8K and 16 at 16K, nearly a power of 0.75 of the
batch. They are for ImageNet, whose epochs have 25 times as many steps. On CIFAR-10 the best rate is
mostly another one. So search it for each batch, on images that are held out of training.
results/rates.md has this search, results/batches.md the command of each cell. For example:

  ... --config.epochs=30 --config.data.validation=5000 --sweep batch_size=128,1024,4096,8192
      --sweep optimizer.learning_rate=0.1,0.4,1.6,6.4

A sweep sets the rate of batch 128; optimizer.scaling turns it into that of each batch. This tries
it in a few minutes on a CPU (three batches are the least for the steps to a target):

  python launch.py --config experiments/large_batch_cifar.py:lars_bn --config.data.name=digits
      --config.data.crop=16 --config.model.width=64 --config.epochs=4
      --config.optimizer.warmup_epochs=1 --config.eval.every_epochs=1 --noise_scale 5
      --sweep batch_size=32,64,128 --sweep optimizer.learning_rate=12.8,51.2
"""

import ml_collections

import cnn_spmd.config
from cnn_spmd.errors import UserError
from experiments import alexnet_cifar, owt_imagenet

RULES = {"linear": "sgd", "lars": "lars", "larc": "larc"}


def get_config(variant: str = "linear") -> ml_collections.ConfigDict:
    """Return the recipe with the rule, network and images that the variant names."""
    rule, *rest = variant.split("_")
    if rule not in RULES:
        rule, rest = "linear", [rule, *rest]
    bn, imagenette = "bn" in rest, "imagenette" in rest
    if rest != ["bn"] * bn + ["imagenette"] * imagenette:
        raise UserError(
            f"experiments/large_batch_cifar.py:{variant}: unknown variant, expected some of a rule "
            f"({', '.join(RULES)}), bn and imagenette, in this order, with _ between them"
        )
    images = owt_imagenet.get_config("imagenette") if imagenette else alexnet_cifar.get_config()
    with_response_norm = "alexnet_2012" if imagenette else "alexnet_2012_small"
    config = cnn_spmd.config.default()
    config.experiment = "_".join(
        ["large_batch", "imagenette" if imagenette else "cifar", rule, *["bn"] * bn]
    )
    config.model.update(name="alexnet_bn" if bn else with_response_norm, dropout=0.5)
    config.data = images.data
    config.data.fallback = ""
    config.parallelism = "data"
    config.batch_size = 128
    config.epochs = 100
    config.optimizer.update(
        name=RULES[rule],
        # For a batch of 128; scaling says the power of (batch_size / 128).
        learning_rate=(0.02 if bn else 0.01) if rule == "linear" else 2 * (128 / 1024) ** 0.75,
        scaling=1.0 if rule == "linear" else 0.75,
        warmup_epochs=5.0,
        decay="polynomial",
        power=2.0,
        momentum=0.9,
        weight_decay=5e-4,
    )
    config.eval.every_epochs = 5
    config.checkpoint.every_epochs = 0
    return config
