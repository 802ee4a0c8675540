"""The Lanczos iteration from many start vectors at once, in one program.

All probes take a step together: one batched product, one batched pass over the basis. A branch is taken for all of
them, so that it stays a branch; under `vmap` it would become a selection between both outcomes, computed.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from hessjax._vectors import contract, divide, inner, noise_of, norm, or_one, scalar_dtype, subtract
from hessjax.krylov._basis import Basis
from hessjax.krylov._eigh import sequential_eigh
from hessjax.operators._operator import Operator, multiply_each


class Tridiagonals(eqx.Module):
    """T = QᵀAQ of every probe; beyond `steps`, where its Krylov space became invariant, all is zero.

    Attributes:
        diagonal: (probes, num_steps).
        off_diagonal: (probes, num_steps - 1), nonnegative.
        residual_norm: (probes,), ‖A Q - Q T‖.
        steps: (probes,), the dimension of the space.
    """

    diagonal: Float[Array, "probes num_steps"]
    off_diagonal: Float[Array, "probes num_steps-1"]
    residual_norm: Float[Array, " probes"]
    steps: Int[Array, " probes"]

    def leading(self, size: int) -> "Tridiagonals":
        """What the first `size` steps would have given, in arrays of the same shape."""
        within = jnp.arange(self.diagonal.shape[1]) < size
        return Tridiagonals(
            jnp.where(within, self.diagonal, 0),
            jnp.where(within[1:], self.off_diagonal, 0),
            jnp.where(self.steps > size, self.off_diagonal[:, size - 1], self.residual_norm)
            if size < self.diagonal.shape[1]
            else self.residual_norm,
            jnp.minimum(self.steps, size),
        )


class Carry(eqx.Module):
    """What a step hands to the next, for every probe.

    Attributes:
        basis: orthonormal rows, those of the steps taken.
        residual: orthogonal to them, not normalised.
        beta: its norm, 0 once the space is invariant.
        last: the newest row.
        noise: the largest `noise_of` a product so far.
    """

    basis: Basis
    residual: PyTree[Float[Array, "probes ..."]]
    beta: Float[Array, " probes"]
    last: PyTree[Float[Array, "probes ..."]]
    noise: Float[Array, " probes"]


def tridiagonalize(
    op: Operator, starts: PyTree[Float[Array, "probes ..."]], num_steps: int, removed: PyTree | None
) -> tuple[Tridiagonals, Basis]:
    """Runs `num_steps` steps from every start vector, with full reorthogonalization.

    The three-term recurrence comes first, so that one pass over the basis is enough; a second one runs only if some
    probe lost more than 1/√2 of its norm in the first.

    Args:
        op: A.
        starts: one vector per probe.
        num_steps: m, at most A's size.
        removed: orthonormal vectors with a leading axis. The iteration stays in their orthogonal complement, and sees
            the part of A that maps it to itself. None for no such vectors.

    Returns:
        T of every probe, and the probes' bases: num_steps vectors of memory for each.
    """
    dtype = scalar_dtype(op.structure)
    position = jnp.arange(num_steps)
    norms = jax.vmap(norm)

    def sweep(basis: Basis, vectors: PyTree, read: Bool[Array, " num_steps"]) -> PyTree:
        vectors = jax.vmap(lambda basis, vector: basis.project(vector, read, read)[1])(basis, vectors)
        return without(removed, vectors)

    def step(carry: Carry, index: Int[Array, ""]) -> tuple[Carry, tuple[Array, Array]]:
        vectors = jax.vmap(divide)(carry.residual, carry.beta)
        basis = jax.vmap(lambda basis, vector: basis.set_row(index, vector))(carry.basis, vectors)
        images = multiply_each(op, vectors)
        noise = jnp.maximum(carry.noise, jax.vmap(noise_of)(images))
        alpha = jax.vmap(inner)(vectors, images)
        residual = jax.vmap(subtract)(jax.vmap(subtract)(images, alpha, vectors), carry.beta, carry.last)
        before, read = norms(residual), position <= index
        residual = sweep(basis, residual, read)
        cancelled = norms(residual) < before / math.sqrt(2)
        residual = lax.cond(jnp.any(cancelled), lambda r: sweep(basis, r, read), lambda r: r, residual)
        # A dead probe's vector is zero, and so is all that follows from it.
        left = norms(residual)
        left = jnp.where(left <= noise, 0, left).astype(dtype)
        return Carry(basis, residual, left, vectors, noise), (alpha, left)

    starts = without(removed, without(removed, starts))
    first = norms(starts)
    nothing = jtu.tree_map(jnp.zeros_like, starts)
    empty = jax.vmap(lambda _: Basis.zeros(op.structure, num_steps))(first)
    carry = Carry(empty, starts, first, nothing, jnp.zeros_like(first))
    # The first step has no row before it: `last` is zero there, whatever `beta` is.
    carry, (alphas, betas) = lax.scan(step, carry, position)
    alive = jnp.concatenate([first[None] != 0, betas[:-1] != 0])
    steps = jnp.sum(alive, axis=0, dtype=jnp.int32)
    return Tridiagonals(alphas.T, betas[:-1].T, betas[-1], steps), carry.basis


def without(removed: PyTree | None, vectors: PyTree[Float[Array, "probes ..."]]) -> PyTree:
    """The vectors' components orthogonal to the `removed` ones."""
    if removed is None:
        return vectors
    dtype = scalar_dtype(vectors)

    def overlap(rows: Array, block: Array) -> Array:
        return contract(block, rows, (tuple(range(1, block.ndim)), tuple(range(1, rows.ndim))), dtype)

    parts = jtu.tree_leaves(jtu.tree_map(overlap, removed, vectors))
    overlaps = sum(parts, jnp.zeros((), dtype))
    return jtu.tree_map(
        lambda block, rows: (block - contract(overlaps, rows, 1, dtype)).astype(block.dtype), vectors, removed
    )


def tridiagonal_eigh(
    diagonal: Float[Array, " m"], off_diagonal: Float[Array, " rest"], count: Int[Array, ""]
) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """Eigenvalues of the leading `count` rows of T, ascending, and eigenvectors in columns.

    Beyond `count` the last eigenvalue is repeated (0 if there is none), and the vectors are zero. T is zero there.
    """
    live = jnp.arange(diagonal.size) < count
    dense = jnp.diag(diagonal) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
    peak = jnp.max(jnp.abs(dense))
    unit = or_one(peak)
    # No row of T / unit sums to more than 3, so 4 sorts behind every eigenvalue.
    values, vectors = sequential_eigh(dense / unit + jnp.diag(jnp.where(live, 0, jnp.asarray(4, dense.dtype))))
    last = jnp.where(count > 0, values[jnp.maximum(count - 1, 0)], 0)
    return jnp.where(live, values, last) * unit, jnp.where(live[:, None] & live[None, :], vectors, 0)
