import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, SLICES, assert_equal, dense, mixture, mlp, problem, softmax

import hessjax as hj


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_empirical_fisher_is_the_second_moment_of_the_gradients(network, loss, x64):
    forward, params, inputs, targets = problem(network, loss)
    E = hj.empirical_fisher(forward, mixture, batch_size=SLICES[network])(params, inputs, targets)
    assert_equal(E, dense(network, loss).empirical_fisher)


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_covariance_is_the_centred_one(network, loss, x64):
    forward, params, inputs, targets = problem(network, loss)
    C = hj.gradient_covariance(forward, mixture, batch_size=SLICES[network])(params, inputs, targets)
    assert_equal(C, dense(network, loss).covariance)


@pytest.mark.parametrize("batch_size", [None, 4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 100))])
def test_slices_are_weighted_by_their_count(batch_size, x64):
    forward, params, inputs, targets = problem("mlp", "squared")
    truth = dense("mlp", "squared")
    args = params, inputs, targets
    assert_equal(hj.empirical_fisher(forward, mixture, batch_size=batch_size)(*args), truth.empirical_fisher)
    assert_equal(hj.gradient_covariance(forward, mixture, batch_size=batch_size)(*args), truth.covariance)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_covariance_survives_a_mean_that_is_much_larger(batch_size, x64):
    shifts = np.array([[3.0, -1.0], [-1.0, 0.5], [-2.0, 0.25]])
    C = hj.gradient_covariance(lambda w, x: w, lambda z, y: jnp.dot(z, y), batch_size=batch_size)
    found = C(np.zeros(2), np.zeros(3), 1e7 + shifts).dense()
    # The data themselves are rounded at 1e-16 · 1e7.
    np.testing.assert_allclose(found, np.cov(shifts.T, bias=True), rtol=1e-8)


def test_one_example_has_no_covariance(x64):
    forward, params, inputs, targets = problem("mlp", "softmax")
    inputs, targets = jax.tree.map(lambda leaf: leaf[:1], (inputs, targets))
    op = hj.gradient_covariance(forward, mixture)(params, inputs, targets)
    assert all(not leaf.any() for leaf in jax.tree.leaves(op(params)))


def test_empirical_fisher_is_no_fisher(x64):
    forward, params, inputs, _ = problem("mlp", "softmax")
    E = dense("mlp", "softmax").empirical_fisher
    F = hj.fisher(forward, "categorical")(params, inputs).dense()
    assert np.abs(E - F).max() > 0.1 * np.abs(F).max()


@pytest.mark.parametrize("transform", [hj.empirical_fisher, hj.gradient_covariance, hj.ggn])
def test_memory_grows_with_the_slice_and_not_with_the_data(transform):
    def temporaries(examples, batch_size):
        op = transform(mlp, softmax, batch_size=batch_size)(
            {"in": {"w": jnp.ones((64, 8)), "b": jnp.ones(64)}, "out": (jnp.ones((3, 64)), jnp.ones(3))},
            {"a": jnp.ones((examples, 8))},
            {"label": jnp.zeros(examples, int)},
        )
        program = jax.jit(lambda op, v: op.product(v)).lower(op, op.params).compile()
        return program.memory_analysis().temp_size_in_bytes

    few, many = temporaries(1023, 64), temporaries(8191, 64)  # both leave a remainder
    assert many < 1.2 * few
    assert temporaries(8191, 512) > 3 * few


def test_runs_inside_one_jit_and_under_vmap_over_parameters(x64):
    forward, params, inputs, targets = problem("mlp", "bernoulli")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), params)
    inputs, targets = jax.device_put((inputs, targets))

    def image(params, inputs, targets):
        C = hj.gradient_covariance(forward, mixture, batch_size=2)(params, inputs, targets)
        E = hj.empirical_fisher(forward, mixture)(params, inputs, targets)
        return jax.lax.fori_loop(0, 2, lambda _, v: (E - C)(v), params)

    run = jax.jit(jax.vmap(image, (0, None, None)))
    with jax.transfer_guard("disallow"):
        found = run(stacked, inputs, targets)
    truth = dense("mlp", "bernoulli")
    flat = jax.flatten_util.ravel_pytree(params)[0]
    outer = truth.empirical_fisher - truth.covariance
    first = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf[0], found))[0]
    np.testing.assert_allclose(first, outer @ (outer @ flat), rtol=1e-8, atol=1e-12)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"`empirical_fisher` needs `batch_size >= 1`.* got 0"):
        hj.empirical_fisher(mlp, softmax, batch_size=0)
    with pytest.raises(ValueError, match=r"`gradient_covariance` needs `batch_size >= 1`.* got -2"):
        hj.gradient_covariance(mlp, softmax, batch_size=-2)
    with pytest.raises(ValueError, match=r"scalar, got shape \(2,\)"):
        hj.empirical_fisher(lambda w, x: w * x, lambda z, y: z)(np.ones(2), np.ones((3, 2)), np.ones(3))(np.ones(2))
