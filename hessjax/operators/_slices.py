"""Data with the examples on the leading axis, whole or in slices.

What flows in: a pytree of arrays. What flows out: their common length, and the mean of a function over all examples,
from its means over slices in a loop inside the program.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

from hessjax._arguments import as_integer


def count_examples(args: PyTree) -> int:
    """The common length of the leading axes in `args`.

    Raises:
        ValueError: there is none, or they differ.
    """
    lengths = {jtu.keystr(path): leaf.shape[0] for path, leaf in jtu.tree_leaves_with_path(args) if _is_sliced(leaf)}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            "Data must have one leading length, at least 1, over all its arrays, got "
            f"{lengths or 'no array'}. Arrays that are not per example belong in a closure or in the parameters."
        )
    return next(iter(lengths.values()))


def as_batch_size(batch_size: Any, caller: str) -> int | None:
    """`batch_size` as an integer, or None for all examples at once.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1.
    """
    if batch_size is not None and (batch_size := as_integer("batch_size", batch_size)) < 1:
        raise ValueError(f"`{caller}` needs `batch_size >= 1`, or None for one slice, got {batch_size}.")
    return batch_size


def mean_over_slices(
    function: Callable[[PyTree], PyTree[Array]], args: PyTree, batch_size: int, like: PyTree[Array]
) -> PyTree[Array]:
    """Σ_b (n_b / N) function(slice b): the mean over N examples, from means over slices of at most `batch_size`.

    `like` has the shapes and dtypes of function's values. The slices run in one `lax.scan`, the remainder after it.
    """
    count = count_examples(args)
    whole, rest = divmod(count, batch_size)
    sliced, fixed = eqx.partition(args, _is_sliced)

    # Slices are read in place: a stack of them would copy the data wherever there is a remainder.
    def weighted(start_at: Any, examples: int) -> PyTree:
        part = jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, start_at, examples), sliced)
        value = function(eqx.combine(part, fixed))
        return jtu.tree_map(lambda x, total: (examples / count) * x.astype(total.dtype), value, start)

    def step(total: PyTree, index: Array) -> tuple[PyTree, None]:
        return jtu.tree_map(jnp.add, total, weighted(index * batch_size, batch_size)), None

    # In half precision a running sum of small terms would stand still.
    start = jtu.tree_map(lambda x: jnp.zeros(x.shape, jnp.result_type(x.dtype, jnp.float32)), like)
    total = start
    if whole:
        total, _ = jax.lax.scan(step, start, jnp.arange(whole))
    if rest:
        total = jtu.tree_map(jnp.add, total, weighted(whole * batch_size, rest))
    return jtu.tree_map(lambda x, y: x.astype(y.dtype), total, like)


def _is_sliced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim > 0
