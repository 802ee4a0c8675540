"""The small dense problem inside a Krylov solver: Ritz values, their residuals, and what they promise.

The solver keeps an orthonormal basis in rows. A row is *expanded* once the operator has been applied to it, and
*frontier* before that. Applying A to the expanded rows E leaves nothing outside the rows in use,

    A E = E H + F C,        H = EᵀAE,    C = FᵀAE,

so that a Ritz pair (t, Ex) of H has the residual F C x, whose norm ‖C x‖ needs no product.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Scalar

from hessjax._vectors import matmul, or_one
from hessjax.krylov._eigh import eigh

WHICH = ("LM", "LA", "SA", "BE", "SM")  # SciPy's words
# Leading sizes that a projected problem is solved at. Up to 62 rows OpenBLAS, the CPU's LAPACK, runs `eigh` on one
# thread. Above, it wakes a thread per core for loops of microseconds and waits for all of them: where other programs
# share the cores, 0.2 ms become 10 ms at 64 rows, and 1 ms becomes 170 ms at 136. A GPU takes as long as many of its
# products whatever they multiply, 0.2 ms at 20 rows and 0.75 at 62 (H100): hence 24.
_SIZES = {24: 31, 62: 62, 136: 204}


class Ritz(eqx.Module):
    """Eigenpairs of H, ascending; only the first `count` exist.

    Attributes:
        values: Ritz values t.
        vectors: column i is x_i, in the coordinates of all rows.
        couplings: column i is C x_i, zero outside the frontier rows.
        residuals: ‖A y_i - t_i y_i‖ = ‖C x_i‖, infinite where no pair exists.
        count: the number of expanded rows.
    """

    values: Float[Array, " rows"]
    vectors: Float[Array, "rows rows"]
    couplings: Float[Array, "rows rows"]
    residuals: Float[Array, " rows"]
    count: Int[Array, ""]

    @property
    def live(self) -> Bool[Array, " rows"]:
        return jnp.arange(self.values.size) < self.count

    @classmethod
    def empty(cls, rows: int, dtype: Any) -> "Ritz":
        """No pairs yet."""
        square = jnp.zeros((rows, rows), dtype)
        return cls(jnp.zeros(rows, dtype), square, square, jnp.full(rows, jnp.inf, dtype), jnp.zeros((), jnp.int32))


def _column_norms(matrix: Array) -> Array:
    peak = jnp.max(jnp.abs(matrix), initial=0)
    unit = or_one(peak)
    return unit * jnp.sqrt(jnp.sum(jnp.square(matrix / unit), axis=0))


@jax.custom_batching.sequential_vmap
def refresh(when: Bool[Array, ""], projected: Array, expanded: Array, frontier: Array, old: Ritz) -> Ritz:
    """The Ritz pairs of the current projected matrix if `when`, else the old ones.

    Under `vmap` the batch runs one after another: vmapped solvers with a batched LAPACK call in their loop have been
    seen to stop for ever on the CPU, and a batched branch would run every size.
    """
    return lax.cond(when, lambda: _rayleigh_ritz(projected, expanded, frontier), lambda: old)


def _rayleigh_ritz(
    projected: Float[Array, "rows rows"], expanded: Bool[Array, " rows"], frontier: Bool[Array, " rows"]
) -> Ritz:
    """Solves the projected problem over the expanded rows, at the smallest size that holds all rows in use."""
    rows = expanded.size

    def solver(size: int) -> Callable[[], tuple[Array, Array, Array, Array]]:
        def solve() -> tuple[Array, Array, Array, Array]:
            corner, known, edge = projected[:size, :size], expanded[:size], frontier[:size]
            inside = jnp.where(known[:, None] & known[None, :], corner, 0)
            peak = jnp.max(jnp.abs(inside))
            unit = or_one(peak)
            inside = inside / unit
            # Rows that are not expanded sort behind those that are: above every eigenvalue, yet of the matrix's scale.
            beyond = 1 + 1.5 * jnp.max(jnp.sum(jnp.abs(inside), axis=0))
            values, vectors = eigh(inside + jnp.diag(jnp.where(known, 0, beyond)))
            couplings = matmul(jnp.where(edge[:, None] & known[None, :], corner / unit, 0), vectors)
            live = jnp.arange(size) < jnp.sum(known)
            spare = (0, rows - size)
            return (
                jnp.pad(jnp.where(live, values * unit, 0), spare),
                jnp.pad(jnp.where(known[:, None] & live[None, :], vectors, 0), (spare, spare)),
                jnp.pad(jnp.where(live, unit * couplings, 0), (spare, spare)),
                jnp.pad(jnp.where(live, unit * _column_norms(couplings), jnp.inf), spare, constant_values=jnp.inf),
            )

        return solve

    # Comparisons with numbers, since a constant array would be batched with its branch, which custom_vmap refuses.
    sizes = [*(size for size, fewest in _SIZES.items() if rows > fewest), rows]
    in_use = jnp.sum(expanded | frontier)
    smallest = sum(((in_use > size).astype(jnp.int32) for size in sizes[:-1]), jnp.zeros((), jnp.int32))
    values, vectors, couplings, residuals = lax.switch(smallest, [solver(size) for size in sizes])
    return Ritz(values, vectors, couplings, residuals, jnp.sum(expanded, dtype=jnp.int32))


def preference(values: Array, live: Array, which: str) -> Int[Array, " rows"]:
    """The positions of the ascending `values`, best first for SciPy's word `which`; those not live come last."""
    position = jnp.arange(values.size)
    from_top = jnp.sum(live) - 1 - position
    rank = {
        "LM": -jnp.abs(values),
        "LA": from_top,
        "SA": position,
        "BE": jnp.minimum(2 * from_top, 2 * position + 1),  # in turn, the high end first
        "SM": jnp.abs(values),
    }[which]
    return jnp.argsort(jnp.where(live, rank, jnp.inf), stable=True)


