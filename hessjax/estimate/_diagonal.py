"""`diagonal`: every parameter's own curvature."""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from hessjax._arguments import as_integer, needs_key
from hessjax._vectors import combine, epsilon, gram, matmul, or_one, scalar_dtype, structure_of, usual_promotion
from hessjax.estimate._door import needs_entries, refuse_method
from hessjax.estimate._exact import exact_diagonal
from hessjax.estimate._left_out import jackknife
from hessjax.estimate._probes import BATCH, products, signs
from hessjax.estimate._result import Estimate, average, exactly
from hessjax.estimate._rounds import Method, as_tolerance, run
from hessjax.estimate._sketch import Sketch, minus, sketch
from hessjax.operators._operator import Operator, as_operator
from hessjax.operators._packing import Packed, Packing


class Diagonal(Estimate):
    """An estimate of a diagonal.

    Attributes:
        value: of the operator's structure.
        stderr: likewise.
        num_matvecs: products that were spent.
        sums: the trace of every leaf's diagonal block, with its own standard error: the errors of a leaf's entries are
            not independent, so it does not follow from theirs.
    """

    sums: Estimate


def diagonal(
    op: Operator | Any,
    num_matvecs: Any,
    key: Any,
    *,
    method: str = "xdiag",
    rtol: ArrayLike | None = None,
    like: PyTree | None = None,
) -> Diagonal:
    """Estimates the diagonal of A from at most `num_matvecs` products.

    Both methods are unbiased. With n products or more in hand the diagonal is read off one entry at a time: exact, n
    products, standard error 0.

    "xdiag" takes the diagonal of A's projection on the span of its images of half as many random vectors, and corrects
    it by what the projection leaves out. It spends the largest even number of products, and 4 num_matvecs vectors of
    memory. It is exact if the rank is below num_matvecs / 2, and it suits decaying spectra.

    "hutchinson" averages z ⊙ Az over vectors z of random signs: the variance of entry i is Σⱼ Aᵢⱼ² / num_matvecs over
    j ≠ i, so it suits nearly diagonal matrices, for which it is exact. It spends all products, 32 at a time, and holds
    some 180 vectors.

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        num_matvecs: a ceiling. At least 1 for "hutchinson" and 2 for "xdiag"; twice that for a finite standard error.
        key: draws the random vectors.
        method: "xdiag" or "hutchinson".
        rtol: an error that is enough, relative and of the whole: the run ends where the 2-norm of `stderr` is at most
            rtol times that of `value`, as in `hj.trace`.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A `Diagonal`: value and standard error of every entry, and `.sums` of every leaf. The standard error covers the
        draw of the vectors. For "xdiag" that of an entry is the spread of estimates that are not independent, so a
        rough one; that of a sum is a jackknife, as in `hj.trace`.

    Raises:
        ValueError: `num_matvecs` is too small, `method` is unknown, or the operator has no entries.
        TypeError: `op` is not an operator, `key` no key, or `num_matvecs` no integer.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: {"w": 3 * v["w"], "b": v["b"]}, like={"w": jnp.ones((2, 2)), "b": jnp.ones(2)})
        >>> estimate = hj.diagonal(A, 4, jax.random.key(0), method="hutchinson")
        >>> estimate.value["b"].tolist(), float(estimate.sums.value["w"])
        ([1.0, 1.0], 12.0)

    Source: Epperly, Tropp and Webber, XTrace: making the most of every sample in stochastic trace estimation,
    arXiv:2301.07825, section 5; Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix,
    doi:10.1016/j.apnum.2007.01.003.
    """
    op = as_operator(op, like)
    num_matvecs = as_integer("num_matvecs", num_matvecs)
    refuse_method("diagonal", method, _METHODS)
    rtol = as_tolerance("diagonal", rtol)
    needs_key(key, "diagonal")
    needs_entries(op, "diagonal")
    least = 2 if method == "xdiag" else 1
    if num_matvecs < min(least, op.size):
        raise ValueError(f'`diagonal` needs `num_matvecs >= {least}` for method="{method}", got {num_matvecs}.')
    return _diagonal(op, num_matvecs, key, method, rtol, Packing.of(op.like))


