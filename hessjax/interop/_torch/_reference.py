"""What PyTorch itself says: outputs and gradients in eager mode, with attention that has a second derivative."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessjax.interop._torch._data import to_numpy


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by its formula, and recurrent layers without cuDNN: the fused kernels have no double backward."""
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), torch.enable_grad():
        yield


def trained_parameters(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters with `requires_grad`, a shared one once, under its first name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def private_copy(module: torch.nn.Module) -> torch.nn.Module:
    """A copy in eval mode, whose embeddings have dense gradients: of the same values, and with a second derivative.

    Raises:
        ValueError: the module cannot be copied.
    """
    try:
        private = copy.deepcopy(module).eval()
    except Exception as error:
        for name, layer in module.named_modules():
            for key, held in vars(layer).items():
                if isinstance(held, torch.Tensor) and held.grad_fn is not None:
                    raise ValueError(
                        f"The module cannot be copied: its `{f'{name}.{key}'.lstrip('.')}` is computed from other "
                        "parameters, as by pruning or the old `weight_norm`. Of a copy made before, or in place, "
                        f'`torch.nn.utils.prune.remove(layer, "{key}")` or `torch.nn.utils.remove_weight_norm(layer)` '
                        "makes a parameter of it; `torch.nn.utils.parametrizations.weight_norm` can be copied."
                    ) from error
        raise ValueError(f"The module cannot be copied (`copy.deepcopy` fails: {error}).") from error
    for layer in sparse_embeddings(private):
        layer.sparse = False
    return private


def sparse_embeddings(module: torch.nn.Module) -> list[Any]:
    """The layers whose gradients are sparse tensors."""
    kinds = torch.nn.Embedding | torch.nn.EmbeddingBag
    return [layer for layer in module.modules() if isinstance(layer, kinds) and layer.sparse]


@contextlib.contextmanager
def as_it_was(module: torch.nn.Module) -> Iterator[Callable[[], None]]:
    """Puts parameters, buffers and training flags back in the end, and whenever the yielded function is called."""
    layers = [(layer, dict(layer._buffers), layer.training) for layer in module.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]
    sparse = sparse_embeddings(module)

    def restore() -> None:
        for layer, buffers, training in layers:
            layer._buffers.clear()
            layer._buffers.update(buffers)
            layer.training = training
        with torch.no_grad():
            for tensor, value in values:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)

    try:
        for layer in sparse:
            layer.sparse = False
        yield restore
    finally:
        restore()
        for layer in sparse:
            layer.sparse = True


def hessian_product(loss: torch.Tensor, parameters: list[Any], tangents: list[torch.Tensor]) -> list[torch.Tensor]:
    """∇²L v by double backward; zero where a parameter takes no part."""
    slopes = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    pairs = [(s, t) for s, t in zip(slopes, tangents, strict=True) if s is not None and s.requires_grad]
    if not pairs:
        return [torch.zeros_like(p) for p in parameters]
    return list(
        torch.autograd.grad(
            [s for s, _ in pairs], parameters, [t for _, t in pairs], allow_unused=True, materialize_grads=True
        )
    )


class _Halves(torch.overrides.TorchFunctionMode):
    """Notes the precisions below float32 in which differentiable numbers come out."""

    def __init__(self):
        super().__init__()
        self.found = set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors_in(result):
            if tensor.is_floating_point() and tensor.dtype.itemsize < 4 and tensor.requires_grad:
                self.found.add(str(tensor.dtype).removeprefix("torch."))
        return result


def low_precision_in(compute: Callable[[], Any]) -> list[str]:
    """The dtypes below float32 that `compute` differentiates through."""
    with _Halves() as halves:
        compute()
    return sorted(halves.found)


