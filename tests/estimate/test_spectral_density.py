import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix
from scipy import stats

import hessjax as hj


def semicircle(rng, n):
    g = rng.standard_normal((n, n))
    return (g + g.T) / (2 * n) ** 0.5


def wishart(rng, n):
    x = rng.standard_normal((2 * n, n))
    return x.T @ x / (2 * n)


ENSEMBLES = {"semicircle": semicircle, "wishart": wishart}


def wasserstein(density, eigenvalues):
    """∫ |F - F̂|, of which only the part between the outermost eigenvalues and nodes is not zero."""
    ends = [float(x) for x in density.ends]
    grid = np.linspace(min(ends[0], eigenvalues[0]) - 1e-3, max(ends[1], eigenvalues[-1]) + 1e-3, 4001)
    exact = np.searchsorted(eigenvalues, grid, side="right") / len(eigenvalues)
    return np.trapezoid(np.abs(np.asarray(density.cdf(grid).value) - exact), grid)


def smoothed(eigenvalues, grid, sigma):
    return np.exp(-((grid[:, None] - eigenvalues) ** 2) / (2 * sigma**2)).mean(1) / (sigma * (2 * np.pi) ** 0.5)


@pytest.mark.parametrize("ensemble", [pytest.param("semicircle", marks=pytest.mark.slow), "wishart"])
@pytest.mark.parametrize("n", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_two_standard_errors_cover_moments_and_counts(ensemble, n, rng, x64):
    matrix = ENSEMBLES[ensemble](rng, n)
    values = np.linalg.eigvalsh(matrix)
    op, (low, high) = Matrix(jnp.asarray(matrix)), np.quantile(values, [0.2, 0.7])
    inside = []
    for seed in range(20):
        density = hj.spectral_density(op, jax.random.key(seed), num_steps=40)
        pairs = [(density.moment(p), np.mean(values**p)) for p in (1, 2, 3, 4)]
        pairs += [(density.count(a, b), np.sum((values >= a) & (values <= b))) for a, b in COUNTS(low, high)]
        inside.append([abs(estimate.value - truth) <= 2 * estimate.stderr for estimate, truth in pairs])
    coverage = np.mean(inside, axis=0)
    assert 0.85 <= coverage[:4].mean() <= 0.99
    assert 0.85 <= coverage[4:].mean() <= 0.99


def COUNTS(low, high):
    return (-np.inf, low), (low, high), (high, np.inf)


@pytest.mark.parametrize("ensemble", ["semicircle", pytest.param("wishart", marks=pytest.mark.slow)])
def test_the_distribution_function_is_nearer_than_the_staircase_of_the_nodes(ensemble, rng):
    matrix = ENSEMBLES[ensemble](rng, 300)
    values = np.linalg.eigvalsh(matrix)
    op = Matrix(jnp.asarray(matrix, jnp.float32))
    density = hj.spectral_density(op, jax.random.key(0), num_steps=8)
    staircase = stats.wasserstein_distance(values, density.nodes.ravel(), None, density.weights.ravel())
    assert wasserstein(density, values) < 0.6 * staircase
    assert wasserstein(density, values) < 0.02 * (values[-1] - values[0])


@pytest.mark.slow
def test_the_error_against_the_semicircle_halves_when_the_steps_double(rng):
    """Measured elsewhere for 10 probes at n = 2000 without smoothing: 0.057, 0.029, 0.0146 for 20, 40, 80 steps."""
    matrix = 2**0.5 * semicircle(rng, 2000)
    values = np.linalg.eigvalsh(matrix) / 2**0.5
    op = Matrix(jnp.asarray(matrix / 2**0.5, jnp.float32))
    errors = [wasserstein(hj.spectral_density(op, jax.random.key(0), num_steps=m), values) for m in (20, 40, 80)]
    assert errors[2] < 0.03
    assert errors[0] < 0.057


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["early", "late"])
def test_a_network_density_is_the_exact_one(stage, network_hessians, x64):
    model, _, values = network_hessians[stage]
    density = hj.spectral_density(model.hessian(), jax.random.key(0), num_steps=80)
    spread = values[-1] - values[0]
    sigma = 0.01 * spread
    grid = np.linspace(values[0] - 0.05 * spread, values[-1] + 0.05 * spread, 2001)
    estimate = density.pdf(grid, sigma)
    assert np.trapezoid(np.abs(estimate.value - smoothed(values, grid, sigma)), grid) < 0.1
    np.testing.assert_allclose(np.trapezoid(estimate.value, grid), 1, atol=1e-3)
    assert wasserstein(density, values) < 0.01 * spread
    top = np.asarray(density.nodes)[0, -1]
    np.testing.assert_allclose(top, values[-1], rtol=1e-10)
    outliers = density.count(values[-9] - 1e-3 * spread, np.inf)
    assert abs(outliers.value - 9) < 4 * outliers.stderr


@pytest.mark.slow
def test_deflated_outliers_come_back_exact(network_hessians, x64):
    model, _, values = network_hessians["early"]
    pairs = hj.eigsh(model.hessian(), 9, jax.random.key(0), which="LA", tol=1e-6)
    plain = hj.spectral_density(model.hessian(), jax.random.key(1), num_steps=80)
    density = hj.spectral_density(model.hessian(), jax.random.key(1), num_steps=80, outliers=pairs)
    count = density.count((values[-9] + values[-10]) / 2, np.inf)
    np.testing.assert_allclose(count.value, 9, atol=1e-6)
    trace, rough = density.moment(1), plain.moment(1)
    assert abs(trace.value - values.mean()) < 4 * trace.stderr
    # The variance of a probe on the sphere is that of the eigenvalues; deflation leaves that of the others.
    assert trace.stderr / rough.stderr < 1.6 * values[:-9].std() / values.std()
    np.testing.assert_allclose(density.weights.sum(1), 1, rtol=1e-12)


