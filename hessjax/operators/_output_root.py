"""Roots of the loss's Hessian at one output: H = R Rᵀ, formed for outputs of few entries.

With a root, the Gauss-Newton matrix is a product of two factors, (1/N) (JᵀR)(JᵀR)ᵀ: its spectrum can be had from the
side of the outputs, and random signs ε give vectors g = Rε with E[ggᵀ] = H.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from hessjax._function import Function
from hessjax._vectors import matmul
from hessjax.operators._examples import as_scalar


def output_hessian(loss: Function, output: PyTree, constants: PyTree, target: PyTree) -> Float[Array, "c c"]:
    """∇²ℓ(z, y) on one example, z in the order of `ravel_pytree`."""
    flat, unravel = ravel_pytree(output)
    return jax.hessian(lambda z: as_scalar(loss(eqx.combine(unravel(z), constants), target)))(flat)


def root_of(matrix: Float[Array, "c c"]) -> Float[Array, "c c"]:
    """R with R Rᵀ = A for a positive semi-definite A, of any rank.

    Cholesky's factorization with a large remaining diagonal entry as the pivot, one rank-one update at a time: it ends
    by itself at A's rank, and calls no LAPACK, so that it runs in any loop. Directions of negative curvature, which a
    convex loss has not, are dropped. Costs c³ operations.
    """
    size = matrix.shape[0]
    dtype = matrix.dtype
    floor = 4 * size * jnp.finfo(dtype).eps * jnp.max(jnp.abs(jnp.diagonal(matrix)), initial=0)

    def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        rest, left = carry
        diagonal = jnp.where(left, jnp.diagonal(rest), -jnp.inf)
        # The first that is large enough, not the largest: equal entries, which a softmax always ends with, would be
        # told apart by rounding, and another program would find another root. The factor is no likely ratio.
        at = jnp.arange(size) == jnp.argmax(diagonal >= 0.618 * jnp.max(diagonal))
        pivot = jnp.sum(jnp.where(at, diagonal, 0))
        positive = pivot > floor
        column = jnp.sum(jnp.where(at, rest, 0), axis=1) / jnp.sqrt(jnp.where(positive, pivot, 1))
        column = jnp.where(positive & left, column, 0)
        return (rest - jnp.outer(column, column), left & ~at), column

    _, columns = jax.lax.scan(step, ((matrix + matrix.T) / 2, jnp.ones(size, bool)), None, length=size)
    return columns.T


class SampledCurvature(eqx.Module):
    """u ↦ (1/M) Σᵢ gᵢ gᵢᵀu on one example, with gᵢ = Rεᵢ for random signs εᵢ; its target carries the example's key."""

    loss: Function
    num_samples: int = eqx.field(static=True)

    def __call__(
        self, output: PyTree, constants: PyTree, target: tuple[PyTree, PRNGKeyArray], tangent: PyTree
    ) -> PyTree:
        target, key = target
        root = root_of(output_hessian(self.loss, output, constants, target))
        signs = jax.random.rademacher(key, (root.shape[0], self.num_samples), root.dtype)
        return through_samples(matmul(root, signs).T, tangent)


def through_samples(samples: Float[Array, "m c"], tangent: PyTree) -> PyTree:
    """(1/M) Σᵢ gᵢ (gᵢᵀu), where u is a pytree and the samples are flat."""
    flat, unravel = ravel_pytree(tangent)
    along = matmul(samples, flat)
    return unravel(matmul(along, samples) / samples.shape[0])
