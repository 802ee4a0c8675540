"""XNysTrace: the trace of a positive semidefinite operator, from all products at once."""

from functools import partial

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PRNGKeyArray

from hessjax._vectors import epsilon, inner, structure_of
from hessjax.estimate._probes import on_long_sphere, products
from hessjax.estimate._result import Estimate, average
from hessjax.estimate._sketch import combine, gram, largest
from hessjax.operators._operator import Operator


def xnystrace(op: Operator, num_matvecs: int, key: PRNGKeyArray) -> Estimate:
    """The mean over i of tr Âᵢ + ωᵢᵀ(A - Âᵢ)ωᵢ, Âᵢ the Nyström approximation from all vectors but ωᵢ.

    Â = Y H⁻¹ Yᵀ with Y = AΩ and H = ΩᵀY; Âᵢ is Â less (Y hᵢ)(Y hᵢ)ᵀ / eᵢᵀhᵢ with hᵢ = H⁻¹ eᵢ, and the second term is
    1 / eᵢᵀhᵢ. A small shift of A, taken off the trace again, keeps H invertible where A's rank is below k.
    """
    k, n, structure = num_matvecs, op.size, structure_of(op.like)
    probes = jax.vmap(partial(on_long_sphere, structure=structure))(jax.random.split(key, k))
    images = products(op, probes)
    unit = lax.stop_gradient(largest(images))
    images = jtu.tree_map(lambda leaf: (leaf / unit).astype(leaf.dtype), images)
    size = jnp.sqrt(jnp.sum(jax.vmap(inner)(images, images)) / n)
    shift = lax.stop_gradient(4 * epsilon(structure) * size)
    images = jtu.tree_map(lambda y, w: (y + shift * w).astype(y.dtype), images, probes)
    middle = gram(probes, images)
    factor = jnp.linalg.cholesky((middle + middle.T) / 2)
    inverse = lax.linalg.triangular_solve(factor, jnp.eye(k, dtype=middle.dtype), left_side=True, lower=True)
    root = combine(images, inverse.T)  # B with BBᵀ = Â: of half the condition that H⁻¹ has
    squares = gram(root, root)
    pivots = jnp.sum(inverse**2, axis=0)
    taken = jnp.sum(inverse * (squares @ inverse), axis=0) / pivots
    # What a probe has outside the span of the others is scaled to the length that it has on average.
    others = gram(probes, probes)
    outside = 1 / jnp.diagonal(jnp.linalg.inv(others))
    samples = jnp.trace(squares) - taken + (n - k + 1) / outside / pivots - n * shift
    return average(unit * samples, k)
