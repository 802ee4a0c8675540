import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix
from models import dense, mixture, problem

import hessjax as hj


def test_inverse_product_of_a_damped_gauss_newton_matrix(x64):
    forward, params, inputs, targets = problem("mlp", "softmax")
    G = hj.ggn(forward, mixture, batch_size=2)(params, inputs, targets)
    found = hj.solve(G, params, damping=0.01, tol=1e-12)
    flat = jax.flatten_util.ravel_pytree(params)[0]
    exact = np.linalg.solve(dense("mlp", "softmax").ggn + 0.01 * np.eye(flat.size), flat)
    np.testing.assert_allclose(jax.flatten_util.ravel_pytree(found.value)[0], exact, atol=1e-9 * np.abs(exact).max())
    assert bool(found.converged)
    assert found.residual <= 1e-12 * np.linalg.norm(flat)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_default_tolerance_is_reached(dtype, rng, x64):
    values = jnp.asarray(np.geomspace(1e-2, 1e2, 60), dtype)
    b = jnp.asarray(rng.standard_normal(60), dtype)
    found = hj.solve(Diagonal(values), b)
    true = np.linalg.norm(np.asarray(values * found.value - b, np.float64))
    assert bool(found.converged)
    assert found.value.dtype == dtype
    assert true <= jnp.finfo(dtype).eps ** 0.5 * np.linalg.norm(b)
    np.testing.assert_allclose(found.residual, true, rtol=1e-3)


def test_reports_what_did_not_converge(x64):
    values = jnp.geomspace(1e-6, 1.0, 100)
    found = hj.solve(Diagonal(values), jnp.ones(100), tol=1e-8, maxiter=5)
    assert not found.converged
    np.testing.assert_allclose(found.residual, jnp.linalg.norm(values * found.value - 1), rtol=1e-10)
    assert hj.solve(Diagonal(values), jnp.ones(100), tol=1e-8, maxiter=3000).converged


def test_breakdown_and_impossible_tolerances_are_told():
    indefinite = Diagonal(jnp.array([1.0, -1.0]))  # the first step divides by zero
    assert not hj.solve(indefinite, jnp.ones(2)).converged
    assert not hj.solve(Diagonal(jnp.array([1.0, 0.0])), jnp.ones(2)).converged
    assert not hj.solve(Diagonal(jnp.array([1.0, jnp.nan])), jnp.ones(2)).converged
    floor = hj.solve(Diagonal(jnp.geomspace(1e-6, 1.0, 50)), jnp.ones(50), tol=1e-9, maxiter=500)
    true = np.geomspace(1e-6, 1.0, 50) * np.asarray(floor.value, np.float64) - 1
    assert bool(floor.converged) == (np.linalg.norm(true) <= 1e-9 * 50**0.5)


def test_a_solution_that_an_indefinite_matrix_has_is_told_from_a_minimum(rng, x64):
    values = jnp.asarray([*rng.uniform(1, 2, 20), -0.01])
    found = hj.solve(Diagonal(values), jnp.ones(21), tol=1e-8)
    true = values * found.value - 1
    assert bool(found.converged) == (np.linalg.norm(true) <= 1e-8 * 21**0.5)
    x = np.asarray(found.value)
    np.testing.assert_allclose(found.curvature, x @ (values * x) / (x @ x), rtol=1e-10)
    assert found.curvature < 0
    assert hj.solve(Diagonal(values), jnp.ones(21), damping=0.02).curvature > 0


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_of_the_right_hand_side_does_not_matter(scale):
    found = hj.solve(Diagonal(jnp.array([1.0, 2.0, 5.0])), jnp.full(3, scale), tol=1e-5)
    np.testing.assert_allclose(found.value, scale / np.array([1.0, 2.0, 5.0]), rtol=1e-5)
    assert found.converged
    assert 1 < found.curvature < 5


