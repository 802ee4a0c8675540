"""The iteration behind `eigsh`: Lanczos with thick restarts, on a basis whose frontier may hold several vectors.

One `lax.while_loop`; each turn applies the operator to one vector, in one of two modes.

*Expanding.* A frontier row q is multiplied; what of Aq lies outside the rows in use becomes a new frontier row. With
one frontier row this is Lanczos. Several arise from a block of start vectors, or when a certificate finds a direction
that was missing; then the row that carries most of the unconverged residuals goes first. The Ritz pairs are examined at
(nearly) every turn, so the iteration stops as soon as it may.

*Probing.* Once the wanted pairs have settled, `_certificate` looks for an eigenvalue that was missed. What it finds
joins the frontier, and the iteration expands again. A probe that grows long, because too little of the spectrum next to
the wanted values is known, gives its last vector to the basis and lets the iteration *dig*: expand, settled or not, by
half as many products as were spent so far and at least by a basis. The next probe has that much more deflated.

When the basis is full, the better half of the spare Ritz vectors is kept, and the frontier with it (Wu and Simon,
Thick-restart Lanczos, doi:10.1137/S0895479898334605).

Invariants at the head of the loop:
    rows [0, count) are orthonormal; `expanded` of them have been multiplied, the others are the frontier;
    `projected` holds qᵢᵀAqⱼ wherever i or j is expanded, and A q of an expanded q lies in the span of the rows (where
        neither is, it holds nothing, or what a model says);
    `vector` is the unit vector to multiply: row `target`, or the probe's z; `last` was multiplied before it: row
        `previous` if that is in range, or the probe's z before;
    `num_matvecs` products have been spent;
    `digging` holds after a probe that grew too long, until `dig_until` products have been spent;
    `seeded` holds while the rows are the Krylov space of a random start that may certify the result.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from hessjax._vectors import divide, draw, epsilon, inner, matmul, norm, or_one, scalar_dtype, select, subtract
from hessjax.krylov._basis import Basis, rows_held
from hessjax.krylov._certificate import Probe, confidence, start_suffices
from hessjax.krylov._projected import Ritz, Verdict, judge, preference, refresh
from hessjax.krylov._state import BROKEN, CERTIFIED, EXHAUSTED, RUNNING, Plan, State
from hessjax.operators._operator import Operator

NOTHING, PROBE, ROW = range(3)  # what a new direction is for: to begin a probe, or to be a frontier row
OWN, SUSPECT, RANDOM = range(3)  # where it comes from: what the product left, what a probe found, a draw


class Ahead(eqx.Module):
    """What comes after a product, which left `State.vector`: a new row, or a probe's next z.

    Attributes:
        row: the row that it is, out of range if none.
        use: what a new direction is for.
        source: where that comes from.
    """

    row: Int[Array, ""]
    use: Int[Array, ""]
    source: Int[Array, ""]


class Iteration(eqx.Module):
    """The solver as init / step / run.

    Attributes:
        op: the operator.
        plan: what to compute.
        tol: relative tolerance, 0 for what the dtype allows.
        key: draws the certificate's directions.
        floor: the noise of a product that is already known.
    """

    op: Operator
    plan: Plan
    tol: Scalar
    key: PRNGKeyArray
    floor: Scalar

    @property
    def eps(self) -> float:
        """The rounding unit of what is stored and multiplied."""
        stored = 0.0 if self.plan.storage is None else float(jnp.finfo(self.plan.storage).eps)
        return max(epsilon(self.op.structure), stored)

    @property
    def fewest(self) -> int:
        """The dimension from which on Ritz pairs are worth a look."""
        return self.plan.k

    def init(self, start: PyTree[Array], spent: int | Int[Array, ""] = 0) -> tuple[Basis, State]:
        """Frontier rows from the orthonormalised start block, leaving out what depends on earlier ones."""
        structure = self.op.structure
        block = jtu.tree_leaves(start)[0].shape[0]
        rows = rows_held(self.plan.ncv + block + 1, self.plan.storage)

        def fill(index: Array, carry: tuple[Basis, Array]) -> tuple[Basis, Array]:
            basis, count = carry
            given = jtu.tree_map(lambda leaf: leaf[index], start)
            unit = divide(given, norm(given))
            live = jnp.arange(rows) < count
            _, vector, left = basis.orthogonalize(unit, live, live) if block > 1 else (None, unit, norm(unit))
            good = left > 64 * self.eps
            return basis.set_row(jnp.where(good, count, rows), divide(vector, left)), count + good

        empty = Basis.zeros(structure, rows, self.plan.storage)
        basis, count = lax.fori_loop(0, block, fill, (empty, jnp.zeros((), jnp.int32)))
        return basis, self.begin(basis, count, spent)

    def begin(self, basis: Basis, count: Int[Array, ""], spent: int | Int[Array, ""] = 0) -> State:
        """The first `count` rows are the frontier, and nothing has been expanded."""
        rows, dtype, integer = sum(basis.sizes), scalar_dtype(self.op.structure), jnp.zeros((), jnp.int32)
        zero = jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.op.structure)
        return State(
            vector=basis.row(integer),
            last=zero,
            suspect=zero,
            target=integer,
            previous=jnp.asarray(rows, jnp.int32),
            projected=jnp.zeros((rows, rows), dtype),
            expanded=jnp.zeros(rows, bool),
            count=count,
            ritz=Ritz.empty(rows, dtype),
            order=jnp.arange(rows),
            probe=Probe.idle(rows, dtype),
            scale=jnp.zeros((), dtype),
            deviation=jnp.zeros(2, dtype),
            next_look=integer,
            dig_until=integer,
            seeded=jnp.asarray(self.plan.k == 1 and self.plan.random_start) & (self.tol > 1000 * self.eps),
            restarts=integer,
            num_matvecs=jnp.asarray(spent, jnp.int32),
            status=integer,
        )

    def run(self, start: PyTree[Array], spent: int | Int[Array, ""] = 0) -> tuple[Basis, State]:
        """Steps from a start block, for which `spent` products were made, until the status is no longer RUNNING."""
        return lax.while_loop(
            lambda carry: carry[1].status == RUNNING, lambda carry: self.step(*carry), self.init(start, spent)
        )

    def noise(self, state: State) -> Scalar:
        """The norm of a product's error: rounding, or what the asymmetry of qᵢᵀAqⱼ betrays, whichever is larger."""
        return jnp.maximum(self.rounding(state), self._error(state))

    def rounding(self, state: State) -> Scalar:
        """What rounding alone adds to a residual: that of the products, or that of the inner products.

        In long vectors rows are orthogonal to less than the rounding unit: see `_expand`.
        """
        return jnp.maximum(self._walk(state), self.eps * state.scale * (self.op.size**0.5 / 32))

    def _walk(self, state: State) -> Scalar:
        """The rounding of m products: like a random walk, √m eps ‖A‖."""
        return self.eps * state.scale * jnp.sqrt(jnp.maximum(state.num_matvecs, 1).astype(state.scale.dtype))

    def _error(self, state: State) -> Scalar:
        """What a product errs by beyond the rounding of inner products.

        An error with independent entries of size s has norm s √n and moves each qᵢᵀAqⱼ by s. Asymmetry that the
        rounding of inner products explains does not count.
        """
        total, samples = state.deviation
        asymmetry = state.scale * jnp.sqrt(self.op.size * total / jnp.maximum(samples, 1))
        return jnp.maximum(asymmetry, self.floor)

    def judge(self, state: State) -> Verdict:
        """What the current Ritz pairs say about the wanted ones."""
        noise, rounding = self.noise(state), self.rounding(state)
        attainable = jnp.maximum(4 * jnp.maximum(self._walk(state), self._error(state)), rounding)
        promises, plan = self.promises(state), self.plan
        promises = jnp.where(promises > 0, jnp.maximum(promises, rounding), 0)
        return judge(state.ritz, state.order, plan.which, plan.k, promises, state.scale, noise, attainable, self.eps)

    def promises(self, state: State) -> Float[Array, " rows"]:
        """The residual up to which each Ritz pair counts as converged: tol · max(eps^(2/3) ‖A‖, |t|)."""
        return self.tol * jnp.maximum(self.eps ** (2 / 3) * state.scale, jnp.abs(state.ritz.values))

    def step(self, basis: Basis, state: State) -> tuple[Basis, State]:
        """One product, and whatever follows from it."""
        basis, state, ahead = self._absorb(basis, state, self.op.product(state.vector))
        # A loop of one turn or none, as in `Basis.rotate`.
        needed, given = (ahead.use != NOTHING).astype(jnp.int32), (basis, state, ahead)
        basis, state, ahead = lax.fori_loop(0, needed, lambda _, given: self._take(*given), given)
        restarts = state.restarts
        basis, state, turned = self._aim(*self._restart(basis, state))
        # A row that is at hand is not read again, unless what the basis keeps of it is another vector.
        at_hand = (ahead.row == state.target) & (state.restarts == restarts) & ~turned & (self.plan.storage is None)
        reads = (~state.probe.active & ~at_hand).astype(jnp.int32)
        vector = lax.fori_loop(0, reads, lambda turn, _: basis.row(state.target + turn), state.vector)
        return basis, dataclasses.replace(state, vector=vector)

    def _absorb(self, basis: Basis, state: State, image: PyTree) -> tuple[Basis, State, "Ahead"]:
        """Orthogonalizes a product's image, and decides what it means.

        What is known of the image goes first: its components along the vector, and along the one multiplied before. One
        pass over the rows is then enough, where without that nearly all would need a second one. A probe's terms are
        those of its recurrence; after the pass they would multiply its errors by α/β in every step.
        """
        vector, probe, probing = state.vector, state.probe, state.probe.active
        # Read once, where what was seen before tells its scale.
        size = norm(image, state.scale)
        size = lax.cond((state.scale > 0) & jnp.isfinite(size), lambda: size, lambda: norm(image))
        known = state.projected[state.target].at[state.previous].get(mode="fill", fill_value=0)
        nothing = jnp.zeros_like(probe.overlap)

        # Called in the branches: outside, XLA:CPU joins it with the last operation of the product. If that transposes,
        # each entry is read across the rows, which takes ten times as long.
        def without_known(lift: Array, other: Scalar) -> tuple[Array, Scalar, Scalar, PyTree]:
            own = inner(vector, image) + matmul(probe.overlap, lift)
            rest = jtu.tree_map(lambda w, x, y: (w - own * x - other * y).astype(w.dtype), image, vector, state.last)
            return lift, own, other, rest

        lift, own, other, incoming = lax.cond(
            probing, lambda: without_known(probe.lift(state.ritz), probe.beta), lambda: without_known(nothing, known)
        )
        remove = jnp.where(probing, state.expanded, state.live)
        coefficients, rest, left = basis.orthogonalize(incoming, state.live, remove, lift, size)
        gone = jnp.zeros_like(lift).at[state.target].add(own).at[state.previous].add(other)
        coefficients += jnp.where(probing, 0, gone)
        state, ahead, more, by = self._after_product(state, size, own, coefficients, lift, rest, left)
        unit = divide(subtract(rest, more, vector), by)
        basis = basis.set_row(ahead.row, unit, in_place=True)
        return basis, dataclasses.replace(state, vector=unit, last=vector), ahead

    def _after_product(
        self, state: State, size: Scalar, own: Scalar, coefficients: Array, lift: Array, rest: PyTree, left: Scalar
    ) -> tuple[State, "Ahead", Scalar, Scalar]:
        """The state after a product, and what is ahead.

        Returns:
            Also two numbers: the next vector is the rest, less so much of this one, over the other.
        """
        vector, finite = state.vector, jnp.isfinite(size)
        probing = state.probe.active & finite
        expanding = ~state.probe.active & finite & state.live[state.target]
        multiplied = jnp.where(expanding, state.target, state.expanded.size).astype(jnp.int32)
        state, row = self._expand(state, jnp.where(finite, size, 0), coefficients, left, expanding)
        state, looked = self._look(state, expanding)
        verdict = self.judge(state)
        limit = self.op.size / jnp.square(confidence(self.tol))
        settled, sufficient = self._settle(state, verdict, looked, limit)
        overlap = jnp.where(state.frontier, coefficients + lift, 0)
        before = state.probe
        probe, more, by = lax.cond(
            probing,
            lambda: before.advance(vector, rest, size, overlap, verdict.thresholds, limit, own, self.eps),
            lambda: (before, jnp.zeros_like(left), left),
        )

        def join(turn: Array, suspect: PyTree) -> PyTree:
            # Turn 0. Without the number XLA would take the product out of the loop, and form it always.
            earlier = select(before.steps > turn, suspect, jtu.tree_map(jnp.zeros_like, suspect))
            return subtract(earlier, -before.weight * (1 + turn), vector)

        state = dataclasses.replace(
            state,
            previous=multiplied,
            suspect=lax.fori_loop(0, probing.astype(jnp.int32), join, state.suspect),
            status=jnp.where(finite, state.status, BROKEN),
        )
        state, use, source = self._decide(state, verdict, settled, sufficient, probe, probing)
        return state, Ahead(row, use, source), more, by

    def _expand(
        self, state: State, size: Scalar, coefficients: Array, left: Scalar, expanding: Bool[Array, ""]
    ) -> tuple[State, Int[Array, ""]]:
        """The product as a column of the projected matrix, and the new frontier row that its remainder becomes."""
        scale = jnp.maximum(state.scale, size)
        known = state.projected[state.target]
        grows = expanding & (left > 4 * self.eps * scale) & (state.count < self.op.size)
        row = jnp.where(grows, state.count, state.expanded.size)
        column = jnp.where(state.expanded, known, jnp.where(state.live, coefficients, 0))
        column = column.at[state.count].set(jnp.where(grows, left, 0))
        column = jnp.where(expanding, column, known)
        surprise = jnp.where(state.expanded & expanding, jnp.abs(coefficients - known) / or_one(scale), 0)
        # XLA:CPU sums n terms in eight lanes: where a few are most of the sum, n/8 roundings of it walk at random.
        # Measured, for spectra with outliers: 18 units at n = 85,000, 60 at a million.
        surprise = jnp.maximum(surprise - max(8.0, self.op.size**0.25, self.op.size**0.5 / 16) * self.eps, 0)
        samples = jnp.where(expanding, jnp.sum(state.expanded), 0).astype(scale.dtype)
        expanded = dataclasses.replace(
            state,
            projected=state.projected.at[:, state.target].set(column).at[state.target].set(column),
            expanded=state.expanded.at[state.target].set(state.expanded[state.target] | expanding),
            count=state.count + grows,
            scale=scale,
            deviation=state.deviation + jnp.stack([jnp.sum(jnp.square(surprise)), samples]),
            num_matvecs=state.num_matvecs + 1,
        )
        return expanded, row

    def _settle(
        self, state: State, verdict: Verdict, looked: Bool[Array, ""], limit: Scalar
    ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether the wanted pairs have settled, and whether the start vector itself certifies them.

        A single pair cannot lack another copy: the iteration's own random start certifies it, more cheaply.
        """
        settled = looked & verdict.settled & ~state.digging
        no = jnp.zeros((), bool)
        if self.plan.k > 1 or not self.plan.random_start:
            return settled, no
        sufficient = lax.cond(
            settled & state.seeded,
            lambda: start_suffices(state.ritz, state.frontier, verdict.thresholds, limit),
            lambda: no,
        )
        return settled & (~state.seeded | sufficient), sufficient

    def _decide(
        self,
        state: State,
        verdict: Verdict,
        settled: Bool[Array, ""],
        sufficient: Bool[Array, ""],
        probe: Probe,
        probing: Bool[Array, ""],
    ) -> tuple[State, Int[Array, ""], Int[Array, ""]]:
        """What comes next: another expansion, a probe or its next step, or the end.

        Returns:
            The state, what a new direction is for, and where it comes from: random for a probe or for a space that has
            closed, the suspect after an alarm, the probe's own vector where it has grown too long.
        """
        needed = jnp.isfinite(verdict.thresholds)
        complete = (jnp.sum(state.expanded) >= self.op.size) | sufficient
        alarm = probing & probe.alarm
        proved = probing & ~alarm & jnp.all(probe.proved | ~needed)
        tired = probing & ~alarm & ~proved & (3 * probe.steps > 200 + 2 * state.num_matvecs)
        kept = tired & ~self._full(state)
        begins = (settled & ~complete) | (probing & ~alarm & ~proved & ~tired & probe.proved[probe.side])
        starved = ~probing & ~settled & ~jnp.any(state.frontier)
        ends = jnp.where((settled & complete) | proved, CERTIFIED, RUNNING)

        spent = state.num_matvecs
        ended = dataclasses.replace(probe, active=probe.active & ~(alarm | proved | tired))
        unwanted = state.ritz.live.at[verdict.wanted].set(False)
        fresh = dataclasses.replace(probe, proved=jnp.where(settled, False, probe.proved))
        probe = lax.cond(begins, lambda: fresh.begin(state.ritz, unwanted, verdict.thresholds), lambda: ended)
        state = dataclasses.replace(
            state,
            probe=probe,
            target=jnp.argmax(self._urgency(state, verdict)).astype(jnp.int32),
            dig_until=jnp.where(tired, spent + jnp.maximum(spent // 2, self.plan.ncv), state.dig_until),
            status=jnp.maximum(state.status, ends),
        )
        source = jnp.where(begins | starved, RANDOM, jnp.where(alarm, SUSPECT, OWN))
        more = (begins | starved | alarm | kept) & (state.status != BROKEN)
        return state, jnp.where(more, jnp.where(begins, PROBE, ROW), NOTHING), source

    def _look(self, state: State, expanding: Bool[Array, ""]) -> tuple[State, Bool[Array, ""]]:
        """Examines the Ritz pairs if it is time to, and says whether it did.

        Always while the space is small, or the frontier is not a single row, since then the choice of the next row
        needs it; later at every 24th of the dimension, where an examination costs more than the products it saves.
        While digging only when the basis is full or the space has closed, which ends that.
        """
        m, frontier, full = jnp.sum(state.expanded), jnp.sum(state.frontier), self._full(state)
        usual = (m >= state.next_look) | (frontier != 1) | full
        due = expanding & (m >= self.fewest) & jnp.where(state.digging, (frontier == 0) | full, usual)
        ritz = refresh(due, state.projected, state.expanded, state.frontier, state.ritz)
        scale = jnp.maximum(state.scale, jnp.max(jnp.abs(ritz.values)))
        following = jnp.where(due, m + jnp.maximum(1, m // 24), state.next_look)
        order = preference(ritz.values, ritz.live, self.plan.which)
        return dataclasses.replace(
            state,
            ritz=ritz,
            order=order,
            scale=scale,
            next_look=following.astype(jnp.int32),
            dig_until=jnp.where(due & (frontier == 0), 0, state.dig_until),
        ), due

    def _take(self, basis: Basis, state: State, ahead: Ahead) -> tuple[Basis, State, Ahead]:
        """Orthogonalizes a new direction, from which a probe starts, or which becomes the next row to expand."""
        direction = lax.cond(
            ahead.source == RANDOM,
            lambda: draw(jax.random.fold_in(self.key, state.num_matvecs), self.op.structure),
            lambda: select(ahead.source == SUSPECT, state.suspect, state.vector),
        )
        use = ahead.use
        remove = jnp.where(use == PROBE, state.expanded, state.live)
        coefficients, rest, left = basis.orthogonalize(direction, state.live, remove)
        unit = divide(rest, left)
        overlap = jnp.where(state.frontier, coefficients, 0)
        probe = dataclasses.replace(state.probe, overlap=overlap / or_one(left))
        within = jnp.sum(jnp.square(overlap))
        # A suspect that lies mostly in the frontier asks for that row to be expanded, not for a new one.
        known = within > jnp.square(left)
        inject = (use == ROW) & ~known & (left > 0)
        row = jnp.where(inject, state.count, state.expanded.size).astype(jnp.int32)
        target = jnp.where(known, jnp.argmax(jnp.abs(overlap)), state.count).astype(jnp.int32)
        state = dataclasses.replace(
            state,
            vector=unit,
            probe=select(use == PROBE, probe, state.probe),
            count=state.count + inject,
            seeded=state.seeded & (use == PROBE),
            target=jnp.where(use == ROW, target, state.target),
            status=jnp.where((use == ROW) & ~known & ~inject, EXHAUSTED, state.status),
        )
        return basis.set_row(row, unit, in_place=True), state, Ahead(row, use, ahead.source)

    def _full(self, state: State) -> Bool[Array, ""]:
        """No room for another product."""
        return (jnp.sum(state.expanded) >= self.plan.ncv) | (state.count >= state.expanded.size - 1)

    def _urgency(self, state: State, verdict: Verdict) -> Float[Array, " rows"]:
        """How much of the unconverged wanted residuals lies in each frontier row; negative elsewhere.

        While digging the newest row goes first: one long Krylov space says more than several short ones.
        """
        couplings = jnp.where(verdict.unsettled, state.ritz.couplings[:, verdict.wanted], 0) / or_one(state.scale)
        weight = jnp.where(state.digging, jnp.arange(state.frontier.size), jnp.sum(jnp.square(couplings), axis=1))
        return jnp.where(state.frontier, weight, -1)

    def _aim(self, basis: Basis, state: State) -> tuple[Basis, State, Bool[Array, ""]]:
        """A last chance to turn the frontier before its row `target` is multiplied; and whether that was done."""
        return basis, state, jnp.zeros((), bool)

    def _restart(self, basis: Basis, state: State) -> tuple[Basis, State]:
        """Compresses a full basis to the better Ritz vectors and the frontier, or gives up after `maxiter`."""
        full = (state.status == RUNNING) & ~state.probe.active & self._full(state)
        spent = state.restarts + 1 >= self.plan.maxiter
        when = full & ~spent
        unchanged = jnp.zeros_like(state.projected)
        state, transform = lax.cond(when, lambda: self._compress(state), lambda: (state, unchanged))
        status = jnp.where(full & spent, EXHAUSTED, state.status)
        return basis.rotate(transform, when), dataclasses.replace(state, status=status)

    def _compress(self, state: State) -> tuple[State, Float[Array, "rows rows"]]:
        """The state in the coordinates of the kept Ritz vectors and the frontier, and the change of coordinates."""
        rows, position = state.expanded.size, jnp.arange(state.expanded.size)
        frontier, ritz = state.frontier, state.ritz
        keep = jnp.minimum(jnp.minimum(self.plan.keep, ritz.count), rows - 2 - jnp.sum(frontier))
        kept = jnp.sort(jnp.where(position < keep, state.order, rows - 1))
        moved = jnp.where(frontier, keep + jnp.cumsum(frontier) - 1, rows)
        chosen = position < keep
        carry = (moved[:, None] == position[None, :]).astype(ritz.values.dtype)
        transform = jnp.where(chosen, ritz.vectors[:, kept], 0) + carry
        couplings = matmul(carry.T, jnp.where(chosen, ritz.couplings[:, kept], 0))
        values = jnp.where(chosen, ritz.values[kept], 0)
        compressed = dataclasses.replace(
            state,
            projected=jnp.diag(values) + couplings + couplings.T,
            expanded=chosen,
            count=(keep + jnp.sum(frontier)).astype(jnp.int32),
            target=moved[state.target].astype(jnp.int32),
            previous=jnp.asarray(rows, jnp.int32),
            ritz=Ritz(
                values,
                jnp.diag(chosen.astype(values.dtype)),
                couplings,
                jnp.where(chosen, ritz.residuals[kept], jnp.inf),
                keep.astype(jnp.int32),
            ),
            next_look=keep.astype(jnp.int32),
            seeded=jnp.zeros((), bool),
            restarts=state.restarts + 1,
        )
        return compressed, transform
