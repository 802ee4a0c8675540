"""Inverse products: (A + δI) x = b for a positive definite A + δI, by conjugate gradients."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from hessjax._arguments import as_integer
from hessjax._vectors import (
    are_known_scalars,
    as_vector,
    divide,
    epsilon,
    inner,
    norm,
    or_one,
    scalar_dtype,
    subtract,
    usual_promotion,
)
from hessjax.operators._operator import Operator, as_operator, multiply


class Solution(eqx.Module):
    """The solution of a linear system, with what is known of its error.

    Attributes:
        value: x, with the operator's structure.
        residual: ‖b - (A + δI) x‖, absolute, from a product of its own.
        converged: whether the residual is at most tol · ‖b‖. Never true where a number is not finite.
        curvature: the Rayleigh quotient xᵀ(A + δI)x / xᵀx, zero for x = 0. A negative one proves that A + δI is not
            positive definite: then x, converged or not, solves no least-squares problem and is no descent direction. A
            positive one proves nothing.
    """

    value: PyTree[Array]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    curvature: Float[Array, ""]

    def __repr__(self) -> str:
        if not are_known_scalars(self.residual, self.converged, self.curvature):
            return eqx.tree_pformat(self)
        outcome = "converged" if self.converged else "not converged"
        return f"Solution({outcome}, residual {float(self.residual):.2g}, curvature {float(self.curvature):.4g})"


def solve(
    op: Operator | Any,
    b: PyTree,
    *,
    damping: Any = 0.0,
    tol: Any = None,
    maxiter: Any = None,
    like: PyTree | None = None,
) -> Solution:
    """Solves (A + δI) x = b by conjugate gradients: the inverse products of influence functions and Newton steps.

    The iteration is `jax.scipy.sparse.linalg.cg`; what this adds is the check of the result. It needs A + δI positive
    definite: a Gauss-Newton or Fisher matrix with δ > 0, or a Hessian damped beyond its most negative eigenvalue (see
    `hj.eigsh` with `which="SA"`). On an indefinite matrix it may break down, which the residual tells, or end at the
    solution all the same, where the curvature may tell. The error of x is at most residual / min |λ + δ|. Works inside
    `jit`, `vmap` and `scan`, and derivatives are those of the exact solution, in forward and reverse mode.

    Args:
        op: symmetric A.
        b: the right-hand side, a pytree of A's structure.
        damping: δ, a real scalar.
        tol: the residual to reach, relative to ‖b‖; None for the square root of the dtype's rounding unit. In floating
            point it is not reached below about the rounding unit times the condition number of A + δI.
        maxiter: the most iterations, one product each; None for 10 n.
        like: a pytree shaped as the vectors, when `op` is a plain function and `b` is not.

    Returns:
        A `Solution`. If CG does not converge within `maxiter`, the last iterate with `converged` False.

    Raises:
        ValueError: `b` does not have A's structure, `tol` is not a positive number, or `maxiter` is below 1.
        TypeError: `op` is not an operator, `damping` is no real scalar, or `maxiter` is not an integer.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.array([1.0, 3.0]) * v, like=jnp.zeros(2))
        >>> found = hj.solve(A, jnp.ones(2), damping=1.0)
        >>> [round(x, 5) for x in found.value.tolist()], bool(found.converged)
        ([0.5, 0.25], True)

    Source: Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, doi:10.6028/jres.049.044.
    """
    op = as_operator(op, b if like is None else like)
    b = as_vector(b, op.structure, "b")
    maxiter = 10 * op.size if maxiter is None else as_integer("maxiter", maxiter)
    if maxiter < 1:
        raise ValueError(f"`maxiter` must be at least 1, got {maxiter}.")
    return conjugate_gradients(op.shift(damping), b, _tolerance(tol, op), maxiter)


def _tolerance(tol: Any, op: Operator) -> Scalar:
    """`tol` as an array, so that a new one compiles nothing; put on the device explicitly, for transfer guards."""
    tol = epsilon(op.structure) ** 0.5 if tol is None else tol
    if not eqx.is_array_like(tol) or jnp.ndim(tol) != 0 or jnp.iscomplexobj(tol):
        raise ValueError(f"`tol` must be a number, got {tol!r}.")
    dtype = scalar_dtype(op.structure)
    if isinstance(tol, Tracer):
        return tol.astype(dtype)
    if not 0 < float(tol) < math.inf:
        raise ValueError(f"`tol` must be a finite positive number, got {tol}.")
    return jax.device_put(np.asarray(tol, dtype))


@eqx.filter_jit
@usual_promotion()
def conjugate_gradients(op: Operator, b: PyTree, tol: Scalar, maxiter: int) -> Solution:
    """What `solve` does once its arguments have been checked: A x = b to the relative residual `tol`."""
    # Of length one, so that squares neither overflow nor vanish; x is linear in b, and the length has no derivative.
    size = jax.lax.stop_gradient(norm(b))
    unit = or_one(size)
    structure = op.structure

    # CG's vectors are in one dtype, that of its scalars; the products are in the leaves' own.
    def matvec(vector: PyTree) -> PyTree:
        return _as(size.dtype, multiply(op, jtu.tree_map(lambda x, spec: x.astype(spec.dtype), vector, structure)))

    value, _ = cg(
        matvec,
        jtu.tree_map(lambda x: x / unit, _as(size.dtype, b)),
        tol=tol / 2,  # pyright: ignore[reportArgumentType] a traced one is fine
        maxiter=maxiter,
    )
    value = jtu.tree_map(lambda x, spec: (unit * x).astype(spec.dtype), value, structure)
    # CG's own residual drifts from the true one.
    image, length = multiply(op, value), norm(value)
    residual = norm(subtract(b, jnp.ones((), size.dtype), image))
    return Solution(value, residual, residual <= tol * size, inner(divide(value, length), divide(image, length)))


def _as(dtype: Any, vector: PyTree) -> PyTree:
    return jtu.tree_map(lambda x: x.astype(dtype), vector)
