"""What the adapters of JAX libraries share: a forward function, a call of the source itself, and their comparison."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from hessjax._compare import least_precise, tolerance_in
from hessjax._model import Model, differences
from hessjax._vectors import full_precision
from hessjax.interop._parity import EXAMPLES, Parity, Ported, check_independence, check_verify, demand, take
from hessjax.operators._examples import real_outputs

Call = Callable[[PyTree | None, PyTree], PyTree]


def missing(caller: str, package: str, extra: str) -> ImportError:
    """The error of an adapter whose framework is not installed."""
    return ImportError(f"`hj.{caller}` needs {package}: pip install 'hessjax[{extra}]'.")


def as_arguments(inputs: PyTree) -> tuple[Any, ...]:
    """A tuple of inputs is several arguments, anything else is one."""
    return inputs if isinstance(inputs, tuple) else (inputs,)


def split_arrays(tree: PyTree) -> tuple[PyTree, PyTree]:
    """The floating-point arrays, and the rest with NumPy's arrays moved to the device: leaves, not static data."""
    params, rest = eqx.partition(tree, _is_inexact)
    return params, jtu.tree_map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, rest)


def mapped(call: Call) -> Call:
    """A call on one example, as one on a batch."""
    return lambda params, inputs: jax.vmap(lambda x: call(params, x))(inputs)


def _is_inexact(leaf: Any) -> bool:
    return eqx.is_inexact_array(leaf) or (isinstance(leaf, np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.inexact))


def port(
    source: str,
    params: PyTree,
    data: Any,
    forward: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Any],
    *,
    batched: bool,
    verify: Any,
    call: Call,
) -> Ported:
    """The model, compared with the source's own call on a batch.

    That is `call(params, inputs)`: the source with `params` in place of its own, or as it is where `params` is None. It
    shares nothing with `forward`, or the comparison could not fail.

    Raises:
        ValueError: there is no parameter, the comparison fails, or examples depend on each other.
    """
    if not jtu.tree_leaves(params):
        raise ValueError(f"The {source} model has no floating-point parameters.")
    model = Ported(params, data, forward, loss, batched=batched)
    check_verify(verify, f"from_{source}")
    if verify is False:
        return model
    count = min(model.num_examples, EXAMPLES)
    inputs, targets = take(model.data, slice(count))
    ours = Model(model.params, (inputs, targets), model.forward, model.loss, batched=batched)

    def mean_loss(params: PyTree) -> Any:
        return jnp.mean(jax.vmap(model.loss)(call(params, inputs), targets))

    with full_precision():
        dtype = _computed_in(ours)  # before the source's call: the port says what to do about one in train mode
        tolerance = tolerance_in(dtype)
        outputs, value, gradient = call(None, inputs), None, None
        if verify == "gradient":
            value, gradient = eqx.filter_jit(jax.value_and_grad(mean_loss))(model.params)
        found = differences(ours, outputs, value, gradient, dtype)
        check_independence(lambda part: call(None, part), inputs, outputs, tolerance)
    return model.proven(demand(Parity(source, count, str(dtype), tolerance, found)))


def _computed_in(model: Model) -> np.dtype:
    """The least precise dtype on the way from parameters to outputs, as the program of the derivative has it.

    In mixed precision that is neither the parameters' nor the outputs'.
    """
    outputs, pull, _ = jax.vjp(
        lambda params: real_outputs(model.forward, params, model.data[0], model.batched), model.params, has_aux=True
    )
    return least_precise(model.params, outputs, _values(jax.make_jaxpr(pull)(outputs).jaxpr))


def _values(jaxpr: Any) -> list[Any]:
    """The abstract values that a program computes, those of programs within it too."""
    found = [variable.aval for equation in jaxpr.eqns for variable in equation.outvars]
    parts = [part for equation in jaxpr.eqns for part in jtu.tree_leaves(list(equation.params.values()))]
    for part in parts:
        inner = getattr(part, "jaxpr", part)
        found += _values(inner) if hasattr(inner, "eqns") else []
    return found
