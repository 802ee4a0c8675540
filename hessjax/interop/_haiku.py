"""From a transformed haiku function to a `Model`."""

import inspect
from typing import Any

import equinox as eqx
from jaxtyping import PyTree

from hessjax.interop._jax_source import as_arguments, mapped, missing, port, split_arrays
from hessjax.interop._parity import Ported


class _Forward(eqx.Module):
    apply: Any = eqx.field(static=True)
    stateful: bool = eqx.field(static=True)
    frozen: PyTree
    fixed: tuple[Any, ...]  # the state and the key, where `apply` takes them
    kwargs: dict[str, Any]

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        full = eqx.combine(params, self.frozen)
        outputs = self.apply(full, *self.fixed, *as_arguments(inputs), **self.kwargs)
        return outputs[0] if self.stateful else outputs


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
    """Makes a `Model` of a function under `hk.transform` or `hk.transform_with_state`, also `hk.without_apply_rng`.

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
        ValueError: the state is missing or one too many, `rng` is given to a function without one, or outputs depend
            on the other examples, or differ.
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
    draws = _takes_key(transformed.apply, stateful)
    if rng is not None and not draws:
        raise ValueError("A function under `hk.without_apply_rng` takes no key: leave `rng` out.")
    fixed = (*((state,) if stateful else ()), *((rng,) if draws else ()))
    trained, frozen = split_arrays(dict(params))

    def call(own: PyTree | None, inputs: PyTree) -> PyTree:
        """The function's own `apply`."""
        variables = params if own is None else eqx.combine(own, frozen)
        outputs = transformed.apply(variables, *fixed, *as_arguments(inputs), **kwargs)
        return outputs[0] if stateful else outputs

    source = call if batched else mapped(call)
    forward = _Forward(transformed.apply, stateful, frozen, fixed, kwargs)
    return port("haiku", trained, data, forward, loss, batched=batched, verify=verify, call=source)


def _takes_key(apply: Any, stateful: bool) -> bool:
    """Whether a key follows the parameters and the state, as haiku's signature says."""
    leading = list(inspect.signature(apply).parameters)[: 3 if stateful else 2]
    return leading[-1] == "rng"
