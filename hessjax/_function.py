"""Functions as pytrees: their arrays are leaves, and everything else is static.

And how they are called: with checked arguments, in full precision.
"""

import contextlib
import operator as builtin
import types
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer


class Function(eqx.Module):
    """A callable that passes through `jax.jit` as an argument, whatever it was made of.

    A plain function has no leaves. A `jax.tree_util.Partial` or an equinox module keeps its arrays as leaves. Two of
    them that differ in their arrays alone share one compiled program.
    """

    arrays: tuple[Any, ...]
    rest: tuple[Any, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    @property
    def inner(self) -> Any:
        """The callable that it was made of."""
        leaves = [b if a is None else a for a, b in zip(self.arrays, self.rest, strict=True)]
        return self.treedef.unflatten(leaves)

    def __call__(self, *args: Any) -> Any:
        return self.inner(*args)


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


def full_precision() -> contextlib.AbstractContextManager[None]:
    """Where matrix products and convolutions of unstated precision are computed in their own dtype.

    A GPU shortens float32 operands to 10 bits of mantissa (TF32) unless told otherwise. Forward values stand that; a
    curvature product is then wrong by 5e-4 of its norm and as asymmetric, so that small eigenvalues drown. What the
    user chose is kept: an explicit `precision=`, or `jax.default_matmul_precision`.
    """
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue] added at run time
    return contextlib.nullcontext() if chosen is not None else jax.default_matmul_precision("highest")


def closes_over_tracers(function: Any) -> bool:
    """Whether a function, or one that it refers to, closes over an array that is being traced."""
    seen: set[int] = set()

    def holds(value: Any) -> bool:
        if id(value) in seen:
            return False
        seen.add(id(value))
        if isinstance(value, Tracer):
            return True
        if isinstance(value, Function):
            return any(holds(leaf) for leaf in value.rest)
        if isinstance(value, types.MethodType):
            return holds(value.__self__) or holds(value.__func__)
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            return any(holds(item) for item in (*cells, *(value.__defaults__ or ())))
        if hasattr(value, "__wrapped__"):
            return holds(value.__wrapped__)
        leaves = jtu.tree_leaves(value)
        return any(holds(leaf) for leaf in leaves if leaf is not value)

    return holds(function)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a variable that is not assigned yet
        return False


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
        raise TypeError(f"`{name}` must be an integer known at compile time, got {value!r}.") from None


def check_key(key: Any, caller: str) -> None:
    """Raises TypeError unless `key` is None or a JAX random key."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
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
