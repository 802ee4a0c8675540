"""Embeddings, gathers and scatters.

Where torch raises for an index that falls outside, JAX would clamp, wrap or drop it and go on with a plausible number.
Here it reads NaN, or of integers the lowest, and a write with such an index makes all of its result so.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax.interop._torch._rules import rule


@rule("embedding")
def embedding(weight: Array, index: Array, padding_idx: int = -1, scale: bool = False, sparse: bool = False) -> Array:
    del sparse
    if scale:
        raise NotImplementedError("`scale_grad_by_freq` makes its gradient none of any function")
    rows = _read(weight, (index,))
    if padding_idx < 0:
        return rows
    return jnp.where((index == padding_idx)[..., None], jax.lax.stop_gradient(rows), rows)


@rule("index.Tensor", "_unsafe_index.Tensor")
def index_of(x: Array, indices: Any) -> Array:
    return _read(x, _key(indices), negative=True)


@rule("index_put", "_unsafe_index_put")
def index_put(x: Array, indices: Any, values: Array, accumulate: bool = False) -> Array:
    where = [index for index in indices if index is not None]
    if len(where) == 1 and where[0].dtype == bool:
        if jnp.ndim(values) == 0 and indices[0] is where[0] and not accumulate:
            mask = where[0].reshape(where[0].shape + (1,) * (x.ndim - where[0].ndim))
            return jnp.where(mask, values, x)
        raise NotImplementedError("it writes an array through a boolean mask; use `torch.where`")
    return _write(x, _key(indices), values, accumulate, negative=True)


def _key(indices: Any) -> tuple[Any, ...]:
    for index in indices:
        if index is not None and index.dtype == bool:
            raise NotImplementedError(
                "it indexes with a boolean mask, so the shape of its result depends on values; use `torch.where`"
            )
    return tuple(slice(None) if index is None else index for index in indices)


@rule("index_select")
def index_select(x: Array, dim: int, index: Array) -> Array:
    return _read(x, _at(x, dim, index))


@rule("gather")
def gather(x: Array, dim: int, index: Array, *, sparse_grad: bool = False) -> Array:
    del sparse_grad
    return _read(x, _along(x, dim, index))


@rule("take_along_dim")
def take_along_dim(x: Array, index: Array, dim: int | None = None) -> Array:
    return jnp.take_along_axis(x, index, dim, mode="fill")


@rule("scatter.src", "scatter.value")
def scatter(x: Array, dim: int, index: Array, src: Any) -> Array:
    return _write(x, _along(x, dim, index), _cut(src, index), False)


@rule("scatter_add")
def scatter_add(x: Array, dim: int, index: Array, src: Array) -> Array:
    return _write(x, _along(x, dim, index), _cut(src, index), True)


@rule("index_add")
def index_add(x: Array, dim: int, index: Array, src: Array, *, alpha: Any = 1) -> Array:
    return _write(x, _at(x, dim, index), alpha * src, True)


@rule("one_hot")
def one_hot(index: Array, classes: int = -1) -> Array:
    if classes < 0:
        raise NotImplementedError("the number of classes must be given, it may not depend on values")
    hot = jax.nn.one_hot(index, classes, dtype=index.dtype)
    return jnp.where(((index >= 0) & (index < classes))[..., None], hot, _nowhere(hot))


@rule("bucketize")
def bucketize(x: Array, bounds: Array, *, out_int32: bool = False, right: bool = False) -> Array:
    del out_int32
    return jnp.searchsorted(bounds, x, side="right" if right else "left")


def _read(x: Array, key: tuple[Any, ...], negative: bool = False) -> Array:
    """x[key], where a `negative` index counts from the end or falls outside."""
    return x.at[key].get(mode="fill", fill_value=_nowhere(x), wrap_negative_indices=negative)


def _write(x: Array, key: tuple[Any, ...], values: Any, accumulate: bool, negative: bool = False) -> Array:
    spot = x.at[key]
    options = {"mode": "drop", "wrap_negative_indices": negative}
    written = spot.add(values, **options) if accumulate else spot.set(values, **options)
    inside = [
        jnp.all((index >= (-n if negative else 0)) & (index < n))
        for index, n in zip(key, x.shape, strict=False)
        if not isinstance(index, slice)
    ]
    return jnp.where(jnp.all(jnp.stack(inside)), written, _nowhere(x)) if inside else written


def _nowhere(x: Array) -> Any:
    """What stands for a number that there is not."""
    if x.dtype == bool:
        return False
    return jnp.nan if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.iinfo(x.dtype).min


def _at(x: Array, dim: int, index: Array) -> tuple[Any, ...]:
    return (slice(None),) * (dim % x.ndim) + (index,)


def _along(x: Array, dim: int, index: Array) -> tuple[Array, ...]:
    """Torch's gather: the index array itself along `dim`, positions along every other axis."""
    if x.ndim == 0:
        return ()
    grid = list(jnp.meshgrid(*[jnp.arange(n) for n in index.shape], indexing="ij", sparse=True))
    grid[dim] = index
    return tuple(grid)


def _cut(src: Any, index: Array) -> Any:
    """Torch reads as much of the source as the index covers."""
    return src if jnp.ndim(src) == 0 else src[tuple(slice(n) for n in index.shape)]
