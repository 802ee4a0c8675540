"""Curvature as an optimizer sees it that scales every coordinate by itself."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, PyTree

from hessjax._vectors import as_vector
from hessjax.operators._operator import Operator, as_operator


def precondition(op: Operator | Any, scale: PyTree) -> Operator:
    """D^-1/2 A D^-1/2 for a diagonal D > 0: symmetric, with the eigenvalues of D⁻¹A.

    Gradient descent preconditioned by D⁻¹ is stable where ordinary descent on this operator is. Its eigenvectors u give
    those of D⁻¹A as D^-1/2 u.

    Args:
        op: symmetric A; a plain function acts on pytrees shaped as `scale`.
        scale: D, a pytree of positive numbers shaped as A's vectors, such as `hj.adam_preconditioner` returns. Infinite
            entries are taken: D^-1/2 is zero there.

    Returns:
        An operator on the same vectors, at the cost of one product with A.

    Raises:
        ValueError: the tree or a shape differs from A's, or an entry of a D that is not being traced is not positive.
            A traced one's entries are not known: the product is then not finite, and `hj.eigsh` does not converge.
        TypeError: `op` is not an operator.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.array([8.0, 1.0]) * v, like=jnp.zeros(2))
        >>> hj.precondition(A, jnp.array([4.0, 1.0])).dense().tolist()
        [[2.0, 0.0], [0.0, 1.0]]
    """
    op = as_operator(op, scale)
    scale = as_vector(scale, op.structure, "scale")
    jtu.tree_map_with_path(_check_positive, scale)
    return Preconditioned(op, _inverse_roots(scale))


def _check_positive(path: tuple[Any, ...], d: Array) -> None:
    if isinstance(d, Tracer):
        return
    with jax.ensure_compile_time_eval():  # also while the product that D is for is being traced
        if _is_positive(d):
            return
        least = jax.device_get(jnp.min(d))
    raise ValueError(
        f"`scale` must be positive, got {least} at `{jtu.keystr(path) or 'the root'}`. An optax state has no D before "
        "its first update."
    )


# Compiled, so that their constants travel with the program and pass any transfer guard.
@jax.jit
def _inverse_roots(scale: PyTree[Array]) -> PyTree[Array]:
    return jtu.tree_map(lambda d: 1 / jnp.sqrt(d), scale)


@jax.jit
def _is_positive(d: Array) -> Array:
    return jnp.all(d > 0)


class Preconditioned(Operator):
    """S A S for a diagonal S."""

    operator: Operator
    scale: PyTree[Array]

    @property
    def like(self) -> PyTree:
        return self.operator.like

    def product(self, vector: PyTree) -> PyTree:
        image = self.operator.product(jtu.tree_map(jnp.multiply, self.scale, vector))
        return jtu.tree_map(jnp.multiply, self.scale, image)
