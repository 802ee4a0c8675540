"""`Estimate`: a number, or a pytree of numbers, with its standard error and its price."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from hessjax._vectors import are_known_scalars, or_one


class Estimate(eqx.Module):
    """A random estimate.

    `float(estimate)` and `numpy.asarray(estimate)` are its value; a scalar prints with its error.

    Attributes:
        value: a pytree of arrays.
        stderr: the standard error of every entry, of `value`'s structure: the spread of the independent (or
            leave-one-out) estimates that were averaged, over the root of their number, and not less than the rounding
            of their sum. 0 where no chance was involved, as with n products, whatever rounding did; infinite where a
            single sample leaves it unknown. It covers the draw of the random vectors and nothing else: not the
            rounding inside of each sample, where large terms cancel. What else is off is said where the estimate is
            made. A constant under differentiation.
        num_matvecs: products that were spent, an integer scalar.
    """

    value: PyTree[Float[Array, "..."]]
    stderr: PyTree[Float[Array, "..."]]
    num_matvecs: Int[Array, ""]

    def __repr__(self) -> str:
        parts = (self.value, self.stderr, self.num_matvecs)
        if not are_known_scalars(*parts):
            return eqx.tree_pformat(self)
        value, error, count = float(self.value), float(self.stderr), int(self.num_matvecs)
        return f"{type(self).__name__}({value:.6g} ± {error:.2g}, {count} products)"

    def __float__(self) -> float:
        return float(self.value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype=dtype, copy=copy)


def exactly(value: PyTree, num_matvecs: int) -> Estimate:
    """What n products told without chance."""
    return Estimate(value, jtu.tree_map(jnp.zeros_like, value), jnp.asarray(num_matvecs, jnp.int32))


def average(samples: PyTree[Float[Array, "count ..."]], num_matvecs: Any) -> Estimate:
    """The mean of equally good estimates of one quantity along the leading axis, and its standard error."""

    def error(leaf: Array) -> Array:
        return spread(leaf, leaf.shape[0] * (leaf.shape[0] - 1))

    value = jtu.tree_map(lambda leaf: jnp.mean(leaf, axis=0), samples)
    return Estimate(value, jtu.tree_map(error, samples), jnp.asarray(num_matvecs, jnp.int32))


def spread(samples: Float[Array, "count ..."], divisor: float | int) -> Float[Array, "..."]:
    """√(Σ (xᵢ - x̄)² / divisor), not below 4 rounding units of the largest xᵢ; infinite for a single sample."""
    samples = lax.stop_gradient(samples)
    if samples.shape[0] < 2:
        return jnp.full(samples.shape[1:], jnp.inf, samples.dtype)
    deviation = samples - jnp.mean(samples, axis=0)
    peak = jnp.max(jnp.abs(deviation), axis=0)
    unit = or_one(peak)  # so that squares neither overflow nor vanish
    return jnp.maximum(unit * jnp.sqrt(jnp.sum((deviation / unit) ** 2, axis=0) / divisor), rounding_of(samples))


def rounding_of(samples: Float[Array, "count ..."], eps: float = 0.0) -> Float[Array, "..."]:
    """4 rounding units of the largest sample: no mean of them is known better.

    Or half of one of the vectors that they came from, `eps`, where these are in half precision: sums of their products
    are formed in float32.
    """
    return max(4 * float(jnp.finfo(samples.dtype).eps), eps / 2) * jnp.max(jnp.abs(samples), axis=0)


def scaled(estimate: Estimate, factor: float | int | Array) -> Estimate:
    """A multiple of an estimate, by a nonnegative number."""
    return Estimate(factor * estimate.value, factor * estimate.stderr, estimate.num_matvecs)
