"""PyTorch's double backward behind a callback."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import torch
from jaxtyping import PyTree

from hessjax._vectors import structure_of
from hessjax.interop._torch._data import at_jax_width, to_numpy, to_tensor, untouched, x64_is_on
from hessjax.interop._torch._loss import check_value
from hessjax.interop._torch._reference import hessian_product, plain_attention, private_copy, trained_parameters
from hessjax.interop._torch._source import failed
from hessjax.operators import Operator


class Host:
    """The module, its batches and the loss, in PyTorch. Static data: it is itself only."""

    def __init__(self, loss_fn: Any, module: torch.nn.Module, batches: list[tuple[Any, Any, int]]):
        self.loss_fn, self.module, self.batches = loss_fn, module, batches
        self.trained = trained_parameters(module)

    def product(self, vector: dict[str, Any]) -> dict[str, np.ndarray]:
        """∇²L v, the batches weighted by their length."""
        parameters = list(self.trained.values())
        count = sum(length for _, _, length in self.batches)
        with untouched(), plain_attention():
            tangents = [to_tensor(np.asarray(vector[name])).to(p) for name, p in self.trained.items()]
            total = [torch.zeros_like(p) for p in parameters]
            for inputs, targets, length in self.batches:
                loss = self.loss_fn(call(self.module, inputs), targets)
                for sum_, part in zip(total, hessian_product(loss, parameters, tangents), strict=True):
                    sum_ += part * (length / count)
        return {name: to_numpy(part) for name, part in zip(self.trained, total, strict=True)}


class TorchOperator(Operator):
    """A Hessian whose products run in PyTorch on the host: a round trip each. Made by `hj.torch_operator`."""

    host: Host = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    specs: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return dict(zip(self.names, self.specs, strict=True))

    def product(self, vector: PyTree) -> PyTree:
        return jax.pure_callback(self.host.product, self.like, vector, vmap_method="sequential")

    def __repr__(self) -> str:
        return f"TorchOperator(host round trip, {type(self.host.module).__name__}, n={self.size})"


def call(module: torch.nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(*inputs) if isinstance(inputs, tuple) else module(inputs)


def build(loss_fn: Any, module: Any, batches: Any) -> TorchOperator:
    """The body of `hj.torch_operator`, which see."""
    if not isinstance(module, torch.nn.Module):
        raise TypeError(f"`torch_operator` needs a `torch.nn.Module`, got {type(module).__name__}.")
    if not callable(loss_fn):
        raise TypeError(f"`torch_operator` needs a function `loss_fn(outputs, targets)`, got {type(loss_fn).__name__}.")
    trained = trained_parameters(module)
    if not trained:
        raise ValueError("The module has no parameter with `requires_grad`.")
    wide = [name for name, p in trained.items() if p.dtype == torch.float64]
    if wide and not x64_is_on():
        raise ValueError(f"`{wide[0]}` is in float64, but JAX's x64 is off: run under `with jax.enable_x64(True):`.")
    device = next(iter(trained.values())).device
    with untouched(batches):
        parts = [_part(batch, number, device) for number, batch in enumerate(batches)]
        host = Host(loss_fn, private_copy(module), parts)
    if not parts:
        raise ValueError("`torch_operator` needs at least one batch `(inputs, targets)`, got none.")
    with untouched():
        inputs, targets, _ = parts[0]
        try:
            value = loss_fn(call(host.module, inputs), targets)
        except NotImplementedError:
            raise
        except (RuntimeError, IndexError) as error:
            raise failed(error, inputs, module) from error
        check_value(value, module, "loss_fn")
    shapes = {n: jax.ShapeDtypeStruct(tuple(p.shape), _dtype(p)) for n, p in host.trained.items()}
    specs = structure_of(shapes)
    return TorchOperator(host, tuple(specs), tuple(specs.values()))


def _dtype(parameter: torch.Tensor) -> Any:
    return jnp.dtype(str(parameter.dtype).removeprefix("torch."))


def _part(batch: Any, number: int, device: Any) -> tuple[Any, Any, int]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        got = f"{len(batch)} items" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(f"Every batch must be a pair `(inputs, targets)`, got {got} in batch {number}.")
    inputs, targets = batch
    inputs = dict(inputs) if hasattr(inputs, "keys") else tuple(inputs) if isinstance(inputs, list) else inputs

    def move(leaf: Any) -> torch.Tensor:
        return torch.as_tensor(at_jax_width(leaf), device=device).detach().clone()

    moved = jtu.tree_map(move, (inputs, targets))
    lengths = {leaf.shape[0] for leaf in jtu.tree_leaves(moved) if leaf.ndim}
    if len(lengths) != 1:
        raise ValueError(f"Inputs and targets of batch {number} must have one leading length, got {sorted(lengths)}.")
    return moved[0], moved[1], lengths.pop()