@eqx.filter_jit
@usual_promotion()
def _diagonal(
    op: Operator, num_matvecs: int, key: PRNGKeyArray, method: str, rtol: Array | None, packing: Packing
) -> Diagonal:
    def exact(spent: int) -> Diagonal:
        value = exact_diagonal(op)
        sums = exactly(jtu.tree_map(_total, value), spent + op.size)
        return Diagonal(value, jtu.tree_map(jnp.zeros_like, value), sums.num_matvecs, sums)

    return run(Packed(op, packing), num_matvecs, key, _METHODS[method](packing), rtol, exact)


def _xdiag(packing: Packing) -> Method[Diagonal]:
    return Method(partial(sketch, signs), partial(_left_one_out, packing), 2)


def _left_one_out(packing: Packing, s: Sketch) -> Diagonal:
    """The mean over i of diag(Pᵢ A) + ωᵢ ⊙ (I - Pᵢ) A ωᵢ, where Pᵢ does not know the signs ωᵢ."""
    inside = jtu.tree_map(lambda q, z: jnp.sum(q * z, axis=0), s.basis, s.basis_images)
    direction, image = combine(s.basis, s.left_out), combine(s.basis_images, s.left_out)
    told = gram(s.basis, s.images)
    told = told - s.left_out * jnp.sum(s.left_out * told, axis=0)
    rest = minus(s.images, combine(s.basis, told))
    samples = jtu.tree_map(
        lambda whole, q, z, w, r: s.unit.astype(w.dtype) * (whole - q * z + w * r),
        inside,
        direction,
        image,
        s.probes,
        rest,
    )
    samples, spent = packing.unpack(samples, batch=1), 2 * told.shape[0]
    entries, sums = average(samples, spent), average(_leaf_sums(samples), spent)
    parts = (packing.unpack(block, batch=1) for block in (s.basis, s.basis_images, s.images, s.probes))
    errors = jtu.tree_map(partial(_error_of_sum, s, gram(s.basis, s.images)), *parts)
    return Diagonal(entries.value, entries.stderr, entries.num_matvecs, Estimate(sums.value, errors, sums.num_matvecs))


def _error_of_sum(s: Sketch, told: Array, q: Array, z: Array, y: Array, w: Array) -> Float[Array, ""]:
    """The jackknife's standard error of a leaf's sum: the estimates that leave one vector out are not independent.

    Args:
        s: the sketch.
        told: QᵀAΩ.
        q: the leaf of Q, as all that follow with a leading axis k.
        z: of AQ.
        y: of AΩ.
        w: of Ω.
    """
    out, k = s.left_out, told.shape[0]
    if k == 1:
        return jnp.full((), jnp.inf, told.dtype)
    bent, seen, own = gram(q, z), matmul(out.T, told), gram(q, w)
    whole, inside = jnp.trace(bent), jnp.sum(own * told, axis=0)
    bent, met, angle = matmul(out.T, matmul(bent, out)), matmul(out.T, own), matmul(out.T, out)
    bent_own, seen_own, met_own = map(jnp.diagonal, (bent, seen, met))
    base = whole + jnp.diagonal(gram(w, y)) - inside
    alone = base - bent_own + seen_own * met_own
    # And with the directions i (rows) and j (columns) out of the span; parallel ones are one.
    determinant = 1 - angle**2
    apart = determinant > 64 * jnp.finfo(angle.dtype).eps
    safe = jnp.where(apart, determinant, 1)
    taken = jnp.where(apart, (bent_own[:, None] + bent_own - angle * (bent + bent.T)) / safe, bent_own)
    a = jnp.where(apart, (seen - angle * seen_own) / safe, 0)
    b = jnp.where(apart, (seen_own - angle * seen) / safe, seen_own)
    return s.unit * jackknife(alone, base - taken + a * met + b * met_own, epsilon(s.probes))


def _hutchinson(packing: Packing) -> Method[Diagonal]:
    return Method(partial(_moments, packing), _from_moments, 1)


