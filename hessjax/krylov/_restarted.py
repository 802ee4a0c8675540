"""The iteration behind `eigsh`: Lanczos with thick restarts, on a basis whose frontier may hold several vectors.

One `lax.while_loop`; each turn applies the operator to one vector, in one of two modes.

*Expanding.* A frontier row q is multiplied; what of Aq lies outside the rows in use becomes a new frontier row. With
one frontier row this is Lanczos. Several arise from a block of start vectors, or when a certificate finds a direction
that was missing; then the row that carries most of the unconverged residuals goes first. The Ritz pairs are examined at
(nearly) every turn, so the iteration stops as soon as it may.

*Probing.* Once the wanted pairs have settled, `_certificate` looks for an eigenvalue that was missed. What it finds
joins the frontier, and the iteration expands again.

When the basis is full, the better half of the spare Ritz vectors is kept, and the frontier with it (Wu and Simon,
Thick-restart Lanczos, doi:10.1137/S0895479898334605).

Invariants at the head of the loop:
    rows [0, count) are orthonormal; `expanded` of them have been multiplied, the others are the frontier;
    `projected` holds qᵢᵀAqⱼ wherever i or j is expanded, and A q of an expanded q lies in the span of the rows;
    `vector` is the unit vector to multiply: row `target`, or the probe's z;
    `num_matvecs` products have been spent.
"""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from hessjax._vectors import divide, draw, epsilon, norm, scalar_dtype, select, size_of
from hessjax.krylov._basis import Basis
from hessjax.krylov._certificate import Probe, confidence
from hessjax.krylov._projected import Ritz, Verdict, judge, preference, refresh
from hessjax.operators._operator import Operator

RUNNING, CERTIFIED, EXHAUSTED, BROKEN = 0, 1, 2, 3