def test_zero_has_the_solution_zero():
    found = hj.solve(Diagonal(jnp.ones(3)), jnp.zeros(3))
    assert found.converged
    assert found.residual == 0
    assert not found.value.any()


def test_derivatives_are_those_of_the_solution(rng, x64):
    matrix = rng.standard_normal((5, 5))
    matrix, b = jnp.asarray(matrix @ matrix.T + np.eye(5)), jnp.arange(1.0, 6.0)
    ours = lambda matrix, b, d: jnp.sum(hj.solve(Matrix(matrix), b, damping=d, tol=1e-13).value ** 2)
    exact = lambda matrix, b, d: jnp.sum(jnp.linalg.solve(matrix + d * jnp.eye(5), b) ** 2)
    for found, truth in zip(
        jax.grad(ours, (0, 1, 2))(matrix, b, 0.3), jax.grad(exact, (0, 1, 2))(matrix, b, 0.3), strict=True
    ):
        np.testing.assert_allclose(found, truth, rtol=1e-8)


def test_a_zero_right_hand_side_has_the_inverse_as_its_derivative(x64):
    inverse = jax.jacrev(lambda b: hj.solve(Diagonal(jnp.array([1.0, 4.0])), b).value)(jnp.zeros(2))
    np.testing.assert_allclose(inverse, np.diag([1, 0.25]), rtol=1e-12)


def test_leaves_may_differ_in_their_dtypes(x64):
    b = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones(2, jnp.float32), "c": jnp.arange(1.0, 3.0)}
    scale = {"a": 2.0, "b": 4.0, "c": 5.0}
    op = hj.operator(lambda v: jax.tree.map(lambda s, x: (s * x).astype(x.dtype), scale, v), b)
    found = hj.solve(op, b, damping=1.0, tol=5e-3)
    assert jax.tree.map(lambda leaf: leaf.dtype, found.value) == jax.tree.map(lambda leaf: leaf.dtype, b)
    for name, leaf in found.value.items():
        np.testing.assert_allclose(np.asarray(leaf, float), np.asarray(b[name], float) / (1 + scale[name]), rtol=2e-2)
    assert found.converged


def test_runs_inside_one_jit_and_under_vmap(rng, x64):
    values, b = jnp.asarray(rng.uniform(1, 2, (3, 8))), jnp.asarray(rng.standard_normal((3, 8)))
    run = jax.jit(jax.vmap(lambda values, b, tol: hj.solve(Diagonal(values), b, tol=tol).value, (0, 0, None)))
    tol = jax.device_put(np.float64(1e-10))
    with jax.transfer_guard("disallow"):
        found = run(values, b, tol)
    np.testing.assert_allclose(found, b / values, rtol=1e-8)


def test_takes_functions_and_lineax_operators():
    np.testing.assert_allclose(hj.solve(lambda v: 2 * v, jnp.ones(2)).value, 0.5)
    lineax = hj.as_lineax(Diagonal(jnp.full(2, 4.0)))
    np.testing.assert_allclose(hj.solve(lineax, np.ones(2)).value, 0.25)


def test_bad_arguments_are_refused():
    op = Diagonal(jnp.ones(3))
    with pytest.raises(ValueError, match=r"`b` must have shape \(3,\).*got \(2,\)"):
        hj.solve(op, jnp.ones(2))
    for tol in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite positive number, got"):
            hj.solve(op, jnp.ones(3), tol=tol)
    with pytest.raises(ValueError, match="`tol` must be a number, got 'small'"):
        hj.solve(op, jnp.ones(3), tol="small")
    with pytest.raises(ValueError, match="`maxiter` must be at least 1, got 0"):
        hj.solve(op, jnp.ones(3), maxiter=0)
    with pytest.raises(TypeError, match=r"`maxiter`.*2\.5"):
        hj.solve(op, jnp.ones(3), maxiter=2.5)
    with pytest.raises(TypeError, match="real scalar"):
        hj.solve(op, jnp.ones(3), damping=jnp.ones(3))
