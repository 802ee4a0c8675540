import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from cases import Matrix

import hessjax as hj


def test_lineax_sees_the_same_matrix(rng, x64):
    matrix = rng.standard_normal((6, 6))
    matrix = matrix @ matrix.T + np.eye(6)
    op = hj.as_lineax(Matrix(jnp.asarray(matrix)), tags=lx.positive_semidefinite_tag)
    np.testing.assert_allclose(op.as_matrix(), matrix, rtol=1e-12)
    assert lx.is_symmetric(op)
    assert lx.is_positive_semidefinite(op)
    b = jnp.arange(6.0)
    found = eqx.filter_jit(lambda op, b: lx.linear_solve(op, b, lx.CG(rtol=1e-10, atol=1e-10)).value)(op, b)
    np.testing.assert_allclose(found, np.linalg.solve(matrix, b), rtol=1e-6)


def test_there_and_back_on_a_pytree():
    like = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    op = hj.as_lineax(lambda v: {"a": 2 * v["a"], "b": 3 * v["b"]}, like=like)
    image = op.mv({"a": jnp.ones(2), "b": jnp.ones(())})
    np.testing.assert_allclose(image["a"], [2, 2])
    np.testing.assert_allclose(hj.eigsh(op, 1, jax.random.key(0), which="LA").eigenvalues, [3], rtol=1e-6)
    assert not lx.is_positive_semidefinite(op)


def test_its_arrays_are_leaves_and_differentiate(x64):
    def first(scale):
        op = hj.as_lineax(Matrix(scale * jnp.eye(2)), tags=(lx.positive_semidefinite_tag,))
        return lx.linear_solve(op, jnp.ones(2), lx.CG(rtol=1e-8, atol=1e-8)).value[0]

    arrays = eqx.filter(hj.as_lineax(Matrix(jnp.eye(2))), eqx.is_array)
    assert [leaf.shape for leaf in jax.tree.leaves(arrays)] == [(2, 2)]
    np.testing.assert_allclose(jax.grad(first)(2.0), -0.25, rtol=1e-6)


def test_needs_like_for_a_function():
    with pytest.raises(TypeError, match="like="):
        hj.as_lineax(lambda v: v)
