"""The one comparison of a port with its source: by how much two pytrees differ, against what size, and what is allowed.

Arrays flow in, a `Difference` flows out: the largest, relative to its leaf's largest entry. At an optimum a leaf may be
nothing but the rounding of terms that cancel; so that no leaf is measured against its own rounding, the size has a
floor, a share of those terms.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

_NEGLIGIBLE = 1e-3  # of the terms: what is smaller counts as this share
_ROUNDINGS = 8  # units in the last place of the terms that two orders of summation may differ by


@dataclasses.dataclass(frozen=True)
class Difference:
    """The largest difference between port and source in one quantity.

    Attributes:
        quantity: "outputs", "loss" or "gradient".
        relative: max |port - source| over one leaf, divided by the leaf's largest entry, or by the floor where that is
            larger; of all leaves, the largest.
        place: the leaf and the index in it.
        port: the port's number there.
        source: the source's.
    """

    quantity: str
    relative: float
    place: str
    port: float
    source: float

    def __str__(self) -> str:
        return f"{self.quantity}: {self.relative:.1e} at {self.place}, {self.port:.9g} for {self.source:.9g}"


def tolerance_in(dtype: Any) -> float:
    """1e-8 in float64, 1e-4 in float32 and 5e-2 in half precision: room for the order of sums, not for an error."""
    size = np.dtype(dtype).itemsize
    return 1e-8 if size >= 8 else 1e-4 if size == 4 else 5e-2


def least_precise(*trees: PyTree) -> np.dtype:
    """The floating-point dtype with the largest rounding among the leaves; float64 where there is none."""
    found = {np.dtype(getattr(leaf, "dtype", np.float64)) for tree in trees for leaf in jtu.tree_leaves(tree)}
    real = [dtype for dtype in found if jnp.issubdtype(dtype, jnp.floating)]
    return max(real, key=lambda dtype: float(jnp.finfo(dtype).eps), default=np.dtype(np.float64))


def difference(quantity: str, port: PyTree, source: PyTree, terms: float = 0.0, dtype: Any = None) -> Difference:
    """The largest relative difference between two pytrees of one structure.

    Args:
        quantity: what they are.
        port: one.
        source: the other.
        terms: the size of the terms that each was summed from, at least that of its largest leaf.
        dtype: what was computed in, by default the least precise of the leaves'.

    Raises:
        ValueError: their structures or shapes differ.
    """
    mine, theirs = jtu.tree_leaves_with_path(port), jtu.tree_leaves_with_path(source)
    shapes = [{jtu.keystr(path): np.shape(leaf) for path, leaf in leaves} for leaves in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The port's {quantity} have shapes {shapes[0]}, the source's {shapes[1]}.")
    peaks = [_peak(leaf) for _, leaf in theirs]
    floor = _share(least_precise(port, source) if dtype is None else dtype) * max([terms, *peaks])
    worst = Difference(quantity, 0.0, "no array", 0.0, 0.0)
    for (path, ours), (_, other), peak in zip(mine, theirs, peaks, strict=True):
        a, b = np.asarray(ours, np.float64), np.asarray(other, np.float64)
        if a.size == 0:
            continue
        # Equal infinities agree, as in masked scores.
        gap = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        gap = np.where(np.isnan(gap), np.inf, gap)
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(gap)), gap.shape))
        relative = float(gap[at]) / (max(peak, floor) or 1.0)
        if relative >= worst.relative:
            worst = Difference(quantity, relative, f"`{quantity}{jtu.keystr(path)}` {at}", float(a[at]), float(b[at]))
    return worst


def _share(dtype: Any) -> float:
    """The floor's share of the terms: times the tolerance it is their rounding, and never below `_NEGLIGIBLE`."""
    return max(_NEGLIGIBLE, _ROUNDINGS * float(jnp.finfo(dtype).eps) / tolerance_in(dtype))


def _peak(leaf: Any) -> float:
    values = np.abs(np.asarray(leaf, np.float64))
    return float(np.max(values, initial=0.0, where=np.isfinite(values)))
