"""A model that works on one example, seen over all examples: outputs, their derivatives, and the checks of the data.

What flows in: `forward(params, x)` and a pytree of inputs with the examples on the leading axis. What flows out: the
outputs with the same leading axis, and the linear maps J and Jᵀ between parameters and outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from hessjax._arguments import as_integer, check_key
from hessjax._vectors import structure_of
from hessjax.operators._slices import count_examples

Data = tuple[PyTree, PyTree]


def outputs_of(forward: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree, batched: bool) -> PyTree:
    """The outputs on all inputs, the examples on the leading axis."""
    return forward(params, inputs) if batched else jax.vmap(lambda x: forward(params, x))(inputs)


def real_outputs(
    forward: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree, batched: bool
) -> tuple[PyTree[Array], PyTree]:
    """The real outputs, and the others (class indices, masks), which have no derivative; None in each other's place.

    Raises:
        ValueError: an output is complex, or none is a real floating-point array.
    """
    outputs = outputs_of(forward, params, inputs, batched)
    real, constants = eqx.partition(outputs, eqx.is_inexact_array)
    leaves = jtu.tree_leaves(real)
    if not leaves or any(jnp.iscomplexobj(leaf) for leaf in leaves):
        what = ", ".join(f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}" for leaf in jtu.tree_leaves(outputs))
        raise ValueError(f"`forward` must return real floating-point arrays, got {what or 'none'}.")
    return real, constants


def as_scalar(value: Any) -> Scalar:
    """`value`, if it is a real scalar.

    Raises:
        ValueError: it is not; the message says what came.
    """
    if (
        not eqx.is_array_like(value)
        or jnp.shape(value) != ()
        or not jnp.issubdtype(jnp.result_type(value), jnp.floating)
    ):
        what = f"shape {jnp.shape(value)}, dtype {jnp.result_type(value)}" if eqx.is_array_like(value) else repr(value)
        raise ValueError(f"The loss must be a real floating-point scalar, got {what}. Reduce it, e.g. by `jnp.mean`.")
    return jnp.asarray(value)


def losses_of(forward: Any, loss: Any, params: PyTree, data: Data, batched: bool) -> Float[Array, " examples"]:
    """The loss of every example."""
    outputs = outputs_of(forward, params, data[0], batched)
    return jax.vmap(lambda output, target: as_scalar(loss(output, target)))(outputs, data[1])


class Linearized(NamedTuple):
    """The outputs at θ, and the derivative of those that are real numbers.

    Attributes:
        outputs: the real ones.
        constants: the others.
        push: v ↦ Jv, from parameters to `outputs`.
        pull: u ↦ Jᵀu.
    """

    outputs: PyTree[Array]
    constants: PyTree
    push: Callable[[PyTree], PyTree]
    pull: Callable[[PyTree], PyTree]


def linearize(forward: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree, batched: bool) -> Linearized:
    """Jᵀ and J at θ from one trace of `forward`."""
    outputs, pull, constants = jax.vjp(
        lambda params: real_outputs(forward, params, inputs, batched), params, has_aux=True
    )
    push, pull = both_ways(pull, outputs)
    return Linearized(outputs, constants, push, pull)


def both_ways(
    pull: Callable[[PyTree], tuple[PyTree]], outputs: PyTree
) -> tuple[Callable[[PyTree], PyTree], Callable[[PyTree], PyTree]]:
    """J and Jᵀ, from Jᵀ as `jax.vjp` returns it.

    J is the transpose of Jᵀ, and not the other way round, so that a `jax.custom_vjp`, which has no forward derivative,
    may be part of the model. The compiled products are the same.
    """
    transposed = jax.linear_transpose(lambda cotangent: pull(cotangent)[0], outputs)
    return lambda tangent: transposed(tangent)[0], lambda cotangent: pull(cotangent)[0]


def as_arguments(params: PyTree, inputs: PyTree, targets: PyTree) -> tuple[PyTree, Data]:
    """Parameters and data as jax arrays.

    Raises:
        TypeError: a parameter is not a floating-point array.
        ValueError: a leaf of the data is no array with a leading axis, or the leading lengths differ.
    """
    structure = structure_of(params)
    params = jtu.tree_map(lambda leaf, spec: jnp.asarray(leaf, spec.dtype), params, structure)

    def convert(path: tuple[Any, ...], leaf: Any) -> Array:
        if not eqx.is_array_like(leaf) or jnp.ndim(leaf) == 0:
            part, place = ("inputs", "targets")[path[0].idx], jtu.keystr(path[1:])
            what = "an array without axes" if eqx.is_array(leaf) else f"the {type(leaf).__name__} {leaf!r}"
            raise ValueError(
                f"`{part}{place}` must be an array with the examples on its leading axis, got {what}. What all "
                "examples share belongs in the parameters or in a closure."
            )
        return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

    data = jtu.tree_map_with_path(convert, (inputs, targets))
    count_examples(dict(zip(("inputs", "targets"), data, strict=True)))
    return params, data


def as_samples(mc_samples: Any, key: Any, caller: str) -> int | None:
    """`mc_samples` as an integer, or None for no sampling; it comes with a key, and neither without the other.

    Raises:
        TypeError: it is not an integer, or `key` is no random key.
        ValueError: it is below 1, or one of the two is missing.
    """
    check_key(key, caller)
    if (mc_samples is None) != (key is None):
        missing, given = ("mc_samples", "key") if mc_samples is None else ("key", "mc_samples")
        raise ValueError(
            f"`{caller}` samples with `mc_samples=` and `key=` together: got `{given}` and no `{missing}`."
        )
    if mc_samples is not None and (mc_samples := as_integer("mc_samples", mc_samples)) < 1:
        raise ValueError(f"`{caller}` needs `mc_samples >= 1`, or None for the exact matrix, got {mc_samples}.")
    return mc_samples
