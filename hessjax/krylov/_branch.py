"""Branches, as the device takes them best.

On a CPU a branch that is not taken costs nothing. On an accelerator the host must read the predicate first, some 15 µs
on an H100, and every array that a branch hands on is copied by a kernel of its own, taken or not. A side that works on
little costs less than that: there both are computed, and one is chosen. `jax.vmap` does the same, so what runs under it
runs here.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax
from jaxtyping import Array, Bool

from hessjax._vectors import select

_LITTLE = 1 << 23  # entries, which an H100 reads in 10 µs

T = TypeVar("T")


def better_computed(entries: int) -> bool:
    """Whether a pass over this many numbers takes less time than the decision that it is not needed.

    Decided by JAX's default device, when the program is traced. A program that runs elsewhere is right all the same.
    """
    return jax.default_backend() != "cpu" and entries <= _LITTLE


def either(when: Bool[Array, ""], true: Callable[[], T], false: Callable[[], T], *, entries: int) -> T:
    """`true()` if `when`, else `false()`; neither side touches more than `entries` numbers."""
    if better_computed(entries):
        return select(when, true(), false())
    return lax.cond(when, true, false)
