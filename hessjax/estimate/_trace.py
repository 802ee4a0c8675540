"""`trace`: XTrace, and what it is better than."""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from hessjax._arguments import as_integer, needs_key
from hessjax._vectors import combine, gram, inner, stacked, structure_of, usual_promotion
from hessjax.estimate._door import needs_entries, refuse_method
from hessjax.estimate._exact import over_columns
from hessjax.estimate._left_out import from_left_out
from hessjax.estimate._nystrom import images_of_probes, xnystrace
from hessjax.estimate._probes import in_batches, on_long_sphere, products, signs
from hessjax.estimate._result import Estimate, average, exactly, scaled
from hessjax.estimate._rounds import Method, as_tolerance, run
from hessjax.estimate._sketch import Sketch, minus, orthonormal, sketch
from hessjax.operators._operator import Operator, as_operator, multiply_each
from hessjax.operators._packing import Packed, Packing


def trace(
    op: Operator | Any,
    num_matvecs: Any,
    key: Any,
    *,
    method: str = "xtrace",
    rtol: ArrayLike | None = None,
    like: PyTree | None = None,
) -> Estimate:
    """Estimates tr A = Σᵢ λᵢ from at most `num_matvecs` products.

    All methods are unbiased; "xnystrace" gives NaN or a biased value where A has negative eigenvalues. With n products
    or more in hand the diagonal is read off one entry at a time: exact, n products, standard error 0.

    | method | products in fact | good for | vectors of memory |
    |---|---|---|---|
    | "xtrace" | the largest even number | decaying spectra; exact if rank < num_matvecs / 2 | 3.5 num_matvecs |
    | "xnystrace" | all | the same, A positive semidefinite: exact if rank < num_matvecs | 5 num_matvecs |
    | "hutch++" | the largest multiple of 3 | the same, simpler | 3.5 num_matvecs |
    | "hutchinson" | all | flat spectra, nearly diagonal matrices, no memory to spare | 180 |

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        num_matvecs: a ceiling. At least 1 for "hutchinson", 2 for "xtrace" and "xnystrace", 3 for "hutch++"; twice that
            for a finite standard error.
        key: draws the random vectors.
        method: one of the above.
        rtol: a relative standard error that is enough, such as 0.01. The run then takes 16 random vectors, twice as
            many, and so on up to the ceiling, keeps all it has learnt, and ends when stderr <= rtol · |value|. It may
            be traced. Ending when an error looks small makes it a little too small on average; where 2n products are in
            hand, the last resort is exact. Each doubling is compiled, and under `vmap` all of them run.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A scalar estimate. The standard error covers the draw of the vectors. For "xtrace" and "xnystrace" it is a
        jackknife over them, which tends to be too large where the spectrum decays fast. All are rough for fewer than
        ten vectors. Differentiable with respect to the operator's arrays: the derivative of
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
    rtol = as_tolerance("trace", rtol)
    needs_key(key, "trace")
    needs_entries(op, "trace")
    least = _LEAST[method]
    if num_matvecs < min(least, op.size):
        raise ValueError(f'`trace` needs `num_matvecs >= {least}` for method="{method}", got {num_matvecs}.')
    return _trace(op, num_matvecs, key, method, rtol, Packing.of(op.like))


@eqx.filter_jit
@usual_promotion()
def _trace(
    op: Operator, num_matvecs: int, key: PRNGKeyArray, method: str, rtol: Array | None, packing: Packing
) -> Estimate:
    def exact(spent: int) -> Estimate:
        return exactly(jnp.sum(over_columns(op, inner)), spent + op.size)

    return run(Packed(op, packing), num_matvecs, key, _METHODS[method], rtol, exact)


def _forms(op: Operator, keys: Array, known: Array | None) -> Float[Array, " count"]:
    """zᵀAz for vectors of random signs."""
    structure = structure_of(op.like)

    def batch(keys: Array) -> Array:
        probes = jax.vmap(partial(signs, structure=structure))(keys)
        return jax.vmap(inner)(probes, multiply_each(op, probes))

    forms = in_batches(batch, keys)
    return forms if known is None else jnp.concatenate([known, forms])


def _hutchinson(forms: Float[Array, " count"]) -> Estimate:
    """Their mean: variance 2 (‖A‖²_F - Σᵢ Aᵢᵢ²) each, none for a diagonal A."""
    return average(forms, forms.size)


class Halves(eqx.Module):
    """An orthonormal basis of the images of some random vectors, other random vectors, and the images of both."""

    basis: PyTree
    basis_images: PyTree
    probes: PyTree
    images: PyTree


def _halves(op: Operator, keys: Array, known: Halves | None) -> Halves:
    structure = structure_of(op.like)
    pairs = jax.vmap(jax.random.split)(keys)
    first, probes = (jax.vmap(partial(signs, structure=structure))(pairs[:, i]) for i in (0, 1))
    images, fresh = products(op, probes), jax.lax.stop_gradient(products(op, first))
    if known is None:
        basis = orthonormal(fresh)
        return Halves(basis, products(op, basis), probes, images)
    basis = orthonormal(stacked(known.basis, fresh), known.basis)
    basis_images = products(op, jtu.tree_map(lambda leaf: leaf[-keys.shape[0] :], basis))
    return Halves(
        basis, stacked(known.basis_images, basis_images), stacked(known.probes, probes), stacked(known.images, images)
    )


def _hutchplusplus(data: Halves) -> Estimate:
    """The trace on the span of a third of the products, and Hutchinson's estimate on its complement."""
    inside = jnp.trace(gram(data.basis, data.basis_images))
    coordinates = gram(data.basis, data.probes)
    rest = minus(data.probes, combine(data.basis, coordinates))
    samples = jax.vmap(inner)(rest, minus(data.images, combine(data.basis_images, coordinates)))
    return average(inside + samples, 3 * samples.size)


def _xtrace(s: Sketch) -> Estimate:
    """The mean over i of tr QᵢᵀAQᵢ + ωᵢᵀ(I - Pᵢ)A(I - Pᵢ)ωᵢ, where Qᵢ does not know ωᵢ.

    The second term is scaled to its mean over directions: what is left of ωᵢ has the length it should have on average.
    """
    forms = jax.vmap(inner)(s.probes, s.images)
    cross = gram(s.basis, s.images) + gram(s.basis_images, s.probes)
    return scaled(from_left_out(s, forms, cross, gram(s.basis, s.basis_images), 2 * forms.size), s.unit)


_METHODS = {
    "xtrace": Method(partial(sketch, on_long_sphere), _xtrace, 2),
    "xnystrace": Method(images_of_probes, xnystrace, 1),
    "hutch++": Method(_halves, _hutchplusplus, 3),
    "hutchinson": Method(_forms, _hutchinson, 1),
}
_LEAST = {"xtrace": 2, "xnystrace": 2, "hutch++": 3, "hutchinson": 1}
