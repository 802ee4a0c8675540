"""Sums, means, extremes, orders and softmax."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax.interop._torch._rules import rule


def _axes(dim: Any) -> Any:
    """Torch's empty list and None are all axes."""
    return None if dim is None or dim == [] or dim == () else tuple(dim) if isinstance(dim, list | tuple) else dim


@rule("sum")
def total(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.sum(x if dtype is None else x.astype(dtype), _axes(dim), keepdims=keepdim)


@rule("nansum")
def total_of_numbers(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return total(jnp.where(jnp.isnan(x), 0, x), dim, keepdim, dtype=dtype)


@rule("mean")
def mean(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.mean(x if dtype is None else x.astype(dtype), _axes(dim), keepdims=keepdim)


@rule("prod")
def prod(x: Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    return jnp.prod(x if dtype is None else x.astype(dtype), dim, keepdims=keepdim)


@rule("var.correction", "var.dim")
def var(x: Array, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None) -> Array:
    by: Any = int(unbiased) if correction is None else correction
    return jnp.var(x, _axes(dim), ddof=by, keepdims=keepdim)


@rule("std.correction", "std.dim")
def std(x: Array, dim: Any = None, unbiased: Any = True, keepdim: bool = False, *, correction: Any = None) -> Array:
    return jnp.sqrt(var(x, dim, unbiased, keepdim, correction=correction))


@rule("var_mean.correction")
def var_mean(x: Array, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> tuple[Array, Array]:
    return var(x, dim, True, keepdim, correction=correction), mean(x, dim, keepdim)


@rule("amax")
def amax(x: Array, dim: Any = (), keepdim: bool = False) -> Array:
    return jnp.max(x, _axes(dim), keepdims=keepdim)


@rule("amin")
def amin(x: Array, dim: Any = (), keepdim: bool = False) -> Array:
    return jnp.min(x, _axes(dim), keepdims=keepdim)


@rule("max.default")
def max_all(x: Array) -> Array:
    return jnp.max(x)


@rule("min.default")
def min_all(x: Array) -> Array:
    return jnp.min(x)


def _pick(x: Array, index: Array, dim: int, keepdim: bool) -> tuple[Array, Array]:
    if x.ndim == 0:
        return x, index
    values = jnp.take_along_axis(x, jnp.expand_dims(index, dim), dim)
    return (values, jnp.expand_dims(index, dim)) if keepdim else (jnp.squeeze(values, dim), index)


@rule("max.dim")
def max_dim(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return _pick(x, jnp.argmax(x, dim), dim, keepdim)


@rule("min.dim")
def min_dim(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return _pick(x, jnp.argmin(x, dim), dim, keepdim)


@rule("argmax")
def argmax(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmax(x, dim, keepdims=keepdim)


@rule("argmin")
def argmin(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
    return jnp.argmin(x, dim, keepdims=keepdim)


@rule("any")
def any_of(x: Array, dim: Any = None, keepdim: bool = False) -> Array:
    return jnp.any(x, _axes(dim), keepdims=keepdim)


@rule("all")
def all_of(x: Array, dim: Any = None, keepdim: bool = False) -> Array:
    return jnp.all(x, _axes(dim), keepdims=keepdim)


@rule("logsumexp")
def logsumexp(x: Array, dim: Any, keepdim: bool = False) -> Array:
    return jax.nn.logsumexp(x, _axes(dim), keepdims=keepdim)


@rule("cumsum")
def cumsum(x: Array, dim: int, *, dtype: Any = None) -> Array:
    return jnp.cumsum(x, dim, dtype=dtype)


@rule("cumprod")
def cumprod(x: Array, dim: int, *, dtype: Any = None) -> Array:
    return jnp.cumprod(x, dim, dtype=dtype)


@rule("sort")
def sort(x: Array, dim: int = -1, descending: bool = False, *, stable: Any = None) -> tuple[Array, Array]:
    del stable  # always
    order = jnp.argsort(x, dim, stable=True, descending=descending)
    return jnp.take_along_axis(x, order, dim), order


@rule("argsort")
def argsort(x: Array, dim: int = -1, descending: bool = False, *, stable: Any = None) -> Array:
    del stable  # always
    return jnp.argsort(x, dim, stable=True, descending=descending)


@rule("topk")
def topk(x: Array, k: int, dim: int = -1, largest: bool = True, ordered: bool = True) -> tuple[Array, Array]:
    del ordered  # always
    order = jax.lax.slice_in_dim(jnp.argsort(x, dim, stable=True, descending=largest), 0, k, axis=dim % x.ndim)
    return jnp.take_along_axis(x, order, dim), order


@rule("linalg_vector_norm", "norm.ScalarOpt_dim", "norm.Scalar")
def vector_norm(x: Array, order: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Array:
    x = x if dtype is None else x.astype(dtype)
    if order is None or order == 2:
        squares = jnp.sum(x * x, _axes(dim), keepdims=keepdim)
        zero = squares == 0  # where torch takes the derivative to be zero
        return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, squares)))
    if order in (float("inf"), float("-inf")):
        return (jnp.max if order > 0 else jnp.min)(jnp.abs(x), _axes(dim), keepdims=keepdim)
    if order == 1:
        return jnp.sum(x * jnp.sign(x), _axes(dim), keepdims=keepdim)
    return jnp.sum(jnp.abs(x) ** order, _axes(dim), keepdims=keepdim) ** (1 / order)


@rule("_softmax", "softmax")
def softmax(x: Array, dim: int, half_to_float: Any = False) -> Array:
    del half_to_float  # a dtype: the result's is known
    return jax.nn.softmax(x, dim)


@rule("_safe_softmax")
def safe_softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    masked = jnp.all(jnp.isneginf(x), dim, keepdims=True)
    return jnp.where(masked, 0, jax.nn.softmax(jnp.where(masked, 0, x if dtype is None else x.astype(dtype)), dim))


@rule("_log_softmax", "log_softmax")
def log_softmax(x: Array, dim: int, half_to_float: Any = False) -> Array:
    del half_to_float
    return jax.nn.log_softmax(x, dim)
