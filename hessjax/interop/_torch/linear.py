"""Products of matrices, convolutions and pools. Everything at the highest precision, as torch computes on the CPU."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax.interop._torch._rules import rule

_HIGHEST = jax.lax.Precision.HIGHEST


@rule("mm", "bmm", "matmul", "dot", "mv", "vdot")
def matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_HIGHEST)


@rule("linear")
def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    y = jnp.matmul(x, weight.T, precision=_HIGHEST)
    return y if bias is None else y + bias


@rule("addmm", "baddbmm", "addmv")
def addmm(c: Array, a: Array, b: Array, *, beta: Any = 1, alpha: Any = 1) -> Array:
    product = jnp.matmul(a, b, precision=_HIGHEST)
    return beta * c + alpha * product


@rule("outer", "ger")
def outer(a: Array, b: Array) -> Array:
    return jnp.outer(a, b)


@rule("einsum")
def einsum(equation: str, operands: Any, *, path: Any = None) -> Array:
    del path
    return jnp.einsum(equation, *operands, precision=_HIGHEST)


@rule("bilinear")
def bilinear(a: Array, b: Array, weight: Array, bias: Array | None = None) -> Array:
    y = jnp.einsum("...i,oij,...j->...o", a, weight, b, precision=_HIGHEST)
    return y if bias is None else y + bias


def _each(value: Any, rank: int) -> list[int]:
    """One number per spatial axis; torch writes one for all."""
    values = [value] if isinstance(value, int) else list(value)
    return values * rank if len(values) == 1 else values


@rule("convolution")
def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Array:
    rank = weight.ndim - 2
    single = x.ndim == rank + 1
    x = x[None] if single else x
    stride, padding, dilation = (_each(value, rank) for value in (stride, padding, dilation))
    y = (_transposed if transposed else _forward)(
        x, weight, stride, padding, dilation, groups, _each(output_padding, rank)
    )
    y = y if bias is None else y + bias.reshape(-1, *[1] * rank)
    return y[0] if single else y


def _forward(x: Array, weight: Array, stride: Any, padding: Any, dilation: Any, groups: int, _: Any) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        weight,
        stride,
        [(p, p) for p in padding],
        rhs_dilation=dilation,
        feature_group_count=groups,
        precision=_HIGHEST,
    )


def _transposed(x: Array, weight: Array, stride: Any, padding: Any, dilation: Any, groups: int, extra: Any) -> Array:
    """The gradient of a convolution: dilated input, kernel flipped and its channels exchanged within each group."""
    into, out, *kernel = weight.shape
    weight = weight.reshape(groups, into // groups, out, *kernel).swapaxes(1, 2).reshape(-1, into // groups, *kernel)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return jax.lax.conv_general_dilated(
        x,
        jnp.flip(weight, range(2, weight.ndim)),
        [1] * len(kernel),
        [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)],
        lhs_dilation=stride,
        rhs_dilation=dilation,
        feature_group_count=groups,
        precision=_HIGHEST,
    )


def _window(x: Array, size: list[int], stride: list[int], padding: list[int], ceil: bool) -> tuple[Any, Any, Any]:
    """Window, strides and pads over all axes; with `ceil_mode` a last window that starts inside counts."""
    lead = (1,) * (x.ndim - len(size))
    pads = []
    for n, k, s, p in zip(x.shape[-len(size) :], size, stride, padding, strict=True):
        count = (n + 2 * p - k) / s
        count = math.ceil(count) if ceil else math.floor(count)
        count -= ceil and count * s >= n + p
        pads.append((p, max(count * s + k - n - p, 0)))
    return (*lead, *size), (*lead, *stride), [(0, 0)] * len(lead) + pads


@rule("max_pool2d_with_indices", "max_pool3d_with_indices")
def max_pool_with_indices(
    x: Array, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> tuple[Array, None]:
    return max_pool(x, size, stride, padding, dilation, ceil_mode), None


@rule("max_pool1d", "max_pool2d", "max_pool3d")
def max_pool(
    x: Array, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Array:
    rank = _rank(x, size, stride, padding, dilation)
    size, padding, dilation = (_each(value, rank) for value in (size, padding, dilation))
    stride = _each(stride, rank) if stride not in ((), [], None) else size
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    _, strides, pads = _window(x, reach, stride, padding, ceil_mode)
    lead = (1,) * (x.ndim - rank)
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (*lead, *size), strides, pads, window_dilation=(*lead, *dilation)
    )


def _rank(x: Array, *values: Any) -> int:
    """The number of spatial axes, from the lists given or else from the array: batch, channels, then space."""
    longest = max([len(value) for value in values if isinstance(value, list | tuple)] + [1])
    return longest if longest > 1 or x.ndim < 4 else x.ndim - 2


@rule("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    x: Array,
    size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    rank = _rank(x, size, stride, padding)
    size, padding = _each(size, rank), _each(padding, rank)
    stride = _each(stride, rank) if stride not in ((), [], None) else size
    window, strides, pads = _window(x, size, stride, padding, ceil_mode)
    total = jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, pads)
    if divisor_override is not None:
        return total / divisor_override
    # The declared padding counts where torch is told so; what `ceil_mode` adds beyond it never does.
    edges = [(p, p) for p in padding]
    counted = np.pad(np.ones(x.shape[-rank:], x.dtype), edges, constant_values=int(count_include_pad))
    beyond = [(0, max(high - p, 0)) for p, (_, high) in zip(padding, pads[-rank:], strict=True)]
    count = jax.lax.reduce_window(jnp.asarray(counted), 0.0, jax.lax.add, window[-rank:], strides[-rank:], beyond)
    return total / count


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d")
@rule("_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
def adaptive_avg_pool(x: Array, size: Any) -> Array:
    for axis, target in zip(range(-len(size), 0), size, strict=True):
        weights = np.zeros((x.shape[axis], target))
        for i, (low, high) in enumerate(_cells(x.shape[axis], target)):
            weights[low:high, i] = 1 / (high - low)
        averaged = jnp.tensordot(x, jnp.asarray(weights, x.dtype), (axis % x.ndim, 0), precision=_HIGHEST)
        x = jnp.moveaxis(averaged, -1, axis)
    return x


@rule("adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d")
def adaptive_max_pool(x: Array, size: Any) -> tuple[Array, None]:
    for axis, target in zip(range(-len(size), 0), _each(size, len(size)), strict=True):
        cells = _cells(x.shape[axis], target)
        parts = [jnp.max(jax.lax.slice_in_dim(x, low, high, axis=axis % x.ndim), axis) for low, high in cells]
        x = jnp.stack(parts, axis)
    return x, None


def _cells(length: int, target: int) -> list[tuple[int, int]]:
    """The cell of each output of an adaptive pool; neighbours may overlap."""
    return [(i * length // target, -(-(i + 1) * length // target)) for i in range(target)]
