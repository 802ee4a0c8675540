"""Gauss quadrature for the spectral measures of random probes.

The spectral measure of a unit vector z puts the weight (zᵀvᵢ)² on every eigenvalue λᵢ. The eigenvalues θⱼ of its
Lanczos matrix T, with the squared first components of their eigenvectors, are the Gauss rule of that measure: it agrees
with it on polynomials up to degree 2m - 1.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from hessjax._vectors import matmul, scalar_dtype, usual_promotion
from hessjax.estimate._probes import in_batches, on_sphere
from hessjax.estimate._tridiagonal import Tridiagonals, tridiagonal_eigh, tridiagonalize
from hessjax.krylov._basis import Basis
from hessjax.krylov._projected import neighbour_gaps
from hessjax.operators._operator import Operator, multiply_each
from hessjax.operators._packing import Packed, Packing


class Rules(eqx.Module):
    """One quadrature rule per probe.

    Attributes:
        nodes: (probes, num_steps), ascending. Beyond the dimension of a probe's Krylov space they repeat the last.
        weights: nonnegative, each probe's sum to one, and zero beyond that dimension.
        radii: ‖A y - θ y‖ of the node's Ritz vector: an eigenvalue lies no further from the node.
        coarse: nodes and weights of the rule from `Plan.coarse` steps, likewise; empty where none was wanted.
        found: what `found` picks, (probes, num_steps, `Plan.found`), and the Ritz vectors of those nodes, packed, with
            leading axes (probes, `Plan.found`); empty where none were wanted. Held fixed by derivatives.
    """

    nodes: Float[Array, "probes num_steps"]
    weights: Float[Array, "probes num_steps"]
    radii: Float[Array, "probes num_steps"]
    coarse: tuple[Array, ...]
    found: tuple[Array, ...] = ()


class Plan(eqx.Module):
    """What is static about a run.

    Attributes:
        num_steps: of each probe.
        batch: how many probes run together.
        packing: of the operator's leaves.
        coarse: the steps of a shorter rule that tells of the quadrature error, if one is wanted.
        found: how many Ritz vectors to give for each probe, at most.
    """

    num_steps: int = eqx.field(static=True)
    batch: int = eqx.field(static=True)
    packing: Packing
    coarse: int | None = eqx.field(static=True, default=None)
    found: int = eqx.field(static=True, default=0)


def gauss_rules(op: Operator, keys: Any, removed: PyTree | None, plan: Plan) -> Rules:
    """The Gauss rules of probes drawn from the unit sphere, one per key, `plan.batch` of them at a time.

    Nodes and weights have derivatives with respect to A's arrays, for which see `_rules_jvp`.

    Args:
        op: A, on plain vectors.
        keys: one per probe.
        removed: orthonormal vectors whose complement is meant; see `tridiagonalize`. Held fixed by derivatives.
        plan: see `Plan`.
    """
    nodes, weights, radii, *rest = _rules(op, keys, lax.stop_gradient(removed), plan)
    shorter = 0 if plan.coarse is None else 2
    return Rules(nodes, weights, radii, tuple(rest[:shorter]), tuple(rest[shorter:]))


def found(
    nodes: Float[Array, " m"], weights: Float[Array, " m"], radii: Float[Array, " m"], most: int
) -> Float[Array, "m most"]:
    """Picks nodes that are eigenvalues, the farthest from the mean first: a column for each, zero if there are fewer.

    Its radius is at most a hundredth of the distance to the next node: the eigenvalue lies within 1e-4 of that, and the
    eigenvector at an angle of 0.01 at most. A lone node is not told from a mean.
    """
    gaps = neighbour_gaps(nodes, weights > 0)
    isolated = (weights > 0) & jnp.isfinite(gaps) & (radii <= 0.01 * gaps)
    distance = jnp.abs(nodes - jnp.sum(weights * nodes))
    order = jnp.argsort(jnp.where(isolated, -distance, jnp.inf), stable=True)[:most]
    return jnp.where(isolated[order], jnp.eye(nodes.size, dtype=nodes.dtype)[:, order], 0)


def _run(op: Operator, keys: Array, removed: PyTree | None, plan: Plan) -> tuple[Tridiagonals, Basis]:
    packed = Packed(op, plan.packing)
    starts = jax.vmap(partial(on_sphere, structure=packed.structure))(keys)
    return tridiagonalize(packed, starts, plan.num_steps, removed)


@eqx.filter_custom_jvp
@usual_promotion()
def _rules(op: Operator, keys: Array, removed: PyTree | None, plan: Plan) -> tuple[Array, ...]:
    def batch(keys: Array) -> tuple[Array, ...]:
        matrices, basis = _run(op, keys, removed, plan)
        rules = jax.vmap(gauss)(matrices)
        return (*rules[:3], *_coarse(matrices, plan), *_found(*rules, basis, plan))

    return in_batches(batch, keys, plan.batch)


def _found(nodes: Array, weights: Array, radii: Array, vectors: Array, basis: Basis, plan: Plan) -> tuple[Array, ...]:
    """What `Rules.found` is to hold."""
    if plan.found == 0:
        return ()

    def probe(nodes: Array, weights: Array, radii: Array, vectors: Array, basis: Basis) -> PyTree:
        picked = found(nodes, weights, radii, plan.found)
        return picked, basis.combine(matmul(vectors, picked), jnp.ones(len(vectors), bool))

    return tuple(jtu.tree_leaves(jax.vmap(probe)(nodes, weights, radii, vectors, basis)))


def _coarse(matrices: Tridiagonals, plan: Plan) -> tuple[Array, ...]:
    """Nodes and weights from the leading part of T, if wanted."""
    return () if plan.coarse is None else jax.vmap(gauss)(matrices.leading(plan.coarse))[:2]


def gauss(matrix: Tridiagonals) -> tuple[Array, Array, Array, Array]:
    """Nodes, weights, radii and eigenvectors of one probe's T."""
    nodes, vectors = tridiagonal_eigh(matrix.diagonal, matrix.off_diagonal, matrix.steps)
    weights = vectors[0] ** 2
    weights = weights / jnp.sum(weights)
    radii = jnp.abs(vectors[jnp.maximum(matrix.steps - 1, 0)]) * matrix.residual_norm
    return nodes, weights, radii, vectors


