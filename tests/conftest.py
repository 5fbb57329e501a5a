"""Shapes are checked at run time, optional tests are skipped without their packages, a tiny dataset is shared."""

import importlib.util
import os
import shutil
import tempfile

import jax
import jaxtyping
import numpy as np
import pytest
from absl import flags

from tests.shapes import arrays_only

# every annotated function of the package checks its arrays' shapes and dtypes while the tests run; numpy's are welcome
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook("rlawm_jax", f"{arrays_only.__module__}.{arrays_only.__name__}")

NEEDS = {"torch": ("torch", "transformers"), "sim": ("gym_pusht",)}
CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's worker processes read flags
    if CACHE not in os.environ:  # one for this session: its processes compile the same programs
        config.compilation_cache = os.environ[CACHE] = tempfile.mkdtemp(prefix="rlawm_jax-compiled-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    # tiny programs spend their time in the compiler: let it hurry
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"


def pytest_unconfigure(config) -> None:
    if hasattr(config, "compilation_cache"):
        shutil.rmtree(config.compilation_cache, ignore_errors=True)
        del os.environ[CACHE]


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        for marker, packages in NEEDS.items():
            if item.get_closest_marker(marker) and not all(map(importlib.util.find_spec, packages)):
                item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(packages)}"))
        if item.get_closest_marker("gpu") and jax.default_backend() == "cpu":
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory):
    """A root with the tiny dataset `pusht` (see tests/tiny_run.py)."""
    from tests.tiny_run import write_dataset

    root = tmp_path_factory.mktemp("tiny")
    write_dataset(root)
    return root


@pytest.fixture(scope="session")
def world_run(tiny_root, tmp_path_factory):
    """A run folder of a tiny world model."""
    from rlawm_jax.world_model import PARTS
    from tests.tiny_policy import write_world_model

    return write_world_model(tiny_root, tmp_path_factory.mktemp("world"), moved=PARTS)


@pytest.fixture(scope="session")
def cloned(world_run, tmp_path_factory):
    """A run folder of a random policy that looks through that world model."""
    from rlawm_jax.policy.checkpoint import save_policy
    from rlawm_jax.training.restore import load_world_model
    from rlawm_jax.weights.backbone import fingerprint
    from tests.tiny_policy import policy_config, random_policy
    from tests.tiny_run import SIZE

    model = load_world_model(world_run)[0]
    config = policy_config(observation="decoded", world_model=str(world_run))
    config.observed.update({"image_size": SIZE, "backbone": "any", "image_decoder": fingerprint(model.image_decoder)})
    policy = random_policy(config)
    policy.set_limits(np.array([[0, 0], [SIZE, SIZE]], np.float32))
    workdir = tmp_path_factory.mktemp("cloned")
    save_policy(workdir, config, policy, 1)
    return workdir
