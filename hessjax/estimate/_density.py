"""`Density`: the distribution of an operator's eigenvalues, as random probes saw it."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from hessjax._arguments import as_integer
from hessjax._vectors import is_known, or_one, usual_promotion
from hessjax.estimate._door import elementwise
from hessjax.estimate._measure import gaussian, invert, mass_up_to, smoothed
from hessjax.estimate._result import Estimate, average, scaled, spread

_TAIL = 1e-3  # of a decade: below it |λ| is not told apart from its neighbours on a logarithmic axis


class Density(eqx.Module):
    """An estimate of the distribution of n eigenvalues: mass 1/n at each, so that `moment(1)` is tr A / n.

    Every probe's nodes and weights are a distribution of mass one by themselves; what is returned is their mean. All
    methods cost no product, return an `Estimate`, and run under `jit` and `vmap`. Their standard errors come from the
    spread over the probes: they cover the draw of the probes, and are infinite if there is only one. What num_steps
    steps cannot resolve they do not cover: eigenvalues closer together than about π (λmax - λmin) / (2 num_steps) are
    smeared into one another, the same way for each probe, unless they lie at the ends of the spectrum. Moments up to
    the (2 num_steps - 1)th are free of this. With p probes 2 standard errors are exceeded about as often as by a
    Student variable with p - 1 degrees of freedom: by 7% for 10.

    Attributes:
        nodes: (num_probes, num_steps), ascending.
        weights: likewise; nonnegative, zero for nodes that do not exist, and each probe's sum to one.
        below: likewise; how far below its node half of a weight is spread evenly.
        above: likewise, for the other half above it.
        size: n.
        num_matvecs: products that were spent.
    """

    nodes: Float[Array, "num_probes num_steps"]
    weights: Float[Array, "num_probes num_steps"]
    below: Float[Array, "num_probes num_steps"]
    above: Float[Array, "num_probes num_steps"]
    size: int = eqx.field(static=True)
    num_matvecs: Int[Array, ""]

    def __repr__(self) -> str:
        if not all(map(is_known, (self.nodes, self.weights, self.num_matvecs))) or self.nodes.ndim != 2:
            return eqx.tree_pformat(self)
        (probes, steps), seen = self.nodes.shape, np.asarray(self.nodes)[np.asarray(self.weights) != 0]
        reach = f"from {seen.min():.4g} to {seen.max():.4g}" if seen.size else "none"
        return (
            f"Density({self.size} eigenvalues, {probes} probes of {steps} nodes {reach}, "
            f"{int(self.num_matvecs)} products)"
        )

    def pdf(self, grid: Any, sigma: Any = None) -> Estimate:
        """The density on `grid`, smoothed by a normal distribution.

        Args:
            grid: points, an array of any shape.
            sigma: the standard deviation of the smoothing, positive; None for `default_width`.

        Returns:
            Value and standard error of `grid`'s shape, in units of 1 / λ; the integral over all λ is 1.

        Raises:
            TypeError: an argument is no real number.
            ValueError: `sigma` is known, and not positive.
        """
        width = self.default_width if sigma is None else self._width(sigma)
        return _over_probes(smoothed, self, self._points("grid", grid), width)

    def log_pdf(self, grid: Any, sigma: Any = 0.1) -> Estimate:
        """The density of log₁₀|λ|, for spectra that span decades: mass per decade, of both signs together.

        Args:
            grid: magnitudes |λ| > 0, an array of any shape.
            sigma: the standard deviation of the smoothing, in decades, positive; at least 0.001 is used.

        Returns:
            Value and standard error of `grid`'s shape. The mass of nodes at exactly 0 is left out, so the integral over
            log₁₀|λ| may be below 1. Magnitudes below the rounding of a product, about eps · λmax, mean nothing.
        """
        width = jnp.maximum(self._width(sigma), _TAIL)
        return _over_probes(_logarithmic, self, jnp.log10(self._points("grid", grid)), width)

    def cdf(self, grid: Any) -> Estimate:
        """The fraction of eigenvalues at or below each point of `grid`.

        An eigenvalue within rounding of a point counts as below it.

        Args:
            grid: points, an array of any shape.

        Returns:
            Value and standard error of `grid`'s shape.
        """
        return _over_probes(mass_up_to, self, self._points("grid", grid) + self._rounding())

    def count(self, low: Any, high: Any) -> Estimate:
        """The number of eigenvalues in [low, high].

        An eigenvalue within rounding of a boundary counts as inside, on both sides.

        Args:
            low: a real number or -inf.
            high: a real number or inf.

        Returns:
            Scalars; the value is a real number between 0 and n.
        """
        margin = self._rounding()
        low, high = self._points("low", low) - margin, self._points("high", high) + margin
        return scaled(_over_probes(_mass_between, self, low, high), self.size)

    def moment(self, p: Any) -> Estimate:
        """The mean of λᵖ: tr(Aᵖ) / n.

        Differentiable with respect to the operator's arrays: exactly so for p up to num_steps.

        Args:
            p: an integer of at least 0.

        Returns:
            Scalars. Exact for each probe if p < 2 num_steps: the standard error covers all but rounding.

        Raises:
            ValueError: `p` is negative.
            TypeError: `p` is no integer.
        """
        if (p := as_integer("p", p)) < 0:
            raise ValueError(f"`moment` needs `p >= 0`, got {p}.")
        return self.mean_of(lambda x: x**p)

    def mean_of(self, function: Callable[[Array], Array]) -> Estimate:
        """The mean of f(λ): tr f(A) / n.

        Args:
            function: f, elementwise on arrays, finite wherever there are nodes.

        Returns:
            Scalars. Where f is not smooth on the scale that num_steps resolve, its quadrature error is not covered.
        """
        values = jnp.where(self.weights != 0, self.weights * elementwise(function, self.nodes), 0)
        return average(jnp.sum(values, axis=1), self.num_matvecs)

    def quantile(self, q: Any) -> Estimate:
        """The λ below which the fraction q of the eigenvalues lies.

        Args:
            q: in [0, 1], an array of any shape.

        Returns:
            Value and standard error of `q`'s shape, NaN for a `q` outside. The error is half the distance between the
            quantiles at q plus and minus one standard error of the fraction (Woodruff's interval), so it is large in a
            gap of the spectrum.
        """
        return _quantile(self, self._points("q", q))

    def function_of_means(self, integrands: Any, function: Callable[..., Array]) -> Estimate:
        """A function g of several means of f(λ), such as a ratio, with a jackknife error over the probes.

        Args:
            integrands: functions f as in `mean_of`.
            function: g, of as many scalars.
        """
        live = self.weights != 0
        means = [jnp.where(live, self.weights * elementwise(f, self.nodes), 0) for f in integrands]
        sums = [jnp.sum(values, axis=1) for values in means]
        count = self.nodes.shape[0]
        value = function(*(jnp.mean(x) for x in sums))
        if count == 1:
            return Estimate(value, jnp.full_like(value, jnp.inf), self.num_matvecs)
        left_out = jax.vmap(function)(*((jnp.sum(x) - x) / (count - 1) for x in sums))
        return Estimate(value, spread(left_out, count / (count - 1)), self.num_matvecs)

    @property
    def ends(self) -> tuple[Array, Array]:
        """The smallest and the largest node: within [λmin, λmax], and close to its ends after a few dozen steps."""
        seen = self.weights != 0
        return (
            jnp.min(jnp.where(seen, self.nodes, jnp.inf)),
            jnp.max(jnp.where(seen, self.nodes, -jnp.inf)),
        )

    def _points(self, name: str, points: Any) -> Array:
        try:
            array = jnp.asarray(points)
        except (TypeError, ValueError):
            raise TypeError(f"`{name}` must be real numbers, got {points!r}.") from None
        if jnp.iscomplexobj(array):
            raise TypeError(f"`{name}` must be real numbers, got {array.dtype}.")
        return array.astype(self.nodes.dtype)

    def _width(self, sigma: Any) -> Array:
        width = self._points("sigma", sigma)
        if not isinstance(width, Tracer) and not np.all(np.asarray(width) > 0):
            raise ValueError(f"`sigma` must be positive, got {sigma}.")
        return width

    def _rounding(self) -> Array:
        return 16 * jnp.finfo(self.nodes.dtype).eps * jnp.max(jnp.abs(self.nodes))

    @property
    def default_width(self) -> Array:
        """The smoothing of `pdf` where none is given: (λmax - λmin) / num_steps, of the nodes seen."""
        low, high = self.ends
        width = (high - low) / self.nodes.shape[1]
        peak = jnp.maximum(jnp.abs(low), jnp.abs(high))
        # A spectrum of one point has no range: a hundredth of its distance from 0, or of 1.
        return jnp.where(width > 16 * jnp.finfo(width.dtype).eps * peak, width, or_one(peak) / 100)


@eqx.filter_jit
@usual_promotion()
def _over_probes(function: Callable[..., Array], density: Density, *args: Array) -> Estimate:
    """The mean of a function of the arguments and of every probe's rule, one probe at a time."""
    rules = (density.nodes, density.weights, density.below, density.above)
    return average(lax.map(lambda rule: function(*args, *rule), rules), density.num_matvecs)


@eqx.filter_jit
@usual_promotion()
def _quantile(density: Density, q: Array) -> Estimate:
    low, high = density.ends

    def mean(x: Array) -> Array:
        return _over_probes(mass_up_to, density, x).value

    value = invert(mean, q, low, high)
    error = _over_probes(mass_up_to, density, value).stderr
    ends = invert(mean, jnp.stack([q - error, q + error]), low, high)
    half = jnp.where(jnp.isfinite(error), (ends[1] - ends[0]) / 2, jnp.inf)
    inside = (q >= 0) & (q <= 1)
    value, half = (jnp.where(inside, part, jnp.nan) for part in (value, half))
    return Estimate(value, lax.stop_gradient(half), density.num_matvecs)


def _mass_between(low: Array, high: Array, nodes: Array, weights: Array, below: Array, above: Array) -> Array:
    # Mass below `low` is what lies at or above -low in the mirrored measure, taken off the whole.
    over = mass_up_to(-low, -nodes, weights, above, below)
    return jnp.maximum(mass_up_to(high, nodes, weights, below, above) + over - 1, 0)


def _logarithmic(grid: Array, width: Array, nodes: Array, weights: Array, _below: Array, _above: Array) -> Array:
    """The density of log₁₀|λ| on a grid of such logarithms."""
    zero = nodes == 0
    place = jnp.log10(jnp.abs(jnp.where(zero, 1, nodes)))
    return jnp.sum(jnp.where(zero, 0, weights) * gaussian(grid[..., None], place, width), axis=-1)
