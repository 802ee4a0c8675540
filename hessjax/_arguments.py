"""Checks of arguments that every room shares."""

import operator as builtin
from typing import Any

import jax
import jax.numpy as jnp


def as_integer(name: str, value: Any) -> int:
    """`value` as a Python integer.

    Raises:
        TypeError: it is none, or not known while tracing.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        return builtin.index(value)
    except (TypeError, jax.errors.TracerIntegerConversionError):
        swapped = " Is it where the `key` should be?" if _is_key(value) else ""
        raise TypeError(f"`{name}` must be an integer known at compile time, got {value!r}.{swapped}") from None


def check_key(key: Any, caller: str) -> None:
    """Raises TypeError unless `key` is None or a JAX random key."""
    typed = _is_key(key)
    if typed and key.shape != ():
        raise TypeError(f"`{caller}` needs one key, got {key.shape} of them. Take one, or use `jax.vmap` over them.")
    raw = isinstance(key, jax.Array) and key.shape in ((2,), (4,)) and key.dtype == "uint32"  # threefry's, rbg's
    if key is not None and not typed and not raw:
        raise TypeError(f"`{caller}` needs a `key` such as `jax.random.key(0)`, got {key!r}.")


def needs_key(key: Any, caller: str) -> None:
    """Raises TypeError unless `key` is a JAX random key."""
    check_key(key, caller)
    if key is None:
        raise TypeError(f"`{caller}` needs a `key` such as `jax.random.key(0)`, got None.")


def _is_key(value: Any) -> bool:
    return isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
