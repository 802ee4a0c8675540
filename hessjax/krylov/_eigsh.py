"""`eigsh`: the door to the eigensolvers, with SciPy's words and meanings."""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from hessjax._function import as_integer, check_key
from hessjax._vectors import as_vector, draw, scalar_dtype
from hessjax.krylov._basis import Basis
from hessjax.krylov._dense import dense_eigenpairs
from hessjax.krylov._memory import default_ncv
from hessjax.krylov._projected import neighbour_gaps
from hessjax.krylov._restarted import BROKEN, CERTIFIED, Iteration, Plan, State
from hessjax.operators._operator import Operator, as_operator, quadratic_form
from hessjax.operators._packing import Packed, Packing

WHICH = ("LM", "LA", "SA", "BE")
_DENSE_SIZE = 256  # up to here n products and a dense `eigh` beat an iteration, and cannot miss anything


class Eigenpairs(eqx.Module):
    """k eigenpairs of a symmetric operator, with what is known of their errors.

    Attributes:
        eigenvalues: (k,), ascending.
        eigenvectors: the operator's structure with a leading axis k on every leaf, or None. Orthonormal; the entry of
            largest magnitude is positive. Constants under differentiation.
        residuals: (k,), ‖Av - λv‖, absolute; never reported below the noise of one product.
        converged: (k,). If all are true, these are the pairs that `which` asks for.
        gaps: (k,), the distance from each eigenvalue to the nearest other one that was seen, wanted or not. Where it
            does not exceed the residuals, the eigenvalue may be repeated: see `simple`.
        num_matvecs: products spent, checks included.
    """

    eigenvalues: Float[Array, " k"]
    eigenvectors: PyTree[Float[Array, "k ..."]] | None
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]
    gaps: Float[Array, " k"]
    num_matvecs: Int[Array, ""]

    @property
    def simple(self) -> Bool[Array, " k"]:
        """(k,): which eigenvalues are known to be simple, so that their own derivative exists.

        An eigenvalue's true gap is within its own and its neighbour's residual of the one that was seen; here the gap
        must exceed ten residuals.
        """
        return self.gaps > 10 * jnp.max(self.residuals)


