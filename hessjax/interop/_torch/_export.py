"""From a PyTorch module to a `Program`, by `torch.export` and the table of rules."""

import contextlib
import io
import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.tree_util as jtu
import torch

from hessjax.interop._torch import attention, elementwise, indexing, linear, norms, recurrent, reductions, shapes
from hessjax.interop._torch._program import Dtype, Instruction, Program, Ref, getitem
from hessjax.interop._torch._reference import watched
from hessjax.interop._torch._rules import Rule, find, why_refused

FAMILIES = (attention, elementwise, indexing, linear, norms, recurrent, reductions, shapes)  # their import fills RULES
_PLACEMENT = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
_CHECKS = ("_assert", "sym_constrain_range", "_assert_scalar", "_assert_tensor_metadata", "_assert_async")
_LOGGER = "torch.fx.experimental.symbolic_shapes"
_ON_SIZES = {"sym_float": float, "sym_int": int, "sym_max": max, "sym_min": min, "sym_not": operator.not_}


class Unrolled(torch.nn.Module):
    """A module as a function of a flat list of tensors, that returns a flat list of tensors."""

    def __init__(self, module: torch.nn.Module, arguments: Any, select: Callable[[Any], Any], kwargs: dict[str, Any]):
        super().__init__()
        self.module = module
        self.arguments = arguments  # the tree of (args, kwargs)
        self.select = select
        self.kwargs = kwargs
        self.result: Any = None  # the tree of what comes out, known after a call

    def forward(self, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
        args, named = jtu.tree_unflatten(self.arguments, leaves)
        outputs, self.result = jtu.tree_flatten(as_tree(self.select(self.module(*args, **named, **self.kwargs))))
        return outputs


def main_part(output: Any) -> Any:
    """Of a Hugging Face output, which is no plain dict, its `logits` where it has some."""
    of_its_own = isinstance(output, Mapping) and type(output) is not dict
    return output["logits"] if of_its_own and "logits" in output else output


def as_tree(output: Any) -> Any:
    """Plain dicts and lists of tensors.

    Raises:
        TypeError: something else is in there.
    """
    if output is None or isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "items") and hasattr(output, "keys"):
        return {key: as_tree(part) for key, part in output.items()}
    if isinstance(output, list | tuple):
        return [as_tree(part) for part in output]
    raise TypeError(
        f"The module returned a {type(output).__name__}. `output=` takes a function that selects the tensors, such as "
        "`lambda out: out.last_hidden_state`."
    )


def export(unrolled: Unrolled, leaves: list[torch.Tensor], dynamic: bool, rules: dict[str, Rule]) -> tuple[Any, ...]:
    """The program, and the tensors it holds by their name in the module.

    Args:
        unrolled: the module, in eval mode.
        leaves: example inputs, at least two of them where `dynamic`.
        dynamic: whether the leading axis is the batch, of any length; else the shapes are those of the example.
        rules: the user's own.

    Raises:
        NotImplementedError: an operation has no rule, the forward branches on values, or writes in place to what
            outlives it. The message names operation and layer.
    """
    shapes_of = ([{0: torch.export.Dim.DYNAMIC} if dynamic and leaf.ndim else None for leaf in leaves],)
    example = [leaf.clone() for leaf in leaves]  # export leaves marks on its inputs
    with watched(unrolled.module) as where, _plain_layers(), _silent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about its own internals
        try:
            exported = torch.export.export(unrolled, (example,), dynamic_shapes=shapes_of if dynamic else None)
            exported = _decomposed(exported, rules)
        except Exception as error:
            raise _explained(error, where) from error
    _refuse_mutation(exported)  # which shows once writes in place have become results
    return _lower(exported, rules), {**dict(exported.state_dict), **exported.constants}


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without the graph that torch logs and prints before it raises: the exception says what is wrong."""
    logger = logging.getLogger(_LOGGER)
    before = logger.disabled
    logger.disabled = True
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.disabled = before


@contextlib.contextmanager
def _plain_layers() -> Iterator[None]:
    """Without the fused transformer layers, which have no second derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class FixedBatch(Exception):
    """The module accepts one batch size only."""


def _explained(error: Exception, where: list[str]) -> Exception:
    layer = where[-1] if where and where[-1] else "the module itself"
    text = str(error).strip()
    head = "\n".join(text.splitlines()[:4])
    if "Constraints violated" in text or "specialized" in text.lower() or "ConstraintViolation" in type(error).__name__:
        return FixedBatch(head)
    if "data-dependent" in text.lower() or "DataDependent" in type(error).__name__:
        return NotImplementedError(
            f"The forward of layer `{layer}` branches on the values of tensors (`if`, `.item()`, `float()`), which no "
            "compiled program can. Use `torch.where`, or `hj.torch_operator`, which runs the module in PyTorch. torch "
            f"says: {head}"
        )
    return NotImplementedError(
        f"`torch.export` fails in layer `{layer}`, so the module cannot be converted. `hj.torch_operator` runs it in "
        f"PyTorch instead. torch says: {type(error).__name__}: {head}"
    )


