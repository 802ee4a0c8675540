import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import SLICES, assert_equal, dense, mlp, problem

import hessjax as hj

LOSS = {"categorical": "softmax", "bernoulli": "bernoulli", "gaussian": "squared"}


@pytest.mark.parametrize(
    ("network", "distribution"),
    [*(("mlp", name) for name in LOSS), ("cnn", "bernoulli"), ("transformer", "categorical")],
)
def test_is_the_gauss_newton_matrix_of_the_log_likelihood(network, distribution, x64):
    forward, params, inputs, _ = problem(network, LOSS[distribution])
    F = hj.fisher(forward, distribution, batch_size=SLICES[network])(params, inputs)
    assert_equal(F, dense(network, LOSS[distribution]).ggn)


def test_is_the_expectation_over_the_models_own_targets(x64):
    forward, params, inputs, _ = problem("mlp", "softmax")
    z = np.asarray(jax.vmap(forward, (None, 0))(params, inputs))
    J = dense("mlp", "softmax").jacobian
    p = np.asarray(jax.nn.softmax(z))
    truth = sum(
        p[n, c] * np.outer(s @ J[n], s @ J[n]) / len(z)
        for n in range(len(z))
        for c in range(3)
        for s in [p[n] - np.eye(3)[c]]
    )
    assert_equal(hj.fisher(forward, "categorical")(params, inputs), truth)
    q = np.asarray(jax.nn.sigmoid(z))
    truth = sum(
        np.prod(np.where(bits, q[n], 1 - q[n])) * np.outer(s @ J[n], s @ J[n]) / len(z)
        for n in range(len(z))
        for bits in itertools.product([0, 1], repeat=3)
        for s in [q[n] - np.array(bits)]
    )
    assert_equal(hj.fisher(forward, "bernoulli")(params, inputs), truth)


@pytest.mark.parametrize("distribution", LOSS)
def test_samples_average_to_it(distribution, x64):
    forward, params, inputs, _ = problem("mlp", LOSS[distribution])
    truth = dense("mlp", LOSS[distribution]).ggn

    @jax.jit
    def sampled(keys):
        build = lambda key: hj.fisher(forward, distribution, mc_samples=1, key=key)(params, inputs)
        return jax.lax.map(lambda key: build(key).dense(), keys)

    draws = np.asarray(sampled(jax.random.split(jax.random.key(3), 400)))
    stderr = draws.std(0) / 20
    seen = stderr > 1e-12
    assert np.abs((draws.mean(0) - truth)[seen] / stderr[seen]).max() < 5
    np.testing.assert_allclose(draws.mean(0)[~seen], truth[~seen], atol=1e-12)
    assert np.linalg.matrix_rank(draws[0], tol=1e-9) <= 5  # one vector for each example


def test_samples_depend_on_the_key_alone(x64, key):
    forward, params, inputs, _ = problem("mlp", "softmax")
    build = lambda batch_size: hj.fisher(forward, "categorical", batch_size=batch_size, mc_samples=3, key=key)
    assert_equal(build(2)(params, inputs), np.asarray(build(None)(params, inputs).dense()), rtol=1e-13)


def test_positions_and_output_arrays_are_independent(x64):
    forward = lambda w, x: {"words": jnp.outer(x, w), "next": w[:2] * x[0]}
    w, x = jnp.array([0.5, -1.0, 0.2]), jnp.array([[1.0, 2.0], [-1.0, 0.5]])
    one = lambda logits: jnp.diag(jax.nn.softmax(logits)) - jnp.outer(jax.nn.softmax(logits), jax.nn.softmax(logits))
    truth = np.zeros((3, 3))
    for a, b in np.asarray(x):
        for scale in (a, b):
            truth += scale**2 * np.asarray(one(scale * w)) / 2
        truth[:2, :2] += a**2 * np.asarray(one(a * w[:2])) / 2
    assert_equal(hj.fisher(forward, "categorical")(w, x), truth)


def test_a_sampled_vocabulary_forms_no_square():
    size = 20_000
    op = hj.fisher(lambda w, x: jnp.outer(w, x).sum(0), "categorical", mc_samples=2, key=jax.random.key(0))(
        jnp.ones(3), jnp.ones((4, size))
    )
    program = jax.jit(lambda op, v: op.product(v)).lower(op, jnp.ones(3)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 20 * 4 * size * 4


def test_saturated_logits_stay_finite():
    for distribution in ("categorical", "bernoulli"):
        F = hj.fisher(lambda w, x: w * x, distribution)(jnp.array([1.0, -1.0]), jnp.full((2, 1), 500.0))
        assert np.isfinite(F.dense()).all()


def test_bad_arguments_are_refused():
    for wrong in ("poisson", None, jax.nn.softmax):
        with pytest.raises(ValueError, match=r"one of categorical, bernoulli, gaussian, got"):
            hj.fisher(mlp, wrong)
    with pytest.raises(ValueError, match="axis of classes"):
        hj.fisher(lambda w, x: w * x, "categorical")(np.ones(()), np.ones(3))(1.0)
    with pytest.raises(ValueError, match=r"`fisher` needs `batch_size >= 1`.* got 0"):
        hj.fisher(mlp, "gaussian", batch_size=0)
    with pytest.raises(ValueError, match="got `mc_samples` and no `key`"):
        hj.fisher(mlp, "gaussian", mc_samples=1)
    with pytest.raises(ValueError, match="got no array"):
        hj.fisher(mlp, "gaussian")(np.ones(3), {})