def eigsh(
    op: Operator | Any,
    k: Any = 6,
    key: Any = None,
    *,
    which: str = "LM",
    v0: PyTree | Eigenpairs | None = None,
    ncv: Any = None,
    maxiter: Any = None,
    tol: Any = 0.0,
    return_eigenvectors: bool = True,
    like: PyTree | None = None,
) -> Eigenpairs:
    """The k eigenpairs of a symmetric operator at an end of its spectrum.

    Thick-restart Lanczos with full reorthogonalization, in one compiled loop that stops as soon as the residuals allow.
    Before it stops, a few products on a fresh random direction certify that no wanted eigenvalue was missed, such as
    another copy of a repeated one. Up to n = 256, unless `v0`, `ncv` or `maxiter` is given, it forms the matrix.

    Works inside `jit`, `vmap`, `scan` and `grad`. Derivatives of a simple eigenvalue are ∂λ = vᵀ (∂A) v, in forward and
    reverse mode. Those of a repeated one (`simple` False) depend on the basis of its eigenspace: there only symmetric
    functions of all its copies, such as their sum, are differentiable. Second derivatives are refused. Eigenvectors are
    constants.

    Args:
        op: a symmetric `hj.Operator`, a function with `like=`, or a lineax operator.
        k: the number of eigenpairs, 1 ≤ k ≤ n.
        key: draws the start vector and the certificate's directions. May be None when `v0` is given; the certificate
            then uses a fixed key.
        which: "LM" largest magnitude, "LA" largest, "SA" smallest, "BE" half from each end (one more from the high end
            if k is odd).
        v0: a start vector, or a block of them (a leading axis on every leaf), or an earlier `Eigenpairs` to go on from.
        ncv: the Krylov dimension at which to restart, k < ncv ≤ n. Memory is ncv + 2k + 12 vectors. Default: k + 256 as
            far as an eighth of the device's memory allows, at least max(2k + 1, 20).
        maxiter: restarts, the first fill counted. Default: as many as make 10 n products.
        tol: a pair converges when ‖Av - λv‖ ≤ tol · max(eps^(2/3) ‖A‖, |λ|), but not below the rounding of m products,
            √m eps ‖A‖; 0 asks for what the dtype and the product's noise allow.
        return_eigenvectors: whether to form them.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        `Eigenpairs`. What failed to converge within `maxiter` is returned with `converged` False; a product that is not
        finite ends the iteration, with `converged` False throughout.

    Raises:
        ValueError: `k`, `ncv`, `maxiter`, `tol` or `which` is out of range, neither `key` nor `v0` came, or `v0` has
            another structure than the operator.
        TypeError: `op` is not an operator, or `k`, `ncv` or `maxiter` is not an integer.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.arange(100.0) * v, like=jnp.zeros(100))
        >>> [round(float(x), 3) for x in hj.eigsh(A, 3, jax.random.key(0), which="LA").eigenvalues]
        [97.0, 98.0, 99.0]

    Source: Wu and Simon, Thick-restart Lanczos method for large symmetric eigenvalue problems,
    doi:10.1137/S0895479898334605; the certificate is explained in `hessjax/krylov/_certificate.py`.
    """
    op = as_operator(op, like)
    n = op.size
    k = as_integer("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"`eigsh` needs 1 <= `k` <= {n}, the operator's size, got {k}.")
    if which not in WHICH:
        raise ValueError(f"`which` must be one of {', '.join(WHICH)}, got {which!r}.")
    tol = _tolerance(tol, op)
    if maxiter is not None and (maxiter := as_integer("maxiter", maxiter)) < 1:
        raise ValueError(f"`maxiter` must be at least 1, got {maxiter}.")
    if ncv is not None and not (k < (ncv := as_integer("ncv", ncv)) <= n or k == ncv == n):
        raise ValueError(f"`ncv` must be above `k` = {k} and at most {n}, the operator's size, got {ncv}.")
    check_key(key, "eigsh")
    start = _start_block(op, key, v0)
    if n <= _DENSE_SIZE and start is None and ncv is None and maxiter is None:
        plan = None
    else:
        ncv = default_ncv(op.structure, k) if ncv is None else ncv
        maxiter = max(10, -(-10 * n // ncv)) if maxiter is None else maxiter
        plan = Plan(which, k, ncv, maxiter, random_start=start is None)
    return _solve(op, start, key, tol, which, k, plan, Packing.of(op.like), return_eigenvectors)


def _tolerance(tol: Any, op: Operator) -> Float[Array, ""]:
    """`tol` as an array, so that a new one compiles nothing; put on the device explicitly, for transfer guards."""
    if not eqx.is_array_like(tol) or jnp.ndim(tol) != 0 or jnp.iscomplexobj(tol):
        raise ValueError(f"`tol` must be a number, got {tol!r}.")
    if isinstance(tol, Tracer):
        return tol.astype(scalar_dtype(op.structure))
    if not 0 <= float(tol) < math.inf:
        raise ValueError(f"`tol` must be a finite number of at least 0, got {tol}. 0 asks for what the dtype allows.")
    return jax.device_put(np.asarray(tol, scalar_dtype(op.structure)))


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
        if length == 0 or length > op.size:
            raise ValueError(f"`v0` must hold between 1 and {op.size} vectors on its leading axis, got {length}.")
        return as_vector(v0, block, "v0")
    return jtu.tree_map(lambda leaf: leaf[None], as_vector(v0, structure, "v0"))


@eqx.filter_jit
def _solve(
    op: Operator,
    start: PyTree | None,
    key: PRNGKeyArray | None,
    tol: Float[Array, ""],
    which: str,
    k: int,
    plan: Plan | None,
    packing: Packing,
    return_eigenvectors: bool,
) -> Eigenpairs:
    frozen, start = lax.stop_gradient(eqx.filter(op, eqx.is_array)), lax.stop_gradient(start)
    fixed = eqx.combine(frozen, eqx.filter(op, eqx.is_array, inverse=True))
    tol = lax.stop_gradient(tol)
    if plan is None:
        values, vectors, residuals, converged, gaps, num_matvecs = dense_eigenpairs(fixed, which, k, tol)
        vectors = _fix_signs(vectors)
    else:
        key = jax.random.key(0) if key is None else key
        packed = Packed(fixed, packing)
        if start is None:
            block = jtu.tree_map(lambda leaf: leaf[None], draw(jax.random.fold_in(key, 0), packed.structure))
        else:
            block = packing.pack(start, batch=1)
        iteration = Iteration(packed, plan, tol, key)
        values, vectors, residuals, converged, gaps, num_matvecs = _finish(iteration, *iteration.run(block))
        vectors = packing.unpack(_fix_signs(vectors), batch=1)
    values = _differentiable(op, values, vectors)
    return Eigenpairs(values, vectors if return_eigenvectors else None, residuals, converged, gaps, num_matvecs)


def _finish(iteration: Iteration, basis: Basis, state: State) -> tuple[Array, PyTree, Array, Array, Array, Array]:
    """The wanted Ritz pairs of a state, and which of them may be called converged."""
    verdict, ritz = iteration.judge(state), state.ritz
    wanted = verdict.wanted
    exist = ritz.live[wanted] & (state.status != BROKEN)
    values = jnp.where(ritz.live[wanted], ritz.values[wanted], jnp.nan)
    vectors = basis.combine(ritz.vectors[:, wanted], state.live)
    good = exist & (verdict.residuals <= verdict.bounds)
    # Without a certificate all k may be eigenpairs and yet not the wanted ones: the outermost is then in doubt.
    edge = state.order[iteration.plan.k - 1]
    doubt = (state.status != CERTIFIED) & jnp.all(good) & (wanted == edge)
    gaps = neighbour_gaps(ritz.values, ritz.live)[wanted]
    return values, vectors, verdict.residuals, good & ~doubt, gaps, state.num_matvecs


def _fix_signs(vectors: PyTree[Float[Array, "k ..."]]) -> PyTree[Float[Array, "k ..."]]:
    """Makes the entry of largest magnitude of every vector positive."""
    leaves, treedef = jtu.tree_flatten(vectors)
    peaks, signs = [], []
    for leaf in leaves:
        if leaf.size == 0:
            continue
        flat = leaf.reshape(leaf.shape[0], -1)
        at = jnp.argmax(jnp.abs(flat), axis=1)
        value = jnp.take_along_axis(flat, at[:, None], axis=1)[:, 0]
        peaks.append(jnp.abs(value))
        signs.append(jnp.where(value < 0, -1, 1))
    best = jnp.argmax(jnp.stack(peaks), axis=0)
    sign = jnp.take_along_axis(jnp.stack(signs), best[None], axis=0)[0]
    return treedef.unflatten(
        [(leaf * sign.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)).astype(leaf.dtype) for leaf in leaves]
    )


@eqx.filter_custom_jvp
def _differentiable(_op: Operator, values: Float[Array, " k"], _vectors: PyTree) -> Float[Array, " k"]:
    """`values`, with the derivative ∂λ = vᵀ (∂A) v with respect to the operator's arrays."""
    return values


@_differentiable.def_jvp
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
