import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.linalg import eigsh

import hessjax as hj


def test_flat_vectors_have_ravel_order():
    op = hj.operator(lambda v: {"b": 3 * v["b"], "a": 2 * v["a"]}, {"b": jnp.zeros(2), "a": jnp.zeros((1, 1))})
    matrix = hj.as_scipy(op)
    np.testing.assert_allclose(matrix @ np.ones(3), [2, 3, 3])
    assert matrix.shape == (3, 3)
    assert matrix.dtype == np.float32


def test_scipy_solves_it(x64):
    values = jnp.linspace(-1, 1, 50)
    found = eigsh(hj.as_scipy(lambda v: values * v, like=values), 2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(found), values[-2:], rtol=1e-10)


def test_needs_like_for_a_function():
    with pytest.raises(TypeError, match="like="):
        hj.as_scipy(lambda v: v)
