"""How two programs are timed against each other, and how a case is printed.

In: two functions that do the same work. Out: a `Comparison` of times, and one JSON line per case. Shared machines drift
by tens of percent within minutes, so the two run in turn, and the ratio is taken within each pair before the median.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy.sparse.linalg import LinearOperator

import hessjax as hj


class Comparison(NamedTuple):
    """Seconds of two programs that ran in turn.

    Attributes:
        ours_first: the first call, compilation included.
        theirs_first: likewise.
        ours: the median of the later calls.
        theirs: likewise.
        ratio: the median over the pairs of later calls of ours / theirs.
    """

    ours_first: float
    theirs_first: float
    ours: float
    theirs: float
    ratio: float


class CountedProduct(LinearOperator):
    """A `LinearOperator` that counts its products in `calls`."""

    def __init__(self, operator: LinearOperator):
        super().__init__(operator.dtype, operator.shape)
        self.operator = operator
        self.calls = 0

    def _matvec(self, x: np.ndarray) -> np.ndarray:
        self.calls += 1
        return self.operator.matvec(x)


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int = 5) -> Comparison:
    """Times two functions in turn: one first call each, then `repeats` pairs in alternating order.

    JAX's compilation caches are emptied before the first calls, so that these do not depend on what ran earlier. What
    both programs need in common is then compiled in the first call of `ours`. Blocks on every JAX array returned.

    Args:
        ours: takes nothing; what it returns is waited for.
        theirs: likewise.
        repeats: pairs of later calls, at least 1.

    Raises:
        ValueError: `repeats` is below 1.
    """
    if repeats < 1:
        raise ValueError(f"`compare` needs `repeats >= 1` for a median, got {repeats}.")
    jax.clear_caches()
    ours_first, theirs_first = _seconds(ours), _seconds(theirs)
    pairs = []
    for index in range(repeats):
        if index % 2:
            second = _seconds(theirs)
            pairs.append((_seconds(ours), second))
        else:
            pairs.append((_seconds(ours), _seconds(theirs)))
    return Comparison(
        ours_first,
        theirs_first,
        statistics.median(mine for mine, _ in pairs),
        statistics.median(other for _, other in pairs),
        statistics.median(mine / other for mine, other in pairs),
    )


def first_call(function: Callable[[], Any]) -> float:
    """Seconds of a call with JAX's compilation caches emptied before it; blocks on every JAX array returned."""
    jax.clear_caches()
    return _seconds(function)


def report(name: str, *, sizes: Mapping[str, Any], **fields: Any) -> None:
    """Prints one case as one line of JSON: its name, device, versions, sizes and `fields`, floats to four digits."""
    versions = {package: version(package) for package in ("jax", "numpy", "scipy")} | {"hessjax": hj.__version__}
    line = {
        "name": name,
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "sizes": dict(sizes),
        **fields,
    }
    print(json.dumps(_plain(line)), flush=True)


def summary(ratios: list[float]) -> dict[str, float] | None:
    """The geometric mean and the maximum of positive ratios; None if there are none."""
    if not ratios:
        return None
    return {"geometric_mean": statistics.geometric_mean(ratios), "maximum": max(ratios)}


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return _plain(value.tolist())
    return float(f"{value:.4g}") if isinstance(value, float) else value
