"""XNysTrace: the trace of a positive semidefinite operator, from all products at once."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from hessjax._vectors import (
    combine,
    epsilon,
    gram,
    inner,
    matmul,
    or_one,
    row_structure,
    size_of,
    stacked,
    structure_of,
)
from hessjax.estimate._left_out import jackknife
from hessjax.estimate._probes import on_long_sphere, products
from hessjax.estimate._result import Estimate, average, scaled
from hessjax.estimate._sketch import largest
from hessjax.operators._operator import Operator


class Images(eqx.Module):
    """Random vectors Ω of length √n, and AΩ."""

    probes: PyTree[Float[Array, "k ..."]]
    images: PyTree[Float[Array, "k ..."]]


def images_of_probes(op: Operator, keys: Array, known: Images | None) -> Images:
    structure = structure_of(op.like)
    probes = jax.vmap(partial(on_long_sphere, structure=structure))(keys)
    images = products(op, probes)
    if known is not None:
        probes, images = stacked(known.probes, probes), stacked(known.images, images)
    return Images(probes, images)


def xnystrace(data: Images) -> Estimate:
    """The mean over i of tr Âᵢ + ωᵢᵀ(A - Âᵢ)ωᵢ, Âᵢ the Nyström approximation from all vectors but ωᵢ.

    Â = Y H⁻¹ Yᵀ with Y = AΩ and H = ΩᵀY; Âᵢ is Â less (Y hᵢ)(Y hᵢ)ᵀ / eᵢᵀhᵢ with hᵢ = H⁻¹ eᵢ, and the second term is
    1 / eᵢᵀhᵢ. A small shift of A, taken off the trace again, keeps H invertible where A's rank is below k.
    """
    probes, images = data.probes, data.images
    structure = row_structure(probes)
    k, n = jtu.tree_leaves(probes)[0].shape[0], size_of(structure)
    unit = lax.stop_gradient(largest(images))
    images = jtu.tree_map(lambda leaf: (leaf / unit).astype(leaf.dtype), images)
    size = jnp.sqrt(jnp.sum(jax.vmap(inner)(images, images)) / n)
    shift = lax.stop_gradient(4 * epsilon(structure) * or_one(size))
    unit = jnp.where(size > 0, unit, 0)  # A = 0: the shift alone would leave its rounding
    images = jtu.tree_map(lambda y, w: (y + shift * w).astype(y.dtype), images, probes)
    middle = gram(probes, images)
    factor = jnp.linalg.cholesky((middle + middle.T) / 2)
    inverse = lax.linalg.triangular_solve(factor, jnp.eye(k, dtype=middle.dtype), left_side=True, lower=True)
    root = combine(images, inverse.T)  # B with BBᵀ = Â: of half the condition that H⁻¹ has
    squares = gram(root, root)
    whole, bent = jnp.trace(squares), matmul(inverse.T, matmul(squares, inverse))
    angle, others = matmul(inverse.T, inverse), jnp.linalg.inv(gram(probes, probes))
    bent_own, pivots, rest = jnp.diagonal(bent), jnp.diagonal(angle), jnp.diagonal(others)
    # What a probe has outside the span of the others is scaled to the length that it has on average.
    alone = whole - bent_own / pivots + (n - k + 1) * rest / pivots - n * shift
    if k == 1:
        return scaled(average(alone, k), unit)
    # And the same without probe i (rows) when j (columns) is left out.
    determinant = jnp.where(jnp.eye(k, dtype=bool), 1, pivots[:, None] * pivots - angle**2)
    taken = (bent_own[:, None] * pivots + bent_own * pivots[:, None] - 2 * angle * bent) / determinant
    ratio = (rest - others**2 / rest[:, None]) / (determinant / pivots[:, None])
    pairs = whole - taken + (n - k + 2) * ratio - n * shift
    return scaled(
        Estimate(jnp.mean(alone), jackknife(alone, pairs, epsilon(structure)), jnp.asarray(k, jnp.int32)), unit
    )
