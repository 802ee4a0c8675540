"""The comparison of a port with its module, in float64 wherever the module can, and then as the port will run."""

import contextlib
import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import torch
from jaxtyping import Array, PyTree

from hessjax._compare import difference, tolerance_in
from hessjax._model import Model, differences
from hessjax.interop._parity import Parity, Ported, check_independence, demand
from hessjax.interop._torch._data import to_jax, to_numpy, to_tensor, x64_is_on
from hessjax.interop._torch._loss import check_mean, torch_loss
from hessjax.interop._torch._lowered import Converted, ConvertedLoss, arguments
from hessjax.interop._torch._reference import gradient_of, switched_off, trained_parameters
from hessjax.interop._torch._source import Source

# Of outputs: ten times what one float32 layer is given, for deep networks; an overflow is of order 1.
_AS_IT_RUNS = 1e-3


def prove(model: Ported, source: Source, loss: Any, verify: Any) -> Parity:
    """Compares in float64; where the source computes in less inside, in its own precision instead."""
    if verify == "gradient" and isinstance(model.loss.inner, ConvertedLoss):
        check_mean(loss, source)
    try:
        wide = source.doubled()
        parity = _compared(model, wide, loss, verify, wide=True)
    except (ValueError, RuntimeError) as error:
        if _precision(model, source) == "float64":
            if isinstance(error, NotImplementedError):
                raise  # by its class a RuntimeError, but no mismatch
            raise _with_switches(error, source) from error
        parity = _compared_in_its_own(model, source, loss, verify)
    else:
        if not x64_is_on():
            _check_without_x64(model, source, wide)
    if verify == "gradient":
        _check_switches(model, source, loss, wide=parity.dtype == "float64")
    if model.batched:
        whole = jtu.tree_unflatten(source.result, [to_numpy(out) for out in source.outputs])
        tolerance = tolerance_in(jnp.dtype(_precision(model, source)))
        check_independence(lambda part: _outputs_on(source, part), source.inputs, whole, tolerance)
    return parity


def _check_switches(model: Ported, source: Source, loss: Any, wide: bool) -> None:
    """Compares once more at moved parameters if derivatives are switched off anywhere.

    At the module's own, what is lost may happen to vanish: behind a head of zeros every derivative does.

    Raises:
        ValueError: gradients differ there.
    """
    if not switched_off(source.unrolled, source.leaves):
        return
    moved = source.moved()
    params = {name: to_jax(to_numpy(p), name) for name, p in trained_parameters(moved.module).items()}
    there = Ported(params, model.data, model.forward, model.loss, batched=model.batched)
    try:
        _compared(there, moved.doubled() if wide else moved, loss, "gradient", wide)
    except ValueError as error:
        raise _with_switches(ValueError(f"At parameters moved at random: {error}"), source) from error


def _compared_in_its_own(model: Ported, source: Source, loss: Any, verify: Any) -> Parity:
    try:
        return _compared(model, source, loss, verify, wide=False)
    except ValueError as error:
        if x64_is_on() or not _agrees_under_x64(model, source, loss, verify):
            raise _with_switches(error, source) from error
        raise _needs_x64(str(error)) from error


def _agrees_under_x64(model: Ported, source: Source, loss: Any, verify: Any) -> bool:
    with jax.enable_x64(True), contextlib.suppress(ValueError):
        return bool(_compared(model, source, loss, verify, wide=False))
    return False


def _check_without_x64(model: Ported, source: Source, wide: Source) -> None:
    """The port's outputs in the dtypes that it will have, of which the proof in float64 knows nothing.

    Their error is measured against the module's own: what rounding does to the module, it may do to the port.

    Raises:
        ValueError: they differ from the module's.
    """
    of_module, in_float64 = (jtu.tree_unflatten(s.result, [to_numpy(out) for out in s.outputs]) for s in (source, wide))
    found = difference("outputs", _on_examples(model, source).outputs(), of_module)
    rounding = difference("outputs", of_module, in_float64).relative
    tolerance = max(_AS_IT_RUNS, tolerance_in(jnp.dtype(_precision(model, source))), 10 * rounding)
    if not found.relative <= tolerance:
        raise _needs_x64(f"{found} (tolerance {tolerance:.0e}).")


def _needs_x64(found: str) -> ValueError:
    return ValueError(
        "The module computes in int64 or float64 inside, which JAX without x64 cuts to int32 and float32. The remedy "
        'is `jax.config.update("jax_enable_x64", True)` before the conversion, and for whatever runs the model. With '
        f"x64 the port is right; without it, {found}"
    )


