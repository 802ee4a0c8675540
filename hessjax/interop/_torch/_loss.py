"""A loss in PyTorch: what it has to be, what it says, and its conversion."""

from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
import torch

from hessjax._compare import tolerance_in
from hessjax.interop._parity import take
from hessjax.interop._torch._data import to_jax, to_numpy, to_tensor
from hessjax.interop._torch._export import Unrolled, as_tree, export
from hessjax.interop._torch._lowered import ConvertedLoss
from hessjax.interop._torch._reference import recorded_by
from hessjax.interop._torch._rules import Rule
from hessjax.interop._torch._source import Source, spread

_SAMPLE = 256  # targets on which a loss is asked whether it is a mean
_ENTRIES = 10**7  # of all outputs that are laid before it


def loss_in_jax(loss: Any, source: Source, rules: dict[str, Rule]) -> Any:
    """The loss on one example in JAX: the user's own, or a torch loss converted."""
    if not callable(loss):
        raise TypeError(f"`loss` must be a function `loss(output, target)`, got {type(loss).__name__}.")
    specs = [
        jtu.tree_map(lambda x: jax.ShapeDtypeStruct(np.shape(x)[1:], jax.dtypes.canonicalize_dtype(x.dtype)), tree)
        for tree in (jtu.tree_unflatten(source.result, [to_numpy(out) for out in source.outputs]), source.targets)
    ]
    if not is_torch_loss(loss):
        try:
            jax.eval_shape(loss, *specs)
            return loss
        except Exception as error:
            if not _runs_in_torch(loss, source):
                raise TypeError(
                    "`loss(output, target)` runs neither in JAX on one example nor in PyTorch on a batch. In JAX, with "
                    f"output and target {specs}: {error}"
                ) from error
    check_value(_on_constant_outputs(loss, source), source.original, "loss")
    outputs = jtu.tree_unflatten(source.result, [out.detach()[:1] for out in source.outputs])
    targets = jtu.tree_map(lambda leaf: to_tensor(leaf[:1]), source.targets)
    leaves, tree = jtu.tree_flatten(((outputs, targets), {}))
    criterion = Unrolled(_Criterion(loss), tree, as_tree, {})
    program, tensors = export(criterion, leaves, False, rules)
    held = {target: to_jax(to_numpy(tensor), target) for target, tensor in tensors.items()}
    return ConvertedLoss(program, {key: held[key] for key in program.arrays.values()})


class _Criterion(torch.nn.Module):
    def __init__(self, loss: Any):
        super().__init__()
        self.loss = loss

    def forward(self, output: Any, target: Any) -> Any:
        return self.loss(output, target)


def is_torch_loss(loss: Any) -> bool:
    """Whether a loss is PyTorch's own, by where it was defined."""
    return isinstance(loss, torch.nn.Module) or (getattr(loss, "__module__", None) or "").split(".")[0] == "torch"


def _runs_in_torch(loss: Any, source: Source) -> bool:
    try:
        return isinstance(torch_loss(loss, source.outputs, source.targets, source), torch.Tensor)
    except Exception:
        return False


def torch_loss(loss: Any, outputs: list[torch.Tensor], targets: Any, source: Source) -> torch.Tensor:
    """The loss on a batch, targets in the outputs' precision."""
    dtype = next((out.dtype for out in outputs if out.is_floating_point()), torch.get_default_dtype())
    tensors = jtu.tree_map(lambda leaf: _at_width(to_tensor(leaf), dtype), targets)
    return loss(jtu.tree_unflatten(source.result, outputs), tensors)


def _at_width(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return target.to(dtype) if target.is_floating_point() else target


def _on_constant_outputs(loss: Any, source: Source) -> Any:
    try:
        return torch_loss(loss, [out.detach() for out in source.outputs], source.targets, source)
    except Exception as error:
        shapes = [(tuple(out.shape), str(out.dtype)) for out in source.outputs]
        wanted = jtu.tree_map(lambda leaf: (np.shape(leaf), str(np.asarray(leaf).dtype)), source.targets)
        raise ValueError(
            f"`loss(outputs, targets)` fails in PyTorch on outputs {shapes} and targets {wanted}: {error}"
        ) from error


def check_value(value: Any, module: torch.nn.Module, name: str) -> None:
    """Looks over what a loss in PyTorch returned.

    Raises:
        TypeError: no tensor.
        ValueError: no scalar; or the user's own parameters take part, which the module's private copy knows nothing of.
    """
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"`{name}` must return a tensor, got {type(value).__name__}.")
    if value.numel() != 1:
        raise ValueError(
            f"`{name}` must return a scalar, the mean over the examples, got shape {tuple(value.shape)}: take "
            '`reduction="mean"`, or its `.mean()`.'
        )
    names = {id(p): own for own, p in module.named_parameters()}
    leaves = (getattr(node, "variable", None) for node in recorded_by([value], set()))
    own = next((names[id(leaf)] for leaf in leaves if id(leaf) in names), None)
    if own is not None:
        raise ValueError(
            f"`{name}` depends on the module's parameter `{own}` by itself, not through the outputs: that part of the "
            "Hessian would be lost. Add a penalty as an operator: `model.hessian() + hj.hvp(penalty)(model.params)`, "
            "with `penalty(params)` in JAX."
        )


def check_mean(loss: Any, source: Source) -> None:
    """Compares the loss on a batch with the mean of its values on one example each.

    The targets are spread over the data, so that a rare class takes part; the outputs are those of the few examples,
    over and over, which costs nothing.

    Raises:
        ValueError: they differ.
    """
    per_example = max(1, sum(out.numel() for out in source.outputs) // source.count)
    targets = source.all_targets
    length = len(jtu.tree_leaves(targets)[0])
    rows = spread(length, max(source.count, min(_SAMPLE, _ENTRIES // per_example)))
    outputs = [out.detach()[torch.arange(len(rows)) % source.count] for out in source.outputs]

    def value(low: int, high: int) -> float:
        return float(torch_loss(loss, [out[low:high] for out in outputs], take(targets, rows[low:high]), source))

    try:
        whole = value(0, len(rows))
        each = np.array([value(i, i + 1) for i in range(len(rows))])
    except Exception as error:
        raise ValueError(f"`loss` fails in PyTorch on {len(rows)} targets spread over the data: {error}") from error
    mean, scale = float(np.mean(each)), float(np.mean(np.abs(each)))
    tolerance = tolerance_in(to_numpy(outputs[0]).dtype) * scale
    if np.isfinite(whole) and not abs(whole - mean) <= tolerance:
        raise ValueError(
            f"`loss` is no mean over the examples: on {len(rows)} of them it is {whole:.6g}, the mean of its values on "
            f'one each is {mean:.6g}. `weight=`, `ignore_index=` and `reduction="sum"` do that. Give a loss on one '
            "example in JAX, or use `hj.torch_operator` with one batch of all the data."
        )
