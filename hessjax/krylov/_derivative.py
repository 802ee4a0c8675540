"""Derivatives of eigenpairs with respect to the operator's arrays.

For a simple eigenvalue, with the eigenvectors orthonormal and their signs fixed,

    ∂λᵢ = vᵢᵀ (∂A) vᵢ,    ∂vᵢ = Σⱼ vⱼ vⱼᵀ (∂A) vᵢ / (λᵢ - λⱼ) + (λᵢ - A)⁺ (I - VVᵀ) (∂A) vᵢ,

the sum over the other pairs that were found. What is left lies in the complement of them all. There λᵢ - A is definite,
where the pairs are at an end of the spectrum, and conjugate gradients invert it. Both rules are written in terms of the
differentiable λ and V themselves, so that they have derivatives of every order.

Source: Magnus, On differentiating eigenvalues and eigenvectors, doi:10.1017/S0266466600011129.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Float, PyTree, Scalar

from hessjax._vectors import combine, epsilon, gram, norm, select, subtract, usual_promotion
from hessjax.krylov._solve import conjugate_gradients
from hessjax.operators._operator import Operator, multiply, quadratic_form


def differentiable(
    op: Operator, values: Float[Array, " k"], vectors: PyTree, residuals: Float[Array, " k"], which: str
) -> tuple[Float[Array, " k"], PyTree]:
    """Eigenvalues and eigenvectors as functions of the operator's arrays.

    Args:
        op: A.
        values: λ, constants.
        vectors: V, constants.
        residuals: pairs that are nearer to each other than theirs are not told apart: only functions of their whole
            eigenspace are then differentiable.
        which: LM, LA, SA, BE, or SM for pairs inside the spectrum.
    """
    return _values(op, values, vectors, residuals, which), _vectors(op, values, vectors, residuals, which)


@eqx.filter_custom_jvp
def _values(_op: Operator, values: Array, _vectors: PyTree, _residuals: Array, _which: str) -> Array:
    return values


@_values.def_jvp
@usual_promotion()
def _values_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    vectors, values = _vectors(*primals), _values(*primals)

    def forms(op: Operator) -> Array:
        return lax.map(lambda v: quadratic_form(op, v), vectors)

    _, change = eqx.filter_jvp(forms, primals[:1], tangents[:1])
    return values, change.astype(values.dtype)


@eqx.filter_custom_jvp
def _vectors(_op: Operator, _values: Array, vectors: PyTree, _residuals: Array, _which: str) -> PyTree:
    return vectors


@_vectors.def_jvp
@usual_promotion()
def _vectors_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
    op, _, _, residuals, which = primals
    vectors, values = _vectors(*primals), _values(*primals)

    def images(op: Operator) -> PyTree:
        return lax.map(lambda v: multiply(op, v), vectors)

    _, change = eqx.filter_jvp(images, primals[:1], tangents[:1])
    mixing = gram(vectors, change)
    distance = values - values[:, None]
    apart = jnp.abs(distance) > residuals + residuals[:, None]
    inside = combine(vectors, jnp.where(apart, mixing / jnp.where(apart, distance, 1), 0))
    rest = jtu.tree_map(jnp.subtract, change, combine(vectors, mixing))
    signs = {"SA": -1.0, "LM": jnp.where(values < 0, -1.0, 1.0), "BE": _halves(values)}.get(which, 1.0)
    far = jnp.max(jnp.abs(values)) * signs

    def outside(given: tuple[Array, Array, Array, PyTree]) -> PyTree:
        value, far, residual, rest = given
        complement = Complement(op, vectors, value, far)
        solve = partial(_inverse, complement, error=residual, inside=which == "SM")
        return lax.custom_linear_solve(complement.product, rest, lambda _, b: solve(b), symmetric=True)

    change = lax.map(outside, (values, jnp.broadcast_to(far, values.shape), residuals, rest))
    return vectors, jtu.tree_map(jnp.add, inside, change)


def _halves(values: Float[Array, " k"]) -> Float[Array, " k"]:
    return jnp.where(jnp.arange(values.size) < values.size // 2, -1.0, 1.0)


class Complement(Operator):
    """(I - VVᵀ) (λ - A) (I - VVᵀ) + far VVᵀ: as definite as λ - A is on the complement of V."""

    operator: Operator
    vectors: PyTree[Float[Array, "k ..."]]
    value: Scalar
    far: Scalar

    @property
    def like(self) -> PyTree:
        return self.operator.like

    def project(self, vector: PyTree) -> tuple[PyTree, PyTree]:
        """The part of a vector in the complement, and the other one."""
        block = jtu.tree_map(lambda leaf: leaf[None], vector)
        within = jtu.tree_map(lambda leaf: leaf[0], combine(self.vectors, gram(self.vectors, block)))
        return jtu.tree_map(jnp.subtract, vector, within), within

    def product(self, vector: PyTree) -> PyTree:
        outside, within = self.project(vector)
        image = subtract(multiply(self.operator, outside), self.value, outside)
        return jtu.tree_map(lambda x, y: (self.far * y - x).astype(x.dtype), self.project(image)[0], within)


class _Square(Operator):
    """B²."""

    operator: Operator

    @property
    def like(self) -> PyTree:
        return self.operator.like

    def product(self, vector: PyTree) -> PyTree:
        return self.operator.product(self.operator.product(vector))


def _inverse(op: Complement, b: PyTree, *, error: Scalar, inside: bool) -> PyTree:
    """B⁻¹ b, by way of B² where B is indefinite.

    NaN where conjugate gradients do not find it, and where B is singular up to the `error` of its shift: then an
    eigenvalue that is not among those found may be a copy of this one.
    """
    unit = epsilon(op.structure)
    tol = jnp.asarray(unit**0.5, op.value.dtype)
    solution = conjugate_gradients(_Square(op) if inside else op, b, tol, 10 * op.size)
    value = op.product(solution.value) if inside else solution.value
    scale = jnp.abs(op.far)
    attainable = 64 * unit * scale * norm(solution.value) * (scale if inside else 1)
    found = solution.converged | (solution.residual <= attainable)
    found &= norm(b) >= jnp.maximum(error, 64 * unit * scale) * norm(value)
    return select(found, value, jtu.tree_map(lambda leaf: jnp.full_like(leaf, jnp.nan), value))
