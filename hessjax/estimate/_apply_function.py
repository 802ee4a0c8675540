"""`apply_function`: f(A)v from a Krylov space."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from hessjax._arguments import as_integer
from hessjax._vectors import contract, matmul, norm
from hessjax.estimate._tridiagonal import tridiagonal_eigh
from hessjax.krylov._lanczos import Lanczos, lanczos
from hessjax.operators._operator import Operator, as_operator


class Applied(eqx.Module):
    """A function of an operator, applied to a vector.

    Attributes:
        value: f(A)v, of the operator's structure.
        error: an estimate of ‖value - f(A)v‖₂.
        num_matvecs: products that were spent.
    """

    value: PyTree[Float[Array, "..."]]
    error: Float[Array, ""]
    num_matvecs: Int[Array, ""]


def apply_function(
    f: Callable[[Array], Array], op: Operator | Any, v: PyTree, num_steps: Any = 50, *, like: PyTree | None = None
) -> Applied:
    """Computes f(A)v = Σᵢ f(λᵢ) vᵢ vᵢᵀv, from `num_steps` products and as many vectors of memory.

    The approximation ‖v‖ Q f(T) e₁ in the Krylov space of v, with full reorthogonalization: exact for polynomials of
    degree below num_steps. For A⁻¹v, `hj.solve` stops by itself. Not differentiable.

    Args:
        f: elementwise on an array, finite between the smallest and the largest eigenvalue.
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        v: a vector of the operator's structure.
        num_steps: at least 1; clamped to the operator's size.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        An `Applied`. Its error is the change between half of the steps and all of them: too large by far once the
        iteration has converged, about right while it is slow, and no bound. Where the Krylov space became invariant
        the value is exact but for rounding, which is then the error.

    Raises:
        ValueError: `num_steps` is below 1, or `v` has another structure.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.linspace(0.0, 1.0, 100) * v, like=jnp.zeros(100))
        >>> result = hj.apply_function(jnp.exp, A, jnp.ones(100), 10)
        >>> bool(jnp.allclose(result.value, jnp.exp(jnp.linspace(0.0, 1.0, 100)), atol=1e-5))
        True

    Source: Saad, Analysis of some Krylov subspace approximations to the matrix exponential operator,
    doi:10.1137/0729014.
    """
    op = as_operator(op, like)
    if (num_steps := as_integer("num_steps", num_steps)) < 1:
        raise ValueError(f"`apply_function` needs `num_steps >= 1`, got {num_steps}.")
    if op.size == 0:
        raise ValueError(f"`apply_function` needs an operator with at least one parameter, got {op.structure}.")
    num_steps = min(num_steps, op.size)
    run = lanczos(op, num_steps, None, v0=v)
    length = norm(jtu.tree_map(lambda leaf, like: jnp.asarray(leaf, like.dtype), v, op.structure))
    whole = _coefficients(f, run, jnp.minimum(run.steps, num_steps))
    half = _coefficients(f, run, jnp.minimum(run.steps, max(1, num_steps // 2)))
    value = jtu.tree_map(lambda rows: length * contract(whole, rows, (0, 0), whole.dtype), run.basis)
    value = jtu.tree_map(lambda leaf, like: leaf.astype(like.dtype), value, op.structure)
    rounding = 16 * jnp.finfo(whole.dtype).eps * length * jnp.linalg.norm(whole)
    change = jnp.where(run.residual_norm == 0, 0, length * jnp.linalg.norm(whole - half))
    return Applied(value, jnp.maximum(change, rounding), jnp.asarray(num_steps, jnp.int32))


def _coefficients(f: Callable[[Array], Array], run: Lanczos, steps: Array) -> Float[Array, " num_steps"]:
    """f(T) e₁ for the leading part of T."""
    live = jnp.arange(run.diagonal.size) < steps
    diagonal, off_diagonal = jnp.where(live, run.diagonal, 0), jnp.where(live[1:], run.off_diagonal, 0)
    values, vectors = tridiagonal_eigh(diagonal, off_diagonal, steps)
    weights = jnp.where(vectors[0] != 0, f(values) * vectors[0], 0)
    return matmul(vectors, weights)
