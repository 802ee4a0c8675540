"""Other eigensolvers in JAX and SciPy, each called as its documentation says and at its smallest sufficient settings.

In: a `Case`. Out: for each rival, one `Attempt` after another, the cheapest that should reach the tolerance first and
then more careful ones. An `Unavailable` says why a rival cannot take part; none of them is a dependency. An attempt
holds a whole compiled program, from a start vector to k eigenpairs, on a product whose arrays are its arguments.
"""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree
from scipy.sparse.linalg import ArpackNoConvergence
from scipy.sparse.linalg import eigsh as scipy_eigsh

import hessjax as hj
from benchmarks._cases import MOST_STEPS, Answer, Case, start_vector, wanted
from benchmarks._harness import CountedProduct

PATIENCE = 3  # attempts, should the tolerance be missed by a hair

Solver = Callable[[hj.Model, PyTree], tuple[Array, PyTree]]


class Unavailable(Exception):
    """A rival cannot take part, for the reason given."""


class Attempt(NamedTuple):
    """A solver at its settings: `solve(i)` runs it from start i, which is timed; `read` unpacks what that returned."""

    settings: dict[str, Any]
    solve: Callable[[int], Any]
    read: Callable[[Any], Answer]


def with_scipy(case: Case) -> Iterator[Attempt]:
    """ARPACK with its default `ncv`, over a jitted product on flat NumPy vectors."""
    matrix = hj.as_scipy(case.model.hessian())
    n, (which, k, tol) = matrix.shape[0], case.problem
    ncv = min(n, max(2 * k + 1, 20))
    starts = [np.asarray(ravel_pytree(start_vector(case.model, key))[0]) for key in case.keys]

    def solve(index: int) -> tuple[np.ndarray, np.ndarray, int]:
        product = CountedProduct(matrix)
        tolerance: Any = tol
        restarts = max(case.budget // (ncv - k), 1)
        try:
            values, vectors = scipy_eigsh(product, k, which=which, tol=tolerance, v0=starts[index], maxiter=restarts)
        except ArpackNoConvergence as error:
            values, vectors = error.eigenvalues, error.eigenvectors
        return values, vectors, product.calls

    unravel = ravel_pytree(case.model.params)[1]
    yield Attempt({"ncv": ncv}, solve, lambda out: Answer(out[0], jax.vmap(unravel)(jnp.asarray(out[1]).T), out[2]))


def with_matfree(case: Case) -> Iterator[Attempt]:
    """Full reorthogonalization in matfree's tridiagonalisation, `eigh` of that, and the k wanted Ritz vectors."""
    decomp = _load("matfree.decomp")

    def build(depth: int) -> Solver:
        tridiagonalise = decomp.tridiag_sym(depth, reortho="full")

        def solve(model: hj.Model, start: PyTree) -> tuple[Array, PyTree]:
            found = tridiagonalise(lambda v: case.product(model, v), start)
            values, vectors = jnp.linalg.eigh(found.J_small)
            index = wanted(values, case.problem)
            return values[index], jtu.tree_map(lambda q: jnp.tensordot(vectors[:, index].T, q, 1), found.Q_tall)

        return solve

    return _single_fills(case, build)


def with_furax(case: Case) -> Iterator[Attempt]:
    """Thick-restart Lanczos in furax, its basis just large enough: a restart would cost more products."""
    operators, linalg = _load("furax"), _load("furax.linalg")
    which, k, tol = case.problem

    def build(depth: int) -> Solver:
        def solve(model: hj.Model, start: PyTree) -> tuple[Array, PyTree]:
            matrix = operators.asoperator(lambda v: case.product(model, v), in_structure=jax.eval_shape(lambda: start))
            found = linalg.lanczos_tr(matrix, start, k=k, m=depth, which=which, tol=tol, max_restarts=0)
            return found.eigenvalues, found.eigenvectors

        return solve

    return _single_fills(case, build)


def with_lobpcg(case: Case) -> Iterator[Attempt]:
    """`lobpcg_standard` from k normal columns; it multiplies k columns at first and 4 k in every iteration.

    It stops once all ‖Av - λv‖ < tol · 10 n (λ + ‖Av‖), which is 20 n tol |λ| near an eigenpair: the tolerance over
    20 n makes it stop at the first iteration that reaches what is asked.
    """
    lobpcg_standard = _load("jax.experimental.sparse.linalg").lobpcg_standard
    which, k, tol = case.problem
    if which not in ("LA", "SA"):
        raise Unavailable("finds the largest eigenvalues only")
    sign = 1 if which == "LA" else -1
    flat, unravel = ravel_pytree(case.model.params)
    starts = [jax.random.normal(key, (flat.size, k), flat.dtype) for key in case.keys]
    iterations = max((case.budget // k - 1) // 4, 1)

    @jax.jit
    def solve(model: hj.Model, start: Array, threshold: Array) -> tuple[Array, Array, Array]:
        def column(flat: Array) -> Array:
            return sign * ravel_pytree(case.product(model, unravel(flat)))[0]

        return lobpcg_standard(jax.vmap(column, 1, 1), start, iterations, threshold)

    def read(out: tuple[Array, Array, Array]) -> Answer:
        # Its values of ±A descend.
        values, vectors, spent = out
        return Answer(sign * values[::-sign], jax.vmap(unravel)(vectors.T[::-sign]), k * (1 + 4 * int(spent)))

    for attempt in range(PATIENCE):
        threshold = 0.9**attempt * tol / (20 * flat.size)
        yield Attempt({"m": iterations, "tol": threshold}, partial(_from_start, solve, case, starts, threshold), read)


def _load(module: str) -> Any:
    """An optional package's module.

    Raises:
        Unavailable: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error


def _single_fills(case: Case, build: Callable[[int], Solver]) -> Iterator[Attempt]:
    """A Lanczos iteration without restarts, at the sufficient depth and a little more."""
    if case.depth is None:
        raise Unavailable(f"does not reach the tolerance with {MOST_STEPS} basis vectors")
    starts = [start_vector(case.model, key) for key in case.keys]
    for depth in range(case.depth, case.depth + PATIENCE):
        solve = jax.jit(build(depth))
        read = partial(_with_products, depth)
        yield Attempt({"depth": depth}, partial(_from_start, solve, case, starts), read)


def _from_start(solve: Callable[..., Any], case: Case, starts: list[Any], *rest: Any) -> Any:
    *arguments, index = rest
    return solve(case.model, starts[index], *arguments)


def _with_products(products: int, out: tuple[Array, PyTree]) -> Answer:
    return Answer(*out, products)


RIVALS: dict[str, Callable[[Case], Iterator[Attempt]]] = {
    "scipy": with_scipy,
    "matfree": with_matfree,
    "furax": with_furax,
    "lobpcg": with_lobpcg,
}