@_rules.def_jvp
@usual_promotion()
def _rules_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    """The derivative of Σ wⱼ f(θⱼ) is Σ sᵢ sⱼ f[θᵢ, θⱼ] yᵢᵀ (∂A) yⱼ, with s² = w and yᵢ the Ritz vectors.

    f[x, y] is the divided difference. That is the Krylov approximation of zᵀ ∂f(A) z, and no approximation where f is a
    polynomial of degree at most m. The products with ∂A run once more over the probes' bases, which are computed anew
    batch by batch, in the backward pass as well: the memory is that of one batch.
    """
    op, keys, removed, plan = primals
    op = _first_order(op)

    @jax.checkpoint
    def batch(keys: Array) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        fixed, rest = eqx.partition(op, eqx.is_array)
        matrices, basis = _run(eqx.combine(lax.stop_gradient(fixed), rest), keys, removed, plan)
        rows = jtu.tree_map(lambda leaf: jnp.swapaxes(leaf, 0, 1), jax.vmap(Basis.stack)(basis))

        def images(op: Operator) -> PyTree:
            packed = Packed(op, plan.packing)
            return lax.map(partial(multiply_each, packed), rows)

        _, changes = eqx.filter_jvp(images, (op,), (tangents[0],))
        nodes, weights, radii, vectors = lax.stop_gradient(jax.vmap(gauss)(matrices))
        slopes = jax.vmap(_slopes)(nodes, vectors, _pairings(rows, changes))
        constant = (radii, *_coarse(matrices, plan), *_found(nodes, weights, radii, vectors, basis, plan))
        constant = lax.stop_gradient(constant)
        return (nodes, weights, *constant), (*slopes, *jtu.tree_map(jnp.zeros_like, constant))

    return in_batches(batch, keys, plan.batch)


def _pairings(rows: PyTree, images: PyTree) -> Float[Array, "probes num_steps num_steps"]:
    """qᵢᵀ xⱼ for each probe; leaves are (num_steps, probes, ...)."""
    dtype = scalar_dtype(rows)

    def pair(row: Array, image: Array) -> Array:
        axes = tuple(range(2, row.ndim))
        parts = lax.dot_general(
            row, image, ((axes, axes), ((1,), (1,))), precision=lax.Precision.HIGHEST, preferred_element_type=dtype
        )
        return parts.astype(dtype)

    parts = jtu.tree_leaves(jtu.tree_map(pair, rows, images))
    return sum(parts, jnp.zeros((), dtype))


def _slopes(nodes: Array, vectors: Array, change: Array) -> tuple[Array, Array]:
    """Derivatives of a probe's nodes and weights, from that of QᵀAQ."""
    change = matmul(vectors.T, matmul((change + change.T) / 2, vectors))
    first = vectors[0]
    gaps = nodes[:, None] - nodes[None, :]
    # Not by the gap alone: fused arithmetic leaves a rounding error where a node is taken from itself.
    live = jnp.any(vectors != 0, axis=0)
    apart = ~jnp.eye(first.size, dtype=bool) & live & live[:, None] & (gaps != 0)
    ratios = jnp.where(apart, change / jnp.where(apart, gaps, 1), 0)
    return jnp.diagonal(change), 2 * first * matmul(ratios, first)


@eqx.filter_custom_jvp
def _first_order(op: Operator) -> Operator:
    """`op`, refusing a second derivative: the first one holds the Ritz vectors fixed."""
    return op


@_first_order.def_jvp
def _first_order_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
    if jtu.tree_leaves(tangents):
        raise ValueError("`spectral_density` has no second derivatives, only first ones.")
    return primals[0], tangents[0]
