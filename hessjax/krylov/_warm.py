"""A solve that starts from the eigenvectors of a nearby operator, for operators that change step by step.

The iteration is that of `eigsh`, from a block of start vectors, with two changes. All start rows are multiplied before
anything is judged: each of them stands for an eigenvalue, and a residual says nothing of those that were left out. And
the certificate, which costs more than a good start leaves to do, is made only when there is cause: when the caller
asks, when a wanted value has moved by a tenth, or when the start was so poor that eight times its products were needed.

Beside the k wanted rows the block holds *guards*, the next best Ritz vectors. They are multiplied and never judged. A
value that rises past the wanted ones is among them before it does, and the wanted ones converge at the rate of the gap
behind the guards. On digits at the edge of stability, where five values lie within 2%, one guard saved products.

With `grow_above` fewer than k pairs may be wanted: those above it, and the next one. How many that is follows from the
Ritz values, which never exceed the eigenvalues that they stand for, and is found anew at every turn.
"""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree, Scalar

from hessjax._vectors import draw, select
from hessjax.krylov._eigsh import _fix_signs
from hessjax.krylov._projected import Verdict
from hessjax.krylov._restarted import Iteration
from hessjax.krylov._state import BROKEN, CERTIFIED, Plan, State
from hessjax.operators._operator import Operator
from hessjax.operators._packing import Packed, Packing

WHICH = ("LA", "SA", "LM", "BE")
_DIMENSION = 20  # expanded rows before a restart, at least; SciPy's own least
_RESTARTS = 8  # about a hundred products: what has not converged by then goes on from there next time
_PATIENCE = 8  # products for each start row, beyond which the start was no better than a random one
_MOVED = 0.1  # of the largest wanted value


class WarmPairs(eqx.Module):
    """k eigenpairs and g guards.

    Attributes:
        values: (k,), ascending; NaN for pairs that were not wanted, which come first, and all of them NaN where a
            product was not finite.
        residuals: (k,), ‖Av - λv‖, absolute; infinite where the values are NaN.
        block: the operator's structure with a leading axis k + g: the eigenvectors in the order of `values`, then the
            guards. Zero where the values are NaN, or where the space has fewer dimensions.
        certified: none of the wanted eigenvalues was missed, by the certificate of `eigsh`.
        num_matvecs: products spent, those of the certificate included.
    """

    values: Float[Array, " k"]
    residuals: Float[Array, " k"]
    block: PyTree[Float[Array, "rows ..."]]
    certified: Bool[Array, ""]
    num_matvecs: Int[Array, ""]


