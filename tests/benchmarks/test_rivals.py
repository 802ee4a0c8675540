import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import eigh

import hessjax as hj
from benchmarks._cases import (
    Answer,
    Case,
    Problem,
    plain_product,
    residual_ratio,
    shortfall,
    start_vector,
    sufficient_depth,
)
from benchmarks._rivals import RIVALS, Unavailable

pytestmark = pytest.mark.slow  # minutes on two cores

DIAGONAL = np.concatenate([[-9.0, -7.0, -4.0], np.linspace(-1, 1, 60), [3.0, 5.0, 8.0]]).astype(np.float32)


@pytest.fixture
def model():
    """A quadratic whose Hessian is diagonal: example i sees parameter i alone."""
    inputs = jnp.diag(jnp.sqrt(DIAGONAL.size * jnp.abs(DIAGONAL)))
    data = (inputs, jnp.sign(DIAGONAL))
    return hj.Model({"w": jnp.zeros(DIAGONAL.size)}, data, lambda p, x: p["w"] @ x, lambda o, sign: sign * o**2 / 2)


def krylov_residual_ratio(problem, starts, depth):
    """The worst true residual over the promise, over the starts, by dense float64 linear algebra."""
    worst = 0.0
    for start in starts:
        columns = [np.asarray(start["w"], np.float64)]
        for _ in range(depth - 1):
            q = np.linalg.qr(np.stack(columns, 1))[0]
            columns.append(DIAGONAL * q[:, -1])
        q = np.linalg.qr(np.stack(columns, 1))[0]
        values, vectors = eigh(q.T @ (DIAGONAL[:, None] * q))
        keep = slice(-problem.k, None) if problem.which == "LA" else slice(problem.k)
        values, vectors = values[keep], q @ vectors[:, keep]
        residuals = np.linalg.norm(DIAGONAL[:, None] * vectors - vectors * values, axis=0)
        worst = max(worst, (residuals / (problem.tol * np.abs(values))).max())
    return worst


@pytest.mark.parametrize("which", ["LA", "SA"])
def test_the_sufficient_depth_is_the_smallest(model, which):
    problem, keys = Problem(which, 2, 1e-3), list(jax.random.split(jax.random.key(0), 2))
    starts = [start_vector(model, key) for key in keys]
    depth, scale = sufficient_depth(model, problem, keys)
    assert scale == pytest.approx(9, rel=1e-3)
    assert krylov_residual_ratio(problem, starts, depth) <= 1 < krylov_residual_ratio(problem, starts, depth - 1)


def test_a_depth_beyond_the_limit_is_none(model):
    assert sufficient_depth(model, Problem("SM", 2, 1e-3), [jax.random.key(0)], limit=32)[0] is None


@pytest.mark.parametrize("which", ["LA", "SA"])
@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_delivers_the_wanted_pairs(model, name, which):
    problem, keys = Problem(which, 2, 1e-3), [jax.random.key(3)]
    case = Case(model, plain_product, problem, keys, *sufficient_depth(model, problem, keys), 2000)
    try:
        attempt = next(RIVALS[name](case))
    except Unavailable as reason:
        pytest.skip(str(reason))
    answer = attempt.read(attempt.solve(0))
    truth = DIAGONAL[-2:] if which == "LA" else DIAGONAL[:2]
    np.testing.assert_allclose(answer.values, truth, rtol=1e-4)
    assert residual_ratio(model, answer, problem, 9.0) < 1.01


def test_answers_are_told_apart(model):
    problem = Problem("SA", 2, 1e-3)
    basis = jnp.eye(DIAGONAL.size)
    right = Answer(DIAGONAL[:2], {"w": 3 * basis[:2]}, 1)
    wrong = Answer(DIAGONAL[np.array([0, 2])], {"w": basis[jnp.array([0, 2])]}, 1)
    off = Answer(DIAGONAL[:2], {"w": basis[:2] + 1e-3 * basis[2]}, 1)
    assert residual_ratio(model, right, problem, 9.0) == pytest.approx(0, abs=1e-3)
    assert residual_ratio(model, off, problem, 9.0) == pytest.approx(5 / 9, rel=1e-3)  # 1e-3 · |-4 + 9| / (1e-3 · 9)
    assert shortfall(right, wrong, problem) == 0
    assert shortfall(wrong, right, problem) == pytest.approx(3 / 9)
