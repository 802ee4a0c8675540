"""`condition_number`: from both ends of a positive definite spectrum."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import PyTree

from hessjax.estimate._result import Estimate
from hessjax.krylov import eigsh
from hessjax.operators._operator import Operator, as_operator


def condition_number(op: Operator | Any, key: Any, *, tol: Any = 1e-3, like: PyTree | None = None) -> Estimate:
    """λmax / λmin of a positive definite operator.

    Two eigenvalues from one run of `hj.eigsh` at both ends. The low end of a damped Hessian lies in its bulk, and takes
    hundreds or thousands of products; an estimate from the nodes of a density would be far too small there.

    Args:
        op: a positive definite `hj.Operator`, such as `H.shift(damping)`, a function with `like=`, or a lineax one.
        key: draws the start.
        tol: of the two eigenpairs, as in `hj.eigsh`: the relative bound that comes back is at most about twice that.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A scalar. The standard error is no spread here but what the eigenvalues' error bounds leave open, to first
        order; infinite where they leave λmin = 0 open. NaN where λmin is negative beyond them. Differentiable.

    Raises:
        ValueError: the operator has fewer than two entries, or `tol` is out of range.
        TypeError: `op` is not an operator, or `key` no key.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.arange(1.0, 11) * v, like=jnp.zeros(10))
        >>> round(float(hj.condition_number(A, jax.random.key(0))), 3)
        10.0
    """
    op = as_operator(op, like)
    if op.size < 2:
        raise ValueError(f"`condition_number` needs an operator with at least two parameters, got {op.structure}.")
    pairs = eigsh(op, 2, key, which="BE", tol=tol, return_eigenvectors=False)
    low, high = pairs.eigenvalues
    bounds = lax.stop_gradient(pairs.error_bounds / jnp.abs(pairs.eigenvalues))
    indefinite = low < -pairs.error_bounds[0]  # and not only by rounding, as λmin = 0 may come out
    value = jnp.where(indefinite, jnp.nan, jnp.where(low > 0, high / low, jnp.inf))
    left_open = jnp.where(bounds[0] < 1, jnp.sum(bounds) * lax.stop_gradient(value), jnp.inf)
    return Estimate(value, jnp.where(indefinite, jnp.nan, left_open), pairs.num_matvecs)
