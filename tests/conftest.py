import gc
import os
from importlib.metadata import version

# Two devices, so that sharded leaves can be tested. Code that runs once need not be optimized: an eighth of the time to
# compile. One thread of OpenBLAS for each worker: they wait for each other without sleeping. All of this must precede
# the first use of jax.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    # Later versions know no such flag, and end the process.
    + (" --xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""),
)
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import numpy as np
import pytest
from cases import digits_hessians


@pytest.fixture(autouse=True, scope="module")
def no_programs_left():
    """Every compiled program keeps memory mapped, and a process may hold 65,530 maps: XLA ends it at the next one."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def key():
    return jax.random.key(20)


@pytest.fixture(scope="session")
def network_hessians():
    """Stage of training -> (model in float64, its dense Hessian, its eigenvalues ascending)."""
    with jax.enable_x64(True):
        return digits_hessians()


@pytest.fixture
def rng():
    return np.random.default_rng(7)
