"""All eigenpairs of a small operator, from its matrix."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, PyTree, Scalar

from hessjax._vectors import epsilon, size_of
from hessjax.krylov._projected import neighbour_gaps, preference
from hessjax.operators._operator import Operator


def dense_eigenpairs(op: Operator, which: str, k: int, tol: Scalar) -> tuple[Array, PyTree, Array, Array, Array, Array]:
    """The k wanted pairs of the symmetric part, with their residuals against the operator itself.

    Returns:
        eigenvalues, eigenvectors (leading axis k), residuals, converged, gaps, num_matvecs = n.
    """
    matrix, n, eps = op.dense(), op.size, epsilon(op.structure)
    peak = jnp.max(jnp.abs(matrix))
    unit = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    matrix = matrix / unit
    values, vectors = _eigh((matrix + matrix.T) / 2)
    wanted = jnp.sort(preference(values, jnp.ones(n, bool), which)[:k])
    gaps = neighbour_gaps(values, jnp.ones(n, bool))[wanted]
    values, vectors = values[wanted], vectors[:, wanted]
    image = jnp.matmul(matrix, vectors, precision=lax.Precision.HIGHEST)
    scale = jnp.max(jnp.abs(values), initial=0) + jnp.linalg.norm(matrix) * eps
    scale = jnp.maximum(scale, jnp.max(jnp.linalg.norm(matrix, axis=0)))
    rounding = eps * scale * max(n**0.5, 4.0)
    residuals = jnp.maximum(jnp.linalg.norm(image - vectors * values, axis=0), eps * scale)
    bounds = jnp.maximum(tol * jnp.maximum(eps ** (2 / 3) * scale, jnp.abs(values)), 4 * rounding)
    leaves, treedef = jtu.tree_flatten(op.structure)
    parts, start = [], 0
    for leaf in leaves:
        rows = vectors[start : start + size_of(leaf)].T
        parts.append(rows.reshape(k, *leaf.shape).astype(leaf.dtype))
        start += size_of(leaf)
    converged = (residuals <= bounds) & jnp.isfinite(values)
    count = jnp.asarray(n, jnp.int32)
    return values * unit, treedef.unflatten(parts), residuals * unit, converged, gaps * unit, count


@jax.custom_batching.sequential_vmap
def _eigh(matrix: Array) -> tuple[Array, Array]:
    vectors, values = lax.linalg.eigh(matrix)
    return values, vectors
