"""A loss on straight lines through the parameters, for `hj.plot.loss_along`.

In: a `Model`, or a function of the parameters, and directions. Out: its values and slopes. Compiled once for each loss.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from hessjax._function import as_function
from hessjax._model import Model
from hessjax._vectors import full_precision, inner


def loss_of(loss: Any, params: PyTree | None) -> tuple[PyTree, Any, Callable[[Any, PyTree], Array]]:
    """Where to stand, the loss object, and a function of it and of parameters."""
    if isinstance(loss, Model):
        return (loss.params if params is None else params), loss, _model_loss
    if not callable(loss):
        raise TypeError(f"`plot.loss_along` needs a `hj.Model` or a function of the parameters, got {loss!r}.")
    if params is None:
        raise ValueError("`plot.loss_along` needs `params=` where the loss is a function.")
    return params, as_function(loss, "loss"), _called


def _model_loss(model: Model, params: PyTree) -> Array:
    return eqx.tree_at(lambda m: m.params, model, params).loss_value()


def _called(loss: Callable[[PyTree], Array], params: PyTree) -> Array:
    with full_precision():
        return loss(params)


@eqx.filter_jit
def value_and_slopes(
    function: Callable[[Any, PyTree], Array], loss: Any, params: PyTree, vectors: PyTree
) -> tuple[Array, Float[Array, " k"]]:
    """The loss at the parameters, and its slope along each vector."""
    params = jtu.tree_map(jnp.asarray, params)
    value, gradient = jax.value_and_grad(function, argnums=1)(loss, params)
    return value, jax.vmap(inner, (None, 0))(gradient, vectors)


@eqx.filter_jit
def losses_along(
    function: Callable[[Any, PyTree], Array], loss: Any, params: PyTree, vectors: PyTree, distances: Any
) -> Float[Array, "k points"]:
    """The loss along each vector."""
    params = jtu.tree_map(jnp.asarray, params)

    def at(vector: PyTree, distance: Array) -> Array:
        return function(loss, jtu.tree_map(lambda p, v: (p + distance * v).astype(p.dtype), params, vector))

    return lax.map(lambda vector: lax.map(partial(at, vector), jnp.asarray(distances)), vectors)
