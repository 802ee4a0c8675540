"""What is converted, as PyTorch sees it: the module in private, and a few examples."""

import copy
import functools
from typing import Any

import jax.tree_util as jtu
import numpy as np
import torch
from jaxtyping import PyTree

from hessjax.interop._parity import EXAMPLES, take
from hessjax.interop._torch._data import to_tensor
from hessjax.interop._torch._export import Unrolled
from hessjax.interop._torch._lowered import arguments
from hessjax.interop._torch._reference import eager_outputs, private_copy, trained_parameters


def spread(length: int, count: int) -> np.ndarray:
    """Up to `count` positions, evenly from first to last: data may be sorted."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int)


class Source:
    """A private copy of the user's module in eval mode, and a few of the examples as tensors."""

    def __init__(self, module: Any, inputs: PyTree, targets: PyTree, select: Any, kwargs: dict[str, Any]):
        self.module = private_copy(module)
        self.arguments = jtu.tree_structure(arguments(inputs))
        self.select, self.kwargs = select, kwargs
        leaves = jtu.tree_leaves(inputs)
        lengths = {np.shape(leaf)[0] if np.ndim(leaf) else -1 for leaf in leaves}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                f"Inputs must be arrays with one leading length, got shapes {[np.shape(x) for x in leaves]}."
            )
        rows = spread(next(iter(lengths)), EXAMPLES)
        self.count = len(rows)
        self.inputs, self.targets = take(inputs, rows), take(targets, rows)
        self.original, self.all_targets = module, targets
        self.leaves = [to_tensor(leaf) for leaf in jtu.tree_leaves(arguments(self.inputs))]
        self.unrolled = Unrolled(self.module, self.arguments, select, kwargs)
        try:
            self.outputs = eager_outputs(self.unrolled, self.leaves)
        except NotImplementedError:
            raise
        except (RuntimeError, IndexError) as error:
            raise failed(error, self.leaves, self.module) from error
        self.result = self.unrolled.result

    def alias(self, target: str) -> str:
        """The name of a parameter or buffer in the user's module, the first where it has several."""
        name = target.removeprefix("module.")
        return self._first_names.get(name, name)

    @functools.cached_property
    def _first_names(self) -> dict[str, str]:
        first: dict[int, str] = {}
        every = [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers()]
        return {name: first.setdefault(id(tensor), name) for name, tensor in every}

    def doubled(self) -> "Source":
        """The same in float64."""
        leaves = [leaf.double() if leaf.is_floating_point() else leaf for leaf in self.leaves]
        return self._with(copy.deepcopy(self.module).double(), leaves)

    def moved(self) -> "Source":
        """The same at other parameters: each is moved by a tenth of its size at random, or by 0.1 if it is zero."""
        module, generator = copy.deepcopy(self.module), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in trained_parameters(module).values():
                size = float(p.double().square().mean().sqrt()) or 1.0
                p.add_(0.1 * size * torch.randn(p.shape, generator=generator).to(p))
        return self._with(module, self.leaves)

    def _with(self, module: torch.nn.Module, leaves: list[torch.Tensor]) -> "Source":
        other = copy.copy(self)
        other.module, other.leaves = module, leaves
        other.unrolled = Unrolled(module, self.arguments, self.select, self.kwargs)
        other.outputs = eager_outputs(other.unrolled, leaves)
        return other


def failed(error: Exception, inputs: Any, module: torch.nn.Module) -> ValueError:
    """What to say where the module, or the loss after it, does not run in PyTorch on the user's data."""
    leaves = jtu.tree_leaves(inputs)
    tensors = [f"{tuple(leaf.shape)} in {leaf.dtype}" for leaf in leaves]
    dtypes = sorted({str(p.dtype) for p in module.parameters()})
    differ = any(leaf.is_floating_point() and str(leaf.dtype) not in dtypes for leaf in leaves)
    remedy = " Convert the inputs to the parameters' dtype, as by `inputs.astype(np.float32)`." if differ else ""
    return ValueError(
        f"The module does not run in PyTorch on inputs of {', '.join(tensors)}, its parameters in {', '.join(dtypes)}: "
        f"{error}.{remedy}"
    )
