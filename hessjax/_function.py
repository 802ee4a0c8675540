"""Functions as pytrees: their arrays are leaves, and everything else is static."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu

from hessjax._reads import Same, Snapshot


@jtu.register_pytree_node_class
class Function:
    """A callable that passes through `jax.jit` as an argument, whatever it was made of.

    A plain function has no leaves. A `jax.tree_util.Partial` or an equinox module keeps its arrays as leaves. Two of
    them that differ in their arrays alone share one compiled program, as long as what they read from outside their
    arguments is the same.
    """

    def __init__(self, arrays: tuple[Any, ...], rest: tuple[Any, ...], treedef: Any):
        self.arrays = arrays
        self.rest = rest
        self.treedef = treedef

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """The arrays, and the key of the programs that they may share."""
        return self.arrays, (tuple(map(_hashable, self.rest)), self.treedef, Snapshot(self.static))

    @classmethod
    def tree_unflatten(cls, key: Any, arrays: Any) -> "Function":
        """The function that has this key and these arrays."""
        rest, treedef, _ = key
        return cls(tuple(arrays), tuple(item.value if isinstance(item, Same) else item for item in rest), treedef)

    @property
    def inner(self) -> Any:
        """The callable that it was made of."""
        leaves = [b if a is None else a for a, b in zip(self.arrays, self.rest, strict=True)]
        return self.treedef.unflatten(leaves)

    @property
    def static(self) -> Any:
        """That callable without its arrays."""
        return self.treedef.unflatten(self.rest)

    def __repr__(self) -> str:
        return eqx.tree_pformat(self.inner)

    def __call__(self, *args: Any) -> Any:
        return self.inner(*args)


def _hashable(value: Any) -> Any:
    """`value`, or where it has no hash, as a dataclass with a `__call__`, its identity."""
    try:
        hash(value)
    except Exception:  # whatever a user's `__hash__` raises
        return Same(value)
    return value


def as_function(function: Callable[..., Any], name: str) -> Function:
    """Splits a callable into its arrays and the rest.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(function):
        raise TypeError(f"`{name}` must be a function, got {function!r}.")
    if isinstance(function, Function):
        return function
    leaves, treedef = jtu.tree_flatten(function)
    arrays = tuple(leaf if eqx.is_array(leaf) else None for leaf in leaves)
    rest = tuple(None if eqx.is_array(leaf) else leaf for leaf in leaves)
    return Function(arrays, rest, treedef)
