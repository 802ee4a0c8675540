"""One Hessian-vector product against a central difference of the gradient.

A symmetry test does not see every wrong second derivative: TensorFlow's layer normalisation and PyTorch's weight
normalisation have right first derivatives and wrong second ones, of which the former stays symmetric. A difference of
gradients does see them, whatever framework the gradient comes from.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Jaxpr, jaxprs_in_params
from jaxtyping import PyTree

from hessjax._vectors import as_vector, structure_of
from hessjax.operators import hvp
from hessjax.operators._slices import as_batch_size

_STEPS = 10.0 ** -np.arange(1, 9)  # relative to the parameters' size; the two that agree best are believed
_EPS = float(np.finfo(np.float64).eps)
_LOW = "Central differences of the gradient do not settle where the loss computes in {}, so no product can be checked."
_CAUSES = "a `stop_gradient`, a custom derivative, or a framework's own bug"
_SLICED = "a loss that is no mean over the examples, so that `batch_size` must not slice it, "
_GOLDEN = (5**0.5 - 1) / 2

Flat = np.ndarray


def check_hvp(
    loss: Callable[..., Any], params: Any, *args: Any, vector: Any = None, rtol: Any = None, batch_size: Any = None
) -> float:
    """Compares one product ∇²L(θ) v with (∇L(θ + hv) - ∇L(θ - hv)) / 2h.

    For a JAX loss everything runs in float64, whatever the dtype of `params`; h is chosen where differences at
    neighbouring steps agree best. Costs one product and 16 gradients.

    Args:
        loss: `loss(params, *args)`, a real scalar in JAX. Where `params` is a `torch.nn.Module`, a function of the
            module, `loss(module, *args)`, whose products are torch's double backward; the module is left as it
            was, its buffers too.
        params: θ, a pytree of floating-point arrays, or a `torch.nn.Module`, of which the parameters with
            `requires_grad` count.
        args: passed on to `loss`.
        vector: v, shaped as the parameters (a dict by name for a module); by default a fixed one whose entries are
            spread evenly over [-1, 1].
        rtol: tolerance relative to the largest entry of the product: by default 1e-5, or ten times the uncertainty of
            the differences where that is larger.
        batch_size: as in `hj.hvp`: the product is summed over slices of `args`, the differences are those of the whole
            loss. They disagree where the loss is no mean over the examples (class weights that are normalised by their
            sum, batch statistics, a regularizer in a sum). Not for a module.

    Returns:
        The largest difference, relative to the largest entry of the difference quotient.

    Raises:
        ValueError: the difference exceeds the tolerance. The message names the worst leaf. Also when the differences
            do not settle at any step, because the loss jumps or is random, and where it computes in less than float32
            (a JAX loss that casts to bfloat16 inside). And when `vector` does not fit a module's parameters, or
            `batch_size` is below 1 or comes with a module.
        TypeError: a parameter is not a floating-point array.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> hj.check_hvp(lambda w: jnp.sum(w**4), jnp.array([1.0, 2.0])) < 1e-8
        True
        >>> hj.check_hvp(lambda w: jnp.sum(w**3 * jax.lax.stop_gradient(w)), jnp.array([1.0, 2.0]))
        Traceback (most recent call last):
        ...
        ValueError: The Hessian-vector product differs from a central difference of the gradient by ...
    """
    torch = sys.modules.get("torch")
    is_module = torch is not None and isinstance(params, torch.nn.Module)
    if batch_size is not None and is_module:
        raise ValueError("`batch_size` is for losses in JAX, got one with a `torch.nn.Module`.")
    size = as_batch_size(batch_size, "check_hvp")
    with _of_torch(loss, params, args, vector) if is_module else _of_jax(loss, params, args, vector, size) as checked:
        return _compare(checked, rtol)


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A loss by its derivatives, as functions of flat parameters.

    Attributes:
        theta: the parameters.
        vector: the direction that was asked for, if any.
        gradient: θ ↦ ∇L(θ).
        product: θ, v ↦ ∇²L(θ) v.
        shapes: of every parameter by its name, in order.
        sliced: the product is a sum over slices of the data.
    """

    theta: Flat
    vector: Flat | None
    gradient: Callable[[Flat], Flat]
    product: Callable[[Flat, Flat], Flat]
    shapes: dict[str, tuple[int, ...]]
    sliced: bool = False

    def name_of(self, index: int) -> str:
        for name, shape in self.shapes.items():
            count = int(np.prod(shape))
            if index < count:
                return f"`{name or 'params'}` {tuple(int(i) for i in np.unravel_index(index, shape))}"
            index -= count
        raise IndexError(index)


