import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix
from models import assert_equal, dense, mixture, problem

import hessjax as hj


def test_is_the_matrix_between_roots_of_the_scale(rng, x64):
    forward, params, inputs, targets = problem("mlp", "softmax")
    truth = dense("mlp", "softmax").ggn
    scale = jax.tree.map(lambda leaf: rng.uniform(0.1, 10, leaf.shape), params)
    root = 1 / np.sqrt(np.asarray(jax.flatten_util.ravel_pytree(scale)[0]))
    P = hj.precondition(hj.ggn(forward, mixture)(params, inputs, targets), scale)
    assert_equal(P, root[:, None] * truth * root)


def test_eigenvalues_are_those_of_the_preconditioned_matrix(rng, x64, key):
    A = rng.standard_normal((30, 30))
    A, d = A + A.T, rng.uniform(0.01, 100, 30)
    found = hj.eigsh(hj.precondition(Matrix(jnp.asarray(A)), d), 4, key, which="BE").eigenvalues
    exact = np.sort(np.linalg.eigvals(A / d[:, None]).real)
    np.testing.assert_allclose(found, exact[[0, 1, -2, -1]], rtol=1e-10)


def test_takes_a_plain_function_and_keeps_dtypes():
    scale = {"a": np.full(2, 4.0, np.float32), "b": np.full((), 0.25, np.float32)}
    image = hj.precondition(lambda v: v, scale)({"a": np.ones(2), "b": 1.0})
    np.testing.assert_allclose(image["a"], [0.25, 0.25])
    assert float(image["b"]) == 4.0
    assert image["a"].dtype == jnp.float32


@pytest.mark.parametrize(("entry", "shown"), [(0.0, "0.0"), (-2.0, "-2.0"), (np.nan, "nan")])
def test_a_scale_that_is_not_positive_is_refused(entry, shown, key):
    op = hj.operator(lambda v: v, {"a": jnp.ones(2)})
    with pytest.raises(ValueError, match=rf"`scale` must be positive, got {shown} at `\['a'\]`"):
        hj.precondition(op, {"a": jnp.array([1.0, entry])})
    traced = jax.jit(lambda d: hj.precondition(op, {"a": d})({"a": jnp.ones(2)})["a"])(jnp.array([1.0, entry]))
    np.testing.assert_array_equal(np.isfinite(traced), [True, False])


def test_a_scale_that_is_known_is_checked_while_the_product_is_traced():
    scale = jnp.array([4.0, 1.0])
    op = Diagonal(jnp.ones(2))
    found = jax.jit(lambda v: hj.precondition(op, scale)(v))(jnp.ones(2))
    np.testing.assert_allclose(found, [0.25, 1.0])
    with jax.transfer_guard("disallow"):
        hj.precondition(op, scale)


def test_another_structure_is_refused():
    with pytest.raises(ValueError, match=r"`scale` must have shape \(2,\).*got \(3,\)"):
        hj.precondition(Matrix(jnp.eye(2)), jnp.ones(3))
    with pytest.raises(TypeError, match=r"`hj\.Operator`.*got ndarray"):
        hj.precondition(np.eye(2), jnp.ones(2))
