"""From a transformed haiku function to a `Model`."""

from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from hessjax.interop._jax_source import as_arguments, mapped, missing, port, split_arrays
from hessjax.interop._parity import Ported


class _Forward(eqx.Module):
    apply: Any = eqx.field(static=True)
    frozen: PyTree
    state: Any
    rng: Any
    kwargs: dict[str, Any]

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        full = eqx.combine(params, self.frozen)
        if self.state is None:
            return self.apply(full, self.rng, *as_arguments(inputs), **self.kwargs)
        return self.apply(full, self.state, self.rng, *as_arguments(inputs), **self.kwargs)[0]


def from_haiku(
    transformed: Any,
    data: Any,
    loss: Any,
    *,
    params: Any,
    state: Any = None,
    rng: Any = None,
    batched: bool = True,
    verify: Any = "gradient",
    **kwargs: Any,
) -> Ported:
    """Makes a `Model` of a function under `hk.transform` or `hk.transform_with_state`.

    Args:
        transformed: what haiku's transform returned. It is called on a batch as `f(x)`, and as `f(*x)` where the
            inputs are a tuple.
        data: `(inputs, targets)`, the examples on the leading axis.
        loss: `loss(output, target)` on one example, a scalar.
        params: haiku's parameters, as trained. Leaves that are not floating-point stay fixed.
        state: haiku's state (batch statistics), held fixed; needed after `transform_with_state`.
        rng: a key for functions that draw; one key, so one draw, for all products.
        batched: False for a function of one example.
        verify: what is compared with the function itself: `"gradient"` (with outputs and loss), `"output"` or False.
        kwargs: passed on to the function, such as `is_training=False`.

    Returns:
        A `Model` whose `params` are haiku's, and with `parity`.

    Raises:
        ImportError: haiku is not installed.
        TypeError: `transformed` is not haiku's, or a parameter is not real.
        ValueError: the state is missing or one too many, or outputs depend on the other examples, or differ.
    """
    try:
        import haiku as hk
    except ImportError as error:
        raise missing("from_haiku", "dm-haiku", "haiku") from error
    if not isinstance(transformed, hk.Transformed | hk.TransformedWithState):
        raise TypeError(
            f"`from_haiku` needs what `hk.transform` or `hk.transform_with_state` returns, got "
            f"{type(transformed).__name__}."
        )
    stateful = isinstance(transformed, hk.TransformedWithState)
    if stateful != (state is not None):
        got = "it is missing" if stateful else "this one has none"
        raise ValueError(f"A function under `hk.transform_with_state` needs `state=`, and only that: {got}.")
    trained, frozen = split_arrays(dict(params))

    def call(own: PyTree | None, inputs: PyTree) -> PyTree:
        """The function's own `apply`."""
        variables = params if own is None else eqx.combine(own, frozen)
        if state is None:
            return transformed.apply(variables, rng, *as_arguments(inputs), **kwargs)
        return transformed.apply(variables, state, rng, *as_arguments(inputs), **kwargs)[0]

    source = call if batched else mapped(call)
    forward = _Forward(transformed.apply, frozen, state, rng, kwargs)
    return port("haiku", trained, data, forward, loss, batched=batched, verify=verify, call=source)