DEGENERATE = {
    "low rank": np.r_[np.zeros(37), 1.0, 2.0, 5.0],
    "repeated": np.repeat([-1.0, 3.0], 20),
    "zero": np.zeros(40),
    "identity": np.full(40, 7.0),
}


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
@pytest.mark.parametrize("case", DEGENERATE)
def test_no_ghosts(case, scale):
    values = np.sort(DEGENERATE[case] * scale)
    density = hj.spectral_density(Diagonal(jnp.asarray(values, jnp.float32)), jax.random.key(3))
    nodes, weights = np.asarray(density.nodes, np.float64), np.asarray(density.weights, np.float64)
    assert nodes.shape == (10, 40)  # 100 steps make no sense for n = 40
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)
    distance = np.abs(nodes[..., None] - values).min(-1)
    assert distance.max() <= 1e-5 * max(np.abs(values).max(), 1e-30)
    assert np.all((weights > 0).sum(1) == len(np.unique(values)))
    zeros = density.count(-0.1 * scale, 0.1 * scale)
    assert abs(zeros.value - np.sum(values == 0)) <= 4 * zeros.stderr


@pytest.mark.parametrize("p", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_moments_have_the_derivative_of_finite_differences(p, rng, x64):
    values, direction = jnp.asarray(rng.standard_normal(20)), jnp.asarray(rng.standard_normal(20))

    def moment(values):
        return hj.spectral_density(Diagonal(values), jax.random.key(0), num_probes=3, num_steps=6).moment(p).value

    h = 1e-5
    difference = (moment(values + h * direction) - moment(values - h * direction)) / (2 * h)
    np.testing.assert_allclose(jax.grad(moment)(values) @ direction, difference, rtol=1e-6)


def test_runs_under_jit_and_vmap_and_does_not_depend_on_the_batch(rng):
    values = jnp.asarray(rng.standard_normal((2, 30)), jnp.float32)

    def nodes(values, batch=None):
        return hj.spectral_density(
            Diagonal(values), jax.random.key(0), num_probes=3, num_steps=5, probe_batch=batch
        ).nodes

    together = jax.jit(jax.vmap(nodes))(values)
    for row, expected in zip(values, together, strict=True):
        np.testing.assert_allclose(nodes(row), expected, atol=1e-5)
        np.testing.assert_allclose(nodes(row, 2), expected, atol=1e-5)


def test_quantiles_invert_the_distribution_function(rng):
    values = np.sort(rng.standard_normal(300))
    density = hj.spectral_density(Diagonal(jnp.asarray(values, jnp.float32)), jax.random.key(0), num_steps=30)
    estimate = density.quantile([0.1, 0.5, 0.9])
    np.testing.assert_allclose(density.cdf(estimate.value).value, [0.1, 0.5, 0.9], atol=1e-4)
    assert np.all(np.abs(estimate.value - np.quantile(values, [0.1, 0.5, 0.9])) < 5 * estimate.stderr)


@pytest.mark.slow
def test_the_logarithmic_density_has_mass_one():
    values = jnp.asarray(np.geomspace(1e-4, 1, 200) * np.resize([1, -1], 200), jnp.float32)
    density = hj.spectral_density(Diagonal(values), jax.random.key(0), num_steps=200)
    decades = np.linspace(-7, 2, 2001)
    pdf = density.log_pdf(10**decades).value
    np.testing.assert_allclose(np.trapezoid(pdf, decades), 1, atol=1e-3)
    inside = (decades > -3.5) & (decades < -0.5)
    np.testing.assert_allclose(pdf[inside].mean(), 1 / 4, rtol=0.2)  # evenly over four decades


def test_odd_pytrees_and_one_entry():
    like = {"a": jnp.zeros((2, 3), jnp.bfloat16), "b": [jnp.zeros(()), jnp.zeros((0,))], "c": None}
    op = hj.operator(lambda v: jax.tree.map(lambda x: 2 * x, v), like)
    density = hj.spectral_density(op, jax.random.key(0), num_probes=2)
    np.testing.assert_allclose(density.moment(1).value, 2, rtol=1e-2)
    single = hj.spectral_density(Diagonal(jnp.array([3.0])), jax.random.key(0))
    np.testing.assert_allclose(single.nodes, 3, rtol=1e-6)
    assert single.count(2.9, 3.1).value == 1


def test_errors_name_the_value():
    op = Diagonal(jnp.ones(3))
    with pytest.raises(ValueError, match="num_probes >= 1`, got 0"):
        hj.spectral_density(op, jax.random.key(0), num_probes=0)
    with pytest.raises(ValueError, match="num_steps >= 1`, got -2"):
        hj.spectral_density(op, jax.random.key(0), num_steps=-2)
    with pytest.raises(TypeError, match="needs a `key`"):
        hj.spectral_density(op, None)
    with pytest.raises(TypeError, match="like="):
        hj.spectral_density(lambda v: v, jax.random.key(0))
    with pytest.raises(ValueError, match="p >= 0`, got -1"):
        hj.spectral_density(op, jax.random.key(0)).moment(-1)
    with pytest.raises(ValueError, match="between 1 and 2 eigenvalues"):
        hj.spectral_density(op, jax.random.key(0), outliers=hj.eigsh(op, 3, jax.random.key(0)))


def test_nan_stays_visible():
    density = hj.spectral_density(Diagonal(jnp.full(30, jnp.nan)), jax.random.key(0), num_probes=2, num_steps=5)
    assert np.isnan(density.moment(1).value)
    assert np.isnan(density.count(0, 1).value)
    assert np.isnan(density.pdf(0.5).value)
    assert np.isnan(hj.spectral_entropy(density).value)
