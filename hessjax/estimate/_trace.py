"""`trace`: XTrace, and what it is better than."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, PyTree

from hessjax._function import as_integer
from hessjax._vectors import inner, structure_of
from hessjax.estimate._door import needs_entries, needs_key, refuse_method
from hessjax.estimate._exact import over_columns
from hessjax.estimate._left_out import from_left_out
from hessjax.estimate._nystrom import xnystrace
from hessjax.estimate._probes import in_batches, on_long_sphere, products, signs
from hessjax.estimate._result import Estimate, average, exactly, scaled
from hessjax.estimate._sketch import combine, gram, minus, orthonormal, sketch
from hessjax.operators._operator import Operator, as_operator, quadratic_form
from hessjax.operators._packing import Packed, Packing


def trace(
    op: Operator | Any, num_matvecs: Any, key: Any, *, method: str = "xtrace", like: PyTree | None = None
) -> Estimate:
    """Estimates tr A = Σᵢ λᵢ from at most `num_matvecs` products.

    All methods are unbiased, but for "xnystrace" where A has negative eigenvalues. With n products or more in hand the
    diagonal is read off one entry at a time: exact, n products, standard error 0.

    | method | products in fact | good for | vectors of memory |
    |---|---|---|---|
    | "xtrace" | the largest even number | decaying spectra; exact if rank < num_matvecs / 2 | 2 num_matvecs |
    | "xnystrace" | all | the same, A positive semidefinite: exact if rank < num_matvecs | 3 num_matvecs |
    | "hutch++" | the largest multiple of 3 | the same, simpler | num_matvecs |
    | "hutchinson" | all | flat spectra, nearly diagonal matrices, no memory to spare | 32 |

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        num_matvecs: a ceiling. At least 1 for "hutchinson", 2 for "xtrace" and "xnystrace", 3 for "hutch++"; twice that
            for a finite standard error.
        key: draws the random vectors.
        method: one of the above.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A scalar estimate. The standard error covers the draw of the vectors. For "xtrace" and "xnystrace" it is a
        jackknife over them, which tends to be too large where the spectrum decays fast, and is rough for fewer than ten
        vectors. Differentiable with respect to the operator's arrays: the derivative of
        the estimate is an unbiased estimate of the derivative.

    Raises:
        ValueError: `num_matvecs` is too small, `method` is unknown, or the operator has no entries.
        TypeError: `op` is not an operator, `key` no key, or `num_matvecs` no integer.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: 0.5 ** jnp.arange(1000.0) * v, like=jnp.zeros(1000))
        >>> round(float(hj.trace(A, 60, jax.random.key(0))), 3)
        2.0

    Source: Epperly, Tropp and Webber, XTrace: making the most of every sample in stochastic trace estimation,
    arXiv:2301.07825; Meyer, Musco, Musco and Woodruff, Hutch++: optimal stochastic trace estimation, arXiv:2010.09649.
    """
    op = as_operator(op, like)
    num_matvecs = as_integer("num_matvecs", num_matvecs)
    refuse_method("trace", method, _METHODS)
    needs_key(key, "trace")
    needs_entries(op, "trace")
    least = _LEAST[method]
    if num_matvecs < min(least, op.size):
        raise ValueError(f'`trace` needs `num_matvecs >= {least}` for method="{method}", got {num_matvecs}.')
    return _trace(op, num_matvecs, key, method, Packing.of(op.like))


@eqx.filter_jit
def _trace(op: Operator, num_matvecs: int, key: PRNGKeyArray, method: str, packing: Packing) -> Estimate:
    if num_matvecs >= op.size:
        return exactly(jnp.sum(over_columns(op, inner)), op.size)
    return _METHODS[method](Packed(op, packing), num_matvecs, key)


def _hutchinson(op: Operator, num_matvecs: int, key: PRNGKeyArray) -> Estimate:
    """The mean of zᵀAz over vectors of random signs: variance 2 (‖A‖²_F - Σᵢ Aᵢᵢ²) each, none for a diagonal A."""
    structure = structure_of(op.like)

    def one(key: PRNGKeyArray) -> Array:
        return quadratic_form(op, signs(key, structure))

    return average(in_batches(jax.vmap(one), jax.random.split(key, num_matvecs)), num_matvecs)


def _hutchplusplus(op: Operator, num_matvecs: int, key: PRNGKeyArray) -> Estimate:
    """The trace on the span of a third of the products, and Hutchinson's estimate on its complement."""
    third, structure = num_matvecs // 3, structure_of(op.like)
    keys = jax.random.split(key, 2 * third)
    first, second = (jax.vmap(partial(signs, structure=structure))(part) for part in (keys[:third], keys[third:]))
    basis = orthonormal(jax.lax.stop_gradient(products(op, first)))
    inside = jnp.trace(gram(basis, products(op, basis)))
    rest = minus(second, combine(basis, gram(basis, second)))
    samples = jax.vmap(inner)(rest, products(op, rest))
    return average(inside + samples, 3 * third)


def _xtrace(op: Operator, num_matvecs: int, key: PRNGKeyArray) -> Estimate:
    """The mean over i of tr QᵢᵀAQᵢ + ωᵢᵀ(I - Pᵢ)A(I - Pᵢ)ωᵢ, where Qᵢ does not know ωᵢ.

    The second term is scaled to its mean over directions: what is left of ωᵢ has the length it should have on average.
    """
    half = num_matvecs // 2
    s = sketch(op, key, half, on_long_sphere)
    forms = jax.vmap(inner)(s.probes, s.images)
    cross = gram(s.basis, s.images) + gram(s.basis_images, s.probes)
    return scaled(from_left_out(s, forms, cross, gram(s.basis, s.basis_images), 2 * half), s.unit)


_METHODS: dict[str, Callable[[Operator, int, PRNGKeyArray], Estimate]] = {
    "xtrace": _xtrace,
    "xnystrace": xnystrace,
    "hutch++": _hutchplusplus,
    "hutchinson": _hutchinson,
}
_LEAST = {"xtrace": 2, "xnystrace": 2, "hutch++": 3, "hutchinson": 1}
