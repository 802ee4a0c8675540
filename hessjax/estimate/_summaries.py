"""Single numbers that a density tells, each with its error and at no further product."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from hessjax._vectors import or_one
from hessjax.estimate._density import Density
from hessjax.estimate._result import Estimate, scaled


def effective_dimension(density: Density | Any, damping: Any) -> Estimate:
    """Σᵢ λᵢ / (λᵢ + damping): how many directions the data determine better than a prior of that precision.

    Args:
        density: of an operator whose eigenvalues all exceed -damping.
        damping: a positive number; far above the rounding of a product, eps · λmax.

    Returns:
        A scalar; the standard error covers the draw of the probes. Directions far below `damping` count for nothing, so
        num_steps must resolve the spectrum on the scale of `damping`.

    Source: MacKay, Bayesian interpolation, doi:10.1162/neco.1992.4.3.415.
    """
    _needs_density("effective_dimension", density)
    damping = jnp.asarray(damping, density.nodes.dtype)
    return scaled(density.mean_of(lambda x: x / (x + damping)), density.size)


def nuclear_norm(density: Density | Any) -> Estimate:
    """Σᵢ |λᵢ|."""
    _needs_density("nuclear_norm", density)
    return scaled(density.mean_of(jnp.abs), density.size)


def stable_rank(density: Density | Any) -> Estimate:
    """‖A‖²_F / ‖A‖²: the number of eigenvalues, each counted by its square relative to the largest.

    ‖A‖ is taken to be the largest |node|, which lies within ‖A‖ and reaches it after a few dozen steps; the standard
    error covers the draw of the probes in ‖A‖_F.
    """
    _needs_density("stable_rank", density)
    peak = _peak(density)
    return scaled(density.mean_of(lambda x: (x / peak) ** 2), density.size)


def num_negative(density: Density | Any, tol: Any = None) -> Estimate:
    """The number of eigenvalues below -tol: the index of a critical point.

    Args:
        density: of any operator.
        tol: a number of at least 0; None for 16 rounding units of the largest |node|. A trained network has most of its
            eigenvalues near 0, on both sides: which of them count is for `tol` to say.
    """
    _needs_density("num_negative", density)
    peak = _peak(density)
    tol = 16 * jnp.finfo(peak.dtype).eps * peak if tol is None else jnp.asarray(tol, peak.dtype)
    # `count` takes in what lies within rounding of its ends.
    return density.count(-jnp.inf, -tol - 32 * jnp.finfo(peak.dtype).eps * peak)


def spectral_entropy(density: Density | Any) -> Estimate:
    """-Σᵢ pᵢ log pᵢ with pᵢ = |λᵢ| / Σⱼ |λⱼ|, between 0 and log n; its exponential is another effective rank.

    The standard error is a jackknife over the probes.

    Source: Roy and Vetterli, The effective rank: a measure of effective dimensionality, EUSIPCO 2007.
    """
    _needs_density("spectral_entropy", density)
    peak = _peak(density)

    def size(x: Array) -> Array:
        return jnp.abs(x) / peak

    def surprise(x: Array) -> Array:
        y = size(x)
        return y * jnp.log(or_one(y))

    def entropy(mass: Array, weighted: Array) -> Array:
        return jnp.log(density.size * mass) - weighted / mass

    return density.function_of_means((size, surprise), entropy)


def _needs_density(caller: str, density: Any) -> None:
    if not isinstance(density, Density):
        raise TypeError(
            f"`{caller}` reads a `Density`, got {type(density).__name__}. Of an operator, take that of "
            "`hj.spectral_density(op, key)`."
        )


def _peak(density: Density) -> Array:
    """The largest |node|, 1 if all are 0."""
    low, high = density.ends
    peak = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return or_one(peak)