class Plan(eqx.Module):
    """What to compute: the static part of a solve.

    Attributes:
        which: LM, LA, SA or BE.
        k: the number of pairs.
        ncv: expanded rows before a restart.
        maxiter: restarts before giving up, the first fill counted.
    """

    which: str = eqx.field(static=True)
    k: int = eqx.field(static=True)
    ncv: int = eqx.field(static=True)
    maxiter: int = eqx.field(static=True)

    @property
    def keep(self) -> int:
        """Ritz vectors kept at a restart: the wanted ones and half of the spare room."""
        return min(self.k + max((self.ncv - self.k) // 2, 1), self.ncv - 1)


class State(eqx.Module):
    """Where the iteration stands. See the invariants above."""

    basis: Basis
    vector: PyTree
    target: Int[Array, ""]
    projected: Float[Array, "rows rows"]
    expanded: Bool[Array, " rows"]
    count: Int[Array, ""]
    ritz: Ritz
    probe: Probe
    scale: Scalar
    deviation: Float[Array, " 2"]
    next_look: Int[Array, ""]
    restarts: Int[Array, ""]
    num_matvecs: Int[Array, ""]
    status: Int[Array, ""]

    @property
    def live(self) -> Bool[Array, " rows"]:
        return jnp.arange(self.expanded.size) < self.count

    @property
    def frontier(self) -> Bool[Array, " rows"]:
        return self.live & ~self.expanded


class Iteration(eqx.Module):
    """The solver as init / step / finish."""

    op: Operator
    plan: Plan
    tol: Scalar
    key: PRNGKeyArray

    @property
    def size(self) -> int:
        return self.op.size

    @property
    def eps(self) -> float:
        return epsilon(self.op.structure)

    def init(self, start: PyTree[Float[Array, "b ..."]]) -> State:
        """Rows from the orthonormalised start block; what depends on earlier ones is replaced by a random vector."""
        structure = self.op.structure
        dtype = scalar_dtype(structure)
        block = jtu.tree_leaves(start)[0].shape[0]
        rows = self.plan.ncv + self.plan.k + 4 + block
        basis = Basis.zeros(structure, rows)
        position = jnp.arange(rows)

        def fill(index: Array, carry: tuple[Basis, Array]) -> tuple[Basis, Array]:
            basis, count = carry
            given = jtu.tree_map(lambda leaf: leaf[index], start)
            unit = divide(given, norm(given))
            live = position < count
            _, vector, left = basis.orthogonalize(unit, live, live)
            good = left > 64 * self.eps
            return basis.set_row(jnp.where(good, count, rows), divide(vector, left)), count + good

        basis, count = lax.fori_loop(0, block, fill, (basis, jnp.zeros((), jnp.int32)))
        zero = jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)
        integer, scalar = jnp.zeros((), jnp.int32), jnp.zeros((), dtype)
        # A zero or non-finite start leaves no row: begin from a random one.
        random = draw(jax.random.fold_in(self.key, 0), structure)
        lost = count == 0
        basis = basis.set_row(jnp.where(lost, 0, rows), divide(random, norm(random)))
        return State(
            basis=basis,
            vector=basis.row(integer),
            target=integer,
            projected=jnp.zeros((rows, rows), dtype),
            expanded=jnp.zeros(rows, bool),
            count=jnp.where(lost, 1, count),
            ritz=Ritz.empty(rows, dtype),
            probe=Probe.idle(zero, rows, dtype),
            scale=scalar,
            deviation=jnp.zeros(2, dtype),
            next_look=integer,
            restarts=integer,
            num_matvecs=integer,
            status=integer,
        )

    def run(self, state: State) -> State:
        """Steps until the status is no longer RUNNING."""
        return lax.while_loop(lambda state: state.status == RUNNING, lambda state: self.step(state), state)

    def noise(self, state: State) -> Scalar:
        """The norm of a product's error: rounding, or what the asymmetry of qᵢᵀAqⱼ betrays, whichever is larger.

        An error with independent entries of size s has norm s √n and moves each of those entries by s.
        """
        total, samples = state.deviation
        asymmetry = state.scale * jnp.sqrt(self.size * total / jnp.maximum(samples, 1))
        return jnp.maximum(self.eps * state.scale, asymmetry)

    def judge(self, state: State) -> Verdict:
        """What the current Ritz pairs say about the wanted ones."""
        return judge(
            state.ritz, self.plan.which, self.plan.k, self.tol, state.scale, self.noise(state), self.eps
        )

    def step(self, state: State) -> State:
        """One product, and whatever follows from it."""
        plan, rows = self.plan, state.expanded.size
        image = self.op.product(state.vector)
        size = norm(image)
        finite = jnp.isfinite(size)
        probing, expanding = state.probe.active & finite, ~state.probe.active & finite
        lift = state.probe.lift(state.ritz)
        remove = jnp.where(probing, state.expanded, state.live)
        coefficients, rest, left = state.basis.orthogonalize(image, state.live, remove, lift)
        scale = jnp.where(finite, jnp.maximum(state.scale, size), state.scale)

        # Expanding: the product is a column of the projected matrix, and its remainder a new frontier row.
        known = state.projected[state.target]
        grows = expanding & (left > 4 * self.eps * scale) & (state.count < self.size)
        column = jnp.where(state.expanded, known, jnp.where(state.live, coefficients, 0))
        column = column.at[state.count].set(jnp.where(grows, left, 0))
        written = state.projected.at[:, state.target].set(column).at[state.target].set(column)
        projected = jnp.where(expanding, written, state.projected)
        surprise = jnp.where(state.expanded & expanding, (coefficients - known) / _nonzero(scale), 0)
        samples = jnp.where(expanding, jnp.sum(state.expanded), 0).astype(scale.dtype)
        deviation = state.deviation + jnp.stack([jnp.sum(jnp.square(surprise)), samples])
        unit = divide(rest, left)
        state = dataclasses.replace(
            state,
            basis=state.basis.set_row(jnp.where(grows, state.count, rows), unit),
            projected=projected,
            expanded=state.expanded.at[state.target].set(state.expanded[state.target] | expanding),
            count=state.count + grows,
            scale=scale,
            deviation=deviation,
            num_matvecs=state.num_matvecs + 1,
            status=jnp.where(finite, state.status, BROKEN),
        )
        state, settled = self._look(state, expanding)
        verdict = self.judge(state)

        # Probing: one more step of the certificate.
        limit = self.size / jnp.square(confidence(self.tol))
        probe, z = lax.cond(
            probing,
            lambda: state.probe.advance(
                state.vector, rest, jnp.where(state.frontier, coefficients + lift, 0), verdict.thresholds, limit
            ),
            lambda: (state.probe, unit),
        )
        return self._turn(dataclasses.replace(state, probe=probe), verdict, z, probing, settled)

    def _look(self, state: State, expanding: Bool[Array, ""]) -> tuple[State, Bool[Array, ""]]:
        """Examines the Ritz pairs if it is time to, and says whether the wanted ones have settled.

        Always while the space is small, or the frontier is not a single row, since then the choice of the next row
        needs it; later at every 24th of the dimension, where an examination costs more than the products it saves.
        """
        m = jnp.sum(state.expanded)
        single = jnp.sum(state.frontier) == 1
        due = expanding & (m >= self.plan.k) & ((m >= state.next_look) | ~single | self._full(state))
        ritz = refresh(due, state.projected, state.expanded, state.frontier, state.ritz)
        scale = jnp.maximum(state.scale, jnp.max(jnp.abs(ritz.values)))
        following = jnp.where(due, m + jnp.maximum(1, m // 24), state.next_look)
        state = dataclasses.replace(state, ritz=ritz, scale=scale, next_look=following.astype(jnp.int32))
        return state, due & self.judge(state).settled

    def _full(self, state: State) -> Bool[Array, ""]:
        """No room for another product."""
        return (jnp.sum(state.expanded) >= self.plan.ncv) | (state.count >= state.expanded.size - 1)

    def _turn(
        self, state: State, verdict: Verdict, z: PyTree, probing: Bool[Array, ""], settled: Bool[Array, ""]
    ) -> State:
        """Decides what comes next, and sets `vector` to it."""
        probe, rows = state.probe, state.expanded.size
        needed = jnp.isfinite(verdict.thresholds)
        complete = jnp.sum(state.expanded) >= self.size
        alarm = probing & probe.alarm
        proved = probing & ~alarm & jnp.all(probe.proved | ~needed)
        side_done = probing & ~alarm & probe.proved[probe.side] & ~proved
        tired = probing & ~alarm & (probe.steps > 100 + state.num_matvecs // 2)
        begins = (settled & ~complete) | side_done
        starved = ~probing & ~settled & ~jnp.any(state.frontier)
        status = jnp.where(tired, EXHAUSTED, state.status)
        status = jnp.where((settled & complete) | proved, CERTIFIED, status)

        # A new direction: random for a probe or a space that has closed, the suspect after an alarm.
        def direction() -> tuple[Array, PyTree, Scalar]:
            random = draw(jax.random.fold_in(self.key, state.num_matvecs), self.op.structure)
            source = select(alarm, probe.suspect, random)
            source = divide(source, norm(source))
            return state.basis.orthogonalize(source, state.live, jnp.where(begins, state.expanded, state.live))

        overlap, fresh, left = lax.cond(
            begins | alarm | starved,
            direction,
            lambda: (jnp.zeros_like(probe.overlap), z, jnp.ones((), probe.overlap.dtype)),
        )
        fresh = divide(fresh, left)
        overlap = jnp.where(state.frontier, overlap, 0)
        # A suspect that lies mostly in the frontier asks for that row to be expanded, not for a new one.
        known = alarm & (jnp.sum(jnp.square(overlap)) > 0.5)
        inject = ((alarm & ~known) | starved) & (left > 0)
        unwanted = state.ritz.live.at[verdict.wanted].set(False)
        proved_before = jnp.where(settled, False, probe.proved)
        begun = dataclasses.replace(probe, proved=proved_before).begin(state.ritz, unwanted, verdict.thresholds)
        begun = dataclasses.replace(begun, overlap=overlap / _nonzero(left))
        ends = alarm | proved | tired
        continued = dataclasses.replace(probe, active=probe.active & ~ends)

        target = jnp.argmax(self._urgency(state, verdict)).astype(jnp.int32)
        target = jnp.where(known, jnp.argmax(jnp.abs(overlap)).astype(jnp.int32), target)
        target = jnp.where(inject, state.count, target)
        state = dataclasses.replace(
            state,
            basis=state.basis.set_row(jnp.where(inject, state.count, rows), fresh),
            count=state.count + inject,
            target=target,
            probe=select(begins, begun, continued),
            status=jnp.where(starved & ~inject & (status == RUNNING), EXHAUSTED, status),
        )
        state = self._restart(state)
        onward = state.probe.active
        vector = lax.cond(onward, lambda: select(begins, fresh, z), lambda: state.basis.row(state.target))
        return dataclasses.replace(state, vector=vector)

    def _urgency(self, state: State, verdict: Verdict) -> Float[Array, " rows"]:
        """How much of the unconverged wanted residuals lies in each frontier row; negative elsewhere."""
        couplings = jnp.where(verdict.unsettled, state.ritz.couplings[:, verdict.wanted], 0) / _nonzero(state.scale)
        return jnp.where(state.frontier, jnp.sum(jnp.square(couplings), axis=1), -1)

    def _restart(self, state: State) -> State:
        """Compresses a full basis to the better Ritz vectors and the frontier, or gives up after `maxiter`."""
        rows, position = state.expanded.size, jnp.arange(state.expanded.size)
        full = (state.status == RUNNING) & ~state.probe.active & self._full(state)
        spent = state.restarts + 1 >= self.plan.maxiter
        when = full & ~spent
        frontier, ritz = state.frontier, state.ritz
        keep = jnp.minimum(jnp.minimum(self.plan.keep, ritz.count), rows - 2 - jnp.sum(frontier))
        kept = jnp.sort(jnp.where(position < keep, preference(ritz.values, ritz.live, self.plan.which), rows - 1))
        moved = jnp.where(frontier, keep + jnp.cumsum(frontier) - 1, rows)
        chosen = position < keep
        carry = (moved[:, None] == position[None, :]).astype(ritz.values.dtype)
        transform = jnp.where(chosen, ritz.vectors[:, kept], 0) + carry
        couplings = jnp.matmul(carry.T, jnp.where(chosen, ritz.couplings[:, kept], 0), precision=lax.Precision.HIGHEST)
        values = jnp.where(chosen, ritz.values[kept], 0)
        compressed = Ritz(values, jnp.diag(chosen.astype(values.dtype)), couplings, keep.astype(jnp.int32))
        small = dataclasses.replace(
            state,
            basis=None,
            projected=jnp.diag(values) + couplings + couplings.T,
            expanded=chosen,
            count=(keep + jnp.sum(frontier)).astype(jnp.int32),
            target=moved[state.target].astype(jnp.int32),
            ritz=compressed,
            next_look=keep.astype(jnp.int32),
            restarts=state.restarts + 1,
        )
        chosen_state = select(when, small, dataclasses.replace(state, basis=None))
        return dataclasses.replace(
            chosen_state,
            basis=state.basis.rotate(transform, when),
            status=jnp.where(full & spent, EXHAUSTED, state.status),
        )


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)
