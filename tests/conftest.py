"""Give every test eight simulated CPU devices; without them all tests fail."""

import importlib.metadata
import os
import pathlib
import tempfile

# Most of the time goes into compiling small programs, here and in the processes that tests start.
# So LLVM skips its expensive passes, and XLA takes its older code generator where jaxlib still has
# it, which is three times as quick. How XLA partitions a program, which tests are about, is decided
# before both.
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# XLA would cut each program into parts, one per core; here the cores are busy with other tests.
os.environ["XLA_FLAGS"] += " --xla_cpu_parallel_codegen_split_count=1"

# A program that several tests or their processes need is compiled once. The key of the cache holds
# everything that a program depends on.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    pathlib.Path(__file__).parent.parent / ".pytest_cache" / "programs"
)
os.environ["JAX_COMPILATION_CACHE_INCLUDE_METADATA_IN_KEY"] = "true"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # two tests may make one program
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# The processes that tests start find the package's modules compiled by the first of them.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import jax
import ml_collections
import photos
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
assert len(jax.devices()) == 8, jax.devices()

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def config() -> ml_collections.ConfigDict:
    """Return the shipped experiment, cut to seconds, for one device and with the plain forms."""
    from experiments.alexnet_cifar import get_config

    config = get_config()
    config.update(dict(batch_size=16, epochs=2, parallelism="data", model=dict(name="simple_cnn")))
    config.data.update(
        dict(name="synthetic", fallback="", synthetic=dict(train_examples=64, test_examples=40))
    )
    config.model.fast = False  # otherwise JAX traces kernels for GPUs, which takes long
    config.mesh.update(dict(data=1, model=1))
    config.optimizer.learning_rate = 0.001
    config.eval.every_epochs = config.checkpoint.every_epochs = 1
    return config


@pytest.fixture
def tfds_directory(monkeypatch, tmp_path) -> pathlib.Path:
    """A TFDS data directory of the test's own, which is not there yet."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    # TFDS leaves an empty temporary folder for each builder.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / "tfds"


@pytest.fixture
def pets(tmp_path, tfds_directory) -> pathlib.Path:
    """Class folders of seven photographs: photos.PETS."""
    return photos.write_pets(tmp_path / "pets")


@pytest.fixture
def pets_config(config, pets) -> ml_collections.ConfigDict:
    """Two steps of four of the photographs."""
    config.update(dict(batch_size=4, steps=2, epochs=0))
    config.data.update(dict(name="folder", dir=str(pets), image_size=photos.SIZE, crop_pad=1))
    return config
