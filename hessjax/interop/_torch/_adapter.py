"""From a PyTorch module to a `Model`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.tree_util as jtu
import torch
from jaxtyping import Array, PyTree

from hessjax.interop._parity import Ported
from hessjax.interop._torch._data import at_jax_width, read, to_jax, to_numpy, untouched, x64_is_on
from hessjax.interop._torch._export import FixedBatch, export, main_part
from hessjax.interop._torch._loss import loss_in_jax
from hessjax.interop._torch._lowered import Converted
from hessjax.interop._torch._proof import prove
from hessjax.interop._torch._reference import check_plain, trained_parameters
from hessjax.interop._torch._rules import Rule
from hessjax.interop._torch._source import Source


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
    inputs, targets = jtu.tree_map(at_jax_width, read(data))
    params, constants = _tensors(module)
    select = main_part if output is None else output
    own_rules = {str(name): function for name, function in (rules or {}).items()}
    with untouched():
        source = Source(module, inputs, targets, select, kwargs)
        if forward is None:
            forward = _converted(source, constants, own_rules)
        batched = isinstance(forward, Converted) and not forward.single
        jax_loss = loss_in_jax(loss, source, own_rules)
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
    arrays = {name: source.alias(target) for name, target in program.arrays.items()}
    program = dataclasses.replace(program, arrays=arrays)
    trained = trained_parameters(source.module)
    held = {source.alias(target): tensor for target, tensor in tensors.items()}
    needed = {key for key in program.arrays.values() if key not in trained}
    values = {key: constants[key] if key in constants else to_jax(to_numpy(held[key]), key) for key in needed}
    return Converted(program, values, source.result, single)
