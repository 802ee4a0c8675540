"""How the space of the top eigenvectors turns from one measurement to the next, and what lies in it."""

import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Scalar

from hessjax._vectors import combine, contract, divide, gram, norm, or_one, scalar_dtype
from hessjax.krylov._eigh import sequential_eigh


def overlap(vector: PyTree | None, basis: PyTree[Float[Array, "k ..."]]) -> Scalar:
    """‖Qᵀu‖² / ‖u‖² for orthonormal rows Q: the share of u that lies in their span. NaN for u = 0, and for None."""
    if vector is None:
        return jnp.full((), jnp.nan, scalar_dtype(basis))
    size = norm(vector)
    unit = jtu.tree_map(lambda leaf: leaf[None], divide(vector, size))
    return jnp.where(size > 0, jnp.sum(jnp.square(gram(basis, unit))), jnp.nan)


def continued(last: PyTree[Float[Array, "k ..."]], earlier: PyTree[Float[Array, "k ..."]]) -> PyTree:
    """Where a space that turned from `earlier` to `last` comes to if it goes on turning: V + (V - E EᵀV), as rows."""
    inside = combine(earlier, gram(earlier, last))
    return jtu.tree_map(lambda v, e: 2 * v - e, last, inside)


def nearness(vectors: PyTree[Float[Array, "k ..."]], rows: PyTree[Float[Array, "m ..."]]) -> Scalar:
    """The sum of the squared cosines between all vectors and all rows; zero rows count nothing."""
    squares = jnp.diagonal(gram(rows, rows))
    return jnp.sum(jnp.where(squares > 0, jnp.square(gram(vectors, rows)) / or_one(squares), 0))


def principal_angles(x: PyTree[Float[Array, "k ..."]], y: PyTree[Float[Array, "k ..."]]) -> Float[Array, " k"]:
    """The principal angles in radians between the spans of two stacks of k orthonormal vectors, ascending.

    Rows may be zero. With p and q other rows there are min(p, q) angles, in the places that end at p if p < q, counted
    from the k - q-th on; the other places are NaN.

    Each angle comes from its sine and its cosine both, since either alone loses half of the digits somewhere. The
    sines are the singular values of Y - X XᵀY.
    """
    cosines = gram(x, y)
    outside = jtu.tree_map(jnp.subtract, y, combine(x, cosines))
    squares = sequential_eigh(gram(outside, outside))[0]
    empty = [jnp.diagonal(gram(rows, rows)) == 0 for rows in (x, y)]  # such a row of Y counts as one within X: angle 0
    shared = contract(cosines, cosines, (0, 0), cosines.dtype) + jnp.diag(empty[1].astype(cosines.dtype))
    cosines = jnp.sqrt(jnp.maximum(sequential_eigh(shared)[0][::-1], 0))
    place = jnp.arange(empty[1].size) - jnp.sum(empty[1])
    real = (place >= 0) & (place < jnp.sum(~empty[0]))
    return jnp.where(real, jnp.arctan2(jnp.sqrt(jnp.maximum(squares, 0)), cosines), jnp.nan)