def neighbour_gaps(values: Float[Array, " rows"], live: Bool[Array, " rows"]) -> Float[Array, " rows"]:
    """The distance from each of the ascending live values to the nearest other one; infinite if there is none."""
    steps = jnp.where(live[1:], values[1:] - values[:-1], jnp.inf)
    edge = jnp.full((1,), jnp.inf, values.dtype)
    return jnp.minimum(jnp.concatenate([edge, steps]), jnp.concatenate([steps, edge]))


def isolation(
    values: Float[Array, " k"], residuals: Float[Array, " k"], thresholds: Float[Array, " 2"]
) -> Float[Array, " k"]:
    """A lower bound of the distance from each of k Ritz values to all eigenvalues but its own; 0 if there is none.

    Given that no eigenvalue beyond the thresholds is missing. Then those beyond them and the Ritz values there match
    one to one, each pair within ‖R‖ for the matrix R of residuals (Parlett, section 11.5), and all others lie between
    the thresholds.
    """
    reach = jnp.max(residuals) * values.size**0.5
    to_wanted = neighbour_gaps(values, jnp.ones(values.size, bool)) - reach
    to_unseen = jnp.maximum(values - thresholds[1], thresholds[0] - values)
    return jnp.maximum(jnp.minimum(to_wanted, to_unseen), 0)


class Verdict(eqx.Module):
    """What the Ritz pairs say about the k wanted ones.

    Attributes:
        wanted: their positions.
        residuals: ‖A y - t y‖, never below the noise of a product.
        bounds: the residual up to which a pair counts as converged.
        settled: every wanted pair has converged, or cannot improve for noise.
        unsettled: the wanted pairs of which that is not true.
        thresholds: (low, high): no unseen eigenvalue may lie below low or above high, infinite where any may.
        decisive: they are near enough to the innermost wanted values to tell that those are the wanted ones.
    """

    wanted: Int[Array, " k"]
    residuals: Float[Array, " k"]
    bounds: Float[Array, " k"]
    settled: Bool[Array, ""]
    unsettled: Bool[Array, " k"]
    thresholds: Float[Array, " 2"]
    decisive: Bool[Array, ""]


def judge(
    ritz: Ritz,
    order: Int[Array, " rows"],
    which: str,
    k: int,
    promises: Float[Array, " rows"],
    scale: Scalar,
    noise: Scalar,
    attainable: Scalar,
    eps: float,
) -> Verdict:
    """Compares the wanted pairs' residuals with what was promised of them.

    Args:
        ritz: the current Ritz pairs.
        order: their `preference`.
        which: LM, LA, SA or BE.
        k: how many.
        promises: for every Ritz pair the residual up to which it counts as converged. 0 asks for what is attainable,
            but at most two thousand rounding units, since more than that is no rounding error.
        scale: an estimate of ‖A‖.
        noise: the norm of the error that one product makes.
        attainable: the residual that an iteration can be expected to reach.
        eps: the dtype's rounding unit.
    """
    wanted = jnp.sort(order[:k])
    values, estimates = ritz.values[wanted], ritz.residuals[wanted]
    promise = promises[wanted]
    lowest, highest = min(16 * eps, eps**0.5) * scale, min(2000 * eps, eps**0.5) * scale
    bounds = jnp.where(promise > 0, promise, jnp.clip(attainable, lowest, highest))
    residuals = jnp.maximum(estimates, noise)
    unsettled = ~((residuals <= bounds) | (estimates <= noise))
    least = jnp.maximum(min(16 * eps, eps**0.5 / 8) * scale, jnp.finfo(values.dtype).tiny)
    least = jnp.maximum(least, noise)
    thresholds, decisive = _thresholds(values, jnp.maximum(jnp.maximum(bounds, residuals), least), least, which)
    return Verdict(wanted, residuals, bounds, ~jnp.any(unsettled), unsettled, thresholds, decisive)


def _thresholds(
    values: Float[Array, " k"], slack: Float[Array, " k"], least: Scalar, which: str
) -> tuple[Float[Array, " 2"], Bool[Array, ""]]:
    """(low, high): where an eigenvalue that is not among the ascending wanted `values` would be a miss.

    Each stands `slack` beyond the innermost wanted value, and not within `least` of another one but beyond the cluster
    in which that lies: so close to a value that was found, the count of eigenvalues beyond the threshold would hang on
    rounding. Where that moves it by more than `least`, as in a ladder of values that rounding cannot tell apart, it no
    longer decides which of them are wanted.
    """

    def beyond(values: Array, slack: Array) -> tuple[Array, Array]:
        start = values[0] + slack[0]
        reach = jnp.maximum(start, values + least)
        apart = values[1:] - least > reach[:-1]
        threshold = reach[jnp.argmax(jnp.append(apart, True))]
        return threshold, threshold <= start + 1.25 * least

    k, infinity = values.size, jnp.array(jnp.inf, values.dtype)
    low, high, decisive = -infinity, infinity, jnp.ones((), bool)
    if which == "LM":
        by_magnitude = jnp.argsort(jnp.abs(values))
        high, decisive = beyond(jnp.abs(values)[by_magnitude], slack[by_magnitude])
        low = -high
    if which in ("LA", "BE"):
        start = 0 if which == "LA" else k // 2
        high, decisive = beyond(values[start:], slack[start:])
    if which == "SA" or (which == "BE" and k > 1):
        end = k if which == "SA" else k // 2
        negative, also = beyond(-values[:end][::-1], slack[:end][::-1])
        low, decisive = -negative, decisive & also
    return jnp.stack([low, high]), decisive
