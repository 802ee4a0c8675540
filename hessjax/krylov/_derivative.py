"""Derivatives of eigenvalues with respect to the operator's arrays."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree

from hessjax._vectors import usual_promotion
from hessjax.operators._operator import Operator, quadratic_form


@eqx.filter_custom_jvp
def differentiable(_op: Operator, values: Float[Array, " k"], _vectors: PyTree) -> Float[Array, " k"]:
    """`values`, with the derivative ∂λ = vᵀ (∂A) v with respect to the operator's arrays."""
    return values


@differentiable.def_jvp
@usual_promotion()
def _eigenvalue_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    op, values, vectors = primals
    vectors = _fixed_vectors(op, vectors)

    def forms(op: Operator) -> Array:
        return lax.map(lambda v: quadratic_form(op, v), vectors)

    _, derivative = eqx.filter_jvp(forms, (op,), (tangents[0],))
    return values, derivative.astype(values.dtype)


@eqx.filter_custom_jvp
def _fixed_vectors(_op: Operator, vectors: PyTree) -> PyTree:
    """The eigenvectors that ∂λ = vᵀ (∂A) v holds fixed, which makes its own derivative wrong: that is refused."""
    return vectors


@_fixed_vectors.def_jvp
def _fixed_vectors_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
    if jtu.tree_leaves(tangents):
        raise ValueError("`eigsh` has no second derivative of an eigenvalue, only the first.")
    return primals[1], jtu.tree_map(jnp.zeros_like, primals[1])
