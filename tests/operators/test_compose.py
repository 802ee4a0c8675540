import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Matrix

import hessjax as hj


@pytest.fixture
def pair(rng, x64):
    first, second = (rng.standard_normal((12, 12)) for _ in range(2))
    return first + first.T, second + second.T


def test_deflation_zeroes_what_is_known_and_keeps_the_rest(pair, key):
    op = Matrix(jnp.asarray(pair[0]))
    top = hj.eigsh(op, 3, key, which="LA")
    found = np.linalg.eigvalsh(hj.deflate(op, top).dense())
    exact = np.linalg.eigvalsh(pair[0])
    np.testing.assert_allclose(found, np.sort([*exact[:-3], 0, 0, 0]), atol=1e-12 * np.abs(exact).max())


def test_deflation_keeps_the_structure_and_the_dtypes(x64, key):
    like = {"a": jnp.ones((2, 2), jnp.float32), "b": jnp.ones(3)}
    scale = {"a": jnp.array([[9.0, 1.0], [2.0, 3.0]], jnp.float32), "b": jnp.array([8.0, 1.0, 2.0])}
    op = hj.operator(lambda v: jax.tree.map(jnp.multiply, scale, v), like)
    rest = hj.deflate(op, hj.eigsh(op, 2, key, which="LA"))
    image = rest(like)
    assert image["a"].dtype == jnp.float32
    np.testing.assert_allclose(image["a"], [[0, 1], [2, 3]], atol=1e-5)
    np.testing.assert_allclose(image["b"], [0, 1, 2], atol=1e-5)


def test_composition_is_the_product_of_the_matrices(pair):
    first, second = pair
    A, B = (Matrix(jnp.asarray(matrix)) for matrix in pair)
    for composed, truth in [
        (hj.compose(A), first),
        (hj.compose(A, A), first @ first),
        (hj.compose(A, B, A), first @ second @ first),
        (hj.compose(A, B, B, A), first @ second @ second @ first),
    ]:
        np.testing.assert_allclose(composed.dense(), truth, atol=1e-12 * np.abs(truth).max())
    assert len(jax.tree.leaves(hj.compose(A, B, A))) == 2  # A's matrix is held once


def test_works_under_jit_and_grad(pair):
    @jax.jit
    def form(matrix, other):
        A, B = Matrix(matrix), Matrix(other)
        return jnp.sum(hj.compose(B, A, B)(jnp.ones(12)))

    a, b = map(jnp.asarray, pair)
    np.testing.assert_allclose(jax.grad(form)(a, b), np.outer(b.sum(0), b.sum(0)), rtol=1e-10, atol=1e-10)


def test_what_is_not_symmetric_is_refused():
    A, B = Matrix(jnp.eye(2)), Matrix(jnp.eye(2))
    with pytest.raises(ValueError, match=r"mirrors itself.*got Matrix, Matrix"):
        hj.compose(A, B)
    with pytest.raises(ValueError, match="got none"):
        hj.compose()
    C = Matrix(jnp.eye(3))
    with pytest.raises(ValueError, match=r"one structure.*\(2,\).*\(3,\)"):
        hj.compose(A, C, A)
    with pytest.raises(TypeError, match="operator"):
        hj.compose(jnp.eye(2))


def test_deflation_needs_eigenvectors_of_the_operator(key):
    A = Matrix(jnp.eye(3))
    with pytest.raises(ValueError, match="no eigenvectors"):
        hj.deflate(A, hj.eigsh(A, 1, key, return_eigenvectors=False))
    with pytest.raises(ValueError, match=r"shape \(1, 2\).*got \(1, 3\)"):
        hj.deflate(Matrix(jnp.eye(2)), hj.eigsh(A, 1, key))
    with pytest.raises(TypeError, match="got tuple"):
        hj.deflate(A, (jnp.ones(1), jnp.ones((1, 3))))
