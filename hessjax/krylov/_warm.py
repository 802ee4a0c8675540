"""A solve that starts from the eigenvectors of a nearby operator, for operators that change step by step.

The iteration is that of `eigsh`, from a block of start vectors, with two changes. All start rows are multiplied before
anything is judged: each of them stands for an eigenvalue, and a residual says nothing of those that were left out. And
the certificate, which costs more than a good start leaves to do, is made only when there is cause: when the caller
asks, when a wanted value has moved by a tenth, or when the start was so poor that four times its products were needed.

Beside the k wanted rows the block holds *guards*, the next best Ritz vectors. They are multiplied and never judged. A
value that rises past the wanted ones is among them before it does, and the wanted ones converge at the rate of the gap
behind the guards. On digits at the edge of stability, where five values lie within 2%, one guard saved products.
"""

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
_PATIENCE = 4  # products for each start row, beyond which the start was no good one
_MOVED = 0.1  # of the largest wanted value


class WarmPairs(eqx.Module):
    """k eigenpairs and g guards.

    Attributes:
        values: (k,), ascending; NaN where a product was not finite.
        residuals: (k,), ‖Av - λv‖, absolute; infinite where a product was not finite.
        block: the operator's structure with a leading axis k + g: the eigenvectors in the order of `values`, then the
            guards. Zero where a product was not finite, or where the space has fewer dimensions.
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
        expected: (k,), the wanted values as last seen, NaN for none.
        certify: make the certificate in any case.
    """

    rows: int = eqx.field(static=True)
    expected: Float[Array, " k"]
    certify: Bool[Array, ""]

    def _settle(
        self, state: State, verdict: Verdict, looked: Bool[Array, ""], limit: Scalar
    ) -> tuple[Bool[Array, ""], Bool[Array, ""]]:
        """Whether the wanted pairs have settled, and whether that is enough without a certificate.

        It is not once a certificate has been begun: what made it raise an alarm may not be all that was missed.
        """
        del limit
        settled = looked & verdict.settled & ~state.digging & ~jnp.any(state.frontier[: self.rows])
        values = state.ritz.values[verdict.wanted]
        still = jnp.all(jnp.abs(values - self.expected) <= _MOVED * jnp.max(jnp.abs(values)))
        quick = state.num_matvecs <= _PATIENCE * self.rows
        return settled, settled & still & quick & ~self.certify & (state.probe.steps == 0)

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
    """
    k, rows = expected.size, jtu.tree_leaves(start)[0].shape[0]
    packing = Packing.of(op.like)
    packed = Packed(op, packing)
    block = packing.pack(start, batch=1)
    blank = ~jnp.any(jnp.stack([jnp.any(leaf != 0) for leaf in block]))
    first, key = jax.random.split(key)
    random = draw(first, packed.structure)
    block = jtu.tree_map(lambda leaf, z: leaf.at[0].set(jnp.where(blank, z, leaf[0])), block, random)
    ncv = min(op.size, max(_DIMENSION, 3 * rows))
    plan = Plan(which, k, ncv, _RESTARTS, random_start=False)
    iteration = Warm(packed, plan, tol, key, jnp.zeros_like(tol), rows, expected, certify | blank)
    basis, state = iteration.run(block)
    verdict = iteration.judge(state)
    finite = (state.status != BROKEN) & jnp.all(jnp.isfinite(verdict.residuals))
    chosen = jnp.concatenate([verdict.wanted, state.order[k:rows]])
    found = packing.unpack(_fix_signs(basis.combine(state.ritz.vectors[:, chosen], state.live)), batch=1)
    proved = (state.probe.steps > 0) | (jnp.sum(state.expanded) >= op.size)
    return WarmPairs(
        jnp.where(finite, state.ritz.values[verdict.wanted], jnp.nan),
        jnp.where(finite, verdict.residuals, jnp.inf),
        select(finite, found, jtu.tree_map(jnp.zeros_like, found)),
        finite & (state.status == CERTIFIED) & verdict.decisive & proved,
        state.num_matvecs,
    )
