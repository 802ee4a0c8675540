"""Lanczos tridiagonalization with full reorthogonalization, on pytrees, in one `lax.scan`."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from hessjax._arguments import as_integer, check_key
from hessjax._vectors import (
    as_vector,
    divide,
    draw,
    inner,
    noise_of,
    norm,
    or_one,
    scalar_dtype,
    subtract,
    usual_promotion,
)
from hessjax.krylov._basis import Basis
from hessjax.krylov._eigh import eigh
from hessjax.operators._operator import Operator, as_operator
from hessjax.operators._packing import Packed, Packing


class Lanczos(eqx.Module):
    """A Q = Q T + r e_mᵀ: an orthonormal basis Q of a Krylov space, and the tridiagonal T = QᵀAQ.

    After a breakdown (the space became invariant) `steps` is less than the number of rows, and whatever lies beyond it
    is zero.

    Attributes:
        basis: Q, the operator's structure with a leading axis `num_steps` on every leaf.
        diagonal: T's diagonal, (num_steps,).
        off_diagonal: T's off-diagonal, (num_steps - 1,), nonnegative.
        residual: r, not normalised.
        residual_norm: ‖r‖.
        steps: the dimension of the space, an integer scalar.
    """

    basis: PyTree[Float[Array, "num_steps ..."]]
    diagonal: Float[Array, " num_steps"]
    off_diagonal: Float[Array, " num_steps-1"]
    residual: PyTree
    residual_norm: Scalar
    steps: Int[Array, ""]

    def ritz(self) -> tuple[Float[Array, "*batch num_steps"], PyTree, Float[Array, "*batch num_steps"]]:
        """Ritz values, Ritz vectors and residual bounds.

        Returns:
            The first `steps` values ascending, the vectors stacked in the same order (leading axis `num_steps`), and
            ‖A y - θ y‖ for each. Beyond `steps` values and vectors are zero and the bound is infinite, because no such
            pair exists.
        """
        if self.diagonal.ndim > 1:  # of a `jax.vmap`
            return jax.vmap(Lanczos.ritz)(self)
        count = self.diagonal.size
        live = jnp.arange(count) < self.steps
        matrix = jnp.diag(self.diagonal) + jnp.diag(self.off_diagonal, 1) + jnp.diag(self.off_diagonal, -1)
        peak = jnp.max(jnp.abs(matrix))
        unit = or_one(peak)
        # At most three entries of a row are nonzero and none exceeds 1, so 4 sorts behind every Ritz value.
        matrix = jnp.where(live[:, None] & live[None, :], matrix / unit, 0) + jnp.diag(jnp.where(live, 0.0, 4.0))
        values, vectors = eigh(matrix.astype(self.diagonal.dtype))
        vectors = jnp.where(live[:, None] & live[None, :], vectors, 0)
        last = vectors[jnp.maximum(self.steps - 1, 0)]
        bounds = jnp.where(live, jnp.abs(last) * self.residual_norm, jnp.inf)
        stacked = jtu.tree_map(
            lambda rows: jnp.tensordot(vectors.T, rows, axes=1, precision=lax.Precision.HIGHEST).astype(rows.dtype),
            self.basis,
        )
        return jnp.where(live, values * unit, 0), stacked, bounds


def lanczos(
    op: Operator | Any,
    num_steps: Any,
    key: Any,
    *,
    v0: PyTree | None = None,
    like: PyTree | None = None,
) -> Lanczos:
    """Runs `num_steps` steps of the Lanczos iteration with full reorthogonalization.

    One product per step, and num_steps vectors of memory. Written with `lax.scan`: it runs inside `jit`, `vmap` and
    `scan`, and the operator is traced once.

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        num_steps: m, at least 1 and at most the operator's size n.
        key: draws the start vector, standard normal. May be None when `v0` is given.
        v0: the start vector instead; it need not be normalised.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A `Lanczos`. Ritz values at both ends of the spectrum converge first.

    Raises:
        ValueError: `num_steps` is out of range, neither `key` nor `v0` came, or `v0` has another structure.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.array([3.0, 1.0, 0.0, 0.0]) * v, like=jnp.zeros(4))
        >>> int(hj.lanczos(A, 4, jax.random.key(0)).steps)  # three distinct eigenvalues
        3

    Source: Golub and Van Loan, Matrix Computations (4th ed.), section 10.3.
    """
    op = as_operator(op, like)
    num_steps = as_integer("num_steps", num_steps)
    check_key(key, "lanczos")
    if not 1 <= num_steps <= op.size:
        raise ValueError(f"`lanczos` needs 1 <= `num_steps` <= {op.size}, the operator's size, got {num_steps}.")
    start = start_vector(op, key, v0, "lanczos")
    return _lanczos(op, start, num_steps, Packing.of(op.like))


def start_vector(op: Operator, key: PRNGKeyArray | None, v0: PyTree | None, caller: str) -> PyTree:
    """`v0` if given, else a standard normal vector.

    Raises:
        ValueError: neither came, or `v0` has another structure than the operator.
    """
    if v0 is not None:
        return as_vector(v0, op.structure, "v0")
    if key is None:
        raise ValueError(f"`{caller}` needs a `key`, such as `jax.random.key(0)`, or a start vector `v0`.")
    return draw(key, op.structure)


@eqx.filter_jit
@usual_promotion()
def _lanczos(op: Operator, start: PyTree, num_steps: int, packing: Packing) -> Lanczos:
    op, start = Packed(op, packing), packing.pack(start)
    dtype = scalar_dtype(start)
    position = jnp.arange(num_steps)

    def step(
        carry: tuple[Basis, PyTree, PyTree, Scalar, Scalar], index: Int[Array, ""]
    ) -> tuple[tuple[Basis, PyTree, PyTree, Scalar, Scalar], tuple[Scalar, Scalar]]:
        basis, last, residual, beta, noise = carry
        vector = divide(residual, beta)
        basis = basis.set_row(index, vector)
        image = op.product(vector)
        live = (position <= index) & (beta != 0)
        # The recurrence's own terms go first: then one pass over the rows is enough.
        own = inner(vector, image)
        residual = subtract(subtract(image, own, vector), beta, last)
        coefficients, residual, left = basis.orthogonalize(residual, live, live)
        alpha = own + coefficients[index]
        noise = jnp.maximum(noise, noise_of(image))
        left = jnp.where(left <= noise, 0, left).astype(dtype)
        return (basis, vector, residual, left, noise), (alpha, left)

    first, zero = norm(start), jtu.tree_map(jnp.zeros_like, start)
    # Before the first step there is no last vector, whatever the start's norm.
    carry = (Basis.zeros(op.structure, num_steps), zero, start, first, jnp.zeros((), dtype))
    (basis, _, residual, beta, _), (alphas, betas) = lax.scan(step, carry, position)
    steps = jnp.sum(jnp.concatenate([first[None] != 0, betas[:-1] != 0]), dtype=jnp.int32)
    residual = packing.unpack(jtu.tree_map(lambda leaf: jnp.where(beta == 0, 0, leaf).astype(leaf.dtype), residual))
    return Lanczos(packing.unpack(basis.stack(), batch=1), alphas, betas[:-1], residual, beta, steps)
