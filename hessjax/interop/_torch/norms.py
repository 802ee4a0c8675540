"""Normalisations. Variances are those of the centred values, whose second derivative is right; see `hj.check_hvp`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax.interop._torch._rules import rule


def _standardize(x: Array, axes: tuple[int, ...], eps: Any) -> tuple[Array, Array, Array]:
    mean = jnp.mean(x, axes, keepdims=True)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x - mean), axes, keepdims=True) + eps)
    return (x - mean) * scale, mean, scale


def _affine(x: Array, weight: Array | None, bias: Array | None) -> Array:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _per_channel(parameter: Array | None, rank: int) -> Array | None:
    return None if parameter is None else parameter.reshape(-1, *[1] * (rank - 2))


@rule("native_layer_norm")
def native_layer_norm(x: Array, shape: Any, weight: Any, bias: Any, eps: float) -> tuple[Array, Array, Array]:
    y, mean, scale = _standardize(x, tuple(range(-len(shape), 0)), eps)
    return _affine(y, weight, bias), mean, scale


@rule("layer_norm")
def layer_norm(
    x: Array, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Array:
    del cudnn
    return native_layer_norm(x, shape, weight, bias, eps)[0]


@rule("rms_norm")
def rms_norm(x: Array, shape: Any, weight: Any = None, eps: float | None = None) -> Array:
    eps = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    square = jnp.mean(jnp.square(x), tuple(range(-len(shape), 0)), keepdims=True)
    return _affine(x * jax.lax.rsqrt(square + eps), weight, None)


@rule("group_norm")
def group_norm(
    x: Array, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: bool = True
) -> Array:
    del cudnn
    parts = x.reshape(x.shape[0], groups, -1)
    y = _standardize(parts, (2,), eps)[0].reshape(x.shape)
    return _affine(y, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim))


@rule("native_group_norm")
def native_group_norm(
    x: Array, weight: Any, bias: Any, n: int, channels: int, size: int, groups: int, eps: float
) -> tuple[Array, None, None]:
    del n, channels, size
    return group_norm(x, groups, weight, bias, eps), None, None


@rule("batch_norm")
def batch_norm(
    x: Array,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn: bool = True,
) -> Array:
    del momentum, cudnn
    if training or mean is None:
        raise NotImplementedError(
            "it normalises by the statistics of the batch, so that examples depend on each other; it needs running "
            "statistics (`track_running_stats=True`, eval mode)"
        )
    mean, var, weight, bias = (_per_channel(p, x.ndim) for p in (mean, var, weight, bias))
    return _affine((x - mean) * jax.lax.rsqrt(var + eps), weight, bias)


@rule("_native_batch_norm_legit_no_training")
def native_batch_norm(
    x: Array, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> tuple[Array, None, None]:
    return batch_norm(x, weight, bias, mean, var, False, momentum, eps), None, None


@rule("instance_norm")
def instance_norm(
    x: Array,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn: bool = True,
) -> Array:
    if not use_input_stats:
        return batch_norm(x, weight, bias, mean, var, False, momentum, eps, cudnn)
    y = _standardize(x, tuple(range(2, x.ndim)), eps)[0]
    return _affine(y, _per_channel(weight, x.ndim), _per_channel(bias, x.ndim))


@rule("_weight_norm_interface")
def weight_norm_interface(v: Array, g: Array, dim: int = 0) -> tuple[Array, None]:
    return weight_norm(v, g, dim), None


@rule("_weight_norm")
def weight_norm(v: Array, g: Array, dim: int = 0) -> Array:
    # Torch's own second derivative of this is wrong on the CPU (2.13); `hj.check_hvp` shows it.
    axes = tuple(axis for axis in range(v.ndim) if axis != dim % v.ndim) if dim != -1 else None
    return v * (g / jnp.sqrt(jnp.sum(jnp.square(v), axes, keepdims=True)))


@rule("cosine_similarity")
def cosine_similarity(a: Array, b: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    sizes = [jnp.sqrt(jnp.sum(jnp.square(x), dim, keepdims=True)) for x in (a, b)]
    a, b = (x / jnp.maximum(size, eps) for x, size in zip((a, b), sizes, strict=True))
    return jnp.sum(a * b, dim)
