"""What a benchmark asks of eigensolvers, and what their answers are worth.

In: a model and a `Problem`. Out: start vectors, the product as it is commonly written, the Krylov dimension that
suffices, and for an `Answer` its true residuals and how it compares with another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree
from scipy.linalg import eigh_tridiagonal

import hessjax as hj

MOST_STEPS = 512  # basis vectors that a Lanczos iteration without restarts may keep

Product = Callable[[hj.Model, PyTree], PyTree]


class Problem(NamedTuple):
    """Which eigenpairs are asked for, and how precisely."""

    which: str
    k: int
    tol: float


class Case(NamedTuple):
    """What all rivals get.

    Attributes:
        model: its Hessian is decomposed.
        product: `(model, v) -> Hv`, as the rivals written in JAX call it.
        problem: see `Problem`.
        keys: one per call; the start vector of every rival but ours follows from it.
        depth: the Krylov dimension that suffices from every start, None if `MOST_STEPS` do not; see `sufficient_depth`.
        scale: ‖A‖, as far as it is known.
        budget: about as many products a rival may spend on one call.
    """

    model: hj.Model
    product: Product
    problem: Problem
    keys: list[PRNGKeyArray]
    depth: int | None
    scale: float
    budget: int


class Answer(NamedTuple):
    """What a call returned: k values, k vectors on the leading axis of every leaf, and the products spent."""

    values: Array
    vectors: PyTree
    products: Int[Array, ""] | int


def plain_product(model: hj.Model, vector: PyTree) -> PyTree:
    """Hv as it is commonly written, forward over reverse."""

    def mean_loss(params: PyTree) -> Array:
        inputs, targets = model.data
        forward = model.forward if model.batched else jax.vmap(model.forward, (None, 0))
        return jnp.mean(jax.vmap(model.loss)(forward(params, inputs), targets))

    return jax.jvp(jax.grad(mean_loss), (model.params,), (vector,))[1]


def own_product(model: hj.Model, vector: PyTree) -> PyTree:
    """Hv by the operator that hessjax makes of the model."""
    return model.hessian() @ vector


def start_vector(model: hj.Model, key: PRNGKeyArray) -> PyTree:
    """A standard normal vector."""
    flat, unravel = ravel_pytree(model.params)
    return unravel(jax.random.normal(key, flat.shape, flat.dtype))


def wanted(values: Float[Any, " m"], problem: Problem) -> Int[Array, " k"]:
    """Indices of the values asked for, in ascending order of the values, which ascend."""
    order = {"LA": -values, "SA": values, "LM": -abs(values), "SM": abs(values)}[problem.which]
    return jnp.sort(jnp.argsort(jnp.asarray(order))[: problem.k])


def promise(values: np.ndarray, tol: float, scale: float) -> np.ndarray:
    """The residual that `tol` allows each value; `scale` is ‖A‖."""
    return tol * np.maximum(float(jnp.finfo(jnp.float32).eps) ** (2 / 3) * scale, np.abs(values))


def sufficient_depth(
    model: hj.Model, problem: Problem, keys: list[PRNGKeyArray], limit: int = MOST_STEPS
) -> tuple[int | None, float]:
    """The smallest Krylov dimension from which k wanted Ritz pairs are within the tolerance, for every start.

    Any Lanczos iteration with full reorthogonalization reaches the same; this one is `hj.lanczos`, doubled until it
    suffices. The second result is ‖A‖, as the largest Ritz value.
    """
    hessian, depth, scale = model.hessian(), 0, 0.0
    for key in keys:
        steps, found = 32, None
        while found is None and steps <= min(limit, hessian.size):
            run = hj.lanczos(hessian, steps, None, v0=start_vector(model, key))
            diagonal, beyond = np.asarray(run.diagonal), np.append(run.off_diagonal, run.residual_norm)
            scale = max(scale, float(np.abs(eigh_tridiagonal(diagonal, beyond[:-1])[0]).max()))
            enough = (
                m
                for m in range(problem.k + 1, steps + 1)
                if _suffices(diagonal[:m], beyond[: m - 1], beyond[m - 1], problem, scale)
            )
            found, steps = next(enough, None), 2 * steps
        if found is None:
            return None, scale
        depth = max(depth, found)
    return depth, scale


def _suffices(diagonal: np.ndarray, off_diagonal: np.ndarray, beyond: float, problem: Problem, scale: float) -> bool:
    values, vectors = eigh_tridiagonal(diagonal, off_diagonal)
    index = np.asarray(wanted(values, problem))
    return bool(np.all(beyond * np.abs(vectors[-1, index]) <= promise(values[index], problem.tol, scale)))


def residual_ratio(model: hj.Model, answer: Answer, problem: Problem, scale: float) -> float | None:
    """The largest ‖Av - λv‖ / ‖v‖ over what `promise` allows, by a product; None if pairs are missing."""
    values = np.asarray(answer.values)
    if len(values) < problem.k:
        return None
    residuals = np.asarray(_residuals(model, jnp.asarray(values), answer.vectors))
    return float((residuals / promise(values, problem.tol, scale)).max())


@eqx.filter_jit
def _residuals(model: hj.Model, values: Float[Array, " k"], vectors: PyTree) -> Float[Array, " k"]:
    def one(pair: tuple[Array, PyTree]) -> Array:
        value, vector = pair
        flat = ravel_pytree(vector)[0]
        return jnp.linalg.norm(ravel_pytree(plain_product(model, vector))[0] - value * flat) / jnp.linalg.norm(flat)

    # All at once rather than in a loop, in which convolutions are slow.
    return jax.vmap(one)((values, vectors))


def shortfall(mine: Answer, other: Answer, problem: Problem) -> float | None:
    """How far values fall short of another answer's, relative to the largest: large if one was missed, else tiny."""
    if len(mine.values) != len(other.values):
        return None
    size = {"LA": lambda x: x, "SA": lambda x: -x, "LM": abs, "SM": lambda x: -abs(x)}[problem.which]
    ours, theirs = (np.sort(size(np.asarray(answer.values))) for answer in (mine, other))
    return max(float((theirs - ours).max() / np.abs(theirs).max()), 0.0)
