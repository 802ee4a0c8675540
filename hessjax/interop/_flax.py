"""From a flax module, linen or nnx, to a `Model`."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import PyTree

from hessjax.interop._jax_source import Call, as_arguments, mapped, missing, port, split_arrays
from hessjax.interop._parity import Ported


class _Linen(eqx.Module):
    module: Any = eqx.field(static=True)
    frozen: PyTree
    rest: dict[str, Any]
    kwargs: dict[str, Any]

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        from flax import errors

        variables = {"params": eqx.combine(params, self.frozen), **self.rest}
        try:
            return self.module.apply(variables, *as_arguments(inputs), **self.kwargs)
        except (errors.ModifyScopeVariableError, errors.InvalidRngError) as error:
            raise ValueError(
                "The module is in train mode: it updates its state or draws random numbers. Pass its own flag for "
                f"inference, such as `train=False` or `deterministic=True`. flax says: {error}"
            ) from error


class _Nnx(eqx.Module):
    graph: Any = eqx.field(static=True)
    template: Any  # the State whose arrays `params` replace
    rest: Any
    kwargs: dict[str, Any]

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        from flax import nnx

        state = jax.tree_util.tree_map(lambda x: x, self.template)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self.graph, state, self.rest)(*as_arguments(inputs), **self.kwargs)


def from_flax(
    module: Any,
    data: Any,
    loss: Any,
    *,
    variables: Any = None,
    trainable: Any = None,
    batched: bool = True,
    verify: Any = "gradient",
    **kwargs: Any,
) -> Ported:
    """Makes a `Model` of a flax module, linen or nnx. What is not a parameter (batch statistics, keys) stays fixed.

    Args:
        module: a `linen.Module`, with its `variables`; or an `nnx.Module`, which is viewed in inference mode
            (`deterministic`, `use_running_average`) and left as it was. Called on a batch as `module(x)`, and as
            `module(*x)` where the inputs are a tuple.
        data: `(inputs, targets)`, the examples on the leading axis.
        loss: `loss(output, target)` on one example, a scalar.
        variables: linen's variables, as trained: `{"params": ..., "batch_stats": ...}`.
        trainable: an nnx filter for what counts as parameters, by default `nnx.Param`; `nnx.LoRAParam`, say.
        batched: False for a module that takes one example.
        verify: what is compared with the module itself: `"gradient"` (with outputs and loss), `"output"` or False.
        kwargs: passed on to the module's call. A linen module's own flag belongs here, such as `train=False`.

    Returns:
        A `Model` whose `params` are nested dicts, `variables["params"]` or nnx's pure dict, and with `parity`.

    Raises:
        ImportError: flax is not installed.
        TypeError: the module is neither, or a parameter is not real.
        ValueError: `variables` lacks `"params"`, the module is in train mode, or outputs depend on the other
            examples, on chance, or differ.
    """
    try:
        from flax import linen, nnx
    except ImportError as error:
        raise missing("from_flax", "flax", "flax") from error
    if isinstance(module, linen.Module):
        if trainable is not None:
            raise ValueError("`trainable` filters nnx modules. For linen, leave frozen collections out of `params`.")
        params, forward, call = _of_linen(module, variables, kwargs)
    elif isinstance(module, nnx.Module):
        if variables is not None:
            raise ValueError("`variables` belongs to linen modules; an nnx module holds its own.")
        params, forward, call = _of_nnx(module, nnx.Param if trainable is None else trainable, kwargs)
    else:
        raise TypeError(f"`from_flax` needs a `linen.Module` or an `nnx.Module`, got {type(module).__name__}.")
    call = call if batched else mapped(call)
    return port("flax", params, data, forward, loss, batched=batched, verify=verify, call=call)


def _of_linen(module: Any, variables: Any, kwargs: dict[str, Any]) -> tuple[PyTree, Any, Call]:
    from flax import core

    if variables is None or "params" not in variables:
        got = "none" if variables is None else f"the collections {sorted(variables)}"
        raise ValueError(f'A linen module needs `variables=` with a collection "params", got {got}.')
    rest = dict(core.meta.unbox(core.unfreeze(variables)))
    params, frozen = split_arrays(rest.pop("params"))

    def call(params: PyTree | None, inputs: PyTree) -> PyTree:
        """The module's own `apply`."""
        own = variables if params is None else {**variables, "params": eqx.combine(params, frozen)}
        return module.apply(own, *as_arguments(inputs), **kwargs)

    return params, _Linen(module, frozen, rest, kwargs), call


def _of_nnx(module: Any, trainable: Any, kwargs: dict[str, Any]) -> tuple[PyTree, Any, Call]:
    from flax import nnx

    resting = nnx.view(module, deterministic=True, use_running_average=True, raise_if_not_found=False)
    graph, state, rest = nnx.split(resting, trainable, ...)
    params = nnx.to_pure_dict(state)
    forward = _Nnx(graph, state, rest, kwargs)

    def call(params: PyTree | None, inputs: PyTree) -> PyTree:
        """The module's own call, on a copy."""
        copy = nnx.clone(resting)
        if params is not None:
            part = nnx.state(copy, trainable)
            nnx.replace_by_pure_dict(part, params)
            nnx.update(copy, part)
        return copy(*as_arguments(inputs), **kwargs)

    return params, forward, call
