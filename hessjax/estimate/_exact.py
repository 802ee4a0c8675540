"""What n products tell without chance."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from hessjax._vectors import inner, size_of
from hessjax.estimate._probes import BATCH
from hessjax.operators._operator import Operator, multiply


def over_columns(op: Operator, function: Callable[[PyTree, PyTree], Array]) -> Float[Array, "n ..."]:
    """`function(e, A e)` for every unit vector e, in the order of the raveled entries; n products, a few at a time."""
    leaves, treedef = jtu.tree_flatten(op.structure)
    starts = [sum(size_of(leaf) for leaf in leaves[:i]) for i in range(len(leaves))]

    def column(index: Array) -> Array:
        parts = [
            (start + jnp.arange(size_of(leaf)) == index).astype(leaf.dtype).reshape(leaf.shape)
            for start, leaf in zip(starts, leaves, strict=True)
        ]
        unit = treedef.unflatten(parts)
        return function(unit, multiply(op, unit))

    return jax.lax.map(column, jnp.arange(op.size), batch_size=min(BATCH, op.size))


def exact_diagonal(op: Operator) -> PyTree[Float[Array, "..."]]:
    """The diagonal, in the operator's structure."""
    entries = over_columns(op, inner)
    leaves, treedef = jtu.tree_flatten(op.structure)
    parts, start = [], 0
    for leaf in leaves:
        parts.append(entries[start : start + size_of(leaf)].reshape(leaf.shape).astype(leaf.dtype))
        start += size_of(leaf)
    return treedef.unflatten(parts)