def _moments(packing: Packing, op: Operator, keys: Array, known: "_Moments | None") -> "_Moments":
    """Those of z ⊙ Az over vectors of random signs, a batch at a time: no sample outlives its batch."""
    structure = structure_of(op.like)
    whole, rest = divmod(keys.shape[0], BATCH)

    def step(so_far: _Moments, keys: Array) -> tuple[_Moments, None]:
        probes = jax.vmap(partial(signs, structure=structure))(keys)
        samples = packing.unpack(jtu.tree_map(jnp.multiply, probes, products(op, probes)), batch=1)
        return so_far.with_batch((samples, _leaf_sums(samples))), None

    if known is None:
        zeros = packing.unpack(_zeros(structure))
        known = _Moments.none((zeros, jtu.tree_map(_total, zeros)))
    if whole:
        known, _ = jax.lax.scan(step, known, keys[: whole * BATCH].reshape(whole, BATCH, *keys.shape[1:]))
    return step(known, keys[whole * BATCH :])[0] if rest else known


def _from_moments(moments: "_Moments") -> Diagonal:
    (value, sums), (error, sums_error) = moments.mean, moments.standard_error()
    spent = moments.count.astype(jnp.int32)
    return Diagonal(value, error, spent, Estimate(sums, sums_error, spent))


def _zeros(structure: PyTree) -> PyTree:
    return jtu.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)


def _leaf_sums(samples: PyTree[Float[Array, "k ..."]]) -> PyTree[Float[Array, " k"]]:
    return jtu.tree_map(jax.vmap(_total), samples)


def _total(leaf: Array) -> Float[Array, ""]:
    """The sum of all entries, of half precision in float32."""
    return jnp.sum(leaf, dtype=scalar_dtype(leaf))


class _Moments(eqx.Module):
    """The mean of the samples so far and the root of their summed squared deviations."""

    count: Float[Array, ""]
    mean: PyTree[Array]
    deviation: PyTree[Array]

    @classmethod
    def none(cls, zeros: PyTree[Array]) -> "_Moments":
        return cls(jnp.zeros(()), zeros, zeros)

    def with_batch(self, samples: PyTree[Array]) -> "_Moments":
        """The moments with the samples of a batch."""
        new = jtu.tree_leaves(samples)[0].shape[0]
        total = self.count + new

        def merge(mean: Array, deviation: Array, leaf: Array) -> tuple[Array, Array]:
            middle = jnp.mean(leaf, axis=0)
            centred = leaf - middle
            peak = jnp.max(jnp.abs(centred), axis=0)
            unit = or_one(peak)
            inside = unit * jnp.sqrt(jnp.sum((centred / unit) ** 2, axis=0))
            shift = middle - mean
            between = jnp.abs(shift) * jnp.sqrt(self.count * new / total)
            spread = jnp.hypot(jnp.hypot(deviation, inside), between)
            return (mean + shift * (new / total)).astype(leaf.dtype), spread.astype(leaf.dtype)

        merged = jtu.tree_map(merge, self.mean, self.deviation, samples)
        mean, deviation = (
            jtu.tree_map(lambda _, pair, i=i: pair[i], self.mean, merged, is_leaf=eqx.is_array) for i in (0, 1)
        )
        return _Moments(total, mean, jax.lax.stop_gradient(deviation))

    def standard_error(self) -> PyTree[Array]:
        """√(Σ deviation² / (count (count - 1))), not below the rounding of the mean; infinite for one sample."""
        root = jnp.sqrt(self.count * jnp.maximum(self.count - 1, 0))

        def error(mean: Array, deviation: Array) -> Array:
            rounding = 4 * jnp.finfo(mean.dtype).eps * jnp.abs(mean)
            return jnp.where(root > 0, jnp.maximum(deviation / root, rounding), jnp.inf).astype(mean.dtype)

        return jax.lax.stop_gradient(jtu.tree_map(error, self.mean, self.deviation))


_METHODS: dict[str, Callable[[Packing], Method[Diagonal]]] = {"xdiag": _xdiag, "hutchinson": _hutchinson}
