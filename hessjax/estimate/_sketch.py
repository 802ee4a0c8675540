"""Random vectors, their images, and what each would be told by all the others.

The estimators here project A on the span of its images of k random vectors, and correct with what the projection leaves
out, seen by a vector that the projection does not know. Every one of the k vectors takes that part in turn: its span is
that of the other k - 1 images. With Y = AΩ = QR, leaving out the ith image takes from the span of Q the one direction
Q sᵢ that is orthogonal to all other images: sᵢ is the ith column of R⁻ᵀ, normalised.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from hessjax._vectors import (
    divide,
    epsilon,
    gram,
    inner,
    norm,
    or_one,
    row_structure,
    scalar_dtype,
    stacked,
    structure_of,
)
from hessjax.estimate._probes import products
from hessjax.krylov._basis import Basis
from hessjax.operators._operator import Operator

Block = PyTree[Float[Array, "k ..."]]


class Sketch(eqx.Module):
    """Ω, Y = AΩ, an orthonormal basis Q of Y's columns, and Z = AQ. Vectors have a leading axis k.

    A basis vector is zero where an image lies within rounding in the span of those before it. Derivatives pass through
    Y and Z, which are linear in A, and hold Q and S fixed: estimates whose expectation does not depend on Q then have
    derivatives of the right expectation.

    Attributes:
        probes: Ω.
        images: Y / unit.
        basis: Q.
        basis_images: Z / unit.
        left_out: S, (k, k), with sᵢ in column i.
        coordinates: QᵀΩ, (k, k).
        rank: the number of basis vectors that are not zero.
        unit: the largest entry of Y, which keeps squares within range.
    """

    probes: Block
    images: Block
    basis: Block
    basis_images: Block
    left_out: Float[Array, "k k"]
    coordinates: Float[Array, "k k"]
    rank: Int[Array, ""]
    unit: Float[Array, ""]

    @property
    def size(self) -> int:
        """The number of entries of a vector."""
        return sum(leaf.size // leaf.shape[0] for leaf in jtu.tree_leaves(self.probes))

    @property
    def lengths(self) -> Float[Array, " k"]:
        """The probes' squared norms."""
        return jax.vmap(inner)(self.probes, self.probes)

    @property
    def removed(self) -> Float[Array, " k"]:
        """The dimension that leaving out the ith image takes from the span: 1, or 0 if the others span it as well."""
        live = jnp.max(jnp.abs(self.coordinates), axis=1, keepdims=True) > 0
        return jnp.sum(jnp.where(live, self.left_out, 0) ** 2, axis=0)


def sketch(draw: Callable[..., PyTree], op: Operator, keys: Array, known: Sketch | None) -> Sketch:
    """Draws a vector for each of k keys and multiplies twice: 2k products, and memory for 4k vectors.

    Args:
        draw: from a key and a structure to a vector.
        op: A, on plain vectors.
        keys: one for each vector.
        known: an earlier sketch, which is extended, or None.
    """
    structure = structure_of(op.like)
    probes = jax.vmap(lambda key: draw(key, structure))(keys)
    images = products(op, probes)
    if known is not None:
        probes, images = stacked(known.probes, probes), stacked(_times(known.images, known.unit), images)
    unit = lax.stop_gradient(largest(images))
    old = None if known is None else known.basis
    basis = orthonormal(_times(lax.stop_gradient(images), 1 / unit), old)
    basis_images = products(op, jtu.tree_map(lambda leaf: leaf[-keys.shape[0] :], basis))
    if known is not None:
        basis_images = stacked(_times(known.basis_images, known.unit), basis_images)
    images, basis_images = (_times(block, 1 / unit) for block in (images, basis_images))
    triangle = gram(basis, lax.stop_gradient(images))
    alive = jax.vmap(norm)(basis) > 0
    return Sketch(
        probes,
        images,
        basis,
        basis_images,
        _left_out(triangle, alive, epsilon(structure)),
        gram(basis, probes),
        jnp.sum(alive),
        unit,
    )


def _times(block: Block, factor: Float[Array, ""]) -> Block:
    return jtu.tree_map(lambda leaf: (leaf * factor).astype(leaf.dtype), block)


def largest(block: PyTree) -> Float[Array, ""]:
    """The largest magnitude among all entries, and 1 if that is 0."""
    peaks = [jnp.max(jnp.abs(leaf), initial=0) for leaf in jtu.tree_leaves(block)]
    peak = jnp.max(jnp.stack([peak.astype(scalar_dtype(block)) for peak in peaks]))
    return or_one(peak)


def minus(x: Block, y: Block) -> Block:
    return jtu.tree_map(jnp.subtract, x, y)


def orthonormal(block: Block, known: PyTree[Float[Array, "m ..."]] | None = None) -> Block:
    """Gram-Schmidt, with a second pass where the first one cancelled; dependent vectors become zero.

    Args:
        block: the vectors.
        known: what the first of them became in an earlier call.
    """
    structure = row_structure(block)
    count = jtu.tree_leaves(block)[0].shape[0]
    start = 0 if known is None else jtu.tree_leaves(known)[0].shape[0]
    position = jnp.arange(count)

    def keep(basis: Basis, item: tuple[Array, Any]) -> tuple[Basis, None]:
        return basis.set_row(*item), None

    def step(basis: Basis, item: tuple[Array, Any]) -> tuple[Basis, None]:
        index, vector = item
        before = position < index
        _, rest, left = basis.orthogonalize(vector, before, before)
        return basis.set_row(index, divide(rest, left)), None

    basis = Basis.zeros(structure, count)
    if known is not None:
        basis, _ = lax.scan(keep, basis, (position[:start], known))
    return lax.scan(step, basis, (position[start:], jtu.tree_map(lambda leaf: leaf[start:], block)))[0].stack()


def _left_out(triangle: Float[Array, "k k"], alive: Array, eps: float) -> Float[Array, "k k"]:
    """S, from R. A zero row of Q gets a small diagonal entry in R: its direction then leaves the span as it is."""
    k = triangle.shape[0]
    scale = jnp.max(jnp.abs(triangle))
    triangle = jnp.triu(triangle) / or_one(scale)
    diagonal = jnp.diagonal(triangle)
    floor = jnp.asarray(eps, triangle.dtype)
    safe = jnp.where(alive & (jnp.abs(diagonal) > floor), diagonal, floor)
    triangle = triangle - jnp.diag(diagonal) + jnp.diag(safe)
    solved = lax.linalg.triangular_solve(triangle, jnp.eye(k, dtype=triangle.dtype), left_side=True, transpose_a=True)
    solved = solved / jnp.max(jnp.abs(solved), axis=0)
    return solved / jnp.linalg.norm(solved, axis=0)
