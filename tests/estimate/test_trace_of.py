import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal

import hessjax as hj

SPECTRA = {"even": np.linspace(0.01, 3, 150), "geometric": np.geomspace(1e-3, 1, 150)}


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("num_matvecs", [60, pytest.param(140, marks=pytest.mark.slow)])
def test_logdet_lies_within_its_error(spectrum, num_matvecs, x64):
    values, damping = SPECTRA[spectrum], 0.001
    truth = np.log(values + damping).sum()
    op = Diagonal(jnp.asarray(values))
    drawn = [hj.logdet(op, num_matvecs, jax.random.key(seed), damping=damping) for seed in range(20)]
    inside = [abs(e.value - truth) <= 2 * e.stderr for e in drawn]
    assert np.mean(inside) >= 0.85
    assert all(e.num_matvecs <= num_matvecs for e in drawn)


def test_n_products_are_exact_and_so_is_the_derivative(x64):
    values = jnp.asarray(SPECTRA["even"][:20])
    logdet = lambda values, damping: hj.logdet(Diagonal(values), 20, jax.random.key(0), damping=damping)
    estimate = logdet(values, 0.1)
    np.testing.assert_allclose(estimate.value, np.log(values + 0.1).sum(), rtol=1e-12)
    assert (estimate.stderr, estimate.num_matvecs) == (0, 20)
    slopes = jax.grad(lambda *args: logdet(*args).value, (0, 1))(values, 0.1)
    np.testing.assert_allclose(slopes[0], 1 / (values + 0.1), rtol=1e-10)
    np.testing.assert_allclose(slopes[1], np.sum(1 / (values + 0.1)), rtol=1e-10)


def test_the_derivative_of_an_estimate_is_that_of_finite_differences(rng, x64):
    values, direction = jnp.asarray(rng.uniform(1, 2, 40)), jnp.asarray(rng.standard_normal(40))
    logdet = lambda values: hj.logdet(Diagonal(values), 39, jax.random.key(0), num_steps=13).value
    h = 1e-5
    difference = (logdet(values + h * direction) - logdet(values - h * direction)) / (2 * h)
    np.testing.assert_allclose(jax.grad(logdet)(values) @ direction, difference, rtol=1e-7)


def test_too_few_steps_show_in_the_error(x64):
    """8 steps at a condition number of 10⁴ err by more than the probes vary."""
    values = np.geomspace(1e-4, 1, 400)
    estimate = hj.logdet(Diagonal(jnp.asarray(values)), 240, jax.random.key(0), num_steps=8)
    assert abs(estimate.value - np.log(values).sum()) < 2 * estimate.stderr


def test_a_polynomial_is_summed_without_quadrature_error(rng, x64):
    values = rng.standard_normal(100)
    op = Diagonal(jnp.asarray(values))
    estimate = hj.trace_of(lambda x: 3 * x**2 - x, op, 90, jax.random.key(0), num_steps=3)
    assert abs(estimate.value - np.sum(3 * values**2 - values)) < 4 * estimate.stderr
    constant = hj.trace_of(lambda x: 0 * x + 2, op, 90, jax.random.key(0))
    np.testing.assert_allclose(constant.value, 200, rtol=1e-12)


def test_an_indefinite_matrix_has_no_logarithm():
    assert np.isnan(hj.logdet(Diagonal(jnp.linspace(-1.0, 1.0, 50)), 40, jax.random.key(0)).value)


def test_errors_name_the_value():
    op = Diagonal(jnp.ones(50))
    with pytest.raises(ValueError, match="`logdet` needs `num_matvecs >= 1`, got 0"):
        hj.logdet(op, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="num_steps <= num_matvecs` = 4 for one probe, got 5"):
        hj.trace_of(jnp.exp, op, 4, jax.random.key(0), num_steps=5)
