"""From a PyTorch module to a `Model`: conversion, losses, and the comparison with PyTorch."""

import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import torch
from jaxtyping import Array, PyTree

from hessjax._model import Model
from hessjax.interop._parity import Parity, Ported, check_independence, demand, difference, take, tolerance_in
from hessjax.interop._torch._data import read, to_jax, to_numpy, to_tensor, untouched, x64_is_on
from hessjax.interop._torch._export import FixedBatch, Unrolled, as_tree, export
from hessjax.interop._torch._program import Program
from hessjax.interop._torch._reference import check_plain, eager_outputs, gradient_of, switched_off, trained_parameters
from hessjax.interop._torch._rules import Rule

_EXAMPLES = 8  # on which port and source are compared


class Converted(eqx.Module):
    """A program with its constants as a forward function; on one example if `single`, else on a batch."""

    program: Program = eqx.field(static=True)
    constants: dict[str, Array]
    result: Any = eqx.field(static=True)
    single: bool = eqx.field(static=True)
    wide: bool = eqx.field(static=True, default=False)

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        leaves = [jnp.asarray(leaf) for leaf in jtu.tree_leaves(arguments(inputs))]
        leaves = [leaf[None] for leaf in leaves] if self.single else leaves
        outputs = self.program.run({**self.constants, **params}, leaves, self.wide)
        return jtu.tree_unflatten(self.result, [out[0] for out in outputs] if self.single else outputs)


class ConvertedLoss(eqx.Module):
    """A torch loss on one example, which it takes for a batch of one."""

    program: Program = eqx.field(static=True)
    constants: dict[str, Array]
    wide: bool = eqx.field(static=True, default=False)

    def __call__(self, output: PyTree, target: PyTree) -> Array:
        leaves = [jnp.asarray(leaf)[None] for leaf in jtu.tree_leaves(((output, target), {}))]
        return self.program.run(self.constants, leaves, self.wide)[0]


def arguments(inputs: PyTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple is several arguments, a dict named ones, anything else is one."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


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
        return model if verify is False else model.proven(_proof(model, source, loss, verify))


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


class Source:
    """A private copy of the user's module in eval mode, and a few of the examples as tensors."""

    def __init__(self, module: Any, inputs: PyTree, targets: PyTree, select: Any, kwargs: dict[str, Any]):
        try:
            self.module = copy.deepcopy(module).eval()
        except Exception as error:
            raise ValueError(f"The module cannot be copied (`copy.deepcopy` fails: {error}).") from error
        self.arguments = jtu.tree_structure(arguments(inputs))
        self.select, self.kwargs = select, kwargs
        leaves = jtu.tree_leaves(inputs)
        lengths = {np.shape(leaf)[0] if np.ndim(leaf) else -1 for leaf in leaves}
        if len(lengths) != 1 or -1 in lengths:
            raise ValueError(
                f"Inputs must be arrays with one leading length, got shapes {[np.shape(x) for x in leaves]}."
            )
        self.count = min(next(iter(lengths)), _EXAMPLES)
        self.inputs, self.targets = (take(tree, 0, self.count) for tree in (inputs, targets))
        self.leaves = [to_tensor(leaf) for leaf in jtu.tree_leaves(arguments(self.inputs))]
        self.unrolled = Unrolled(self.module, self.arguments, select, kwargs)
        self.outputs = eager_outputs(self.unrolled, self.leaves)
        self.result = self.unrolled.result

    def alias(self, target: str) -> str:
        """The name of a parameter or buffer in the user's module, the first where it has several."""
        name = target.removeprefix("module.")
        if not hasattr(self, "_first"):
            first: dict[int, str] = {}
            every = [*self.module.named_parameters(remove_duplicate=False), *self.module.named_buffers()]
            self._first = {n: first.setdefault(id(t), n) for n, t in every}
        return self._first.get(name, name)

    def doubled(self) -> "Source":
        """The same in float64."""
        wide = copy.copy(self)
        wide.module = copy.deepcopy(self.module).double()
        wide.leaves = [leaf.double() if leaf.is_floating_point() else leaf for leaf in self.leaves]
        wide.unrolled = Unrolled(wide.module, self.arguments, self.select, self.kwargs)
        wide.outputs = eager_outputs(wide.unrolled, wide.leaves)
        return wide


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
        return isinstance(_torch_loss(loss, source), torch.Tensor)
    except Exception:
        return False


def _torch_loss(loss: Any, source: Source) -> torch.Tensor:
    outputs = jtu.tree_unflatten(source.result, source.outputs)
    like = [leaf for leaf in source.outputs if leaf.is_floating_point()]
    targets = jtu.tree_map(lambda leaf: _at_width_of(to_tensor(leaf), like), source.targets)
    return loss(outputs, targets)


def _at_width_of(target: torch.Tensor, outputs: list[torch.Tensor]) -> torch.Tensor:
    return target.to(outputs[0].dtype) if target.is_floating_point() and outputs else target


def _proof(model: Ported, source: Source, loss: Any, verify: Any) -> Parity:
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


def _with_switches(error: Exception, source: Source) -> Exception:
    """The error, with the layers that run under `no_grad` where there are some: the likeliest cause."""
    layers = [f"`{name}`" if name else "the module itself" for name in switched_off(source.unrolled, source.leaves)]
    if not layers or not isinstance(error, ValueError):
        return error
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
        value = _torch_loss(loss, source)
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
