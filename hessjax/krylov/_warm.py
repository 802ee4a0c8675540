"""A solve that starts from what is known of a nearby operator, for operators that change step by step.

The iteration is that of `eigsh`, with three changes.

*A model.* Beside the k wanted vectors come *guards*, the next best, and a value for each: together a low-rank model of
the operator as it was. All of them are rows of the basis from the start, but only the wanted ones are multiplied. The
model fills the part of the projected matrix that no product has shown, and makes it whole. Its wanted eigenvectors are
then the best guess at the true ones, and what of them lies in rows that were not multiplied is the direction to
multiply next: the frontier is reflected so that one of its rows is that direction. This is the generalized Davidson
method (Morgan and Scott, doi:10.1137/0907054) with the model as preconditioner. What an eigenvector has turned towards
its neighbours since, the model finds in one product; a Krylov space has to tell them apart by their values, which at
the edge of stability lie within 2%. From one measurement to the next the model is the least change that agrees with all
products made (Powell's symmetric update), cut down to its best eigenpairs.

*What settles.* All wanted start rows are multiplied before anything is judged: each of them stands for an eigenvalue,
and a residual says nothing of those that were left out. Nor has anything settled while a wanted eigenvector of the
model lies mostly in rows that were not multiplied: a guard whose value has risen past a wanted one is one.

*The certificate*, which costs more than a good start leaves to do, is made only when there is cause: when the caller
asks, when a wanted value has moved by a tenth, or when the start was so poor that eight times its products were needed.

With `grow_above` fewer than k pairs may be wanted: those above it, and the next one. How many that is follows from the
Ritz values, which never exceed the eigenvalues that they stand for, and is found anew at every turn.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from hessjax._vectors import divide, draw, matmul, norm, select
from hessjax.krylov._basis import Basis
from hessjax.krylov._eigenpairs import fix_signs
from hessjax.krylov._low_rank import LowRank, start_rows
from hessjax.krylov._projected import Ritz, Verdict, preference, refresh
from hessjax.krylov._restarted import Iteration
from hessjax.krylov._state import BROKEN, CERTIFIED, RUNNING, Guide, Plan, State
from hessjax.operators._operator import Operator
from hessjax.operators._packing import Packed, Packing

WHICH = ("LA", "SA", "LM", "BE")
_DIMENSION = 20  # expanded rows before a restart, at least; SciPy's own least
_RESTARTS = 8  # about a hundred products: what has not converged by then goes on from there next time
_PATIENCE = 8  # products for each start row and one more, beyond which the start was no better than a random one
_MOVED = 0.1  # of the largest wanted value


class WarmPairs(eqx.Module):
    """k eigenpairs, and the model that they leave.

    Attributes:
        values: (k,), ascending; NaN for pairs that were not wanted, which come first, and all of them NaN where a
            product was not finite.
        residuals: (k,), ‖Av - λv‖, absolute; infinite where the values are NaN.
        vectors: the operator's structure with a leading axis k. Zero where the values are NaN.
        model: of the operator as it is now.
        certified: none of the wanted eigenvalues was missed, by the certificate of `eigsh`.
        num_matvecs: products spent, those of the certificate included.
    """

    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    vectors: PyTree[Float[Array, "k ..."]]
    model: LowRank
    certified: Bool[Array, ""]
    num_matvecs: Int[Array, ""]


class Warm(Iteration):
    """`Iteration` from good start vectors and a model of the operator.

    Attributes:
        projected: (m, m), the model's matrix in the coordinates of the start rows.
        rows: how many of the first rows have to be multiplied.
        expected: (k,), the wanted values as last seen, NaN for those that were not.
        certify: make the certificate in any case.
        grow_above: only the pairs above it are wanted and the next one, k at most; None for k pairs.
    """

    projected: Float[Array, "m m"]
    rows: Int[Array, ""]
    expected: Float[Array, " k"]
    certify: Bool[Array, ""]
    grow_above: Scalar | None

    @property
    def fewest(self) -> int:
        return self.plan.k if self.grow_above is None else 1

    def init(self, start: PyTree[Array], spent: int | Int[Array, ""] = 0) -> tuple[Basis, State]:
        """The model is what is not yet known of the projected matrix.

        Args:
            start: orthonormal rows, then zeros.
            spent: products made so far.
        """
        known = self.projected.shape[0]
        basis = Basis.of(start, self.plan.ncv + known + 1)
        filled = [jnp.any(leaf.reshape(known, -1) != 0, axis=1) for leaf in jtu.tree_leaves(start)]
        count = jnp.sum(jnp.any(jnp.stack(filled), axis=0), dtype=jnp.int32)
        state = self.begin(basis, count, spent)
        projected = state.projected.at[:known, :known].set(self.projected)
        return basis, dataclasses.replace(state, projected=projected, guide=_silent(state))

    def count(self, ritz: Ritz) -> int | Int[Array, ""]:
        """How many pairs are wanted."""
        if self.grow_above is None:
            return self.plan.k
        return jnp.minimum(jnp.sum(ritz.live & (ritz.values > self.grow_above)) + 1, self.plan.k)

    def judge(self, state: State) -> Verdict:
        """Pairs that are not wanted are stood for by the innermost wanted one, so that they change no verdict."""
        count = self.count(state.ritz)
        within = jnp.arange(state.order.size) < count
        return super().judge(dataclasses.replace(state, order=jnp.where(within, state.order, state.order[count - 1])))

    def _expand(
        self, state: State, size: Scalar, coefficients: Array, left: Scalar, expanding: Bool[Array, ""]
    ) -> tuple[State, Int[Array, ""]]:
        """The model knows nothing of a new frontier row."""
        state, row = super()._expand(state, size, coefficients, left, expanding)
        return dataclasses.replace(state, projected=state.projected.at[row, row].set(self._ordinary(state))), row

    def _ordinary(self, state: State) -> Scalar:
        """A value that nobody wants, for rows of which nothing is known: 0, if that is one."""
        values = jnp.diagonal(state.projected)
        low = jnp.min(jnp.where(state.expanded, values, jnp.inf))
        high = jnp.max(jnp.where(state.expanded, values, -jnp.inf))
        ordinary = {"LA": jnp.minimum(low, 0), "SA": jnp.maximum(high, 0), "LM": 0.0, "BE": (low + high) / 2}
        return jnp.where(jnp.any(state.expanded), ordinary[self.plan.which], 0)

    def _look(self, state: State, expanding: Bool[Array, ""]) -> tuple[State, Bool[Array, ""]]:
        """Beside the Ritz pairs, the eigenpairs of the model.

        A start that was no better than a random one says the same of the model, which is then forgotten.
        """
        state, looked = super()._look(state, expanding)
        unseen = state.frontier[:, None] & state.frontier[None, :]
        blank = jnp.diag(jnp.where(state.frontier, self._ordinary(state), 0))
        whole = jnp.where(unseen & ~self._patient(state), blank, state.projected)
        pairs = refresh(looked, whole, state.live, jnp.zeros_like(state.live), _guide(state).pairs)
        wanted = preference(pairs.values, pairs.live, self.plan.which)[: self.plan.k]
        within = (jnp.arange(self.plan.k) < self.count(pairs)) & pairs.live[wanted]
        inside = jnp.where(state.frontier[:, None] & within, pairs.vectors[:, wanted], 0)
        direction = inside[:, jnp.argmax(jnp.sum(jnp.square(inside), axis=0))]
        return dataclasses.replace(state, guide=Guide(pairs, direction)), looked

    def _patient(self, state: State) -> Bool[Array, ""]:
        return state.num_matvecs <= _PATIENCE * (self.rows + 1)

    def _settle(
        self, state: State, verdict: Verdict, looked: Bool[Array, ""], limit: Scalar
    ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether the wanted pairs have settled, and whether that is enough without a certificate.

        It is not once a certificate has been begun: what made it raise an alarm may not be all that was missed.
        """
        del limit
        fresh = _unprobed(state)
        claimed = fresh & (jnp.sum(jnp.square(_guide(state).direction)) > 0.5)
        settled = looked & verdict.settled & ~state.digging & ~jnp.any(self._starting(state)) & ~claimed
        values = state.ritz.values[verdict.wanted]
        moved = jnp.abs(values - self.expected) > _MOVED * jnp.max(jnp.abs(values))  # not where nothing was expected
        return settled, settled & ~jnp.any(moved) & self._patient(state) & ~self.certify & fresh

    def _starting(self, state: State) -> Bool[Array, " rows"]:
        """The wanted start rows that have not been multiplied."""
        return state.frontier & (jnp.arange(state.frontier.size) < self.rows)

    def _urgency(self, state: State, verdict: Verdict) -> Float[Array, " rows"]:
        """Start rows come first."""
        return jnp.where(self._starting(state), jnp.inf, super()._urgency(state, verdict))

    def _aim(self, basis: Basis, state: State) -> tuple[Basis, State, Bool[Array, ""]]:
        """Reflects the frontier so that one of its rows is what the model wants to know of.

        Not once a certificate has begun: it keeps coordinates, and what it finds is to be multiplied itself.
        """
        direction = _guide(state).direction
        size = jnp.linalg.norm(direction)
        target = jnp.argmax(jnp.abs(direction)).astype(jnp.int32)
        guided = (state.status == RUNNING) & _unprobed(state) & (size > 0)
        guided &= ~jnp.any(self._starting(state)) & (jnp.sum(state.frontier) > 1)
        mirror = direction.at[target].add(jnp.where(direction[target] < 0, -size, size))
        mirror = jnp.where(guided, divide(mirror, jnp.linalg.norm(mirror)), 0)

        def reflect(rows: Array) -> Array:
            return rows - 2 * mirror[:, None] * matmul(mirror, rows)

        ritz = dataclasses.replace(state.ritz, couplings=reflect(state.ritz.couplings))
        state = dataclasses.replace(
            state,
            projected=reflect(reflect(state.projected).T),
            ritz=ritz,
            target=jnp.where(guided, target, state.target),
        )
        return basis.reflect(mirror, guided), state, guided

    def _compress(self, state: State) -> tuple[State, Float[Array, "rows rows"]]:
        """The model goes on in the frontier; its eigenpairs wait for the next look."""
        compressed, transform = super()._compress(state)
        unseen = state.frontier[:, None] & state.frontier[None, :]
        kept = matmul(transform.T, matmul(jnp.where(unseen, state.projected, 0), transform))
        return dataclasses.replace(compressed, projected=compressed.projected + kept, guide=_silent(state)), transform


