"""What a stranger tried on the estimators: half precision, extreme scales, boundaries, bad functions, repeats."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal

import hessjax as hj
from hessjax.estimate import Estimate

SPECTRUM = np.linspace(1.0, 1.4, 200)


def mixed():
    """Float32, but for one number in bfloat16."""
    values = jnp.asarray(SPECTRUM, jnp.float32)
    like = {"s": jnp.zeros((), jnp.bfloat16), "w": jnp.zeros(200)}
    return hj.operator(lambda v: {"s": v["s"], "w": values * v["w"]}, like)


def halves(dtype):
    return Diagonal(jnp.asarray(SPECTRUM, dtype))


@pytest.mark.parametrize("make", [mixed, lambda: halves(jnp.bfloat16), lambda: halves(jnp.float16)])
def test_half_precision_does_not_end_the_iteration(make, key):
    op = make()
    density = hj.spectral_density(op, key, num_probes=20, num_steps=30)
    count = density.count(1.3, 9.0)
    assert abs(count.value - 50) < 4 * count.stderr + 2
    powers = hj.trace_of(lambda x: x**-8, op, 150, key, num_steps=15)
    assert abs(powers.value - np.sum(SPECTRUM**-8)) < 4 * powers.stderr < 20
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), op.structure)
    applied = hj.apply_function(lambda x: x**-8, op, ones, 20)
    weights = jax.tree.leaves(applied.value)[-1].astype(float)
    assert np.linalg.norm(weights - SPECTRUM**-8) < applied.error < 10


def test_an_empty_leaf_decides_no_rounding(key):
    op = hj.operator(lambda v: (v[0], 2 * v[1]), (jnp.zeros(0, jnp.bfloat16), jnp.zeros(40)))
    assert int(hj.lanczos(op, 3, key).steps) == 1
    assert hj.eigsh(op, 1, key).residuals[0] < 1e-4


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_error_of_a_norm_covers_half_precision(dtype, rng):
    q = np.linalg.qr(rng.normal(size=(100, 3)))[0]
    matrix = jnp.asarray(q * [16.0, 12.0, 10.0] @ q.T, dtype)
    truth = np.linalg.norm(np.asarray(matrix, np.float64))
    op = hj.operator(lambda v: matrix @ v, jnp.zeros(100, dtype))
    estimates = jax.vmap(lambda key: hj.frobenius_norm(op, 40, key))(jax.random.split(jax.random.key(1), 30))
    assert np.mean(abs(np.asarray(estimates.value, float) - truth) < 3 * estimates.stderr) > 0.95


def test_the_error_of_a_steep_function_covers_rounding(rng):
    values = np.geomspace(3e-7, 1.0, 80)
    op, v = Diagonal(jnp.asarray(values, jnp.float32)), np.float32(rng.normal(size=80))
    applied = hj.apply_function(lambda x: 1 / (x + 1e-6), op, v, 80)
    assert np.linalg.norm(np.asarray(applied.value, float) - v / (values + 1e-6)) < applied.error


def test_an_eigenvalue_at_a_point_lies_below_it(key):
    density = hj.spectral_density(Diagonal(jnp.full(50, 1.7)), key)
    assert density.cdf(1.7).value == pytest.approx(1.0)
    assert density.cdf(1.6).value == 0.0
    projector = Diagonal(jnp.concatenate([jnp.zeros(60), jnp.ones(40)]))
    shares = jax.vmap(lambda key: hj.spectral_density(projector, key).cdf(0.0).value)(jax.random.split(key, 20))
    assert np.mean(shares) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("scale", [1e-20, 1e25])
@pytest.mark.parametrize("method", ["lanczos", "kpm"])
def test_a_density_at_extreme_scales(scale, method, key):
    values = jnp.linspace(0.5, 2.0, 100)
    grid, sigma = np.linspace(0.6, 1.9, 5), 0.2
    plain, far = (
        hj.spectral_density(Diagonal(c * values), key, num_steps=20, method=method).pdf(c * grid, c * sigma)
        for c in (1.0, np.float32(scale))
    )
    np.testing.assert_allclose(far.value * scale, plain.value, rtol=1e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_norm_that_is_not_finite_is_not_zero(value, key):
    norm = hj.frobenius_norm(Diagonal(jnp.full(50, value)), 10, key)
    assert not np.isfinite(norm.value)


def test_sums_of_float16_do_not_overflow(key):
    op = Diagonal(jnp.full(128, 1000.0, jnp.float16))
    for num_matvecs, method in ((128, "xdiag"), (20, "xdiag"), (20, "hutchinson")):
        sums = hj.diagonal(op, num_matvecs, key, method=method).sums
        assert abs(sums.value - 128_000) < 4 * sums.stderr + 1


@pytest.mark.parametrize("num_matvecs", [33, 50])
def test_hutchinsons_diagonal_runs_what_it_reports(num_matvecs, rng):
    products, matrix = [], jnp.asarray(rng.normal(size=(60, 60)), jnp.float32)

    def matvec(v):
        jax.debug.callback(lambda _: products.append(1), v[0])
        return (matrix + matrix.T) @ v

    result = hj.diagonal(hj.operator(matvec, jnp.zeros(60)), num_matvecs, jax.random.key(0), method="hutchinson")
    jax.effects_barrier()
    assert len(products) == result.num_matvecs == num_matvecs


def test_sums_of_xdiag_know_that_their_samples_are_not_independent(rng):
    q = np.linalg.qr(rng.normal(size=(80, 80)))[0]
    matrix = jnp.asarray(q * 0.8 ** np.arange(80) @ q.T, jnp.float32)
    like = {"a": jnp.zeros((6, 5)), "b": jnp.zeros(50)}

    def matvec(v):
        image = matrix @ jnp.concatenate([v["a"].reshape(-1), v["b"]])
        return {"a": image[:30].reshape(6, 5), "b": image[30:]}

    op, keys = hj.operator(matvec, like), jax.random.split(jax.random.key(2), 100)
    sums = jax.vmap(lambda key: hj.diagonal(op, 40, key).sums)(keys)
    diagonal = np.diagonal(np.asarray(matrix, np.float64))
    for name, truth in (("a", diagonal[:30].sum()), ("b", diagonal[30:].sum())):
        covered = np.mean(abs(np.asarray(sums.value[name], float) - truth) < 2 * sums.stderr[name])
        assert covered > 0.85  # it was 0.69 for the spread of the samples


def test_functions_are_elementwise_or_refused(key):
    op = Diagonal(jnp.linspace(0.5, 2.0, 40))
    for num_matvecs in (20, 40):
        assert float(hj.trace_of(lambda x: 1.0, op, num_matvecs, key)) == pytest.approx(40.0)
        with pytest.raises(ValueError, match="elementwise"):
            hj.trace_of(lambda x: jnp.stack([x, x]), op, num_matvecs, key)
    with pytest.raises(ValueError, match="elementwise"):
        hj.apply_function(lambda x: x[:1], op, jnp.ones(40))


def test_outliers_that_are_not_orthonormal_show(key):
    op = Diagonal(jnp.concatenate([jnp.array([5.0, 4.0, 3.0]), jnp.linspace(0.0, 1.0, 37)]))
    good = hj.eigsh(op, 3, key, which="LA")
    assert float(hj.spectral_density(op, key, outliers=good).count(2.0, 9.0)) == pytest.approx(3.0, abs=1e-3)
    longer = good.eigenvectors * 7
    twice = jnp.concatenate([good.eigenvectors[:2], good.eigenvectors[:1]])
    for vectors in (longer, twice):
        pairs = hj.Eigenpairs(**{**vars(good), "eigenvectors": vectors})
        density = hj.spectral_density(op, key, outliers=pairs)
        assert np.isnan(density.count(2.0, 9.0).value)
        assert np.isnan(density.moment(1).value)
    with pytest.raises(ValueError, match=r"outliers.converged.*\(3,\), got \(1,\)"):
        hj.spectral_density(op, key, outliers=SimpleNamespace(**{**vars(good), "converged": np.ones(1, bool)}))


def test_zero_has_minus_infinity_for_a_logarithm_and_all_its_mass_at_zero(key):
    zero = Diagonal(jnp.zeros(30))
    assert hj.logdet(zero, 20, key).value == hj.logdet(zero, 30, key).value == -np.inf
    assert float(hj.spectral_density(zero, key, method="kpm").count(-0.1, 0.1)) == pytest.approx(30.0)


def test_methods_of_a_density_compile_once(key):
    density = hj.spectral_density(Diagonal(jnp.linspace(0.0, 1.0, 60)), key, num_steps=10)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )

    def use(x):
        results: list[Estimate] = [density.count(x, 1.0), density.cdf(x), density.pdf(x), density.log_pdf(x + 0.1)]
        hj.apply_function(jnp.exp, Diagonal(jnp.linspace(0.0, x, 60)), jnp.ones(60), 10)
        return [*results, density.quantile(x), density.pdf(x, sigma=x)]

    use(0.5)
    compiled.clear()
    use(0.25)
    assert compiled == []


def test_estimates_print_with_their_errors(key):
    assert repr(hj.Estimate(jnp.asarray(1.25), jnp.asarray(0.031), jnp.asarray(60))) == (
        "Estimate(1.25 ± 0.031, 60 products)"
    )
    op = Diagonal(jnp.linspace(0.0, 1.0, 60))
    assert "f32[60]" in repr(hj.diagonal(op, 10, key))
    shown = []
    jax.jit(lambda key: shown.append(repr(hj.trace(op, 10, key))))(key)
    jax.vmap(lambda key: shown.append(repr(hj.trace(op, 10, key))))(jax.random.split(key, 2))
    assert all("value=f32[]" in text for text in shown)
    shift = op.shift(1.0)
    assert repr(hj.spectral_density(shift, key, num_probes=2, num_steps=60)) == (
        "Density(60 eigenvalues, 2 probes of 60 nodes from 1 to 2, 120 products)"
    )
    assert repr(hj.apply_function(jnp.exp, op, jnp.ones(60), 20)).endswith(", 20 products)")
    assert repr(hj.solve(op, jnp.ones(60), damping=1.0)).startswith("Solution(converged, residual ")


def test_points_and_widths_are_real_numbers(key):
    density = hj.spectral_density(Diagonal(jnp.linspace(0.0, 1.0, 60)), key, num_steps=10)
    with pytest.raises(TypeError, match="`low` must be real numbers, got None"):
        density.count(None, 1.0)
    with pytest.raises(TypeError, match="`grid` must be real numbers"):
        density.pdf(1j)
    for call in (density.pdf, density.log_pdf):
        with pytest.raises(ValueError, match="`sigma` must be positive"):
            call(0.5, sigma=-0.1)
    assert np.isnan(density.quantile(np.array([-1.0, 2.0])).value).all()
    assert np.isfinite(density.quantile(np.array([0.0, 1.0])).value).all()
    for rtol in (np.array([0.1, 0.2]), 1j):
        with pytest.raises(ValueError, match="real scalar `rtol`"):
            hj.trace(Diagonal(jnp.ones(60)), 20, key, rtol=rtol)
