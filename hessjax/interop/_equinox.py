"""From an equinox module to a `Model`."""

from typing import Any

import equinox as eqx
import jax.tree_util as jtu
from jaxtyping import PyTree

from hessjax.interop._jax_source import as_arguments, mapped, port, split_arrays
from hessjax.interop._parity import Ported


class _Forward(eqx.Module):
    static: Any
    state: Any
    kwargs: dict[str, Any]

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        model = eqx.combine(params, self.static)
        if self.state is None:
            return model(*as_arguments(x), **self.kwargs)
        return model(*as_arguments(x), self.state, **self.kwargs)[0]


def from_equinox(
    model: Any,
    data: Any,
    loss: Any,
    *,
    state: Any = None,
    trainable: Any = None,
    batched: bool = False,
    verify: Any = "gradient",
    **kwargs: Any,
) -> Ported:
    """Makes a `Model` of an equinox module, in inference mode.

    Args:
        model: an `eqx.Module` (or any callable pytree), called on one example as `model(x)`, and as `model(*x)` where
            the inputs are a tuple. Left as it was.
        data: `(inputs, targets)`, the examples on the leading axis.
        loss: `loss(output, target)` on one example, a scalar.
        state: the `eqx.nn.State` of a stateful model, held fixed; the model is then called as `model(x, state)`.
        trainable: which leaves are parameters: a predicate on leaves, or a pytree of bools shaped as the model; by
            default all floating-point arrays. Constant tables (masks, rotary angles) are such arrays too: exclude
            them here.
        batched: whether the model takes a batch.
        verify: what is compared with the module itself: `"gradient"` (with outputs and loss), `"output"` or False.
        kwargs: passed on to the module.

    Returns:
        A `Model` whose `params` are the module with None in place of all that is not trained, and with `parity`.

    Raises:
        TypeError: the module is not callable, or a trainable leaf is not a real floating-point array.
        ValueError: nothing is trainable, or outputs depend on the other examples, on chance, or differ.

    Example:
        >>> import hessjax as hj, equinox as eqx, jax, jax.numpy as jnp, optax
        >>> linear = eqx.nn.Linear(2, 1, key=jax.random.key(0))
        >>> data = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.zeros((2, 1))
        >>> model = hj.from_equinox(linear, data, lambda out, y: optax.losses.l2_loss(out, y).sum())
        >>> model.hessian().dense().tolist()
        [[0.5, 0.0, 0.5], [0.0, 2.0, 1.0], [0.5, 1.0, 1.0]]
    """
    if not callable(model):
        raise TypeError(f"`from_equinox` needs a callable module, got {type(model).__name__}.")
    resting = eqx.nn.inference_mode(model)
    params, static = split_arrays(resting)
    if trainable is not None:
        params, frozen = eqx.partition(params, _spec(trainable, params))
        static = eqx.combine(frozen, static)

    def call(params: PyTree | None, x: PyTree) -> PyTree:
        """The module's own call, in inference mode."""
        module = resting if params is None else eqx.combine(params, resting)
        return module(*as_arguments(x), **kwargs) if state is None else module(*as_arguments(x), state, **kwargs)[0]

    source = call if batched else mapped(call)
    forward = _Forward(static, state, kwargs)
    try:
        return port("equinox", params, data, forward, loss, batched=batched, verify=verify, call=source)
    except TypeError as error:
        error.add_note(f"The module was called on {'a batch' if batched else 'one example'}: `batched={batched}`.")
        raise


def _spec(trainable: Any, params: PyTree) -> PyTree:
    """A pytree of bools over `params`, False where a leaf is none."""
    if callable(trainable) and not isinstance(trainable, eqx.Module):
        return jtu.tree_map(lambda leaf: bool(trainable(leaf)), params)
    wanted = jtu.tree_map(lambda keep, part: jtu.tree_map(lambda _: bool(keep), part), trainable, params)
    return wanted