def warm_eigenpairs(
    op: Operator,
    first: PyTree[Float[Array, "k ..."]],
    model: LowRank,
    expected: Float[Array, " k"],
    key: PRNGKeyArray,
    *,
    which: str,
    tol: Scalar,
    certify: Bool[Array, ""],
    grow_above: Scalar | None = None,
) -> WarmPairs:
    """The k wanted eigenpairs of `op`, from what is known of an operator near to it.

    At least as many products as pairs are wanted. Memory is max(20, 3k + 3) + k + m + 13 vectors.

    Args:
        op: symmetric A.
        first: vectors to start from before those of the model; zero for none.
        model: of an operator near to A, m >= k vectors, its most wanted ones the start; all zero for a start from a
            random vector.
        expected: the k values that the start belongs to; NaN if there are none, and the result will be certified.
        key: draws the certificate's directions, and the start if there is none.
        which: LA, SA, LM or BE.
        tol: a pair converges when its residual is at most tol · |λ|.
        certify: make the certificate even if nothing calls for it.
        grow_above: with LA, compute only the pairs above it and the next one, k at most.
    """
    k = expected.size
    packing = Packing.of(op.like)
    packed = Packed(op, packing)
    known = LowRank(model.values, packing.pack(model.vectors, batch=1))
    block, projected = start_rows(known, packing.pack(first, batch=1))
    blank = ~jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in block]))
    direction, key = jax.random.split(key)
    random = draw(direction, packed.structure)
    random = divide(random, norm(random))
    block = jtu.tree_map(lambda leaf, z: leaf.at[0].set(jnp.where(blank, z, leaf[0])), block, random)
    ncv = min(op.size, max(_DIMENSION, 3 * (k + 1)))
    plan = Plan(which, k, ncv, _RESTARTS, random_start=False)
    wanted = jnp.maximum(jnp.sum(~jnp.isnan(expected), dtype=jnp.int32), 1)
    certify, floor = certify | blank, jnp.zeros_like(tol)
    iteration = Warm(packed, plan, tol, key, floor, projected, wanted, expected, certify, grow_above)
    basis, state = iteration.run(block)
    verdict, count = iteration.judge(state), iteration.count(state.ritz)
    finite = (state.status != BROKEN) & jnp.all(jnp.isfinite(verdict.residuals))
    held = finite & (jnp.arange(k) >= k - count)
    # A row that holds nothing points at the last position, which never holds a pair.
    vectors = basis.combine(state.ritz.vectors[:, jnp.where(held, verdict.wanted, -1)], state.live)
    pairs = _guide(state).pairs
    best = preference(pairs.values, pairs.live, which)[: model.values.size]
    learnt = basis.combine(pairs.vectors[:, best], state.live)
    proved = (state.probe.steps > 0) | (jnp.sum(state.expanded) >= op.size)
    return WarmPairs(
        jnp.where(held, state.ritz.values[verdict.wanted], jnp.nan),
        jnp.where(held, verdict.residuals, jnp.inf),
        packing.unpack(select(finite, fix_signs(vectors), jtu.tree_map(jnp.zeros_like, vectors)), batch=1),
        LowRank(
            jnp.where(finite, pairs.values[best], 0),
            packing.unpack(select(finite, learnt, jtu.tree_map(jnp.zeros_like, learnt)), batch=1),
        ),
        finite & (state.status == CERTIFIED) & verdict.decisive & proved,
        state.num_matvecs,
    )


def _unprobed(state: State) -> Bool[Array, ""]:
    """No certificate has been begun."""
    return ~state.probe.active & (state.probe.steps == 0)


def _silent(state: State) -> Guide:
    """A guide that says nothing."""
    none = Ritz.empty(state.expanded.size, state.scale.dtype)
    return Guide(none, none.values)


def _guide(state: State) -> Guide:
    if state.guide is None:
        raise AssertionError("`Warm.init` did not begin this iteration.")
    return state.guide
