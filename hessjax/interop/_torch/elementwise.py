"""Operations entry by entry. Where a function has a kink, the derivative there is the one that torch takes."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax.interop._torch._rules import RULES, rule

_SAME_NAME = (
    "sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh exp exp2 expm1 log log2 log10 log1p sqrt floor "
    "ceil round trunc sign isnan isinf isfinite logical_not logical_and logical_or logical_xor bitwise_not bitwise_and "
    "bitwise_or bitwise_xor maximum minimum atan2 hypot logaddexp signbit square reciprocal"
)
RULES.update({f"aten.{name}": getattr(jnp, {"atan2": "arctan2"}.get(name, name)) for name in _SAME_NAME.split()})
RULES.update(
    {
        "aten.neg": jnp.negative,
        "aten.abs": lambda x: x * jnp.sign(x),
        "aten.rsqrt": jax.lax.rsqrt,
        "aten.sigmoid": jax.nn.sigmoid,
        "aten.relu": jax.nn.relu,
        "aten.silu": jax.nn.silu,
        "aten.mish": jax.nn.mish,
        "aten.relu6": jax.nn.relu6,
        "aten.erf": jax.scipy.special.erf,
        "aten.erfc": jax.scipy.special.erfc,
        "aten.erfinv": jax.scipy.special.erfinv,
        "aten.lgamma": jax.scipy.special.gammaln,
        "aten.digamma": jax.scipy.special.digamma,
        "aten.eq": lambda a, b: a == b,
        "aten.ne": lambda a, b: a != b,
        "aten.lt": lambda a, b: a < b,
        "aten.le": lambda a, b: a <= b,
        "aten.gt": lambda a, b: a > b,
        "aten.ge": lambda a, b: a >= b,
        "aten.where": jnp.where,
        "aten.fmax": lambda a, b: jnp.where((a >= b) | jnp.isnan(b), a, b),
        "aten.fmin": lambda a, b: jnp.where((a <= b) | jnp.isnan(b), a, b),
        "aten.mul": lambda a, b: a * b,
        "aten.fmod": lambda a, b: jnp.fmod(a, b),
        "aten.remainder": lambda a, b: jnp.remainder(a, b),
        "aten.floor_divide": lambda a, b: jnp.floor_divide(a, b),
        "aten.xlogy": lambda a, b: jax.scipy.special.xlogy(a, b),
    }
)


@rule("add")
def add(a: Any, b: Any, alpha: Any = 1) -> Array:
    return a + b if alpha == 1 else a + alpha * b


@rule("sub")
def sub(a: Any, b: Any, alpha: Any = 1) -> Array:
    return a - b if alpha == 1 else a - alpha * b


@rule("rsub")
def rsub(a: Any, b: Any, alpha: Any = 1) -> Array:
    return b - alpha * a


@rule("div", "true_divide")
def div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Array:
    if rounding_mode == "floor":
        return jnp.floor_divide(a, b)
    quotient = a / b
    return jnp.trunc(quotient) if rounding_mode == "trunc" else quotient


@rule("pow")
def power(a: Any, b: Any) -> Array:
    # Whole exponents by multiplication: the derivatives of exp(b log a) are NaN at a = 0.
    if isinstance(b, int | float):
        return jnp.sqrt(a) if b == 0.5 else jnp.power(a, int(b) if b == int(b) else b)
    return jnp.power(a, b)


@rule("addcmul")
def addcmul(x: Array, a: Array, b: Array, *, value: Any = 1) -> Array:
    return x + value * a * b


@rule("addcdiv")
def addcdiv(x: Array, a: Array, b: Array, *, value: Any = 1) -> Array:
    return x + value * a / b


@rule("lerp")
def lerp(a: Array, b: Array, weight: Any) -> Array:
    return a + weight * (b - a)


@rule("clamp", "clip", "clamp_min")
def clamp(x: Array, low: Any = None, high: Any = None) -> Array:
    x = x if low is None else jnp.where(x < low, low, x)
    return x if high is None else jnp.where(x > high, high, x)


@rule("clamp_max")
def clamp_max(x: Array, high: Any) -> Array:
    return clamp(x, None, high)


@rule("hardtanh")
def hardtanh(x: Array, low: Any = -1, high: Any = 1) -> Array:
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x))  # flat at its corners, which `clamp` is not


@rule("masked_fill")
def masked_fill(x: Array, mask: Array, value: Any) -> Array:
    return jnp.where(mask, value, x)


@rule("gelu")
def gelu(x: Array, *, approximate: str = "none") -> Array:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


@rule("leaky_relu")
def leaky_relu(x: Array, slope: Any = 0.01) -> Array:
    return jnp.where(x > 0, x, slope * x)


@rule("prelu", "_prelu_kernel")
def prelu(x: Array, weight: Array) -> Array:
    if weight.ndim == 1 and weight.size > 1 and x.ndim > 1:
        weight = weight.reshape(1, -1, *[1] * (x.ndim - 2))
    weight = weight.reshape(()) if weight.size == 1 else weight
    return jnp.where(x > 0, x, jnp.where(x < 0, weight, jax.lax.stop_gradient(weight)) * x)  # at 0 no curvature


@rule("elu")
def elu(x: Array, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> Array:
    curved = jnp.expm1(input_scale * jnp.where(x < 0, x, 0))
    below = scale * alpha * jnp.where(x < 0, curved, input_scale * x)  # at 0 a slope and no curvature
    return jnp.where(x > 0, scale * x, below)


@rule("celu")
def celu(x: Array, alpha: Any = 1.0) -> Array:
    return elu(x, alpha, 1, 1 / alpha)


@rule("selu")
def selu(x: Array) -> Array:
    return elu(x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@rule("softplus")
def softplus(x: Array, beta: Any = 1, threshold: Any = 20) -> Array:
    return jnp.where(beta * x > threshold, x, jax.nn.softplus(beta * x) / beta)


@rule("log_sigmoid")
def log_sigmoid(x: Array) -> Array:
    return -jax.nn.softplus(-x)


@rule("log_sigmoid_forward")
def log_sigmoid_forward(x: Array) -> tuple[Array, Array]:
    return log_sigmoid(x), jnp.zeros((0,), x.dtype)


@rule("hardsigmoid")
def hardsigmoid(x: Array) -> Array:
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, 1, x / 6 + 0.5))


@rule("hardswish")
def hardswish(x: Array) -> Array:
    return jnp.where(x <= -3, 0, jnp.where(x >= 3, x, x * (x + 3) / 6))


@rule("hardshrink")
def hardshrink(x: Array, lambd: Any = 0.5) -> Array:
    return jnp.where(jnp.abs(x) > lambd, x, 0)


@rule("softshrink")
def softshrink(x: Array, lambd: Any = 0.5) -> Array:
    return jnp.where(x > lambd, x - lambd, jnp.where(x < -lambd, x + lambd, 0))


@rule("threshold")
def threshold(x: Array, limit: Any, value: Any) -> Array:
    return jnp.where(x > limit, x, value)


@rule("glu")
def glu(x: Array, dim: int = -1) -> Array:
    a, b = jnp.split(x, 2, axis=dim)
    return a * jax.nn.sigmoid(b)


@rule("nan_to_num")
def nan_to_num(x: Array, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Array:
    return jnp.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


@rule("logit")
def logit(x: Array, eps: Any = None) -> Array:
    x = x if eps is None else clamp(x, eps, 1 - eps)
    return jnp.log(x / (1 - x))


@rule("sinc")
def sinc(x: Array) -> Array:
    small = x == 0
    angle = math.pi * jnp.where(small, 1, x)
    return jnp.where(small, 1, jnp.sin(angle) / angle)


@rule("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
def dropout(x: Array, p: float, train: bool) -> Array:
    if train and p > 0:
        raise NotImplementedError("it draws random numbers although the module is in eval mode")
    return x
