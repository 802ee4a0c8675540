"""`eigsh`: the door to the eigensolvers, with SciPy's words and meanings."""

import dataclasses
import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from hessjax._arguments import as_integer, check_key
from hessjax._vectors import as_vector, draw, scalar_dtype, usual_promotion
from hessjax.krylov._basis import Basis
from hessjax.krylov._dense import dense_eigenpairs
from hessjax.krylov._derivative import differentiable
from hessjax.krylov._eigenpairs import Eigenpairs, fix_signs
from hessjax.krylov._interior import nearest_eigenpairs
from hessjax.krylov._memory import default_ncv, storage_name
from hessjax.krylov._noise import NOISE_PRODUCTS, product_noise
from hessjax.krylov._projected import WHICH, isolation, neighbour_gaps
from hessjax.krylov._restarted import Iteration
from hessjax.krylov._state import BROKEN, CERTIFIED, Plan, State
from hessjax.operators._operator import Operator, as_operator
from hessjax.operators._packing import Packed, Packing

_DENSE_SIZE = 256  # up to here n products and a dense `eigh` beat an iteration, and cannot miss anything
_DENSE_INTERIOR_SIZE = 2048  # inside the spectrum an iteration seldom needs fewer than n products
_STAGES = 10  # of a solve inside the spectrum


