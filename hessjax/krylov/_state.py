"""What an iteration of `_restarted` is asked for, and where it stands."""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from hessjax.krylov._certificate import Probe
from hessjax.krylov._projected import Ritz

RUNNING, CERTIFIED, EXHAUSTED, BROKEN = range(4)


class Plan(eqx.Module):
    """What to compute: the static part of a solve.

    Attributes:
        which: LM, LA, SA or BE.
        k: the number of pairs.
        ncv: expanded rows before a restart.
        maxiter: restarts before giving up, the first fill counted.
        random_start: the start is one random vector, which can certify a single pair without a probe.
        storage: the dtype in which basis vectors are kept, None for their own.
    """

    which: str = eqx.field(static=True)
    k: int = eqx.field(static=True)
    ncv: int = eqx.field(static=True)
    maxiter: int = eqx.field(static=True)
    random_start: bool = eqx.field(static=True)
    storage: str | None = eqx.field(static=True, default=None)

    @property
    def keep(self) -> int:
        """Ritz vectors kept at a restart: the wanted ones and half of the spare room."""
        return min(self.k + max((self.ncv - self.k) // 2, 1), self.ncv - 1)


class Guide(eqx.Module):
    """What a model of the operator says, in the coordinates of all rows. See `_warm`.

    Attributes:
        pairs: the eigenpairs of the projected matrix with the model in its unknown part.
        direction: what lies in the frontier of the wanted one of which most does.
    """

    pairs: Ritz
    direction: Float[Array, " rows"]


class State(eqx.Module):
    """Where the iteration stands, apart from the basis itself. See the invariants of `_restarted`."""

    vector: PyTree
    last: PyTree
    suspect: PyTree
    target: Int[Array, ""]
    previous: Int[Array, ""]
    projected: Float[Array, "rows rows"]
    expanded: Bool[Array, " rows"]
    count: Int[Array, ""]
    ritz: Ritz
    order: Int[Array, " rows"]
    probe: Probe
    scale: Scalar
    deviation: Float[Array, " 2"]
    next_look: Int[Array, ""]
    dig_until: Int[Array, ""]
    seeded: Bool[Array, ""]
    restarts: Int[Array, ""]
    num_matvecs: Int[Array, ""]
    status: Int[Array, ""]
    guide: Guide | None = None

    @property
    def digging(self) -> Bool[Array, ""]:
        return self.num_matvecs < self.dig_until

    @property
    def live(self) -> Bool[Array, " rows"]:
        return jnp.arange(self.expanded.size) < self.count

    @property
    def frontier(self) -> Bool[Array, " rows"]:
        return self.live & ~self.expanded
