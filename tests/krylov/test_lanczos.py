import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix

import hessjax as hj

N = 120


@pytest.fixture
def matrix():
    values = np.random.default_rng(0).standard_normal((N, N))
    return jnp.asarray(values + values.T)


@pytest.mark.parametrize("num_steps", [1, 2, 30, N])
def test_three_term_relation_and_orthonormality(num_steps, x64, matrix, key):
    result = hj.lanczos(Matrix(matrix), num_steps, key)
    q = np.asarray(result.basis)
    t = np.diag(result.diagonal) + np.diag(result.off_diagonal, 1) + np.diag(result.off_diagonal, -1)
    right = t @ q
    right[-1] += result.residual
    scale = np.linalg.norm(matrix, 2)
    np.testing.assert_allclose(q @ np.asarray(matrix), right, atol=1e-13 * scale)
    np.testing.assert_allclose(q @ q.T, np.eye(num_steps), atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(result.residual), result.residual_norm, atol=1e-13 * scale)
    assert int(result.steps) == num_steps
    assert result.off_diagonal.shape == (num_steps - 1,)


def test_float32_stays_orthonormal_over_many_steps(key):
    values = jnp.asarray(np.r_[100.0, 50.0, np.random.default_rng(0).uniform(0, 1, 998)], jnp.float32)
    result = hj.lanczos(Diagonal(values), 150, key)
    gram = np.asarray(result.basis, np.float64) @ np.asarray(result.basis, np.float64).T
    np.testing.assert_allclose(gram, np.eye(150), atol=2e-6)
    assert np.sum(np.asarray(result.ritz()[0]) > 99) == 1  # no ghost copies


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_breakdown_on_low_rank_is_reported(dtype, scale, x64, key):
    vectors = np.linalg.qr(np.random.default_rng(3).standard_normal((500, 3)))[0]
    low_rank = scale * (vectors * [3.0, 2.0, -1.0]) @ vectors.T
    result = hj.lanczos(Matrix(jnp.asarray(low_rank, dtype)), 20, key)
    assert int(result.steps) == 4
    values, ritz, bounds = result.ritz()
    np.testing.assert_allclose(values[:4] / scale, [-1, 0, 2, 3], atol=1e-5)
    assert np.all(np.asarray(values[4:]) == 0)
    assert np.all(np.isinf(bounds[4:]))
    assert not np.any(np.asarray(result.basis)[4:])
    assert not np.any(np.asarray(ritz)[4:])
    assert not np.any(np.asarray(result.diagonal)[4:])
    assert not np.any(np.asarray(result.off_diagonal)[3:])
    assert float(result.residual_norm) == 0


CLOSED = {
    "zero operator": (np.zeros(N), None, 1),
    "identity": (np.ones(N), None, 1),
    "start at an eigenvector": (np.arange(N) + 1.0, np.eye(N)[4], 1),
    "ones on ten values": (np.repeat(np.arange(10.0), N // 10), np.ones(N), 10),
    "zero start": (np.ones(N), np.zeros(N), 0),
}


@pytest.mark.parametrize("case", CLOSED)
def test_invariant_spaces_end_the_iteration(case, x64, key):
    values, start, steps = CLOSED[case]
    v0 = None if start is None else jnp.asarray(start)
    result = hj.lanczos(Diagonal(jnp.asarray(values)), 15, key, v0=v0)
    assert int(result.steps) == steps
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((result, result.ritz()[:2])))
    ritz = np.asarray(result.ritz()[0])[:steps]
    assert all(np.min(np.abs(values - value)) < 1e-12 for value in ritz)


def test_residual_bounds_are_the_true_residuals(x64, matrix, key):
    values, vectors, bounds = hj.lanczos(Matrix(matrix), 40, key).ritz()
    true = np.linalg.norm(np.asarray(vectors) @ np.asarray(matrix) - np.asarray(values)[:, None] * vectors, axis=1)
    np.testing.assert_allclose(bounds, true, atol=1e-11)


def test_pytree_basis_keeps_structure_and_dtypes(x64, key):
    like = {"a": jnp.zeros((2, 3), jnp.float32), "b": (jnp.zeros(()), None, jnp.zeros((0, 4))), "c": [jnp.zeros(5)]}
    op = hj.operator(lambda v: jax.tree.map(lambda leaf: 2 * leaf, v), like)
    result = hj.lanczos(op, 3, key)
    assert jax.tree.structure(result.basis) == jax.tree.structure(like)
    for row, leaf in zip(jax.tree.leaves(result.basis), jax.tree.leaves(like), strict=True):
        assert row.shape == (3, *leaf.shape)
        assert row.dtype == leaf.dtype
    assert int(result.steps) == 1


def test_is_differentiable_in_reverse_mode(x64, key):
    values = jnp.linspace(0.5, 2.0, N)
    trace = lambda values: jnp.sum(hj.lanczos(Diagonal(values), 5, key).diagonal)
    direction = jnp.sin(jnp.arange(N))
    step = 1e-6
    difference = (trace(values + step * direction) - trace(values - step * direction)) / (2 * step)
    np.testing.assert_allclose(jnp.vdot(jax.grad(trace)(values), direction), difference, rtol=1e-6)


@pytest.mark.parametrize("num_steps", [0, N + 1])
def test_number_of_steps_is_checked(num_steps, key):
    with pytest.raises(ValueError, match=f"got {num_steps}"):
        hj.lanczos(Diagonal(jnp.ones(N)), num_steps, key)


def test_needs_a_key_or_a_start():
    with pytest.raises(ValueError, match="`key`"):
        hj.lanczos(Diagonal(jnp.ones(N)), 3, None)
    with pytest.raises(ValueError, match=r"\(2,\)"):
        hj.lanczos(Diagonal(jnp.ones(N)), 3, None, v0=jnp.ones(2))
