"""How many basis vectors a solve may keep."""

import os

import jax
import jax.tree_util as jtu
from jaxtyping import PyTree

from hessjax._vectors import size_of

_SHARE = 8  # the basis may take an eighth of the device's memory
_SPARE = 256  # Krylov dimensions beyond k; a larger projected problem costs more than the products it saves


def default_ncv(structure: PyTree[jax.ShapeDtypeStruct], k: int) -> int:
    """The Krylov dimension: k + 256 where memory allows, never less than SciPy's max(2k + 1, 20) nor more than n.

    Args:
        structure: of one vector.
        k: number of eigenpairs.
    """
    limit = _device_memory() // _SHARE
    bytes_per_vector = sum(size_of(leaf) * leaf.dtype.itemsize for leaf in jtu.tree_leaves(structure))
    affordable = limit // max(bytes_per_vector, 1) - k - 12
    return min(size_of(structure), max(2 * k + 1, 20, min(k + _SPARE, affordable)))


def _device_memory() -> int:
    """Bytes of memory that the default device has, or the host for a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", host))
