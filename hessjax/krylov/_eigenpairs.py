"""`Eigenpairs`: what an eigensolver returns, with what is known of its errors."""

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from hessjax._vectors import is_known, or_one


class Eigenpairs(eqx.Module):
    """k eigenpairs of a symmetric operator, with what is known of their errors.

    Under `jax.vmap` every array has the batch's axes in front; what is read from them has them too. Printed, it shows
    eigenvalues, residuals and what converged.

    Attributes:
        eigenvalues: (k,), ascending.
        eigenvectors: the operator's structure with a leading axis k on every leaf, or None. Orthonormal; the entry of
            largest magnitude is positive.
        residuals: (k,), ‖Av - λv‖, absolute; never reported below the noise of one product.
        converged: (k,). If all are true, these are the pairs that `which` asks for.
        gaps: (k,), the distance from each eigenvalue to the nearest other one that was seen, wanted or not. Where it
            does not exceed the residuals, the eigenvalue may be repeated: see `simple`.
        isolation: (k,), a lower bound of the distance from each eigenvalue to the rest of the spectrum, seen or not;
            0 where none is known.
        noise: the norm of the error that one product makes, as far as it showed: rounding, or asymmetry.
        num_matvecs: products spent, checks included.
    """

    eigenvalues: Float[Array, " k"]
    eigenvectors: PyTree[Float[Array, "k ..."]] | None
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    gaps: Float[Array, " k"]
    isolation: Float[Array, " k"]
    noise: Scalar
    num_matvecs: Int[Array, ""]

    @property
    def simple(self) -> Bool[Array, "*batch k"]:
        """(k,): which eigenvalues are known to be simple, so that their own derivative exists.

        An eigenvalue's true gap is within its own and its neighbour's residual of the one that was seen; here the gap
        must exceed ten residuals.
        """
        return self.gaps > 10 * jnp.max(self.residuals, axis=-1, keepdims=True)

    @property
    def error_bounds(self) -> Float[Array, "*batch k"]:
        """(k,): how far each eigenvalue can be from a true one.

        The residual r bounds it. Where the rest of the spectrum is known to be at a distance d > r, the Kato-Temple
        bound r²/d does too: for all but the innermost wanted value, next to which an unwanted one may lie as close as
        it likes. Ask for k + 1 to have the sharp bound on k. No bound is given below four times the `noise`.

        Source: Parlett, The Symmetric Eigenvalue Problem, section 10.2.
        """
        bound = jnp.where(self.isolation > self.residuals, self.residuals * self._sines(), self.residuals)
        return jnp.maximum(bound, 4 * self.noise[..., None])

    @property
    def angle_bounds(self) -> Float[Array, "*batch k"]:
        """(k,): the largest angle, in radians, between each eigenvector and a true one.

        By the theorem of Davis and Kahan its sine is at most r/d, with r the residual and d the `isolation`. π/2 where
        nothing is known: next to an unwanted eigenvalue, or inside a cluster, of which only the span is determined.

        Source: Davis and Kahan, The rotation of eigenvectors by a perturbation, doi:10.1137/0707001.
        """
        return jnp.where(self.isolation > self.residuals, jnp.arcsin(self._sines()), jnp.pi / 2)

    def __repr__(self) -> str:
        shown = (self.eigenvalues, self.residuals, self.converged, self.noise, self.num_matvecs)
        if not all(map(is_known, shown)) or self.eigenvalues.ndim != 1:
            return eqx.tree_pformat(self)
        values, residuals, converged = (np.asarray(part).tolist() for part in shown[:3])
        lines = [f"{sum(converged)} of {len(values)} eigenpairs converged, {int(self.num_matvecs)} products"]
        for value, residual, good in zip(values, residuals, converged, strict=True):
            floor = ", at the product's noise" if residual <= 4 * float(self.noise) else ""
            lines.append(f"{value:14.7g}  residual {residual:.1e}{'' if good else f'  not converged{floor}'}")
        return "\n".join(lines)

    def _sines(self) -> Float[Array, "*batch k"]:
        return jnp.minimum(self.residuals / or_one(self.isolation), 1)


def fix_signs(vectors: PyTree[Float[Array, "k ..."]]) -> PyTree[Float[Array, "k ..."]]:
    """Makes the entry of largest magnitude of every vector positive."""
    leaves, treedef = jtu.tree_flatten(vectors)
    peaks, signs = [], []
    for leaf in leaves:
        if leaf.size == 0:
            continue
        flat = leaf.reshape(leaf.shape[0], -1)
        # The first of the largest entries, as `argmax` finds it; that is a slow loop on a CPU, these are fast ones.
        largest = jnp.abs(flat) == jnp.max(jnp.abs(flat), axis=1, keepdims=True)
        at = jnp.min(jnp.where(largest, jnp.arange(flat.shape[1]), flat.shape[1] - 1), axis=1)
        value = jnp.take_along_axis(flat, at[:, None], axis=1)[:, 0]
        peaks.append(jnp.abs(value))
        signs.append(jnp.where(value < 0, -1, 1))
    best = jnp.argmax(jnp.stack(peaks), axis=0)
    sign = jnp.take_along_axis(jnp.stack(signs), best[None], axis=0)[0]
    return treedef.unflatten(
        [(leaf * sign.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)).astype(leaf.dtype) for leaf in leaves]
    )
