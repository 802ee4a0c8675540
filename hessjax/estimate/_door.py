"""Checks of arguments that every estimator shares."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from hessjax._arguments import as_integer
from hessjax.operators._operator import Operator


def needs_entries(op: Operator, caller: str) -> None:
    """Raises ValueError for vectors without entries."""
    if op.size == 0:
        raise ValueError(f"`{caller}` needs an operator with at least one parameter, got {op.structure}.")


def at_least(least: int, name: str, value: Any, caller: str) -> int:
    """`value` as a Python integer.

    Raises:
        ValueError: it is below `least`.
        TypeError: it is no integer.
    """
    if (number := as_integer(name, value)) < least:
        raise ValueError(f"`{caller}` needs `{name} >= {least}`, got {number}.")
    return number


def refuse_method(caller: str, method: Any, methods: Iterable[str]) -> None:
    """Raises ValueError unless `method` is one of `methods`."""
    if method not in (known := list(methods)):
        raise ValueError(f"`{caller}` knows the methods {', '.join(map(repr, known))}, got {method!r}.")


def needs_function(caller: str, f: Any) -> None:
    """Raises TypeError unless `f` can be called."""
    if not callable(f):
        raise TypeError(f"`{caller}` needs a function of an array of eigenvalues, such as `jnp.log`, got {f!r}.")


def elementwise(f: Callable[[Array], Array], values: Array) -> Array:
    """F of every value.

    Raises:
        ValueError: f returns another shape; a scalar stands for a constant.
    """
    result = jnp.asarray(f(values))
    if result.shape not in ((), values.shape):
        raise ValueError(f"f must work elementwise, but made {result.shape} of {values.shape}.")
    return jnp.broadcast_to(result, values.shape)
