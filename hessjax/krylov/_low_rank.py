"""What is known of an operator by its part in the span of a few vectors, for a solve with another one near to it."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from hessjax._vectors import combine, gram, matmul, stacked
from hessjax.krylov._eigh import sequential_eigh


class LowRank(eqx.Module):
    """An operator's part in the span of m orthonormal vectors, by its eigenpairs.

    Attributes:
        values: (m,), the most wanted first.
        vectors: the operator's structure with a leading axis m. Zero rows, which come last, say nothing.
    """

    values: Float[Array, " m"]
    vectors: PyTree[Float[Array, "m ..."]]


def start_rows(
    model: LowRank, first: PyTree[Float[Array, "k ..."]]
) -> tuple[PyTree[Float[Array, "rows ..."]], Float[Array, "rows rows"]]:
    """Orthonormal rows, m + k, that span the model's vectors and `first`; and the model's matrix in their coordinates.

    Those nearest to `first` come first, those that are zero last. Where `first` is zero they are the model's own.
    Vectors that are orthonormal but for rounding become so to its square (a step of Newton and Schulz), or rounding
    would add up over a training run.
    """
    m, k, dtype = model.values.size, jtu.tree_leaves(first)[0].shape[0], model.values.dtype

    def polished(change: Array, rows: PyTree, products: Array) -> PyTree:
        return combine(rows, matmul(1.5 * jnp.eye(len(change), dtype=dtype) - 0.5 * products, change))

    def as_they_are() -> tuple[PyTree, Array]:
        rows = polished(jnp.eye(m, dtype=dtype), model.vectors, gram(model.vectors, model.vectors))
        return stacked(rows, jtu.tree_map(jnp.zeros_like, first)), jnp.diag(values)

    def turned() -> tuple[PyTree, Array]:
        beyond = first
        for _ in range(2):
            inside = combine(model.vectors, gram(model.vectors, beyond))
            beyond = jtu.tree_map(jnp.subtract, beyond, inside)
        squares, axes = sequential_eigh(gram(beyond, beyond))
        least = jnp.maximum(1e-6, 1e-4 * jnp.max(squares))  # shorter rows would be orthogonal to few digits
        unit = jnp.where(squares > least, axes / jnp.sqrt(jnp.maximum(squares, least)), 0)
        rows = stacked(model.vectors, combine(beyond, unit))
        products, shares = gram(rows, rows), gram(rows, first)
        held = jnp.diagonal(products) > 0.5
        ranks = jnp.arange(k, 0, -1, dtype=dtype)
        near = matmul(shares * ranks, shares.T) + 0.1 * jnp.diag(held.astype(dtype))  # 0.1: before rows that are zero
        change = sequential_eigh(near)[1][:, ::-1]
        change = jnp.where(jnp.arange(m + k) < jnp.sum(held), change, 0)
        return polished(change, rows, products), matmul(change.T * values, change)

    values = jnp.concatenate([model.values, jnp.zeros(k, dtype)])
    given = [jnp.any(leaf != 0) for leaf in jtu.tree_leaves(first)]
    return lax.cond(jnp.any(jnp.stack(given)), turned, as_they_are)