def eigsh(
    op: Operator | Any,
    k: Any = 6,
    key: Any = None,
    *,
    which: str = "LM",
    sigma: Any = None,
    v0: PyTree | Eigenpairs | None = None,
    ncv: Any = None,
    maxiter: Any = None,
    tol: Any = 0.0,
    return_eigenvectors: bool = True,
    like: PyTree | None = None,
    memory_limit: Any = None,
    basis_dtype: Any = None,
    measure_noise: bool = False,
) -> Eigenpairs:
    """The k eigenpairs of a symmetric operator at an end of its spectrum, or nearest to a point inside it.

    Thick-restart Lanczos with full reorthogonalization, in one compiled loop that stops as soon as the residuals allow.
    Before it stops, a few products on a fresh random direction certify that no wanted eigenvalue was missed, such as
    another copy of a repeated one. Up to n = 256, unless `v0`, `ncv` or `maxiter` is given, it forms the matrix.

    Nearest to `sigma` (and for "SM", nearest to 0) it forms the matrix up to n = 2048. Beyond, the same iteration runs
    on a polynomial of A; that costs about ‖A - σ‖ / d products per digit, d being the distance from σ to the wanted
    eigenvalues, and often thousands. Without a factorization there is no cheap way inside a spectrum.

    Works inside `jit`, `vmap`, `scan` and `grad`, with derivatives of every order. That of a simple eigenvalue is
    ∂λ = vᵀ (∂A) v. That of an eigenvector, and with it a second one of an eigenvalue, takes a solve by conjugate
    gradients for each of the k pairs (inside the spectrum with the square of A - λ, which may take very long), and is
    no better than residual / gap. Copies of a repeated eigenvalue (`simple` False) depend on the basis of its
    eigenspace: only symmetric functions of all of them, such as their sum or the projector onto them, are
    differentiable, and only once. Second derivatives are NaN where any of the k is a copy of another, and those of
    vectors where k leaves a copy out.

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        k: the number of eigenpairs, 1 ≤ k ≤ n.
        key: draws the start vector and the certificate's directions. May be None when `v0` is given; the certificate
            then uses a fixed key.
        which: "LM" largest magnitude, "LA" largest, "SA" smallest, "BE" half from each end (one more from the high end
            if k is odd), "SM" smallest magnitude.
        sigma: a real number, with `which="LM"` alone: the k eigenvalues nearest to it.
        v0: a start vector, or a block of them (a leading axis on every leaf), or an earlier `Eigenpairs` to go on from.
        ncv: the Krylov dimension at which to restart, k < ncv ≤ n. Memory is ncv + 2k + 12 vectors, beside what a
            product needs: see `hj.memory_estimate`. Default: k + 256 as far as `memory_limit` allows, at least
            max(2k + 1, 20); for LA and LM what 8 MB hold, or 2k + 20 or 5k if that is more.
        maxiter: restarts, the first fill counted. Default: as many as make 10 n products; inside the spectrum and above
            n = 2048 ten stages, which on a spectrum over many magnitudes are up to 1000 n products.
        tol: a pair converges when ‖Av - λv‖ ≤ tol · max(eps^(2/3) ‖A‖, |λ|), but not below the rounding of m products
            and of inner products of n terms, max(√m, √n / 32) eps ‖A‖; 0 asks for what the dtype and the product's
            noise allow. A positive one below the noise is not reached: the iteration stops there, `residuals` stand
            at `noise`, and `converged` is False.
        return_eigenvectors: whether to form them.
        like: a pytree shaped as the vectors, when `op` is a plain function.
        memory_limit: bytes that the default `ncv` may use; an eighth of the device's memory if None.
        basis_dtype: keep the basis in a narrower dtype, such as "bfloat16". Its rounding unit takes the place of the
            vectors' own in all that is said of accuracy: residuals reach 0.05 ‖A‖ in bfloat16, 1e-6 ‖A‖ in float32.
        measure_noise: spend 3 products on measuring how far the product is from a deterministic and symmetric one,
            rather than rely on what shows in the iteration. A residual is never reported below the noise, so that
            what drowns in it is not called converged.

    Returns:
        `Eigenpairs`. What failed to converge within `maxiter` is returned with `converged` False; a product that is not
        finite ends the iteration, with `converged` False throughout.

    Raises:
        ValueError: `k`, `ncv`, `maxiter`, `tol` or `which` is out of range, `sigma` came with another `which` than
            "LM", neither `key` nor `v0` came, `v0` has another structure than the operator, or `memory_limit` does not
            hold the smallest basis.
        TypeError: `op` is not an operator, or `k`, `ncv`, `maxiter` or `memory_limit` is not an integer, or
            `basis_dtype` no floating-point dtype.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.arange(100.0) * v, like=jnp.zeros(100))
        >>> [round(float(x), 3) for x in hj.eigsh(A, 3, jax.random.key(0), which="LA").eigenvalues]
        [97.0, 98.0, 99.0]

    Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
    doi:10.1137/S0895479898334605. The algorithm is explained in `hessjax/krylov/README.md`.
    """
    op = as_operator(op, like)
    n = op.size
    k = as_integer("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"`eigsh` needs 1 <= `k` <= {n}, the operator's size, got {k}.")
    if which not in WHICH:
        raise ValueError(f"`which` must be one of {', '.join(WHICH)}, got {which!r}.")
    if sigma is not None:
        if which != "LM":
            raise ValueError(f'`sigma` goes with `which="LM"`, as nearest to it, got {which!r}.')
        which = "SM"
    sigma = _number("sigma", 0.0 if sigma is None else sigma, op, "a finite number.")
    tol = _number("tol", tol, op, "a finite number of at least 0. 0 asks for what the dtype allows.", least=0.0)
    if maxiter is not None and (maxiter := as_integer("maxiter", maxiter)) < 1:
        raise ValueError(f"`maxiter` must be at least 1, got {maxiter}.")
    if ncv is not None and not (k < (ncv := as_integer("ncv", ncv)) <= n or k == ncv == n):
        raise ValueError(f"`ncv` must be above `k` = {k} and at most {n}, the operator's size, got {ncv}.")
    if memory_limit is not None and (memory_limit := as_integer("memory_limit", memory_limit)) < 1:
        raise ValueError(f"`memory_limit` must be a positive number of bytes, got {memory_limit}.")
    storage = storage_name(basis_dtype, op.structure)
    check_key(key, "eigsh")
    start = _start_block(op, key, v0)
    if n <= (_DENSE_INTERIOR_SIZE if which == "SM" else _DENSE_SIZE if start is ncv is maxiter is None else 0):
        plan = None
    else:
        ncv = default_ncv(op.structure, k, which, memory_limit, storage) if ncv is None else ncv
        if maxiter is None:
            maxiter = _STAGES if which == "SM" else max(10, -(-10 * n // ncv))
        plan = Plan(which, k, ncv, maxiter, random_start=start is None, storage=storage)
    packing = Packing.of(op.like)
    return _solve(op, start, key, tol, sigma, which, k, plan, packing, bool(measure_noise), return_eigenvectors)


def _number(name: str, value: Any, op: Operator, needed: str, least: float = -math.inf) -> Float[Array, ""]:
    """`value` as an array, so that a new one compiles nothing; put on the device explicitly, for transfer guards."""
    if not eqx.is_array_like(value) or jnp.ndim(value) != 0 or jnp.iscomplexobj(value):
        raise ValueError(f"`{name}` must be {needed} Got {value!r}.")
    if isinstance(value, Tracer):
        return value.astype(scalar_dtype(op.structure))
    dtype = scalar_dtype(op.structure)
    with np.errstate(over="ignore"):
        number = np.asarray(value, dtype)
    if not (least <= float(number) < math.inf and float(number) > -math.inf):
        raise ValueError(f"`{name}` must be {needed} Got {value}, in {np.dtype(dtype)} {number}.")
    return jax.device_put(number)


def _start_block(op: Operator, key: PRNGKeyArray | None, v0: PyTree | Eigenpairs | None) -> PyTree | None:
    """`v0` as a block of vectors, or None if it is to be drawn."""
    if v0 is None:
        if key is None:
            raise ValueError("`eigsh` needs a `key`, such as `jax.random.key(0)`, or a start vector `v0`.")
        return None
    if isinstance(v0, Eigenpairs):
        if v0.eigenvectors is None:
            raise ValueError("`v0` has no eigenvectors: it was computed with `return_eigenvectors=False`.")
        v0 = v0.eigenvectors
    structure = op.structure
    first = next(iter(jtu.tree_leaves(v0)), None)
    spec = next(iter(jtu.tree_leaves(structure)), None)
    if first is not None and spec is not None and jnp.ndim(first) == len(spec.shape) + 1:
        length = jnp.shape(first)[0]
        block = jtu.tree_map(lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape), leaf.dtype), structure)
        if jnp.shape(first)[1:] != spec.shape == jnp.shape(first)[:-1]:
            raise ValueError(
                f"`v0` must have its vectors on the leading axis, got {jnp.shape(first)} for vectors of {spec.shape}: "
                "SciPy's columns are the rows of `v0.T`."
            )
        if length == 0 or length > op.size:
            raise ValueError(f"`v0` must hold between 1 and {op.size} vectors on its leading axis, got {length}.")
        return as_vector(v0, block, "v0")
    return jtu.tree_map(lambda leaf: leaf[None], as_vector(v0, structure, "v0"))


@eqx.filter_jit
@usual_promotion()
def _solve(
    op: Operator,
    start: PyTree | None,
    key: PRNGKeyArray | None,
    tol: Float[Array, ""],
    sigma: Float[Array, ""],
    which: str,
    k: int,
    plan: Plan | None,
    packing: Packing,
    measure_noise: bool,
    return_eigenvectors: bool,
) -> Eigenpairs:
    frozen, start = lax.stop_gradient(eqx.filter(op, eqx.is_array)), lax.stop_gradient(start)
    fixed = eqx.combine(frozen, eqx.filter(op, eqx.is_array, inverse=True))
    tol, sigma = lax.stop_gradient((tol, sigma))
    key = jax.random.key(0) if key is None else key
    packed = Packed(fixed, packing)
    floor, spent = jnp.zeros((), scalar_dtype(packed.structure)), 0
    if measure_noise:
        floor, spent = product_noise(packed, jax.random.fold_in(key, 2**32 - 1)), NOISE_PRODUCTS
    if plan is None:
        pairs = dense_eigenpairs(fixed, which, sigma, k, tol, floor, spent)
        vectors = fix_signs(pairs.eigenvectors)
    else:
        if start is None:
            block = jtu.tree_map(lambda leaf: leaf[None], draw(jax.random.fold_in(key, 0), packed.structure))
        else:
            block = packing.pack(start, batch=1)
        if which == "SM":
            pairs = nearest_eigenpairs(packed, sigma, plan, tol, key, block, floor, spent)
        else:
            iteration = Iteration(packed, plan, tol, key, floor)
            pairs = _finish(iteration, *iteration.run(block, spent))
        vectors = packing.unpack(fix_signs(pairs.eigenvectors), batch=1)
    values, vectors = differentiable(op, pairs.eigenvalues, vectors, pairs.residuals, which)
    return dataclasses.replace(pairs, eigenvalues=values, eigenvectors=vectors if return_eigenvectors else None)


def _finish(iteration: Iteration, basis: Basis, state: State) -> Eigenpairs:
    """The wanted Ritz pairs of a state, and which of them may be called converged."""
    verdict, ritz = iteration.judge(state), state.ritz
    wanted = verdict.wanted
    exist = ritz.live[wanted] & (state.status != BROKEN)
    values = jnp.where(ritz.live[wanted], ritz.values[wanted], jnp.nan)
    vectors = basis.combine(ritz.vectors[:, wanted], state.live)
    good = exist & (verdict.residuals <= verdict.bounds)
    # Without a certificate all k may be eigenpairs and yet not the wanted ones: the outermost is then in doubt.
    edge = state.order[iteration.plan.k - 1]
    certified = (state.status == CERTIFIED) & verdict.decisive & jnp.all(good)
    doubt = ~certified & jnp.all(good) & (wanted == edge)
    apart = isolation(values, verdict.residuals, verdict.thresholds)
    return Eigenpairs(
        values,
        vectors,
        verdict.residuals,
        good & ~doubt,
        neighbour_gaps(ritz.values, ritz.live)[wanted],
        jnp.where(certified, apart, 0),
        iteration.noise(state),
        state.num_matvecs,
    )
