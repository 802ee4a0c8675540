"""The comparison of a port with its module, in float64 wherever the module can."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import torch
from jaxtyping import Array, PyTree

from hessjax._model import Model
from hessjax.interop._parity import Parity, Ported, check_independence, demand, difference, tolerance_in
from hessjax.interop._torch._data import to_numpy, to_tensor, x64_is_on
from hessjax.interop._torch._lowered import Converted, ConvertedLoss, arguments
from hessjax.interop._torch._reference import gradient_of, switched_off, trained_parameters
from hessjax.interop._torch._source import Source, torch_loss


def prove(model: Ported, source: Source, loss: Any, verify: Any) -> Parity:
    """Compares in float64; where the source computes in less inside, in its own precision instead."""
    try:
        parity = _compared(model, source.doubled(), loss, verify, wide=True)
    except (ValueError, RuntimeError) as error:
        if _precision(model, source) == "float64":
            raise _with_switches(error, source) from error
        try:
            parity = _compared(model, source, loss, verify, wide=False)
        except ValueError as error:
            raise _with_switches(error, source) from error
    if model.batched:
        whole = jtu.tree_unflatten(source.result, [to_numpy(out) for out in source.outputs])
        tolerance = tolerance_in(jnp.dtype(_precision(model, source)))
        check_independence(lambda part: _outputs_on(source, part), source.inputs, whole, tolerance)
    return parity


def _with_switches(error: Exception, source: Source) -> ValueError:
    """The error, with the layers that run under `no_grad` where there are some: the likeliest cause."""
    layers = [f"`{name}`" if name else "the module itself" for name in switched_off(source.unrolled, source.leaves)]
    if not layers:
        return ValueError(str(error))
    return ValueError(
        f"{error}\nUnder `torch.no_grad` in layer {', '.join(layers)} derivatives are switched off, which a conversion "
        "does not keep. `.detach()` it keeps; `hj.torch_operator` runs the module in PyTorch as it is."
    )


def _precision(model: Ported, source: Source) -> str:
    """The least precise dtype that the module computes in: some Hugging Face layers are in float32 in any module."""
    dtypes = {str(t.dtype).removeprefix("torch.") for t in (*source.module.parameters(), *source.outputs)}
    forward = model.forward.inner
    dtypes |= forward.program.dtypes() if isinstance(forward, Converted) else set()
    return min((d for d in dtypes if jnp.issubdtype(jnp.dtype(d), jnp.floating)), key=lambda d: jnp.dtype(d).itemsize)


def _compared(model: Ported, source: Source, loss: Any, verify: Any, wide: bool) -> Parity:
    with jax.enable_x64(wide or x64_is_on()):
        widen = _widened if wide else lambda tree: tree
        ours = Model(
            widen(model.params),
            widen(jtu.tree_map(jnp.asarray, (source.inputs, source.targets))),
            _wide_function(model.forward, wide),
            _wide_function(model.loss, wide),
            batched=model.batched,
        )
        outputs = jtu.tree_unflatten(source.result, [to_numpy(out) for out in source.outputs])
        found = [difference("outputs", ours.outputs(), outputs)]
        if verify == "gradient":
            value, gradient = _torch_gradient(ours, source, loss, outputs)
            found += [difference("loss", ours.loss_value(), value), difference("gradient", ours.gradient(), gradient)]
    dtype = "float64" if wide else _precision(model, source)
    return demand(Parity("PyTorch", source.count, dtype, tolerance_in(jnp.dtype(dtype)), tuple(found)))


def _outputs_on(source: Source, inputs: PyTree) -> PyTree:
    leaves = [to_tensor(leaf) for leaf in jtu.tree_leaves(arguments(inputs))]
    leaves = [leaf.to(old.dtype) for leaf, old in zip(leaves, source.leaves, strict=True)]
    with torch.no_grad():
        return jtu.tree_unflatten(source.result, [to_numpy(out) for out in source.unrolled(leaves)])


def _torch_gradient(ours: Model, source: Source, loss: Any, outputs: PyTree) -> tuple[Any, Any]:
    """Loss and gradient by PyTorch; a JAX loss enters through its derivative with respect to the outputs."""
    trained = trained_parameters(source.module)
    if isinstance(ours.loss.inner, ConvertedLoss):
        value = torch_loss(loss, source)
        return to_numpy(value), gradient_of([value], [np.ones(())], trained)

    def mean_loss(outputs: PyTree) -> Array:
        return jnp.mean(jax.vmap(ours.loss)(outputs, ours.data[1]))

    real, rest = eqx.partition(jtu.tree_map(jnp.asarray, outputs), eqx.is_inexact_array)
    value, weights = jax.value_and_grad(lambda part: mean_loss(eqx.combine(part, rest)))(real)
    floating = [out for out in source.outputs if out.is_floating_point()]
    return value, gradient_of(floating, [np.asarray(w, np.float64) for w in jtu.tree_leaves(weights)], trained)


def _widened(tree: PyTree) -> PyTree:
    def widen(leaf: Any) -> Any:
        return leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf

    return jtu.tree_map(widen, tree)


def _wide_function(function: Any, wide: bool) -> Any:
    """A converted function that computes in float64."""
    inner = function.inner
    if not wide or not isinstance(inner, Converted | ConvertedLoss):
        return function
    return eqx.tree_at(
        lambda f: f.constants, type(inner)(**{**_fields(inner), "wide": True}), _widened(inner.constants)
    )


def _fields(module: eqx.Module) -> dict[str, Any]:
    return {name: getattr(module, name) for name in module.__dataclass_fields__}
