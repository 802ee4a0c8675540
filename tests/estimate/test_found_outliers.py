"""`spectral_density(outliers="found")`: what the first probe finds is exact, and free of chance."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix

import hessjax as hj
from hessjax.estimate._memory import probes_together

N = 400
TOPS = np.array([-9.0, 6.0, 7.0, 8.0, 20.0])


def spectrum(rng):
    """Five outliers on a narrow bulk."""
    return np.sort(np.r_[TOPS, rng.uniform(-1, 1, N - len(TOPS))])


def atoms(density, value, tolerance=1e-6):
    """The weight at `value` in every row."""
    near = np.abs(np.asarray(density.nodes) - value) < tolerance * max(abs(value), 1)
    return np.sum(np.where(near, density.weights, 0), axis=1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_outliers_are_atoms_of_one_eigenvalue_each(rng, dtype, x64):
    q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    values = spectrum(rng)
    op = Matrix(jnp.asarray(q * values @ q.T, dtype))
    density = hj.spectral_density(op, jax.random.key(0), num_steps=40, outliers="found")
    assert density.nodes.dtype == dtype
    assert density.nodes.shape == (9, 60)
    assert density.num_matvecs == 400
    assert np.all(density.weights >= 0)
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-5)
    for top in TOPS:
        np.testing.assert_allclose(atoms(density, top, 1e-5), 1 / N, rtol=1e-4)
    for low, high, count in ((5, 30, 4), (-10, -5, 1), (7.5, 9, 1)):
        estimate = density.count(low, high)
        np.testing.assert_allclose(estimate.value, count, atol=1e-3)
        assert estimate.stderr < 1e-3


def test_two_standard_errors_still_cover_and_are_smaller(rng, x64):
    values = spectrum(rng)
    op = Diagonal(jnp.asarray(values))
    inside, ratios = [], []
    for seed in range(20):
        density = hj.spectral_density(op, jax.random.key(seed), num_steps=30, outliers="found")
        plain = hj.spectral_density(op, jax.random.key(seed), num_steps=30)
        moments = [(density.moment(p), np.mean(values**p), plain.moment(p)) for p in (1, 2)]
        counts = [
            (density.count(a, b), np.sum((values >= a) & (values <= b)), plain.count(a, b))
            for a, b in ((-0.2, 0.3), (0.3, np.inf))
        ]
        inside += [abs(estimate.value - truth) <= 2 * estimate.stderr for estimate, truth, _ in moments + counts]
        ratios.append([estimate.stderr / rough.stderr for estimate, _, rough in moments])
    assert 0.85 <= np.mean(inside) <= 0.99
    assert np.all(np.median(ratios, axis=0) < [0.6, 0.1])


def test_further_copies_of_a_repeated_outlier_are_counted_without_bias(rng, x64):
    values = np.sort(np.r_[np.full(6, 5.0), rng.uniform(-1, 1, N - 6)])
    op = Diagonal(jnp.asarray(values))
    counts = [hj.spectral_density(op, jax.random.key(s), num_steps=20, outliers="found").count(4, 6) for s in range(20)]
    mean, error = np.mean([c.value for c in counts]), np.std([c.value for c in counts]) / 20**0.5
    assert abs(mean - 6) < 3 * error
    assert error < 0.5


SMALL = {
    "zero": np.zeros(40),
    "identity": np.full(40, 7.0),
    "rank one": np.r_[np.zeros(39), 3.0],
    "two values": np.repeat([-1.0, 3.0], 20),
    "two entries": np.array([1.0, 2.0]),
    "one entry": np.array([4.0]),
    "distinct": np.arange(12.0),
}


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("case", SMALL)
def test_nothing_that_is_not_there(case, scale):
    values = SMALL[case] * scale
    density = hj.spectral_density(Diagonal(jnp.asarray(values, jnp.float32)), jax.random.key(3), outliers="found")
    nodes, weights = np.asarray(density.nodes, np.float64), np.asarray(density.weights, np.float64)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    distance = np.abs(nodes[..., None] - values).min(-1)
    assert distance[weights > 0].max() <= 1e-5 * max(np.abs(values).max(), 1e-30)
    for value in np.unique(values):
        near = 0.1 * scale
        count = density.count(value - near, value + near)
        assert abs(count.value - np.sum(values == value)) <= 5 * count.stderr + 1e-3


def test_derivatives_are_those_of_the_eigenvalues_that_were_found(rng, x64):
    bulk = jnp.asarray(rng.uniform(-0.01, 0.01, N - len(TOPS)))

    def moment(tops):
        op = Diagonal(jnp.concatenate([bulk, tops]))
        return hj.spectral_density(op, jax.random.key(0), num_steps=15, outliers="found").moment(3).value

    gradient = jax.jit(jax.grad(moment))(jnp.asarray(TOPS))
    np.testing.assert_allclose(gradient, 3 * TOPS**2 / N, rtol=1e-4)


def test_runs_under_jit_and_vmap_and_in_any_batch(rng, x64):
    values = jnp.asarray(np.stack([spectrum(rng), spectrum(rng)]))

    def moments(values, batch=None):
        density = hj.spectral_density(
            Diagonal(values), jax.random.key(1), num_probes=4, num_steps=12, outliers="found", probe_batch=batch
        )
        return jnp.stack([density.moment(p).value for p in (1, 2)])

    together = jax.jit(jax.vmap(moments))(values)
    for row, expected in zip(values, together, strict=True):
        np.testing.assert_allclose(moments(row), expected, rtol=1e-10)
        np.testing.assert_allclose(moments(row, 2), expected, rtol=1e-10)


def test_errors_at_the_door():
    op, key = Diagonal(jnp.arange(5.0)), jax.random.key(0)
    with pytest.raises(ValueError, match="got 'all'"):
        hj.spectral_density(op, key, outliers="all")
    with pytest.raises(ValueError, match="num_probes >= 2`, one to find them, got 1"):
        hj.spectral_density(op, key, outliers="found", num_probes=1)
    with pytest.raises(ValueError, match="got 'kpm'"):
        hj.spectral_density(op, key, outliers="found", method="kpm")


def test_nan_stays_visible():
    density = hj.spectral_density(Diagonal(jnp.full(30, jnp.nan)), jax.random.key(0), num_steps=5, outliers="found")
    assert np.isnan(density.moment(1).value)


def test_memory_for_what_is_found_is_set_aside(monkeypatch):
    op, vector = Diagonal(jnp.arange(1000.0)), 4000
    monkeypatch.setattr("hessjax.estimate._memory.device_memory", lambda: 8 * 100 * vector)  # room for 100 vectors
    assert probes_together(op, 10, 12, None) == 5
    assert probes_together(op, 10, 12, None, beside=50) == 2
    assert probes_together(op, 10, 12, None, beside=99) == 1