def _refuse_mutation(exported: Any) -> None:
    signature = exported.graph_signature
    for what, names in (
        ("the buffer", list(signature.buffers_to_mutate.values())),
        ("the parameter", list(getattr(signature, "parameters_to_mutate", {}).values())),
        ("its input number", [n.rpartition("_")[2] for n in signature.user_inputs_to_mutate.values()]),
    ):
        if names:
            name = names[0].removeprefix("module.")
            raise NotImplementedError(
                f"The forward writes in place to {what} `{name}`, in layer "
                f"`{name.rpartition('.')[0] or 'the module itself'}`: it is no function of its inputs. Clone before "
                "writing, or keep such counters out of eval mode."
            )


def _decomposed(exported: Any, rules: dict[str, Rule]) -> Any:
    """The graph in operations that have rules, as few and as large as possible."""
    from torch._decomp import get_decompositions

    table = torch.export.default_decompositions()
    for op in list(table.keys()):
        if find(str(op), rules) is not None:
            table.pop(op)
    exported = exported.run_decompositions(table)
    unknown = {node.target for node in exported.graph.nodes if _is_aten(node) and _rule_of(node, rules) is None}
    further = {op: how for op, how in get_decompositions(list(unknown)).items() if op in unknown}
    return exported.run_decompositions({**table, **further}) if further else exported


def _is_aten(node: Any) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _rule_of(node: Any, rules: dict[str, Rule]) -> Rule | None:
    target = node.target
    if _is_aten(node):
        name = str(target)
        return _nothing if name.split(".")[1] in _CHECKS else find(name, rules)
    if target is operator.getitem:
        return getitem
    name = getattr(target, "__name__", "")
    if getattr(target, "__module__", "") in ("_operator", "math", "builtins"):
        return target
    return _ON_SIZES.get(name) or getattr(math, name.removeprefix("_sym_").removeprefix("sym_"), None)


def _nothing(*_: Any, **__: Any) -> None:
    """A check of what is already known here."""


def _lower(exported: Any, rules: dict[str, Rule]) -> Program:
    graph = exported.graph
    graph.eliminate_dead_code()
    signature = exported.graph_signature
    arrays, inputs, instructions, missing = {}, [], [], {}
    for spec in signature.input_specs:
        if spec.kind.name == "USER_INPUT":
            inputs.append(spec.arg.name)
        elif spec.target is not None:
            arrays[spec.arg.name] = spec.target
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        layer = _layer_of(node)
        name = str(node.target) if _is_aten(node) else getattr(node.target, "__name__", str(node.target))
        function = _rule_of(node, rules) if node.op == "call_function" else None
        if function is None:
            missing.setdefault(name, layer)
            continue
        if function is _nothing:
            continue
        args = as_data(node.args)
        kwargs = {key: as_data(value) for key, value in node.kwargs.items() if key not in _PLACEMENT}
        instructions.append(Instruction(node.name, function, args, kwargs, _dtypes_of(node), name, layer))
    if missing:
        raise NotImplementedError(_missing_text(missing))
    outputs = tuple(Ref(spec.arg.name) for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT")
    return Program(tuple(instructions), tuple(inputs), arrays, outputs)


def _missing_text(missing: dict[str, str]) -> str:
    lines = []
    for name, layer in missing.items():
        why = why_refused(name) if name.startswith("aten.") else None
        lines.append(f"`{name}` in layer `{layer or 'the module itself'}`" + (f": {why}" if why else ""))
    return (
        "There is no rule for " + "; ".join(lines) + ". Give one as `rules={name: function of JAX arrays}`, with the "
        "operation's signature, or use `hj.torch_operator`, which runs the module in PyTorch."
    )


def _layer_of(node: Any) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    names = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in stack]
    deepest = names[-1] if names else ""
    return deepest.removeprefix("L['self'].").removeprefix("module").removeprefix(".")


def as_data(value: Any) -> Any:
    """An argument in a graph, without PyTorch's objects."""
    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, torch.dtype):
        return Dtype(str(value).removeprefix("torch."))
    if isinstance(value, list | tuple):
        return tuple(as_data(part) for part in value)
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return None
    return value


def _dtypes_of(node: Any) -> tuple[str | None, ...]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(str(v.dtype).removeprefix("torch.") if isinstance(v, torch.Tensor) else None for v in values)
