"""The mean over left-out vectors, and an error that does not take them for independent.

The k estimates that each leave one vector out share most of their span, and are strongly correlated where that span
just suffices: their spread over √k can then be several times too small. The standard error here is the jackknife's: the
whole estimate is formed anew without each vector, which leaves out two at a time, and its variance is taken to be
(k - 1)/k · Σ (fᵢ - f̄)². By the inequality of Efron and Stein that is on average not below the variance of the estimate
from k - 1 vectors. All of it is arithmetic of k × k matrices.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hessjax._vectors import epsilon, matmul
from hessjax.estimate._result import Estimate, rounding_of
from hessjax.estimate._sketch import Sketch


def from_left_out(
    s: Sketch, forms: Float[Array, " k"], cross: Float[Array, "k k"], core: Float[Array, "k k"], num_matvecs: int
) -> Estimate:
    """Estimates tr B, for a symmetric B of which the sketch knows parts.

    Args:
        s: the sketch.
        forms: ωⱼᵀBωⱼ.
        cross: twice QᵀBωⱼ, by column.
        core: QᵀBQ.
        num_matvecs: products that were spent.
    """
    out, w = s.left_out, s.coordinates
    seen = matmul(out.T, w)  # of probe j along the direction that leaving i out takes away
    crossed, curved = matmul(out.T, cross), matmul(out.T, matmul(core, w))
    bent, angle = matmul(out.T, matmul(core, out)), matmul(out.T, out)
    lengths, gone = s.lengths, s.removed
    whole, bent_own, seen_own = jnp.trace(core), jnp.diagonal(bent), jnp.diagonal(seen)
    base = forms - jnp.sum(w * cross, axis=0) + jnp.sum(w * matmul(core, w), axis=0)
    base_length = lengths - jnp.sum(w**2, axis=0)

    def estimates(a: Array, b: Array, first: Array, second: Array) -> Array:
        """With the directions i (rows) and j (columns) out of the span, weighted a and b in the projection of ωⱼ."""
        bending = a**2 * bent_own[:, None] + b**2 * bent_own + 2 * a * b * bent
        change = a * (crossed - 2 * curved) + b * jnp.diagonal(crossed - 2 * curved) + bending
        length = base_length + a * seen + b * seen_own
        return whole - first + (s.size - s.rank + second) * (base + change) / length

    alone = jnp.diagonal(estimates(jnp.zeros_like(seen), jnp.broadcast_to(seen_own, seen.shape), bent_own, gone))
    value = jnp.mean(alone)
    k = alone.size
    if k == 1:
        return Estimate(value, jnp.full_like(value, jnp.inf), jnp.asarray(num_matvecs, jnp.int32))
    determinant = 1 - angle**2
    # Parallel directions are one: they lie where no image does.
    apart = determinant > 64 * jnp.finfo(angle.dtype).eps
    safe = jnp.where(apart, determinant, 1)
    a = jnp.where(apart, (seen - angle * seen_own) / safe, 0)
    b = jnp.where(apart, (seen_own - angle * seen) / safe, seen_own)
    pair = (bent_own[:, None] + bent_own - 2 * angle * bent) / safe
    first = jnp.where(apart, pair, bent_own)
    second = jnp.where(apart, gone[:, None] + gone, gone)
    error = jackknife(alone, estimates(a, b, first, second), epsilon(s.probes))
    return Estimate(value, error, jnp.asarray(num_matvecs, jnp.int32))


def jackknife(alone: Float[Array, " k"], pairs: Float[Array, "k k"], eps: float) -> Float[Array, ""]:
    """The standard error of the mean of `alone`.

    Args:
        alone: the estimate that leaves j out.
        pairs: in row i and column j the estimate that leaves j out, of those made without i.
        eps: the rounding unit of the vectors.
    """
    k = alone.size
    others = ~jnp.eye(k, dtype=bool)
    without = jnp.sum(jnp.where(others, pairs, 0), axis=1) / (k - 1)
    variance = (k - 1) / k * jnp.sum((without - jnp.mean(without)) ** 2)
    return lax.stop_gradient(jnp.maximum(jnp.sqrt(variance), rounding_of(alone, eps)))