@contextlib.contextmanager
def _of_jax(
    loss: Callable[..., Any], params: PyTree, args: tuple[Any, ...], vector: PyTree | None, batch_size: int | None
) -> Any:
    narrow = structure_of(params)
    with jax.enable_x64(True):
        wide = jtu.tree_map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float64), narrow)
        shapes = {jtu.keystr(path): spec.shape for path, spec in jtu.tree_leaves_with_path(wide)}
        treedef = jtu.tree_structure(wide)
        # A small model in float32 has data in float32, which must not decide where the sums are rounded.
        args = jtu.tree_map(_widen, args)
        gradient = eqx.filter_jit(lambda p, a: jax.grad(lambda p: loss(p, *a))(p))
        multiply = eqx.filter_jit(lambda p, a, t: hvp(loss, batch_size=batch_size)(p, *a).product(t))

        def unflatten(flat: Flat) -> PyTree:
            return jtu.tree_map(jnp.asarray, treedef.unflatten(_split(flat, shapes)))

        arrays, static = eqx.partition(args, eqx.is_array)
        program = jax.make_jaxpr(lambda p, a: loss(p, *eqx.combine(a, static)))(wide, arrays)
        if low := sorted(_halves(program.jaxpr)):
            raise ValueError(f"{_LOW.format(' and '.join(low))} Check the same loss in float64.")
        yield _Checked(
            _join(jtu.tree_leaves(params)),
            None if vector is None else _join(jtu.tree_leaves(as_vector(vector, wide, "vector"))),
            lambda flat: _join(jtu.tree_leaves(gradient(unflatten(flat), args))),
            lambda flat, v: _join(jtu.tree_leaves(multiply(unflatten(flat), args, unflatten(v)))),
            shapes,
            batch_size is not None,
        )


@contextlib.contextmanager
def _of_torch(loss: Callable[..., Any], module: Any, args: tuple[Any, ...], vector: Any) -> Any:
    import torch

    from hessjax.interop._torch._data import to_numpy, untouched
    from hessjax.interop._torch._reference import (
        as_it_was,
        hessian_product,
        low_precision_in,
        plain_attention,
        trained_parameters,
    )

    trained = trained_parameters(module)
    parameters = list(trained.values())
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    v = None if vector is None else _named(vector, shapes, to_numpy)

    def tensors(flat: Flat) -> list[Any]:
        parts = zip(_split(flat, shapes), parameters, strict=True)
        return [torch.from_numpy(np.array(part)).to(p) for part, p in parts]

    with untouched(), plain_attention(), as_it_was(module) as restore:

        def loss_at(flat: Flat) -> Any:
            restore()  # buffers too: in train mode every call may change them
            with torch.no_grad():
                for p, part in zip(parameters, tensors(flat), strict=True):
                    p.copy_(part)
            return loss(module, *args)

        def gradient(flat: Flat) -> Flat:
            found = torch.autograd.grad(loss_at(flat), parameters, allow_unused=True, materialize_grads=True)
            return _join([to_numpy(part) for part in found])

        def product(flat: Flat, v: Flat) -> Flat:
            return _join([to_numpy(part) for part in hessian_product(loss_at(flat), parameters, tensors(v))])

        theta = _join([to_numpy(p) for p in parameters])
        low = low_precision_in(lambda: loss_at(theta))
        if low:
            raise ValueError(
                f"{_LOW.format(' and '.join(low))} Check `copy.deepcopy(module).double()`, on float64 inputs and "
                "outside `torch.autocast`."
            )
        yield _Checked(theta, v, gradient, product, shapes)


