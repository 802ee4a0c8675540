"""Operators made of operators and known eigenpairs, where the result is symmetric again."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree

from hessjax._vectors import as_vector, contract, scalar_dtype
from hessjax.operators._operator import Operator, as_operator


def deflate(op: Operator | Any, eigenpairs: Any) -> Operator:
    """A - V Λ Vᵀ: the operator without eigenpairs that are known.

    Their eigenvalues become zero, and every other pair stays. A product costs one with A and two passes over V.

    Args:
        op: symmetric A.
        eigenpairs: an object with `eigenvalues` (k,) and `eigenvectors`, orthonormal, with a leading axis k on every
            leaf, such as `hj.eigsh` returns. All k are taken, converged or not: what they are off by stays in A.

    Returns:
        An operator on the same vectors.

    Raises:
        ValueError: the eigenvectors are None, or do not have A's structure with a leading axis k.
        TypeError: `op` is not an operator, or `eigenpairs` lacks one of the two.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.array([1.0, 9.0, 4.0]) * v, like=jnp.zeros(3))
        >>> rest = hj.deflate(A, hj.eigsh(A, 1, jax.random.key(0), which="LA"))
        >>> [round(abs(x), 4) for x in jnp.diagonal(rest.dense()).tolist()]
        [1.0, 0.0, 4.0]
    """
    op = as_operator(op, None)
    if not hasattr(eigenpairs, "eigenvalues") or not hasattr(eigenpairs, "eigenvectors"):
        raise TypeError(f"`eigenpairs` must have `eigenvalues` and `eigenvectors`, got {type(eigenpairs).__name__}.")
    values, vectors = jnp.asarray(eigenpairs.eigenvalues), eigenpairs.eigenvectors
    if vectors is None:
        raise ValueError("`eigenpairs` has no eigenvectors: it was computed with `return_eigenvectors=False`.")
    if values.ndim != 1:
        raise ValueError(f"`eigenvalues` must have one axis, got shape {values.shape}.")
    block = jtu.tree_map(lambda leaf: jax.ShapeDtypeStruct((len(values), *leaf.shape), leaf.dtype), op.structure)
    return Deflated(op, values, as_vector(vectors, block, "eigenvectors"))


class Deflated(Operator):
    """A - V Λ Vᵀ."""

    operator: Operator
    eigenvalues: Float[Array, " k"]
    eigenvectors: PyTree[Float[Array, "k ..."]]

    @property
    def like(self) -> PyTree:
        return self.operator.like

    def product(self, vector: PyTree) -> PyTree:
        dtype = scalar_dtype(self.structure)
        parts = jtu.tree_map(lambda v, x: contract(v, x, x.ndim, dtype), self.eigenvectors, vector)
        weights = self.eigenvalues.astype(dtype) * sum(jtu.tree_leaves(parts))

        def remove(image: Array, vectors: Array) -> Array:
            return (image - contract(weights, vectors, 1, dtype)).astype(image.dtype)

        return jtu.tree_map(remove, self.operator.product(vector), self.eigenvectors)


def compose(*operators: Any) -> Operator:
    """The product of symmetric operators, where it reads the same in both directions: `compose(B, A, B)` is B A B.

    Only such a product is symmetric whatever its factors are. `compose(A, A)` is A².

    Args:
        operators: symmetric operators on vectors of one structure, the i-th from the left the very object that the i-th
            from the right is. The rightmost is applied first.

    Returns:
        An operator at the cost of one product with each factor.

    Raises:
        ValueError: there is none, the order does not mirror itself, or the structures differ.
        TypeError: one is not an operator.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: v[::-1], like=jnp.zeros(2))
        >>> B = hj.operator(lambda v: jnp.array([2.0, 3.0]) * v, like=jnp.zeros(2))
        >>> hj.compose(B, A, B).dense().tolist()
        [[0.0, 6.0], [6.0, 0.0]]
    """
    if not operators or any(first is not last for first, last in zip(operators, reversed(operators), strict=True)):
        names = ", ".join(type(operator).__name__ for operator in operators)
        raise ValueError(
            f"`compose` needs operators whose order mirrors itself, as `compose(B, A, B)`, got {names or 'none'}: "
            "another product is not symmetric."
        )
    half = [as_operator(operator, None) for operator in operators[: (len(operators) + 1) // 2]]
    for operator in half[1:]:
        if operator.structure != half[0].structure:
            raise ValueError(
                f"Operators compose only on vectors of one structure, got {half[0].structure} and {operator.structure}."
            )
    return Composed(tuple(half), middle=len(operators) % 2 == 1)


class Composed(Operator):
    """B₁ … Bₘ … B₁, the last of `half` applied once if it is the `middle`, else twice."""

    half: tuple[Operator, ...]
    middle: bool = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return self.half[0].like

    def product(self, vector: PyTree) -> PyTree:
        back = self.half[:-1] if self.middle else self.half
        for operator in (*self.half, *reversed(back)):
            vector = operator.product(vector)
        return vector