def check_plain(module: Any) -> None:
    """Looks a module over before anything is run.

    Raises:
        TypeError: it is no module, or a parameter is not real.
        ValueError: it is not on the CPU, has nothing to train, or its weights are not there.
        NotImplementedError: a layer normalises by the statistics of the batch even in eval mode.
    """
    if not isinstance(module, torch.nn.Module):
        raise TypeError(
            f"Needs a `torch.nn.Module`, got {type(module).__name__}. A forward written by hand in JAX goes to "
            "`hj.Model(params, data, forward, loss)`."
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError("A TorchScript module has no Python code left to export: convert the module it was made from.")
    for name, p in module.named_parameters():
        if torch.nn.parameter.is_lazy(p):
            raise ValueError(f"`{name}` has no values yet (a lazy layer): call the module on a batch first.")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.device.type == "meta":
            raise ValueError(f"`{name}` has no values (it is on the device `meta`): load the weights first.")
        if tensor.device.type != "cpu":
            raise ValueError(f"`{name}` is on the device `{tensor.device}`: convert `copy.deepcopy(module).cpu()`.")
    for name, p in module.named_parameters():
        if not p.dtype.is_floating_point:
            raise TypeError(
                f"The parameter `{name}` has dtype {p.dtype}; curvature needs real floating-point parameters. Register "
                "constants with `register_buffer`; a quantized module has to be dequantized first."
            )
    for name, layer in module.named_modules():
        if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm) and layer.running_mean is None:
            raise NotImplementedError(
                f"The layer `{name}` normalises by the statistics of the batch even in eval mode, so that examples "
                "depend on each other. It needs `track_running_stats=True`, or another normalisation."
            )
    if not trained_parameters(module):
        raise ValueError("The module has no parameter with `requires_grad`.")


@contextlib.contextmanager
def watched(module: torch.nn.Module) -> Iterator[list[str]]:
    """The names of the layers that are being called, outermost first; after an exception, where it came from."""
    where: list[str] = []
    handles = []
    for name, layer in module.named_modules():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: where.append(name)))
        handles.append(layer.register_forward_hook(lambda *_: (where.pop(), None)[1]))
    try:
        yield where
    finally:
        for handle in handles:
            handle.remove()


class _Switches(torch.overrides.TorchFunctionMode):
    """Notes the layers that compute with derivatives switched off."""

    def __init__(self, where: list[str]):
        super().__init__()
        self.where, self.found = where, set[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not torch.is_grad_enabled():
            self.found.add(self.where[-1].removeprefix("module").removeprefix("."))
        return func(*args, **(kwargs or {}))


def switched_off(module: torch.nn.Module, leaves: list[torch.Tensor]) -> list[str]:
    """The layers that compute under `no_grad` or `inference_mode`; the outermost is the empty name."""
    with watched(module) as where, plain_attention(), _Switches(where) as switches:
        module([leaf.clone() for leaf in leaves])
    return sorted(switches.found)


def eager_outputs(module: torch.nn.Module, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """What the module returns, after a look at the graph that autograd recorded.

    Raises:
        NotImplementedError: a custom autograd function took part; the message names it and its layer.
    """
    seen: set[Any] = set()
    names = {layer: name.removeprefix("module").removeprefix(".") for name, layer in module.named_modules()}

    def look(layer: torch.nn.Module, _: Any, output: Any) -> None:
        for node in recorded_by(_tensors_in(output), seen):
            if isinstance(node, torch.autograd.function.BackwardCFunction):
                raise NotImplementedError(
                    f"The custom autograd function `{type(node).__name__.removesuffix('Backward')}` in layer "
                    f"`{names[layer] or 'the module itself'}` has a derivative of its own, which a conversion would "
                    "lose. Write it with plain operations, or use `hj.torch_operator`, which runs it in PyTorch."
                )

    handles = [layer.register_forward_hook(look) for layer in module.modules()]
    try:
        with plain_attention():
            return module([leaf.clone() for leaf in leaves])
    finally:
        for handle in handles:
            handle.remove()


def recorded_by(tensors: list[torch.Tensor], seen: set[Any]) -> Iterator[Any]:
    """The nodes of autograd's graph behind some tensors, but for those `seen` before."""
    pending = [tensor.grad_fn for tensor in tensors]
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [parent for parent, _ in node.next_functions]


def _tensors_in(output: Any) -> list[torch.Tensor]:
    """All tensors in what a layer returned."""
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if hasattr(output, "values") else output if isinstance(output, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors_in(part)]


def gradient_of(outputs: list[torch.Tensor], weights: list[Any], trained: dict[str, Any]) -> dict[str, Any]:
    """Σ ⟨weights, outputs⟩ differentiated, by name; zero where a parameter takes no part."""
    pairs = [(o, torch.from_numpy(np.array(w)).to(o)) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not pairs:
        return {name: to_numpy(torch.zeros_like(p)) for name, p in trained.items()}
    with plain_attention():
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            list(trained.values()),
            [w for _, w in pairs],
            allow_unused=True,
            retain_graph=True,  # the outputs may be asked again
        )
    parts = zip(trained.items(), found, strict=True)
    return {name: to_numpy(torch.zeros_like(p) if g is None else g) for (name, p), g in parts}