def _named(vector: Any, shapes: dict[str, tuple[int, ...]], to_numpy: Callable[[Any], Any]) -> Flat:
    """A module's vector as one array.

    Raises:
        ValueError: it does not fit the parameters.
    """
    if not isinstance(vector, Mapping):
        raise ValueError(f"`vector` must be a dict by the parameters' names, got {type(vector).__name__}.")
    parts = {name: np.asarray(to_numpy(part), np.float64) for name, part in vector.items()}
    for name in (*shapes, *parts):
        wanted, got = shapes.get(name, "none"), parts[name].shape if name in parts else "none"
        if wanted != got:
            raise ValueError(f"`vector` must be shaped as the trained parameters: `{name}` has {got} for {wanted}.")
    return _join([parts[name] for name in shapes])


def _compare(checked: _Checked, rtol: Any) -> float:
    theta, vector, gradient = checked.theta, checked.vector, checked.gradient
    if theta.size == 0:
        raise ValueError("`check_hvp` needs at least one parameter, got none.")
    direction = _spread(theta.size) if vector is None else vector
    length = float(np.linalg.norm(direction))
    if not length > 0 or not np.isfinite(length):
        raise ValueError(f"`check_hvp` needs a finite `vector` that is not zero, got one of norm {length}.")
    unit = direction / length
    ours, slope = checked.product(theta, unit), float(np.max(np.abs(gradient(theta))))
    steps = max(1.0, float(np.linalg.norm(theta))) * _STEPS
    quotients = [(gradient(theta + h * unit) - gradient(theta - h * unit)) / (2 * h) for h in steps]
    gaps = [float(np.max(np.abs(a - b))) for a, b in itertools.pairwise(quotients)]
    best = int(np.nanargmin(gaps)) if np.isfinite(gaps).any() else 0
    quotient, uncertainty = quotients[best + 1], gaps[best]
    # Where the loss is linear the quotients are nothing but the gradient's rounding.
    scale = max(float(np.max(np.abs(quotient))), 1e3 * _EPS * slope / steps[best + 1], float(np.finfo(float).tiny))
    if not uncertainty <= 0.1 * scale:
        raise ValueError(
            f"Central differences of the gradient do not settle (they vary by {uncertainty:.3g} on entries up to "
            f"{scale:.3g}), so no product can be checked. The loss may be random (dropout in train mode), jump, or "
            "compute in low precision inside."
        )
    gap = np.abs(ours - quotient)
    largest = float(np.max(gap))
    tolerance = max(1e-5 * scale, 10 * uncertainty) if rtol is None else float(rtol) * scale
    if not largest <= tolerance:
        at = int(np.argmax(np.where(np.isfinite(gap), gap, np.inf)))
        raise ValueError(
            f"The Hessian-vector product differs from a central difference of the gradient by {largest:.3g} at "
            f"{checked.name_of(at)}: got {ours[at]:.9g}, expected {quotient[at]:.9g}, tolerance {tolerance:.3g}. "
            f"The second derivative is wrong there: look for {_CAUSES if not checked.sliced else _SLICED + _CAUSES}."
        )
    return largest / scale


def _halves(jaxpr: Jaxpr) -> set[str]:
    """The floating-point dtypes below float32 that a program computes in."""
    results = (variable.aval for equation in jaxpr.eqns for variable in equation.outvars)
    dtypes = {aval.dtype for aval in results if isinstance(aval, ShapedArray)}
    found = {str(dtype) for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4}
    inside = (_halves(inner) for equation in jaxpr.eqns for inner in jaxprs_in_params(equation.params))
    return found.union(*inside)


def _spread(size: int) -> Flat:
    """A fixed direction: a Weyl sequence over [-1, 1], in which no pattern of the parameters repeats."""
    return 2 * np.modf(_GOLDEN * np.arange(1, size + 1))[0] - 1


def _split(flat: Flat, shapes: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), shapes.values(), strict=True)]


def _join(leaves: Any) -> Flat:
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in leaves] or [np.zeros(0)])


def _widen(leaf: Any) -> Any:
    dtype = getattr(leaf, "dtype", None)
    narrow = dtype is not None and jnp.issubdtype(dtype, jnp.floating) and np.dtype(dtype).itemsize < 8
    return jnp.asarray(leaf, jnp.float64) if narrow else leaf
