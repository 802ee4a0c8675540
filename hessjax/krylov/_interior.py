"""Eigenvalues nearest to a shift, inside the spectrum, from products alone.

With B = ((A - σ) / c)² the wanted eigenvalues are the smallest of B, whatever their sign, and a polynomial of B makes
them the largest of an operator that the outer iteration knows how to solve and to certify:

    p(B) = T_d(m(B)) / T_d(m(0)),    m(B) = (1 + w² - 2B) / (1 - w²),

with the Chebyshev polynomial T_d. It decreases from 1 at the shift and stays below 1 / T_d(m(0)) in magnitude from the
distance w c outwards, as long as no eigenvalue is farther than c from σ; for d = 1, w = 0 it is 1 - 2B. A product costs
2d products with A. Against shift-and-invert with an iterative solver this needs no inner tolerance, is the same linear
operator every time, counts what it spends, and works where A - σ is singular, as it is for the Hessian of a network at
σ = 0. Both pay about c / (distance of the wanted eigenvalues) products per digit; nothing that only has products is
free of that.

Eight steps of power iteration tell ‖A‖ to a factor of four. A is scaled by it, and the shift clipped to four times it:
from there on outwards every shift orders the spectrum alike.

Stages: the first has d = 1 and fills the basis once, unless it is done before. Its Ritz values tell c, and how far the
wanted eigenvalues are from σ at most; from these follow w and d of the next stage, which starts with the best vectors
of the last one. After every stage a Rayleigh-Ritz step with A itself resolves eigenvalues at equal distances on both
sides of σ, and gives true residuals; a few guard vectors beyond the k wanted ones provide the partners for it.

Sources: Zhou and Saad, A Chebyshev-Davidson algorithm for large symmetric eigenproblems, doi:10.1137/050630404; Wang
and Zunger, Solving Schrödinger's equation around a desired energy, doi:10.1063/1.466486 (the folded spectrum).
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from hessjax._vectors import combine, divide, draw, epsilon, gram, norm, or_one, scalar_dtype, subtract
from hessjax.krylov._basis import Basis
from hessjax.krylov._eigenpairs import Eigenpairs
from hessjax.krylov._eigh import sequential_eigh
from hessjax.krylov._restarted import Iteration
from hessjax.krylov._state import CERTIFIED, Plan, State
from hessjax.operators._operator import Operator

_GUARDS = 4  # vectors beyond the wanted ones
_STEEPNESS = 1.5  # d w: the filter's largest value outside its window is 1 / cosh(2 d w), a tenth
_HIGHEST_DEGREE = 256
_POWERS = 8  # steps of the power iteration for ‖A‖
_SAFELY = 4  # it is below ‖A‖ by no more than this factor


class Filter(Operator):
    """p(B) for the polynomial above. `radius` is c, `window` w, `degree` d; all may be traced."""

    operator: Operator
    sigma: Scalar
    radius: Scalar
    window: Scalar
    degree: Int[Array, ""]

    @property
    def like(self) -> PyTree:
        return self.operator.like

    @property
    def peak(self) -> Scalar:
        """T_d(m(0))."""
        square = jnp.square(self.window)
        return jnp.cosh(self.degree * jnp.arccosh((1 + square) / (1 - square)))

    @property
    def cost(self) -> Int[Array, ""]:
        """Products with A in one with p(B)."""
        return 2 * self.degree

    def distance(self, values: Array) -> Array:
        """How far from the shift A's eigenvalues lie that p maps to `values`; infinite outside the window."""
        square = jnp.square(self.window)
        grown = values * self.peak
        inside = jnp.cosh(jnp.arccosh(jnp.maximum(grown, 1)) / self.degree)
        mapped = jnp.where(self.degree == 1, grown, inside)
        folded = jnp.maximum((1 + square - mapped * (1 - square)) / 2, 0)
        return jnp.where((grown > 1) | (self.degree == 1), self.radius * jnp.sqrt(folded), jnp.inf)

    def product(self, vector: PyTree) -> PyTree:
        square = jnp.square(self.window)

        def shifted(_: Array, v: PyTree) -> PyTree:
            return jtu.tree_map(lambda x: (x / self.radius).astype(x.dtype), subtract(self.operator(v), self.sigma, v))

        def step(index: Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            before, now = carry
            folded = lax.fori_loop(0, 2, shifted, now)
            factor, past = jnp.where(index == 0, 1, 2), jnp.where(index == 0, 0, 1)
            after = jtu.tree_map(
                lambda f, x, y: (factor * ((1 + square) * x - 2 * f) / (1 - square) - past * y).astype(x.dtype),
                folded,
                now,
                before,
            )
            return now, after

        zero = jtu.tree_map(jnp.zeros_like, vector)
        return divide(lax.fori_loop(0, self.degree, step, (zero, vector))[1], self.peak)


class _Nearest(Iteration):
    """The outer iteration, with a promise for A's residuals in place of p(B)'s own.

    A component of size s in direction j adds (p_i - p_j) s to the residual with p(B), and at most (δ_i + δ_j) s to that
    with A, δ being distances from the shift. The worst j is either the nearest one that is not among the wanted vectors
    and guards, or the farthest of all.
    """

    tightening: Scalar

    def promises(self, state: State) -> Float[Array, " rows"]:
        assert isinstance(self.op, Filter)
        values, radius = state.ritz.values, self.op.radius
        distances = jnp.minimum(self.op.distance(values), radius)
        bounds = self.tightening * residual_bounds(self.op, jnp.abs(jnp.abs(self.op.sigma) - distances), self.tol)
        edge = state.order[min(self.plan.k + _GUARDS, values.size) - 1]
        near = jnp.maximum(values - values[edge], 0) / jnp.maximum(distances + distances[edge], self.eps * radius)
        far = jnp.where(self.op.degree == 1, values + 1, values - 1 / self.op.peak) / radius
        within = distances / radius / radius  # inside a cluster its width says nothing
        return bounds * jnp.maximum(jnp.minimum(near, far), within)


class _Stage(eqx.Module):
    """Between two stages: the next filter, and the pairs of A so far, nearest first, guards last."""

    filter: Filter
    values: Float[Array, " width"]
    vectors: PyTree[Float[Array, "width ..."]]
    residuals: Float[Array, " width"]
    tightening: Scalar
    certified: Bool[Array, ""]
    count: Int[Array, ""]
    num_matvecs: Int[Array, ""]

    def bounds(self, tol: Scalar) -> Float[Array, " width"]:
        return residual_bounds(self.filter, jnp.abs(self.values), tol)


def residual_bounds(filter: Filter, magnitudes: Array, tol: Scalar) -> Array:
    """The promise tol · max(eps^(2/3) ‖A‖, |λ|), or what the dtype allows."""
    eps = epsilon(filter.structure)
    scale = jnp.maximum(filter.radius - jnp.abs(filter.sigma), jnp.abs(filter.sigma))  # at most ‖A‖
    rounding = 16 * eps * (filter.radius + jnp.abs(filter.sigma))
    return jnp.maximum(tol * jnp.maximum(eps ** (2 / 3) * scale, magnitudes), rounding)


def nearest_eigenpairs(
    op: Operator, sigma: Scalar, plan: Plan, tol: Scalar, key: PRNGKeyArray, start: PyTree, floor: Scalar, spent: int
) -> Eigenpairs:
    """The k pairs nearest to `sigma`.

    Args:
        op: A.
        sigma: the shift.
        plan: its `k`, `ncv` (rows of a stage), `maxiter` (stages) and `storage` are used.
        tol: as in `eigsh`.
        key: for the certificates.
        start: a block of vectors.
        floor: the known noise of a product.
        spent: products so far.
    """
    width = min(plan.k + _GUARDS, op.size)
    outer = dataclasses.replace(plan, which="LA", k=min(plan.k + 1, width), maxiter=1, random_start=False)

    def goes_on(stage: _Stage) -> Bool[Array, ""]:
        done = stage.certified & jnp.all((stage.residuals <= stage.bounds(tol))[: plan.k])
        return (stage.count < plan.maxiter) & ~done & jnp.isfinite(stage.filter.radius)

    def advance(stage: _Stage) -> _Stage:
        own = floor * stage.filter.cost / stage.filter.radius  # of the filter's product
        iteration = _Nearest(stage.filter, outer, tol, jax.random.fold_in(key, stage.count), own, stage.tightening)
        return _refine(stage, floor, *iteration.run(stage.vectors))

    size = _norm_estimate(op, draw(jax.random.fold_in(key, 2**32 - 2), op.structure))
    unit = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    op, floor = op / unit, floor / unit  # of norm 1 to `_SAFELY`, so that no square of a distance underflows
    # From outside the spectrum every shift orders it alike, and a far one would swallow it in rounding.
    sigma = jnp.clip(sigma / unit, -_SAFELY, _SAFELY)
    stage = lax.while_loop(goes_on, advance, _first(op, sigma, start, width))
    bounds = stage.bounds(tol)
    converged = (stage.residuals <= bounds) & (stage.residuals < jnp.inf)
    # p(B) knows squares of distances: below this one an eigenvalue may hide nearer to the shift than those found.
    hidden = epsilon(op.structure) ** 0.5 / 2 * stage.filter.radius
    farthest = jnp.abs(stage.values[plan.k - 1] - sigma)
    blind = (farthest < hidden) & (farthest > bounds[plan.k - 1])
    # Without a certificate all k may be eigenpairs and yet not the nearest: the farthest is then in doubt.
    unsure = ~stage.certified | blind
    doubt = unsure & jnp.all(converged[: plan.k]) & (jnp.arange(width) == plan.k - 1)
    gaps = jnp.min(jnp.abs(stage.values[:, None] - stage.values) + jnp.diag(jnp.full(width, jnp.inf)), axis=1)
    ascending = jnp.argsort(stage.values[: plan.k])
    noise = jnp.maximum(floor, epsilon(op.structure) * stage.filter.radius)
    return Eigenpairs(
        jnp.where(jnp.isfinite(stage.residuals), stage.values * unit, jnp.nan)[ascending],
        jtu.tree_map(lambda leaf: leaf[ascending], stage.vectors),
        stage.residuals[ascending] * unit,
        (converged & ~doubt)[ascending],
        gaps[ascending].astype(stage.values.dtype) * unit,
        jnp.zeros(plan.k, stage.values.dtype),
        noise * unit,
        stage.num_matvecs + spent,
    )


def _norm_estimate(op: Operator, vector: PyTree) -> Scalar:
    """At most ‖A‖, and by more than a factor of `_SAFELY` below it with a probability of rounding: power iteration."""

    def step(_: Array, carry: tuple[PyTree, Scalar]) -> tuple[PyTree, Scalar]:
        image = op(divide(carry[0], norm(carry[0])))
        return image, jnp.maximum(carry[1], norm(image))

    return lax.fori_loop(0, _POWERS, step, (vector, jnp.zeros((), scalar_dtype(op.structure))))[1]


def _first(op: Operator, sigma: Scalar, start: PyTree, width: int) -> _Stage:
    """No pairs yet: a filter of degree 1, scaled by what one product does to the first start vector, at least by 1."""

    def fit(leaf: Array) -> Array:
        rows = leaf[:width]
        return jnp.pad(rows, [(0, width - rows.shape[0])] + [(0, 0)] * (leaf.ndim - 1))

    vectors = jtu.tree_map(fit, start)
    first = jtu.tree_map(lambda leaf: leaf[0], start)
    unit = divide(first, norm(first))
    size = jnp.maximum(norm(subtract(op(unit), sigma, unit)), 1)
    dtype, zero = scalar_dtype(op.structure), jnp.zeros((), jnp.int32)
    radius = jnp.where(jnp.isfinite(size), size, 1).astype(dtype)
    filter = Filter(op, sigma, radius, jnp.zeros((), dtype), jnp.ones((), jnp.int32))
    unknown = jnp.full(width, jnp.inf, dtype)
    return _Stage(filter, unknown, vectors, unknown, jnp.ones((), dtype), jnp.zeros((), bool), zero, zero + 1 + _POWERS)


def _refine(stage: _Stage, floor: Scalar, basis: Basis, state: State) -> _Stage:
    """A Rayleigh-Ritz step with A on the best vectors of a stage, and the filter for the next one."""
    filter, width = stage.filter, stage.residuals.size
    op, sigma = filter.operator, filter.sigma
    best = state.order[:width]
    exist = state.ritz.live[best]
    vectors = basis.combine(state.ritz.vectors[:, best], state.live)
    images = lax.map(lambda v: subtract(op(v), sigma, v), vectors)
    matrix = gram(vectors, images)
    unit = or_one(jnp.max(jnp.abs(matrix)))
    apart = jnp.diag(jnp.where(exist, 0, 4 * width))  # vectors that do not exist sort behind
    values, turn = sequential_eigh((matrix + matrix.T) / (2 * unit) + apart.astype(matrix.dtype))
    vectors, images = (combine(tree, turn) for tree in (vectors, images))
    values = values * unit
    off = jax.vmap(lambda image, value, vector: norm(subtract(image, value, vector)))(images, values, vectors)
    noise = jnp.maximum(floor, epsilon(op.structure) * filter.radius)
    distances = jnp.where(jnp.arange(width) < jnp.sum(exist), jnp.hypot(values, off), jnp.inf)
    order = jnp.argsort(distances)
    edge = jnp.max(jnp.where(jnp.isfinite(distances), distances, 0))

    lowest = jnp.min(jnp.where(state.ritz.live, state.ritz.values - state.ritz.residuals, jnp.inf))
    seen = jnp.where(filter.degree == 1, filter.distance(lowest), filter.radius)
    radius = jnp.maximum(jnp.where(filter.degree == 1, 1.02, 1) * seen, edge)
    radius = jnp.where(radius == 0, filter.radius, radius)  # A = σI
    window = jnp.clip(edge / radius, _STEEPNESS / _HIGHEST_DEGREE, 0.9)
    degree = jnp.ceil(_STEEPNESS / window).astype(jnp.int32)
    certified = state.status == CERTIFIED
    return _Stage(
        Filter(op, sigma, radius, window, degree),
        (sigma + values)[order],
        jtu.tree_map(lambda leaf: leaf[order], vectors),
        jnp.where(jnp.isfinite(distances), jnp.maximum(off, noise), jnp.inf)[order],
        jnp.where(certified, 0.1, 1) * stage.tightening,
        certified,
        stage.count + 1,
        stage.num_matvecs + state.num_matvecs * filter.cost + width,
    )
