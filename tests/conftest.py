"""Small real inputs for the tests: phantoms on disk, a configuration that trains in seconds."""

import gc
import os
from pathlib import Path

_CACHE = Path(__file__).parents[1] / "build" / "test-xla"
os.environ["KERAS_BACKEND"] = "jax"  # before anything imports Keras, see keras_judge.py
# Programs that several tests run compile once, also over pytest-xdist's workers and sessions.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax
import pytest
from matplotlib.figure import Figure

from covid_flax.data import phantoms
from ml_collections_configs import base

# Files that take long, first: else one worker is at the last of them when the others are done.
_LONGEST = (
    "test_train.py test_augment.py test_evaluate.py test_resnet.py test_main.py test_step.py "
    "test_distributed.py test_recalibrate.py test_members.py test_lite.py test_numerics.py "
    "test_controls.py test_job.py test_table.py test_densenet.py test_conv.py test_compare.py"
).split()


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(_LONGEST)))


def pytest_collection_finish():
    """What is imported stays: the collector need not go through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def quick_compilation():
    """Half the time to compile: LLVM optimises little, here and in processes begun from here.

    For modules that judge what a program does rather than its last digits. `make test-all` sets the
    variable, and has all of them optimised as users have.
    """
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    if name in os.environ:
        yield
        return
    os.environ[name] = "1"
    jax.config.update(name.lower(), True)
    yield
    jax.config.update(name.lower(), False)
    del os.environ[name]


_DRAWN = {
    "png": b"\x89PNG\r\n\x1a\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9pt" height="9pt"></svg>',
}


@pytest.fixture(scope="module")
def quick_drawing():
    """Figures are made, but blank files stand for them: drawing is most of what a report takes.

    For modules that judge no picture: those of report/ do, and test_main.py draws a run's.
    """

    def savefig(self, to, *, format, **_):
        to.write(_DRAWN[format])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield


@pytest.fixture(scope="session")
def phantom_dir(tmp_path_factory) -> Path:
    """Four classes of 20 synthetic X-rays, 48 px, in Kaggle's layout."""
    directory = tmp_path_factory.mktemp("data") / "phantoms"
    phantoms.write_dataset(directory, 20, seed=7, size=48)
    return directory


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def tiny_config(make_tiny_config):
    return make_tiny_config()


@pytest.fixture(scope="session")
def make_tiny_config(phantom_dir, cache_dir):
    return lambda: _tiny_config(phantom_dir, cache_dir)


def _tiny_config(phantom_dir, cache_dir):
    """LeNet-5 on the phantoms: it compiles in a second or two; see `small_resnet.py`."""
    c = base.get_config()
    c.data.dir = str(phantom_dir)
    c.data.cache_dir = str(cache_dir)
    c.data.image_size = 32
    c.data.split = "paper-random"
    c.data.val_fraction = 0.25
    c.data.num_threads = 2
    c.model.name = "lenet5"
    c.model.weights = "none"
    c.train.feature_cache_gb = c.train.feature_disk_gb = 0.0  # steps start from the images
    c.optimizer.learning_rate = 3e-3
    c.train.epochs = 3
    c.train.batch_size = 15  # of 60: a short last batch would be compiled apart
    c.eval.batch_size = 16
    return c
