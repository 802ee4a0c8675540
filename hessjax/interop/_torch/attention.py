"""Attention by its formula, which has derivatives of every order; torch's fused kernels have no second one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax.interop._torch._rules import rule

_HIGHEST = jax.lax.Precision.HIGHEST


@rule("scaled_dot_product_attention")
def attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    dropout: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Array:
    if dropout > 0:
        raise NotImplementedError("it drops attention weights at random although the module is in eval mode")
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        shared = query.shape[-3] // key.shape[-3]
        key, value = jnp.repeat(key, shared, -3), jnp.repeat(value, shared, -3)
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * jnp.matmul(query, jnp.swapaxes(key, -1, -2), precision=_HIGHEST)
    if is_causal:
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        scores = jnp.where(seen, scores, -jnp.inf)
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf) if mask.dtype == bool else scores + mask
    return jnp.matmul(_softmax(scores), value, precision=_HIGHEST)


def _softmax(scores: Array) -> Array:
    """Softmax over the last axis, zero where everything is masked, as torch has it."""
    masked = jnp.all(jnp.isneginf(scores), -1, keepdims=True)
    return jnp.where(masked, 0, jax.nn.softmax(jnp.where(masked, 0, scores), -1))
