"""All eigenpairs of a small operator, from its matrix."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Scalar

from hessjax._vectors import epsilon, matmul, size_of
from hessjax.krylov._eigenpairs import Eigenpairs
from hessjax.krylov._eigh import sequential_eigh
from hessjax.krylov._projected import neighbour_gaps, preference
from hessjax.operators._operator import Operator


def dense_eigenpairs(
    op: Operator, which: str, sigma: Scalar | None, k: int, tol: Scalar, floor: Scalar, spent: int
) -> Eigenpairs:
    """The k wanted pairs of the symmetric part, with their residuals against the operator itself; n products.

    Args:
        op: A.
        which: LM, LA, SA, BE or SM.
        sigma: with "SM", the point to be near to, in place of 0.
        k: how many.
        tol: as in `eigsh`.
        floor: the known noise of a product.
        spent: products so far.
    """
    matrix, n, eps = op.dense(), op.size, epsilon(op.structure)
    peak = jnp.max(jnp.abs(matrix))
    unit = jnp.where((peak > 0) & jnp.isfinite(peak), peak, 1)
    matrix = matrix / unit
    values, vectors = sequential_eigh((matrix + matrix.T) / 2)
    # A shift far outside would swallow the values in rounding; one beside the spectrum orders them the same.
    low, high = 2 * values[0] - values[-1], 2 * values[-1] - values[0]
    shift = 0 if sigma is None else jnp.clip(sigma / unit, low, high)
    wanted = jnp.sort(preference(values - shift, jnp.ones(n, bool), which)[:k])
    gaps = neighbour_gaps(values, jnp.ones(n, bool))[wanted]
    values, vectors = values[wanted], vectors[:, wanted]
    image = matmul(matrix, vectors)
    scale = jnp.max(jnp.abs(values), initial=0) + jnp.linalg.norm(matrix) * eps
    scale = jnp.maximum(scale, jnp.max(jnp.linalg.norm(matrix, axis=0)))
    rounding = eps * scale * max(n**0.5, 16.0)
    asymmetry = jnp.linalg.norm(matrix - matrix.T) / (2 * n) ** 0.5  # of n products, the root mean square
    noise = jnp.maximum(asymmetry, floor / unit)
    residuals = jnp.maximum(jnp.linalg.norm(image - vectors * values, axis=0), jnp.maximum(noise, eps * scale))
    bounds = jnp.maximum(tol * jnp.maximum(eps ** (2 / 3) * scale, jnp.abs(values)), rounding)
    leaves, treedef = jtu.tree_flatten(op.structure)
    parts, start = [], 0
    for leaf in leaves:
        rows = vectors[start : start + size_of(leaf)].T
        parts.append(rows.reshape(k, *leaf.shape).astype(leaf.dtype))
        start += size_of(leaf)
    converged = (residuals <= bounds) & jnp.isfinite(values)
    isolation = jnp.maximum(gaps - 2 * rounding, 0)
    return Eigenpairs(
        values * unit,
        treedef.unflatten(parts),
        residuals * unit,
        converged,
        gaps * unit,
        isolation * unit,
        jnp.maximum(rounding / 4, noise) * unit,
        jnp.asarray(n + spent, jnp.int32),
    )
