"""Estimates from a fixed number of products, or from as many as a wanted error takes.

A wanted error is reached in rounds: each doubles the random vectors of all rounds before it and keeps what they told,
and the run ends when the standard error is small enough. Two means that agree prove nothing and end nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from hessjax._vectors import norm
from hessjax.estimate._result import Estimate
from hessjax.operators._operator import Operator

FIRST = 16  # random vectors in the first round: fewer leave their own spread too uncertain to stop on


Told = TypeVar("Told", bound=Estimate)


@dataclass(frozen=True)
class Method(Generic[Told]):
    """How products become an estimate.

    Attributes:
        gather: `(op, keys, known) -> data` draws a vector for each key, multiplies, and adds what it learns to what an
            earlier call gathered (None at first).
        tell: from all data to the estimate, at no product.
        cost: products per key.
    """

    gather: Callable[[Operator, Array, Any], Any]
    tell: Callable[[Any], Told]
    cost: int


def as_tolerance(caller: str, rtol: Any) -> Float[Array, ""] | None:
    """A relative error as an array, so that a new one is no new program.

    Raises:
        ValueError: it is no real scalar; or it is known, and negative or NaN.
    """
    if rtol is None:
        return None
    if not eqx.is_array_like(rtol) or jnp.ndim(rtol) != 0 or jnp.iscomplexobj(rtol):
        raise ValueError(f"`{caller}` needs a real scalar `rtol`, got {rtol!r}.")
    if not isinstance(rtol, Tracer) and not np.all(np.asarray(rtol) >= 0):
        raise ValueError(f"`{caller}` needs `rtol >= 0`, got {rtol}.")
    return jnp.asarray(rtol, float)


def run(
    op: Operator, num_matvecs: int, key: PRNGKeyArray, method: Method[Told], rtol: Any, exact: Callable[[int], Told]
) -> Told:
    """An estimate from at most `num_matvecs` products.

    Args:
        op: A.
        num_matvecs: a ceiling.
        key: draws all random vectors.
        method: how they are used.
        rtol: a relative error that is enough, or None. Of a pytree it is that of the whole, in the 2-norm.
        exact: from the products spent before to what n more tell without chance.
    """
    n = op.size
    if n <= num_matvecs and (rtol is None or n <= FIRST * method.cost):
        return exact(0)
    keys = jax.random.split(key, min(n, num_matvecs) // method.cost)
    if rtol is None:
        return method.tell(method.gather(op, keys, None))
    ends = _ends(keys.shape[0])

    def done(estimate: Told) -> Bool[Array, ""]:
        return ~(norm(estimate.stderr) > rtol * norm(estimate.value))  # NaN ends the run: it stays NaN

    def after(known: Any, index: int) -> Told:
        start, end = ends[index], ends[index + 1]
        data = method.gather(op, keys[start:end], known)
        estimate = method.tell(data)
        if index + 2 < len(ends):
            return _cond(done(estimate), lambda: estimate, lambda: after(data, index + 1))
        if num_matvecs >= 2 * n:
            return _cond(done(estimate), lambda: estimate, lambda: exact(end * method.cost))
        return estimate

    return after(None, 0)


def _ends(count: int) -> list[int]:
    """0, 16, 32, 64, ..., count; a last round of less than half of what went before joins the one before it."""
    ends = [0, min(FIRST, count)]
    while ends[-1] < count:
        following = 2 * ends[-1]
        ends.append(count if 1.5 * following > count else following)
    return ends


def _cond(predicate: Array, yes: Callable[[], Told], no: Callable[[], Told]) -> Told:
    """`lax.cond` on results that differ in nothing but the weakness of their types."""

    def strong(function: Callable[[], Told]) -> Callable[[], Told]:
        return lambda: jtu.tree_map(lambda x: lax.convert_element_type(x, jnp.result_type(x)), function())

    return lax.cond(predicate, strong(yes), strong(no))