def _with_switches(error: Exception, source: Source) -> ValueError:
    """The error, with the layers that run under `no_grad` where there are some: the likeliest cause."""
    layers = [f"`{name}`" if name else "the module itself" for name in switched_off(source.unrolled, source.leaves)]
    if not layers:
        return ValueError(str(error))
    return ValueError(
        f"{error}\nUnder `torch.no_grad` in layer {', '.join(layers)} derivatives are switched off, which a conversion "
        "does not keep. Parameters that are to be constant take `requires_grad_(False)`, and `.detach()` is kept; "
        "`hj.torch_operator` runs the module in PyTorch as it is."
    )


def _precision(model: Ported, source: Source) -> str:
    """The least precise dtype that the module computes in: some Hugging Face layers are in float32 in any module."""
    dtypes = {str(t.dtype).removeprefix("torch.") for t in (*source.module.parameters(), *source.outputs)}
    forward = model.forward.inner
    dtypes |= forward.program.dtypes() if isinstance(forward, Converted) else set()
    return min((d for d in dtypes if jnp.issubdtype(jnp.dtype(d), jnp.floating)), key=lambda d: jnp.dtype(d).itemsize)


def _compared(model: Ported, source: Source, loss: Any, verify: Any, wide: bool) -> Parity:
    with jax.enable_x64(wide or x64_is_on()):
        ours = _on_examples(model, source)
        ours = _in_float64(ours) if wide else ours
        outputs = jtu.tree_unflatten(source.result, [to_numpy(out) for out in source.outputs])
        value = gradient = None
        if verify == "gradient":
            value, gradient = _torch_gradient(ours, source, loss, outputs)
        dtype = "float64" if wide else _precision(model, source)
        found = differences(ours, outputs, value, gradient, jnp.dtype(dtype))
    return demand(Parity("PyTorch", source.count, dtype, tolerance_in(jnp.dtype(dtype)), found))


def _outputs_on(source: Source, inputs: PyTree) -> PyTree:
    leaves = [to_tensor(leaf) for leaf in jtu.tree_leaves(arguments(inputs))]
    leaves = [leaf.to(old.dtype) for leaf, old in zip(leaves, source.leaves, strict=True)]
    with torch.no_grad():
        return jtu.tree_unflatten(source.result, [to_numpy(out) for out in source.unrolled(leaves)])


def _torch_gradient(ours: Model, source: Source, loss: Any, outputs: PyTree) -> tuple[Any, Any]:
    """Loss and gradient by PyTorch; a JAX loss enters through its derivative with respect to the outputs."""
    trained = trained_parameters(source.module)
    if isinstance(ours.loss.inner, ConvertedLoss):
        value = torch_loss(loss, source.outputs, source.targets, source)
        return to_numpy(value), gradient_of([value], [np.ones(())], trained)

    def mean_loss(outputs: PyTree) -> Array:
        return jnp.mean(jax.vmap(ours.loss)(outputs, ours.data[1]))

    real, rest = eqx.partition(jtu.tree_map(jnp.asarray, outputs), eqx.is_inexact_array)
    value, weights = jax.value_and_grad(lambda part: mean_loss(eqx.combine(part, rest)))(real)
    floating = [out for out in source.outputs if out.is_floating_point()]
    return value, gradient_of(floating, [np.asarray(w, np.float64) for w in jtu.tree_leaves(weights)], trained)


def _on_examples(model: Model, source: Source) -> Model:
    """The model with the compared examples for its data."""
    data = jtu.tree_map(jnp.asarray, (source.inputs, source.targets))
    return Model(model.params, data, model.forward, model.loss, batched=model.batched)


def _in_float64(model: Model) -> Model:
    """The same model, with every floating-point number in float64."""
    functions = _wide_function(model.forward), _wide_function(model.loss)
    return Model(_widened(model.params), _widened(model.data), *functions, batched=model.batched)


def _widened(tree: PyTree) -> PyTree:
    def widen(leaf: Any) -> Any:
        return leaf.astype(jnp.float64) if eqx.is_inexact_array(leaf) else leaf

    return jtu.tree_map(widen, tree)


def _wide_function(function: Any) -> Any:
    """A converted function that computes in float64."""
    inner = function.inner
    if not isinstance(inner, Converted | ConvertedLoss):
        return function
    return dataclasses.replace(inner, constants=_widened(inner.constants), wide=True)
