"""From a PyTorch module to a `Model`: conversion of the forward and of the loss."""

from collections.abc import Callable
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
import torch
from jaxtyping import Array, PyTree

from hessjax.interop._parity import Ported
from hessjax.interop._torch._data import read, to_jax, to_numpy, to_tensor, untouched, x64_is_on
from hessjax.interop._torch._export import FixedBatch, Unrolled, as_tree, export
from hessjax.interop._torch._lowered import Converted, ConvertedLoss
from hessjax.interop._torch._program import Program
from hessjax.interop._torch._proof import prove
from hessjax.interop._torch._reference import check_plain, trained_parameters
from hessjax.interop._torch._rules import Rule
from hessjax.interop._torch._source import Source, torch_loss


def convert(
    module: Any,
    data: Any,
    loss: Any,
    verify: Any,
    rules: dict[Any, Rule] | None,
    output: Callable[[Any], Any] | None,
    forward: Callable[[PyTree, PyTree], PyTree] | None,
    kwargs: dict[str, Any],
) -> Ported:
    """The body of `hj.from_torch`, which see."""
    module = getattr(module, "_orig_mod", module)  # under torch.compile
    check_plain(module)
    inputs, targets = read(data)
    params, constants = _tensors(module)
    select = as_tree if output is None else output
    own_rules = {str(name): function for name, function in (rules or {}).items()}
    with untouched():
        source = Source(module, inputs, targets, select, kwargs)
        if forward is None:
            forward = _converted(source, constants, own_rules)
        batched = isinstance(forward, Converted) and not forward.single
        jax_loss = _loss_in_jax(loss, source, own_rules)
        tree = jtu.tree_map(lambda leaf: to_jax(leaf, "data"), (inputs, targets))
        model = Ported(params, tree, forward, jax_loss, batched=batched)
        return model if verify is False else model.proven(prove(model, source, loss, verify))


def _tensors(module: torch.nn.Module) -> tuple[dict[str, Array], dict[str, Array]]:
    """Trained parameters by name, and the frozen ones and buffers."""
    trained = trained_parameters(module)
    narrow = next((n for n, p in trained.items() if p.dtype == torch.float64 and not x64_is_on()), None)
    if narrow is not None:
        raise ValueError(
            f"`{narrow}` is in float64, but JAX's x64 is off: run under `with jax.enable_x64(True):`, or pass "
            "`copy.deepcopy(module).float()`."
        )
    rest = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    params = {name: to_jax(to_numpy(p), name) for name, p in trained.items()}
    return params, {name: to_jax(to_numpy(t), name) for name, t in rest.items() if name not in params}


def _converted(source: Source, constants: dict[str, Array], rules: dict[str, Rule]) -> Converted:
    single = False
    try:
        # Torch takes a batch of one for a constant.
        example = [torch.cat([leaf, leaf]) if source.count == 1 else leaf for leaf in source.leaves]
        program, tensors = export(source.unrolled, example, True, rules)
    except FixedBatch:
        program, tensors = export(source.unrolled, [leaf[:1] for leaf in source.leaves], False, rules)
        single = True
    program = Program(
        program.instructions,
        program.inputs,
        {name: source.alias(target) for name, target in program.arrays.items()},
        program.outputs,
    )
    trained = trained_parameters(source.module)
    held = {source.alias(target): tensor for target, tensor in tensors.items()}
    needed = {key for key in program.arrays.values() if key not in trained}
    values = {key: constants[key] if key in constants else to_jax(to_numpy(held[key]), key) for key in needed}
    return Converted(program, values, source.result, single)


def _loss_in_jax(loss: Any, source: Source, rules: dict[str, Rule]) -> Any:
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
        return isinstance(torch_loss(loss, source), torch.Tensor)
    except Exception:
        return False
