"""Derivatives of eigenpairs with respect to the operator's arrays.

For a simple eigenvalue, with the eigenvectors orthonormal and their signs fixed,

    ∂λᵢ = vᵢᵀ (∂A) vᵢ,    ∂vᵢ = Σⱼ vⱼ vⱼᵀ (∂A) vᵢ / (λᵢ - λⱼ) + (λᵢ - A)⁺ (I - VVᵀ) (∂A) vᵢ,

the sum over the other pairs that were found. What is left lies in the complement of them all. There λᵢ - A is definite,
where the pairs are at an end of the spectrum, and conjugate gradients invert it. Both rules are written in terms of the
differentiable λ and V themselves, so that they have derivatives of every order.

Copies of a repeated eigenvalue have no vectors of their own. The first rule is then right in sum, and so is the second
with no terms between copies, for functions of their whole eigenspace. Derivatives of these rules are not: so λ and V
inside them are *strict*, which have no derivative there.

Source: Magnus, On differentiating eigenvalues and eigenvectors, doi:10.1017/S0266466600011129.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree, Scalar

from hessjax._vectors import combine, epsilon, gram, norm, or_one, select, subtract, usual_promotion
from hessjax.krylov._solve import conjugate_gradients
from hessjax.operators._compose import compose
from hessjax.operators._operator import Operator, multiply, quadratic_form


def differentiable(
    op: Operator, values: Float[Array, " k"], vectors: PyTree, residuals: Float[Array, " k"], which: str
) -> tuple[Float[Array, " k"], PyTree]:
    """Eigenvalues and eigenvectors as functions of the operator's arrays.

    Args:
        op: A.
        values: λ, constants.
        vectors: V, constants.
        residuals: pairs that are nearer to each other than theirs are copies of one eigenvalue.
        which: LM, LA, SA, BE, or SM for pairs inside the spectrum.
    """
    pairs = (op, values, vectors, residuals, which)
    return _values(*pairs, False), _vectors(*pairs, False)


@eqx.filter_custom_jvp
def _values(_op: Operator, values: Array, _vectors: PyTree, _residuals: Array, _which: str, _strict: bool) -> Array:
    return values


@_values.def_jvp
@usual_promotion()
def _values_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    *pairs, strict = primals
    op, vectors, values = pairs[0], _vectors(*pairs, True), _values(*pairs, True)

    def forms(op: Operator) -> Array:
        return lax.map(lambda v: quadratic_form(op, v), vectors)

    change = _change(forms, op, tangents[0]).astype(values.dtype)
    return values, _if_simple(change, _apart(*pairs)) if strict else change


@eqx.filter_custom_jvp
def _vectors(_op: Operator, _values: Array, vectors: PyTree, _residuals: Array, _which: str, _strict: bool) -> PyTree:
    return vectors


@_vectors.def_jvp
@usual_promotion()
def _vectors_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[PyTree, PyTree]:
    *pairs, strict = primals
    op, _, _, residuals, which = pairs
    vectors, values = _vectors(*pairs, True), _values(*pairs, True)

    def images(op: Operator) -> PyTree:
        return lax.map(lambda v: multiply(op, v), vectors)

    def outside(given: tuple[Array, Array, Array, PyTree]) -> PyTree:
        value, far, residual, rest = given
        complement = Complement(op, vectors, value, far)
        solve = partial(_inverse, complement, error=residual, inside=which == "SM")
        return lax.custom_linear_solve(complement.product, rest, lambda _, b: solve(b), symmetric=True)

    image = _change(images, op, tangents[0])
    mixing, apart = gram(vectors, image), _apart(*pairs)
    distance = jnp.where(apart, values - values[:, None], 1)
    change = combine(vectors, jnp.where(apart, mixing / distance, 0))
    if values.size < op.size:
        rest = jtu.tree_map(jnp.subtract, image, combine(vectors, mixing))
        far = or_one(jnp.max(jnp.abs(values))) * _sides(values, which)
        change = jtu.tree_map(jnp.add, change, lax.map(outside, (values, far, residuals, rest)))
    return vectors, _if_simple(change, apart) if strict else change


def _change(function: Callable[[Operator], PyTree[Array]], op: Operator, tangent: PyTree) -> PyTree[Array]:
    """The derivative of `function` along a tangent, zeros where it does not depend on it."""
    value, change = eqx.filter_jvp(function, (op,), (tangent,))
    return jtu.tree_map(lambda x, dx: jnp.zeros_like(x) if dx is None else dx, value, change)


def _apart(_op: Operator, values: Array, _vectors: PyTree, residuals: Array, _which: str) -> Bool[Array, "k k"]:
    """Which pairs belong to different eigenvalues."""
    return jnp.abs(values - values[:, None]) > residuals + residuals[:, None]


def _if_simple(change: PyTree, apart: Bool[Array, "k k"]) -> PyTree:
    """`change`, but NaN if any pair is a copy of another one."""
    unit = jnp.where(jnp.all(apart | jnp.eye(len(apart), dtype=bool)), 1, jnp.nan)
    return jtu.tree_map(lambda leaf: (leaf * unit).astype(leaf.dtype), change)


def _sides(values: Float[Array, " k"], which: str) -> Float[Array, " k"]:
    """1 for each pair above all that were not found, -1 below."""
    below = {"SA": True, "LM": values < 0, "BE": jnp.arange(values.size) < values.size // 2}.get(which, False)
    return jnp.where(below, -1.0, 1.0) * jnp.ones_like(values)


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


def _inverse(op: Complement, b: PyTree, *, error: Scalar, inside: bool) -> PyTree:
    """B⁻¹ b, by way of B² where B is indefinite.

    NaN where conjugate gradients do not find it, and where B is singular up to the `error` of its shift: then an
    eigenvalue that is not among those found may be a copy of this one.
    """
    unit = epsilon(op.structure)
    tol = jnp.asarray(unit**0.5, op.value.dtype)
    solution = conjugate_gradients(compose(op, op) if inside else op, b, tol, 10 * op.size)
    value = op.product(solution.value) if inside else solution.value
    scale = jnp.abs(op.far)
    attainable = 64 * unit * scale * norm(solution.value) * (scale if inside else 1)
    found = solution.converged | (solution.residual <= attainable)
    found &= norm(b) >= jnp.maximum(error, 64 * unit * scale) * norm(value)
    return select(found, value, jtu.tree_map(lambda leaf: jnp.full_like(leaf, jnp.nan), value))
