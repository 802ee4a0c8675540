"""How many probes run together."""

import jax.tree_util as jtu

from hessjax._vectors import size_of
from hessjax.krylov._memory import device_memory
from hessjax.operators._operator import Operator

_SHARE = 8  # by default the bases may take an eighth of the device's memory
_WORKING = 8  # vectors beside the basis


def probes_together(op: Operator, num_probes: int, num_steps: int, batch: int | None, beside: int = 0) -> int:
    """What was asked for, or as many as an eighth of the memory holds with `beside` vectors beside their bases."""
    if batch is not None:
        return min(batch, num_probes)
    vector = sum(size_of(leaf) * leaf.dtype.itemsize for leaf in jtu.tree_leaves(op.structure))
    vectors = device_memory() // _SHARE // vector - beside
    return max(1, min(num_probes, vectors // (num_steps + _WORKING)))
