"""Functions as pytrees: their arrays are leaves, and everything else is static."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu


class Function(eqx.Module):
    """A callable that passes through `jax.jit` as an argument, whatever it was made of.

    A plain function has no leaves. A `jax.tree_util.Partial` or an equinox module keeps its arrays as leaves. Two of
    them that differ in their arrays alone share one compiled program.
    """

    arrays: tuple[Any, ...]
    rest: tuple[Any, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    def __call__(self, *args: Any) -> Any:
        leaves = [b if a is None else a for a, b in zip(self.arrays, self.rest, strict=True)]
        return self.treedef.unflatten(leaves)(*args)


def as_function(function: Callable[..., Any]) -> Function:
    """Splits a callable into its arrays and the rest.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(function):
        raise TypeError(f"Needs a function, got {type(function).__name__}.")
    if isinstance(function, Function):
        return function
    leaves, treedef = jtu.tree_flatten(function)
    arrays = tuple(leaf if eqx.is_array(leaf) else None for leaf in leaves)
    rest = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
    return Function(arrays, rest, treedef)