class Warm(Iteration):
    """`Iteration` from a block of good start vectors.

    Attributes:
        rows: how many start vectors there are.
        expected: (k,), the wanted values as last seen, NaN for those that were not.
        certify: make the certificate in any case.
        grow_above: only the pairs above it are wanted and the next one, k at most; None for k pairs.
    """

    rows: Int[Array, ""]
    expected: Float[Array, " k"]
    certify: Bool[Array, ""]
    grow_above: Scalar | None

    @property
    def fewest(self) -> int:
        return self.plan.k if self.grow_above is None else 1

    def count(self, state: State) -> int | Int[Array, ""]:
        """How many pairs are wanted."""
        if self.grow_above is None:
            return self.plan.k
        above = jnp.sum(state.ritz.live & (state.ritz.values > self.grow_above))
        return jnp.minimum(above + 1, self.plan.k)

    def judge(self, state: State) -> Verdict:
        """Pairs that are not wanted are stood for by the innermost wanted one, so that they change no verdict."""
        within = jnp.arange(state.order.size) < self.count(state)
        order = jnp.where(within, state.order, state.order[self.count(state) - 1])
        return super().judge(dataclasses.replace(state, order=order))

    def _settle(
        self, state: State, verdict: Verdict, looked: Bool[Array, ""], limit: Scalar
    ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether the wanted pairs have settled, and whether that is enough without a certificate.

        It is not once a certificate has been begun: what made it raise an alarm may not be all that was missed.
        """
        del limit
        started = jnp.arange(state.frontier.size) < self.rows
        settled = looked & verdict.settled & ~state.digging & ~jnp.any(state.frontier & started)
        values = state.ritz.values[verdict.wanted]
        moved = jnp.abs(values - self.expected) > _MOVED * jnp.max(jnp.abs(values))  # not where nothing was expected
        quick = state.num_matvecs <= _PATIENCE * self.rows
        return settled, settled & ~jnp.any(moved) & quick & ~self.certify & (state.probe.steps == 0)

    def _urgency(self, state: State, verdict: Verdict) -> Float[Array, " rows"]:
        """Start rows come first."""
        first = state.frontier & (jnp.arange(state.frontier.size) < self.rows)
        return jnp.where(first, jnp.inf, super()._urgency(state, verdict))


def warm_eigenpairs(
    op: Operator,
    start: PyTree[Float[Array, "rows ..."]],
    expected: Float[Array, " k"],
    key: PRNGKeyArray,
    *,
    which: str,
    tol: Scalar,
    certify: Bool[Array, ""],
    grow_above: Scalar | None = None,
) -> WarmPairs:
    """The k wanted eigenpairs of `op`, from eigenvectors of an operator near to it.

    At least as many products as `start` has rows. Memory is max(20, 3 rows) + rows + 12 vectors.

    Args:
        op: symmetric A.
        start: k + g vectors on the leading axis of every leaf; all zero for a start from a random vector.
        expected: the k values that `start` belongs to; NaN if there are none, and the result will be certified.
        key: draws the certificate's directions, and the start if there is none.
        which: LA, SA, LM or BE.
        tol: a pair converges when its residual is at most tol · |λ|.
        certify: make the certificate even if nothing calls for it.
        grow_above: with LA, compute only the pairs above it and the next one, k at most.
    """
    k, rows = expected.size, jtu.tree_leaves(start)[0].shape[0]
    packing = Packing.of(op.like)
    packed = Packed(op, packing)
    block = packing.pack(start, batch=1)
    filled = [jnp.any(leaf.reshape(rows, -1) != 0, axis=1) for leaf in block]
    filled = jnp.sum(jnp.any(jnp.stack(filled), axis=0), dtype=jnp.int32)
    blank = filled == 0
    first, key = jax.random.split(key)
    random = draw(first, packed.structure)
    block = jtu.tree_map(lambda leaf, z: leaf.at[0].set(jnp.where(blank, z, leaf[0])), block, random)
    ncv = min(op.size, max(_DIMENSION, 3 * rows))
    plan = Plan(which, k, ncv, _RESTARTS, random_start=False)
    certify, started = certify | blank, jnp.maximum(filled, 1)
    iteration = Warm(packed, plan, tol, key, jnp.zeros_like(tol), started, expected, certify, grow_above)
    basis, state = iteration.run(block)
    verdict, count = iteration.judge(state), iteration.count(state)
    finite = (state.status != BROKEN) & jnp.all(jnp.isfinite(verdict.residuals))
    held = finite & (jnp.arange(k) >= k - count)
    # The guards are next in line. A row that holds nothing points at the last position, which never holds a pair.
    following = jnp.clip(count + jnp.arange(rows - k), 0, state.order.size - 1)
    chosen = jnp.concatenate([jnp.where(held, verdict.wanted, -1), state.order[following]])
    found = packing.unpack(_fix_signs(basis.combine(state.ritz.vectors[:, chosen], state.live)), batch=1)
    proved = (state.probe.steps > 0) | (jnp.sum(state.expanded) >= op.size)
    return WarmPairs(
        jnp.where(held, state.ritz.values[verdict.wanted], jnp.nan),
        jnp.where(held, verdict.residuals, jnp.inf),
        select(finite, found, jtu.tree_map(jnp.zeros_like, found)),
        finite & (state.status == CERTIFIED) & verdict.decisive & proved,
        state.num_matvecs,
    )
