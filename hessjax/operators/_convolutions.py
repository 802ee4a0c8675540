"""Convolutions in the layout that XLA runs fast on the CPU, wherever they stand in a program.

XLA's CPU compiler puts convolutions into its own layout, channels last, in the entry computation only. In the body of a
loop, where a solver's product stands, every other layout runs 10 to 60 times slower, and a weight gradient is always in
another layout. So the rewriting is done here, on the traced program, before it is compiled.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jax.extend.core.primitives import conv_general_dilated_p, jit_p
from jax.sharding import AxisType
from jaxtyping import Array, PyTree


def channel_last(function: Callable[..., PyTree[Array]]) -> Callable[..., PyTree[Array]]:
    """`function`, with every convolution in XLA's own layout where the program is compiled for the CPU.

    The function is traced once. Convolutions inside what it calls (loops, branches, `jit`, `checkpoint`, functions with
    a custom derivative) are rewritten too; a custom derivative's own rule is not. For other platforms, and in a program
    without convolutions, nothing changes.

    Args:
        function: of pytrees of arrays, to a pytree of arrays. It may close over arrays, traced ones as well.
    """

    def traced(*args: PyTree[Array]) -> PyTree[Array]:
        return channel_last_program(function, *args)[1](*args) if may_trace() else function(*args)

    return traced


def may_trace() -> bool:
    """Not without `jit`: a function may then look at its values, which tracing forbids."""
    return not jax.config.jax_disable_jit  # pyright: ignore[reportAttributeAccessIssue] jax adds its options at run time


def channel_last_program(
    function: Callable[..., PyTree[Array]], *args: PyTree
) -> tuple[ClosedJaxpr, Callable[..., PyTree[Array]]]:
    """The program of such a function for arguments of the given shapes, and a function that runs it."""
    # A function of its own, since JAX compares what it was given before, and a bound operator's arrays may be traced.
    program, result = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    program, treedef = program.replace(jaxpr=_rewrite(program.jaxpr, {})), jtu.tree_structure(result)

    def run(*args: PyTree[Array]) -> PyTree[Array]:
        return treedef.unflatten(jax.core.eval_jaxpr(program.jaxpr, program.consts, *jtu.tree_leaves(args)))

    return program, run


def _rewrite(jaxpr: Jaxpr, known: dict[Jaxpr, Jaxpr]) -> Jaxpr:
    """`jaxpr` with its convolutions replaced; itself if it has none. `known` keeps shared programs shared."""
    if jaxpr not in known:
        equations = [_rewrite_equation(equation, known) for equation in jaxpr.eqns]
        changed = any(new is not old for new, old in zip(equations, jaxpr.eqns, strict=True))
        known[jaxpr] = jaxpr.replace(eqns=equations) if changed else jaxpr
    return known[jaxpr]


def _rewrite_equation(equation: JaxprEqn, known: dict[Jaxpr, Jaxpr]) -> JaxprEqn:
    if equation.primitive is conv_general_dilated_p:
        return _replace_convolution(equation)
    if equation.primitive is jit_p and equation.params["name"] == "_convolve_for_platform":
        return equation  # rewritten already, in an operator that is part of this one
    params = {name: _rewrite_parameter(value, known) for name, value in equation.params.items()}
    changed = any(params[name] is not value for name, value in equation.params.items())
    return equation.replace(params=params) if changed else equation


def _rewrite_parameter(value: Any, known: dict[Jaxpr, Jaxpr]) -> Any:
    """A parameter of an equation, in which programs are rewritten: one, or a tuple of them such as branches."""
    if isinstance(value, Jaxpr):
        return _rewrite(value, known)
    if isinstance(value, ClosedJaxpr):
        jaxpr = _rewrite(value.jaxpr, known)
        return value if jaxpr is value.jaxpr else value.replace(jaxpr=jaxpr)
    if isinstance(value, tuple):
        parts = [_rewrite_parameter(part, known) for part in value]
        if any(new is not old for new, old in zip(parts, value, strict=True)):
            return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _replace_convolution(equation: JaxprEqn) -> JaxprEqn:
    """A call of `_convolve_for_platform`, unless the convolution is in place or its arrays are explicitly sharded."""
    avals: list[Any] = [atom.aval for atom in equation.invars]
    params = equation.params
    in_place = params["dimension_numbers"] == _layout(len(avals[0].shape)) and params["batch_group_count"] == 1
    sharded = any(axis != AxisType.Auto for aval in avals for axis in aval.sharding.mesh.axis_types)
    if in_place or sharded:
        return equation
    lhs, rhs = (jax.ShapeDtypeStruct(aval.shape, aval.dtype, weak_type=aval.weak_type) for aval in avals)
    (call,) = jax.make_jaxpr(partial(_convolve_for_platform, params=tuple(params.items())))(lhs, rhs).jaxpr.eqns
    return equation.replace(primitive=call.primitive, params=call.params)


@partial(jax.jit, static_argnames="params")  # equal convolutions are traced once, and are one function of the program
def _convolve_for_platform(lhs: Array, rhs: Array, params: tuple[tuple[str, Any], ...]) -> Array:
    """A convolution with the parameters of its primitive, in the layout that suits the platform."""
    as_written = partial(conv_general_dilated_p.bind, **dict(params))
    return lax.platform_dependent(lhs, rhs, cpu=partial(_convolve_channel_last, **dict(params)), default=as_written)


def _layout(ndim: int) -> lax.ConvDimensionNumbers:
    """Batch, space, channels; for kernels space, in, out."""
    data = (0, ndim - 1, *range(1, ndim - 1))
    return lax.ConvDimensionNumbers(data, (ndim - 1, ndim - 2, *range(ndim - 2)), data)


def _convolve_channel_last(
    lhs: Array,
    rhs: Array,
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    feature_group_count: int,
    batch_group_count: int,
    **params: Any,
) -> Array:
    lhs_axes, rhs_axes, out_axes = dimension_numbers
    lhs = jnp.transpose(lhs, (lhs_axes[0], *lhs_axes[2:], lhs_axes[1]))
    rhs = jnp.transpose(rhs, (*rhs_axes[2:], rhs_axes[1], rhs_axes[0]))
    if batch_group_count > 1:
        # Groups of the batch meet their own output features: as groups of input features XLA runs them 15 times faster.
        batch, *space, channels = lhs.shape
        batch //= batch_group_count
        lhs = jnp.moveaxis(lhs.reshape(batch_group_count, batch, *space, channels), 0, -2)
        lhs = lhs.reshape(batch, *space, batch_group_count * channels)
        feature_group_count = batch_group_count
    out = conv_general_dilated_p.bind(
        lhs,
        rhs,
        dimension_numbers=_layout(lhs.ndim),
        feature_group_count=feature_group_count,
        batch_group_count=1,
        **params,
    )
    return jnp.moveaxis(out, range(out.ndim), (out_axes[0], *out_axes[2:], out_axes[1]))
