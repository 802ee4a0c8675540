"""How many basis vectors a solve keeps, and the memory that it takes."""

import bisect
import os
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from hessjax._arguments import as_integer
from hessjax._vectors import scalar_dtype, size_of
from hessjax.krylov._basis import rows_held
from hessjax.krylov._projected import WHICH
from hessjax.operators._operator import Operator, as_operator

_SHARE = 8  # by default a solve may take an eighth of the device's memory
_SPARE = 256  # Krylov dimensions beyond k; a larger projected problem costs more than the products it saves
_FREE = 1 << 23  # bytes that a basis may have before its rows cost a noticeable time
_WORKING = 12  # vectors beside the basis and the results: measured on compiled programs, 10 to 12
_SQUARES = 8  # matrices of the projected problem's size


def memory_estimate(
    op: Operator | Any,
    k: Any = 6,
    ncv: Any = None,
    *,
    which: str = "LM",
    basis_dtype: Any = None,
    like: PyTree | None = None,
) -> int:
    """The bytes that `eigsh` will hold at its peak, beside what a product itself needs.

    ncv + 2k + 12 vectors at most, 9k/4 + 6 more inside the spectrum, and a few ncv × ncv matrices. A block `v0` comes
    on top, and what is widened of leaves in half precision beside others. The true figure of a compiled program is
    XLA's own, `jax.jit(f).lower(...).compile().memory_analysis()`; it includes the product's memory.

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        k: number of eigenpairs.
        ncv: Krylov dimension; None for the one that `eigsh` would choose.
        which: as in `eigsh`, whose choice depends on it.
        basis_dtype: the dtype of the stored basis, as in `eigsh`.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Raises:
        ValueError: `k` or `ncv` is out of range, or `which` is unknown.
        TypeError: `basis_dtype` is no floating-point dtype.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: 2 * v, like=jnp.zeros(100_000, jnp.float32))
        >>> round(hj.memory_estimate(A, 6, 40) / 1e6)  # megabytes
        26
    """
    structure = as_operator(op, like).structure
    n = size_of(structure)
    k = as_integer("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"`memory_estimate` needs 1 <= `k` <= {n}, the operator's size, got {k}.")
    if which not in WHICH:
        raise ValueError(f"`which` must be one of {', '.join(WHICH)}, got {which!r}.")
    ncv = default_ncv(structure, k, which) if ncv is None else as_integer("ncv", ncv)
    if not (k < ncv <= n or k == ncv == n):
        raise ValueError(f"`memory_estimate` needs `ncv` above `k` = {k} and at most {n}, got {ncv}.")
    return _bytes(structure, k, ncv, storage_name(basis_dtype, structure), which)


def default_ncv(
    structure: PyTree[jax.ShapeDtypeStruct],
    k: int,
    which: str,
    limit: int | None = None,
    storage: str | None = None,
) -> int:
    """The Krylov dimension: k + 256 where memory allows, never less than SciPy's max(2k + 1, 20) nor more than n.

    A program on the CPU writes zeros to every row before it starts, about 1 ms per MB. The low end of a trained
    network's spectrum repays that many times over. At the high end, or by magnitude, outliers converge before the rows
    are needed: there a basis holds what 8 MB hold, at least 2k + 20 rows and 5k.

    Args:
        structure: of one vector.
        k: number of eigenpairs.
        which: the end of the spectrum.
        limit: bytes that may be used, by default a share of the device's memory.
        storage: the dtype of the stored basis, None for the vectors' own.

    Raises:
        ValueError: a given limit does not even hold SciPy's dimension.
    """
    n = size_of(structure)
    spare = _SPARE
    if which in ("LA", "LM"):
        free = _FREE // max(_vector_bytes(structure, storage), 1) - k
        spare = min(max(free, k + 20, 4 * k), _SPARE)
    least, most = min(n, max(2 * k + 1, 20)), min(n, max(2 * k + 1, 20, k + spare))
    budget = device_memory() // _SHARE if limit is None else limit
    choices = range(least, most + 1)
    fitting = bisect.bisect_right(choices, budget, key=lambda ncv: _bytes(structure, k, ncv, storage, which))
    if limit is not None and fitting == 0:
        needed = _bytes(structure, k, least, storage, which)
        raise ValueError(
            f"`memory_limit` = {limit:,} bytes does not hold the smallest Krylov dimension {least}, which needs "
            f"{needed:,}. Raise it, give a smaller `ncv`, or `basis_dtype='bfloat16'`."
        )
    return choices[max(fitting - 1, 0)]


def storage_name(dtype: Any, structure: PyTree[jax.ShapeDtypeStruct]) -> str | None:
    """The name of a storage dtype, None where rows are kept as the vectors are.

    That is so where it is not narrower, but for vectors all of one dtype of 16 bits: XLA:CPU would widen whole blocks
    of these to multiply them.

    Raises:
        TypeError: it is no floating-point dtype.
    """
    own = {leaf.dtype for leaf in jtu.tree_leaves(structure)}
    half = next(iter(own)).name if len(own) == 1 and next(iter(own)).itemsize == 2 else None
    if dtype is None:
        return half
    try:
        wanted = jnp.dtype(dtype)
    except TypeError:
        raise TypeError(f"`basis_dtype` must be a floating-point dtype such as 'bfloat16', got {dtype!r}.") from None
    if not jnp.issubdtype(wanted, jnp.floating) or wanted.itemsize < 2:
        raise TypeError(f"`basis_dtype` must be a floating-point dtype such as 'bfloat16', got {wanted}.")
    return wanted.name if wanted.itemsize < min((leaf.itemsize for leaf in own), default=0) else half


def _bytes(structure: PyTree[jax.ShapeDtypeStruct], k: int, ncv: int, storage: str | None, which: str) -> int:
    vector, itemsize = _vector_bytes(structure, None), np.dtype(scalar_dtype(structure)).itemsize
    wide = max(vector, size_of(structure) * itemsize) if storage is not None else vector
    rows = rows_held(ncv + 2, storage)
    basis = rows * _vector_bytes(structure, storage)
    widened = 0 if storage is None else rows_held(1, storage) * wide  # where rows meet a vector
    working = _WORKING - 2 + (9 * k // 4 + 6 if which == "SM" else 0)
    return basis + widened + 2 * k * vector + working * wide + _SQUARES * rows**2 * itemsize


def _vector_bytes(structure: PyTree[jax.ShapeDtypeStruct], storage: str | None) -> int:
    """The bytes of one vector, in its own dtypes or as it is stored."""
    if storage is not None:
        return size_of(structure) * jnp.dtype(storage).itemsize
    return sum(size_of(leaf) * leaf.dtype.itemsize for leaf in jtu.tree_leaves(structure))


def device_memory() -> int:
    """Bytes of memory that the default device has, or the host for a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(stats.get("bytes_limit", host))
