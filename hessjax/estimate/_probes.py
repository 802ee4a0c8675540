"""Random probe vectors, and work on many of them at a time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from hessjax._vectors import divide, draw, norm, size_of
from hessjax.operators._operator import Operator, multiply_each

BATCH = 32  # products that run together where nothing else is asked for


def on_sphere(key: PRNGKeyArray, structure: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """A vector drawn uniformly from the unit sphere."""
    vector = draw(key, structure)
    return divide(vector, norm(vector))


def on_long_sphere(key: PRNGKeyArray, structure: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """A vector drawn uniformly from the sphere of radius √n: E zzᵀ = I."""
    length = size_of(structure) ** 0.5
    return jtu.tree_map(lambda leaf: leaf * length, on_sphere(key, structure))


def signs(key: PRNGKeyArray, structure: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """A vector of independent random signs, one key per leaf."""
    leaves, treedef = jtu.tree_flatten(structure)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [jax.random.rademacher(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )


def in_batches(function: Callable[[Any], PyTree], batched: Any, size: int = BATCH) -> PyTree:
    """`function` of slices of the leading axis, at most `size` long, one after another; its results concatenated.

    Unlike `lax.map(..., batch_size=size)` it hands the function a whole slice, which may then share work.
    """
    count = jtu.tree_leaves(batched)[0].shape[0]
    if count <= size:
        return function(batched)
    whole, rest = divmod(count, size)

    def cut(leaf: Array) -> Array:
        return leaf[: whole * size].reshape(whole, size, *leaf.shape[1:])

    out = lax.map(function, jtu.tree_map(cut, batched))
    out = jtu.tree_map(lambda leaf: leaf.reshape(whole * size, *leaf.shape[2:]), out)
    if not rest:
        return out
    last = function(jtu.tree_map(lambda leaf: leaf[whole * size :], batched))
    return jtu.tree_map(lambda first, second: jnp.concatenate([first, second]), out, last)


def products(op: Operator, block: PyTree[Float[Array, "count ..."]], size: int = BATCH) -> PyTree:
    """A applied to every vector of a block, `size` at a time."""
    return in_batches(partial(multiply_each, op), block, size)
