"""Proof that a port is faithful: what it and its source say on the same examples, side by side.

A wrong port gives a plausible, wrong spectrum. So every adapter compares outputs, loss and gradient before it returns,
and what it found travels with the model as `Ported.parity`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from hessjax._compare import Difference, difference
from hessjax._model import Model

_CAUSES = (
    "Usual causes: train instead of eval mode, normalisation over the batch, random layers, another dtype, a sum for a "
    "mean in the loss, a derivative that the source switches off (`no_grad`, custom functions)."
)
EXAMPLES = 8  # on which port and source are compared


@dataclasses.dataclass(frozen=True)
class Parity:
    """What was compared, in which dtype, on how many examples; printing it shows the largest differences and where.

    Attributes:
        source: the framework that was asked.
        num_examples: how many examples.
        dtype: the least precise that port and source computed in.
        tolerance: the largest relative difference that is accepted.
        differences: one `Difference` per quantity.
    """

    source: str
    num_examples: int
    dtype: str
    tolerance: float
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        head = f"Port against {self.source}, {self.num_examples} examples in {self.dtype}, largest relative differences"
        return "\n  ".join([f"{head} (tolerance {self.tolerance:.0e}):", *map(str, self.differences)])


class Ported(Model):
    """A `Model` made by an adapter, with the proof that it computes what its source computes.

    Attributes:
        parity: a `Parity`, or None where the check was switched off.
    """

    parity: Parity | None = eqx.field(static=True)

    def __init__(self, *args: Any, parity: Parity | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.parity = parity

    def proven(self, parity: Parity) -> "Ported":
        """The same model with its proof."""
        return Ported(self.params, self.data, self.forward, self.loss, batched=self.batched, parity=parity)


def check_verify(verify: Any, caller: str) -> None:
    """Raises ValueError unless `verify` is "gradient", "output" or False."""
    if not (verify is False or (isinstance(verify, str) and verify in ("gradient", "output"))):
        raise ValueError(f'`{caller}` takes `verify="gradient"`, `"output"` or False, got {verify!r}.')


def demand(parity: Parity) -> Parity:
    """Returns `parity` if it holds.

    Raises:
        ValueError: a difference exceeds the tolerance.
    """
    if all(difference.relative <= parity.tolerance for difference in parity.differences):
        return parity
    raise ValueError(f"The port disagrees with its source. {parity}\n{_CAUSES}")


def check_independence(outputs_of: Callable[[PyTree], PyTree], inputs: PyTree, whole: PyTree, tolerance: float) -> None:
    """Asks the source for its examples in two parts, which must say what it said of them together.

    Raises:
        ValueError: they do not.
    """
    length = jtu.tree_leaves(inputs)[0].shape[0]
    if length < 2:
        return
    halves = slice(length // 2), slice(length // 2, length)
    parts = [outputs_of(take(inputs, rows)) for rows in halves]
    joined = jtu.tree_map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts)
    found = difference("outputs", joined, whole)
    if found.relative > tolerance:
        raise ValueError(
            f"The source's output on one example depends on the others in the batch, or on chance ({found}). A loss "
            "that is a mean over independent examples is needed: switch to inference mode (running statistics in the "
            "normalisation, no dropout)."
        )


def take(tree: PyTree, rows: slice | np.ndarray) -> PyTree:
    """Some of the examples; what has no axes is passed whole."""
    return jtu.tree_map(lambda leaf: leaf[rows] if np.ndim(leaf) > 0 else leaf, tree)
