"""The kernel polynomial method: a spectral density from Chebyshev moments, at the memory of a few vectors.

With B = (A - c) / h, whose eigenvalues lie in [-1, 1], a unit vector z has the moments μₘ = zᵀTₘ(B)z. Their series,
damped by Jackson's factors so that it stays nonnegative, is z's spectral measure convolved with a kernel of width
about π h / M for M moments. Its values at the M Chebyshev nodes are the weights of a rule that is exact for the damped
series up to degree M - 1: nodes and weights as the Gauss rules have them, with one set of nodes for all probes.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.scipy.fft import idct
from jaxtyping import Array, Float, PyTree, Scalar

from hessjax._vectors import divide, inner, norm, scalar_dtype, subtract
from hessjax.estimate._probes import in_batches, on_sphere
from hessjax.estimate._quadrature import Plan, gauss
from hessjax.estimate._tridiagonal import tridiagonalize, without
from hessjax.operators._operator import Operator, multiply_each
from hessjax.operators._packing import Packed

BOUND_STEPS = 30  # of the Lanczos run that bounds the spectrum
_MARGIN = 0.01  # by which the interval exceeds the bounds
_LARGEST = 1.01  # a moment beyond it shows that an eigenvalue lies outside


class Interval(eqx.Module):
    """[c - h, c + h], which holds the spectrum."""

    center: Scalar
    half: Scalar


def bound_steps(op: Operator) -> int:
    """How many products bound the spectrum of `op`."""
    return min(BOUND_STEPS, op.size)


def chebyshev_rules(
    op: Operator, keys: Array, removed: PyTree | None, plan: Plan
) -> tuple[Float[Array, "probes nodes"], Float[Array, "probes nodes"]]:
    """The rules of probes drawn from the unit sphere: 2 num_steps nodes each, ascending, and their weights.

    The weights are NaN where a moment shows that the spectrum exceeds the interval, which derivatives hold fixed.

    Args:
        op: A, on plain vectors.
        keys: one per probe, and a last one for the vector that bounds the spectrum.
        removed: orthonormal vectors whose complement is meant, or None.
        plan: its `num_steps` are the products per probe.
    """
    arrays, rest = eqx.partition(op, eqx.is_array)
    fixed = eqx.combine(lax.stop_gradient(arrays), rest)
    interval = _interval(Packed(fixed, plan.packing), keys[-1], removed)
    packed = Packed(op, plan.packing)
    structure = packed.structure

    def batch(keys: Array) -> Array:
        starts = without(removed, jax.vmap(lambda key: on_sphere(key, structure))(keys))
        starts = jax.vmap(lambda start: divide(start, norm(start)))(starts)
        return _moments(packed, starts, removed, plan.num_steps, interval)

    moments = in_batches(batch, keys[:-1], plan.batch)
    nodes, weights = jax.vmap(_rule)(moments)
    return interval.center + interval.half * nodes, weights


def _interval(op: Operator, key: Array, removed: PyTree | None) -> Interval:
    """Bounds of the spectrum: the outermost Ritz values of a short run, moved outwards by its largest residual.

    Source: Zhou and Li, Bounding the spectrum of large Hermitian matrices, doi:10.1016/j.laa.2010.06.034.
    """
    start = jtu.tree_map(lambda leaf: leaf[None], on_sphere(key, op.structure))
    matrices, _ = tridiagonalize(op, start, bound_steps(op), removed)
    matrix = jtu.tree_map(lambda leaf: leaf[0], matrices)
    nodes, _, radii, _ = gauss(matrix)
    low, high = nodes[0] - jnp.max(radii), nodes[-1] + jnp.max(radii)
    center, half = (low + high) / 2, (1 + _MARGIN) * (high - low) / 2
    # A spectrum of one point: as narrow as rounding allows, and next to nothing for the zero operator.
    info = jnp.finfo(half.dtype)
    least = 256 * info.eps * jnp.maximum(jnp.abs(low), jnp.abs(high))
    return Interval(center, jnp.where(least > 0, jnp.maximum(half, least), float(info.tiny) ** 0.5))


def _moments(
    op: Operator, starts: PyTree[Float[Array, "probes ..."]], removed: PyTree | None, steps: int, interval: Interval
) -> Float[Array, "probes moments"]:
    """The first 2 · steps moments: Tᵢ(B)z and its successor tell two each, by TᵢTⱼ = (Tᵢ₊ⱼ + Tᵢ₋ⱼ) / 2."""
    dtype = scalar_dtype(op.structure)

    def shifted(vectors: PyTree) -> PyTree:
        image = subtract(multiply_each(op, vectors), interval.center, vectors)
        return jtu.tree_map(lambda leaf: (leaf / interval.half).astype(leaf.dtype), image)

    def step(carry: tuple[PyTree, PyTree], index: Array) -> tuple[tuple[PyTree, PyTree], tuple[Array, Array]]:
        last, now = carry
        factor, past = jnp.where(index == 0, 1, 2), jnp.where(index == 0, 0, 1)
        image = without(removed, shifted(now))
        following = jtu.tree_map(lambda x, y: (factor * x - past * y).astype(x.dtype), image, last)
        products = jax.vmap(inner)
        return (now, following), (products(now, now).astype(dtype), products(now, following).astype(dtype))

    nothing = jtu.tree_map(jnp.zeros_like, starts)
    _, (even, odd) = lax.scan(step, (nothing, starts), jnp.arange(steps))
    pairs = jnp.stack([2 * even - even[0], 2 * odd - odd[0]], axis=1)
    return pairs.reshape(2 * steps, -1).T


def _rule(moments: Float[Array, " moments"]) -> tuple[Float[Array, " nodes"], Float[Array, " nodes"]]:
    """Chebyshev nodes in [-1, 1] and the damped series' weights there."""
    count = moments.size
    angles = (jnp.arange(count, dtype=moments.dtype) + 0.5) * (jnp.pi / count)
    damped = jnp.maximum(2 * idct(_jackson(count).astype(moments.dtype) * moments), 0)
    inside = jnp.all(jnp.abs(moments) <= _LARGEST)
    weights = jnp.where(inside, damped / jnp.sum(damped), jnp.nan)
    return jnp.cos(angles)[::-1], weights[::-1]


def _jackson(count: int) -> Float[Array, " count"]:
    """Jackson's damping factors g₀ … g of `count` moments; g₀ = 1."""
    order, angle = jnp.arange(count), jnp.pi / (count + 1)
    return ((count - order + 1) * jnp.cos(order * angle) + jnp.sin(order * angle) / jnp.tan(angle)) / (count + 1)
