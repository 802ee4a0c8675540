"""`apply_function`: f(A)v from a Krylov space."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree

from hessjax._arguments import as_integer
from hessjax._vectors import are_known_scalars, contract, matmul, noise_of, norm, usual_promotion
from hessjax.estimate._door import elementwise, needs_function
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

    def __repr__(self) -> str:
        if not are_known_scalars(self.error, self.num_matvecs):
            return eqx.tree_pformat(self)
        return f"Applied(error {float(self.error):.2g}, {int(self.num_matvecs)} products)"


def apply_function(
    f: Callable[[Array], Array], op: Operator | Any, v: PyTree, num_steps: Any = 50, *, like: PyTree | None = None
) -> Applied:
    """Computes f(A)v = Σᵢ f(λᵢ) vᵢ vᵢᵀv, from `num_steps` products and twice as many vectors of memory.

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
        the value is exact but for rounding. The error is not below what rounding leaves unknown of the eigenvalues,
        32 rounding units of the largest: much, where f is steep.

    Raises:
        ValueError: `num_steps` is below 1, `v` has another structure, or f is not elementwise.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.linspace(0.0, 1.0, 100) * v, like=jnp.zeros(100))
        >>> result = hj.apply_function(jnp.exp, A, jnp.ones(100), 10)
        >>> bool(jnp.allclose(result.value, jnp.exp(jnp.linspace(0.0, 1.0, 100)), atol=1e-5))
        True

    Source: Saad, Analysis of some Krylov subspace approximations to the matrix exponential operator,
    doi:10.1137/0729014.
    """
    needs_function("apply_function", f)
    op = as_operator(op, like)
    if (num_steps := as_integer("num_steps", num_steps)) < 1:
        raise ValueError(f"`apply_function` needs `num_steps >= 1`, got {num_steps}.")
    if op.size == 0:
        raise ValueError(f"`apply_function` needs an operator with at least one parameter, got {op.structure}.")
    num_steps = min(num_steps, op.size)
    run = lanczos(op, num_steps, None, v0=v)
    length = norm(jtu.tree_map(lambda leaf, like: jnp.asarray(leaf, like.dtype), v, op.structure))
    whole, half, noise = _rules(run, max(1, num_steps // 2))
    coefficients = _coefficients(f, *whole), _coefficients(f, *half)
    rounding = jnp.maximum(noise / 2 * jnp.linalg.norm(coefficients[0]), _blurred(f, *whole, noise=noise))
    return _assembled(run, length, coefficients, rounding)


@eqx.filter_jit
@usual_promotion()
def _rules(run: Lanczos, half: int) -> tuple[tuple[Array, Array], tuple[Array, Array], Array]:
    """Ritz values, and T's eigenvectors in columns, from all steps and from the first `half`; the basis's rounding."""
    rules = []
    for most in (run.diagonal.size, half):
        steps = jnp.minimum(run.steps, most)
        live = jnp.arange(run.diagonal.size) < steps
        diagonal, off_diagonal = jnp.where(live, run.diagonal, 0), jnp.where(live[1:], run.off_diagonal, 0)
        rules.append(tridiagonal_eigh(diagonal, off_diagonal, steps))
    return rules[0], rules[1], jnp.max(jax.vmap(noise_of)(run.basis))


def _coefficients(f: Callable[[Array], Array], values: Array, vectors: Array) -> Float[Array, " num_steps"]:
    """f(T) e₁."""
    return matmul(vectors, jnp.where(vectors[0] != 0, elementwise(f, values) * vectors[0], 0))


def _blurred(f: Callable[[Array], Array], values: Array, vectors: Array, noise: Array) -> Float[Array, ""]:
    """By how much f(T) e₁ changes where every Ritz value moves by what rounding leaves open."""
    here, step = elementwise(f, values), noise * jnp.max(jnp.abs(values))
    moved = (jnp.clip(values + side * step, values[0], values[-1]) for side in (-1, 1))
    change = jnp.max(jnp.stack([jnp.abs(elementwise(f, there) - here) for there in moved]), axis=0)
    # Orthogonal eigenvectors: the norm of the combination is that of the coefficients.
    return jnp.linalg.norm(jnp.where(vectors[0] != 0, change * vectors[0], 0))


@eqx.filter_jit
@usual_promotion()
def _assembled(run: Lanczos, length: Array, coefficients: tuple[Array, Array], rounding: Array) -> Applied:
    whole, half = coefficients
    value = jtu.tree_map(
        lambda rows: (length * contract(whole, rows, (0, 0), whole.dtype)).astype(rows.dtype), run.basis
    )
    change = jnp.where(run.residual_norm == 0, 0, jnp.linalg.norm(whole - half))
    return Applied(value, length * jnp.maximum(change, rounding), jnp.asarray(run.diagonal.size, jnp.int32))
