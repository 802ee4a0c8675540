"""`frobenius_norm`: the size of an operator, from the images that a trace estimate uses."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, PRNGKeyArray, PyTree

from hessjax._arguments import as_integer, needs_key
from hessjax._vectors import gram, inner, norm, usual_promotion
from hessjax.estimate._door import needs_entries
from hessjax.estimate._exact import over_columns
from hessjax.estimate._left_out import from_left_out
from hessjax.estimate._probes import on_long_sphere
from hessjax.estimate._result import Estimate, exactly
from hessjax.estimate._rounds import Method, as_tolerance, run
from hessjax.estimate._sketch import Sketch, sketch
from hessjax.operators._operator import Operator, as_operator
from hessjax.operators._packing import Packed, Packing


def frobenius_norm(
    op: Operator | Any,
    num_matvecs: Any,
    key: Any,
    *,
    rtol: ArrayLike | None = None,
    like: PyTree | None = None,
) -> Estimate:
    """Estimates ‖A‖_F = √Σᵢ λᵢ² from at most `num_matvecs` products.

    The square is ‖AQ‖²_F + ‖A(I - QQᵀ)‖²_F for any orthonormal Q. Q spans the images of k = num_matvecs / 2 random
    vectors ω but one, which tells the second part in its turn: A(I - QQᵀ)ω = Aω - (AQ)Qᵀω needs no further product. The
    square is estimated without bias. Exact if the rank is below num_matvecs / 2; from n products or more it is exact
    with n products. Spends the largest even number of products and 3.5 num_matvecs vectors of memory.

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        num_matvecs: a ceiling, at least 2; 4 for a finite standard error.
        key: draws the random vectors.
        rtol: a relative standard error that is enough; the ceiling then need not be reached, as in `hj.trace`.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A scalar estimate. The standard error is that of the square, carried to the root; it covers the draw of the
        vectors, and is rough below ten of them. Differentiable with respect to the operator's arrays.

    Raises:
        ValueError: `num_matvecs` is too small, or the operator has no entries.
        TypeError: `op` is not an operator, `key` no key, or `num_matvecs` no integer.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: 0.5 ** jnp.arange(1000.0) * v, like=jnp.zeros(1000))
        >>> round(float(hj.frobenius_norm(A, 60, jax.random.key(0))) ** 2, 4)  # 1 + 1/4 + 1/16 + ...
        1.3333
    """
    op = as_operator(op, like)
    num_matvecs = as_integer("num_matvecs", num_matvecs)
    rtol = as_tolerance("frobenius_norm", rtol)
    needs_key(key, "frobenius_norm")
    needs_entries(op, "frobenius_norm")
    if num_matvecs < min(2, op.size):
        raise ValueError(f"`frobenius_norm` needs `num_matvecs >= 2`, got {num_matvecs}.")
    return _frobenius_norm(op, num_matvecs, key, rtol, Packing.of(op.like))


@eqx.filter_jit
@usual_promotion()
def _frobenius_norm(
    op: Operator, num_matvecs: int, key: PRNGKeyArray, rtol: Array | None, packing: Packing
) -> Estimate:
    def exact(spent: int) -> Estimate:
        return exactly(norm(over_columns(op, lambda _, image: norm(image))), spent + op.size)

    return run(Packed(op, packing), num_matvecs, key, _METHOD, rtol, exact)


def _root_of_square(s: Sketch) -> Estimate:
    forms = jax.vmap(lambda image: inner(image, image))(s.images)
    cross = 2 * gram(s.basis_images, s.images)
    square = from_left_out(s, forms, cross, gram(s.basis_images, s.basis_images), 2 * forms.size)
    positive = ~(square.value <= 0)  # so is NaN, which stays
    root = jnp.sqrt(jnp.where(positive, square.value, 1))
    value = jnp.where(positive, root, 0)
    return Estimate(s.unit * value, lax.stop_gradient(s.unit * square.stderr / (2 * root)), square.num_matvecs)


_METHOD = Method(partial(sketch, on_long_sphere), _root_of_square, 2)
