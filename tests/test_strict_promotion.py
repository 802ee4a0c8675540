"""Everything runs where the caller told JAX to be strict about shapes and dtypes, and gives the same numbers."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

N = 40


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def matrix(scale=1.0, n=N):
    diagonal = jnp.linspace(-1.0, 3.0, n)
    like = {"a": jnp.ones(n), "b": jnp.ones((2, 3))}
    return hj.operator(lambda v: {"a": scale * diagonal * v["a"], "b": 2.0 * scale * v["b"]}, like)


def ones(op):
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), op.structure)


def tracked(key):
    def loss(w, x):
        return jnp.sum((w * x) ** 4) / 12

    w, x = jnp.ones(5), jnp.arange(1.0, 6.0)
    tracker = hj.track_curvature(loss, 2, key, history=2)
    state = tracker.init(w)
    for _ in range(2):
        _, state = tracker.update(w, state, w, batch=(x,))
    return state.eigenvalues


def of_density(key):
    density = hj.spectral_density(matrix(), key, num_probes=3, num_steps=15)
    grid = jnp.linspace(-1.0, 3.0, 7)
    numbers = density.pdf(grid), density.cdf(grid), density.count(0.0, 1.0), density.moment(2), density.log_pdf(grid)
    return [number.value for number in (*numbers, density.quantile(0.5))]


CASES = {
    "dense": lambda key: hj.eigsh(matrix(), 3, key, which="LA").eigenvalues,
    "iterated": lambda key: hj.eigsh(matrix(n=300), 3, key, which="BE", tol=1e-3).eigenvalues,
    "inside": lambda key: hj.eigsh(matrix(), 3, key, sigma=0.5).eigenvalues,
    "gradient": lambda key: jax.grad(lambda s: hj.eigsh(matrix(s), 1, key, which="LA").eigenvalues[0])(2.0),
    "lanczos": lambda key: hj.lanczos(matrix(), 10, key).ritz()[0],
    "trace": lambda key: hj.trace(matrix(), 20, key).value,
    "diagonal": lambda key: hj.diagonal(matrix(), 20, key).value,
    "norm": lambda key: hj.frobenius_norm(matrix(), 20, key).value,
    "logdet": lambda key: hj.logdet(matrix().shift(3.0), 40, key).value,
    "density": of_density,
    "applied": lambda key: hj.apply_function(jnp.exp, matrix(), ones(matrix()), 10).value,
    "deflated": lambda key: hj.deflate(matrix(), hj.eigsh(matrix(), 2, key)) @ ones(matrix()),
    "tracker": tracked,
}


@pytest.mark.parametrize("case", CASES)
def test_strict_promotion_changes_nothing(case, key):
    expected = CASES[case](key)
    with strict():
        got = CASES[case](key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
