import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix

import hessjax as hj


@functools.cache
def estimator(num_steps, num_probes=10):
    return jax.jit(
        lambda op, key: hj.spectral_density(op, key, num_steps=num_steps, num_probes=num_probes, method="kpm")
    )


def semicircle(rng, n):
    g = rng.standard_normal((n, n))
    return (g + g.T) / (2 * n) ** 0.5


def distance(density, eigenvalues):
    """∫ |F - F̂|"""
    grid = np.linspace(eigenvalues[0] - 0.3, eigenvalues[-1] + 0.3, 4001)
    exact = np.searchsorted(eigenvalues, grid, side="right") / len(eigenvalues)
    return np.trapezoid(np.abs(np.asarray(density.cdf(grid).value) - exact), grid)


def test_the_distribution_is_approached_as_the_steps_grow(rng, x64):
    matrix = semicircle(rng, 400)
    values = np.linalg.eigvalsh(matrix)
    op = Matrix(jnp.asarray(matrix))
    chance = np.ptp(values) / np.sqrt(2 * 400 * 200)  # the largest standard deviation of F̂, over the whole range
    distances = []
    for steps in (10, 40, 160):
        density = estimator(steps, 200)(op, jax.random.key(0))
        assert density.nodes.shape == density.weights.shape == (200, 2 * steps)
        assert density.num_matvecs == 200 * steps + 30
        width = np.pi * np.ptp(values) / (4 * steps)
        distances.append(distance(density, values))
        assert distances[-1] <= 0.3 * width + chance
        mean = density.moment(2)
        assert abs(mean.value - np.mean(values**2)) <= width**2 + 3 * mean.stderr
    assert distances[0] > 2 * distances[1]
    assert distances[1] > distances[2]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(
    "values",
    [np.full(60, 7.0), np.zeros(60), np.r_[np.zeros(57), 1, 2, 5], 1e20 * np.arange(-20, 40), 1e-20 * np.arange(60)],
    ids=["identity", "zero", "low rank", "large", "small"],
)
def test_every_spectrum_lies_in_the_interval_and_has_mass_one(values, dtype, x64):
    density = estimator(50)(Diagonal(jnp.asarray(values, dtype)), jax.random.key(1))
    np.testing.assert_allclose(np.sum(density.weights, axis=1), 1, rtol=1e-5)
    assert np.all(density.weights >= 0)
    width = np.pi * np.ptp(density.nodes) / 200
    far = (density.nodes < values.min() - 4 * width) | (density.nodes > values.max() + 4 * width)
    assert np.all(np.sum(np.where(far, density.weights, 0), axis=1) < 0.01)
    assert np.ptp(density.nodes) <= 1.3 * np.ptp(values) + 1e-3 * np.abs(values).max() + 2 * (not values.any())
    mean = density.moment(1)
    assert abs(mean.value - values.mean()) <= 3 * mean.stderr + width


def test_outliers_come_back_as_atoms(rng, x64):
    matrix = semicircle(rng, 200) + 3 * np.ones((200, 200)) / 200
    op = Matrix(jnp.asarray(matrix))
    top = hj.eigsh(op, 1, jax.random.key(0), which="LA")
    density = hj.spectral_density(op, jax.random.key(0), num_steps=40, method="kpm", outliers=top)
    np.testing.assert_allclose(density.count(2.5, 9).value, 1, atol=1e-6)
    np.testing.assert_allclose(density.ends[1], top.eigenvalues[-1], rtol=1e-12)


def test_gradients_are_those_of_the_moments(rng, x64):
    matrix = semicircle(rng, 50)
    run = estimator(80, 4)

    def second(scale):
        return run(Matrix(scale * jnp.asarray(matrix) + jnp.eye(50)), jax.random.key(0)).moment(2).value

    slope = (second(1 + 1e-4) - second(1 - 1e-4)) / 2e-4
    np.testing.assert_allclose(jax.grad(second)(1.0), slope, rtol=0.05)


def test_not_a_number_stays_visible():
    density = estimator(50)(Diagonal(jnp.full(60, jnp.nan)), jax.random.key(1))
    assert np.isnan(density.moment(1).value)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"lanczos.*kpm.*'chebyshev'"):
        hj.spectral_density(Diagonal(jnp.ones(3)), jax.random.key(0), method="chebyshev")
