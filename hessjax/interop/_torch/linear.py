"""Products of matrices, convolutions and pools. Everything at the highest precision, as torch computes on the CPU."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax.interop._torch._rules import RULES, rule

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
    stride, padding, dilation = (_each(value, rank) for value in (stride, padding, dilation))
    y = (_transposed if transposed else _forward)(
        x, weight, stride, padding, dilation, groups, _each(output_padding, rank)
    )
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


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


def max_pool_with_indices(rank: int, x: Array, *args: Any) -> tuple[Array, None]:
    return max_pool(rank, x, *args), None


def max_pool(
    rank: int, x: Array, size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False
) -> Array:
    size, padding, dilation = (_each(value, rank) for value in (size, padding, dilation))
    stride = _each(stride, rank) if stride not in ((), [], None) else size
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, size, strict=True)]
    _, _, pads = _window(x, reach, stride, padding, ceil_mode)
    # Axis by axis from the last one, the first of equals wins: as torch has it. A window reduction would not
    # differentiate twice under dilation.
    for axis in range(x.ndim - 1, x.ndim - rank - 1, -1):
        spatial = axis - (x.ndim - rank)
        x = _largest(x, axis, size[spatial], stride[spatial], dilation[spatial], pads[axis])
    return x


def _largest(x: Array, axis: int, size: int, stride: int, dilation: int, pad: tuple[int, int]) -> Array:
    """The largest entry of each window along one axis."""
    x = jax.lax.pad(x, jnp.array(-jnp.inf, x.dtype), [(*pad, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)])
    span = (x.shape[axis] - dilation * (size - 1) - 1) // stride * stride + 1
    parts = [jax.lax.slice_in_dim(x, i * dilation, i * dilation + span, stride, axis) for i in range(size)]
    best = parts[0]
    for part in parts[1:]:
        best = jnp.where((part > best) | jnp.isnan(part), part, best)
    return best


def avg_pool(
    rank: int,
    x: Array,
    size: Any,
    stride: Any = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
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


for _d in (1, 2, 3):
    RULES[f"aten.max_pool{_d}d"] = functools.partial(max_pool, _d)
    RULES[f"aten.avg_pool{_d}d"] = functools.partial(avg_pool, _d)
    RULES[f"aten.max_pool{_d}d_with_indices"] = functools.partial(max_pool_with_indices, _d)
del RULES["aten.max_pool1d_with_indices"]  # which torch has not


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
