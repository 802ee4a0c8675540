"""Where an optimizer stops being stable: the sharpness to compare a measured one with."""

from collections.abc import Callable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array

from hessjax._vectors import or_one

Coefficients = Sequence[ArrayLike] | Array | np.ndarray

_NAMED: dict[str, Callable[[ArrayLike], Coefficients]] = {
    "gradient_descent": lambda _: (0.0, 1.0, 0.0),
    "heavy_ball": lambda b: (b, 0.0, 1.0),
    "nesterov": lambda b: (b, 1.0, b),
    "adam": lambda b: (b, 0.0, 1 - jnp.asarray(b)),
}
_ALIASES = {
    "gd": "gradient_descent",
    "sgd": "gradient_descent",
    "polyak": "heavy_ball",
    "momentum": "heavy_ball",
    "adamw": "adam",
    "rmsprop": "gradient_descent",
}


def edge_of_stability(optimizer: str | Coefficients, learning_rate: ArrayLike, *, momentum: ArrayLike = 0.9) -> Array:
    """The largest eigenvalue at which an optimizer is stable on a quadratic.

    An optimizer with the coefficients (b, p, q) takes the steps -η (p g + q m) with m ← b m + g. On the loss λw²/2 its
    iterates shrink up to ηλ = 2 (1 + b) / (p (1 + b) + q), or to (1 + b) / (p b) if that is less, for b, p, q ≥ 0;
    beyond, they grow. Negative coefficients are allowed as well.

    | name | coefficients | threshold | to compare with |
    |---|---|---|---|
    | "gradient_descent", "gd", "sgd" | 0, 1, 0 | 2 / η | the Hessian |
    | "heavy_ball", "polyak", "momentum" | b, 0, 1 | (2 + 2b) / η | the Hessian |
    | "nesterov" | b, 1, b | (2 + 2b) / (η (1 + 2b)) | the Hessian |
    | "adam", "adamw" | b, 0, 1 - b | (2 + 2b) / ((1 - b) η), so 38 / η at b = 0.9 | the preconditioned Hessian |
    | "rmsprop" | 0, 1, 0 | 2 / η | the preconditioned Hessian |

    Args:
        optimizer: a name, or the three coefficients (b, p, q).
        learning_rate: η, an array of them as well.
        momentum: b of the named optimizers; Adam's b1.

    Returns:
        The threshold, shaped as `learning_rate`. Zero if they never shrink.

    Raises:
        ValueError: the name is not known, there are not three coefficients, or a rate is not positive.
        TypeError: `learning_rate` is no number, such as one of optax's schedules.

    Example:
        >>> import hessjax as hj
        >>> [round(float(hj.edge_of_stability(name, 0.01)), 2) for name in ("sgd", "heavy_ball", "nesterov", "adam")]
        [200.0, 380.0, 135.71, 3800.0]

    Source: Cohen et al., Gradient descent on neural networks typically occurs at the edge of stability,
    arXiv:2103.00065, for descent and momentum; Adaptive gradient methods at the edge of stability, arXiv:2207.14484,
    for Adam.
    """
    if not eqx.is_array_like(learning_rate):
        raise TypeError(
            f"`learning_rate` must be a number or an array, got {learning_rate!r}. Of a schedule, take "
            "`schedule(step)`."
        )
    if not isinstance(learning_rate, Tracer) and not np.all(np.asarray(learning_rate) > 0):
        raise ValueError(f"`learning_rate` must be positive, got {learning_rate}.")
    if isinstance(optimizer, str):
        name = _ALIASES.get(optimizer, optimizer)
        if name not in _NAMED:
            raise ValueError(
                f"`optimizer` must be one of {', '.join([*_NAMED, *_ALIASES])}, or three coefficients (b, p, q), "
                f"got {optimizer!r}."
            )
        optimizer = _NAMED[name](momentum)
    if not isinstance(optimizer, Sequence | np.ndarray | jax.Array) or len(optimizer) != 3:
        raise ValueError(f"`optimizer` must be a name or three coefficients (b, p, q), got {optimizer!r}.")
    b, p, q = (jnp.asarray(c, jnp.result_type(float)) for c in optimizer)
    # z² - (1 + b - ηλ (p + q)) z + b (1 - ηλ p) has both roots in the unit circle: none at ±1, and no pair on it.
    flips = _bound(2 * (1 + b), p * (1 + b) + q)
    spirals = jnp.minimum(_bound(1 + b, p * b), _bound(1 - b, -p * b))
    stable = (jnp.abs(b) < 1) & (p * (1 - b) + q > 0)
    return jnp.where(stable, jnp.minimum(flips, spirals), 0) / jnp.asarray(learning_rate)


def _bound(limit: Array, slope: Array) -> Array:
    """The largest x with slope · x ≤ limit; infinite if any will do."""
    return jnp.where(slope > 0, limit / or_one(slope), jnp.inf)
