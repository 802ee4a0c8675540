import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Rotated

import hessjax as hj

N = 100
METHODS = ["xtrace", "xnystrace", "hutch++", "hutchinson"]
SPECTRA = {
    "flat": 3 - 2 * np.arange(N) / N,
    "polynomial": 1.0 / np.arange(1, N + 1) ** 2,
    "exponential": 0.7 ** np.arange(N),
    "step": np.r_[np.ones(10), 1e-3 * np.ones(N - 10)],
}


def rotated(rng, values):
    reflectors = rng.standard_normal((3, N))
    reflectors /= np.linalg.norm(reflectors, axis=1, keepdims=True)
    return Rotated(jnp.asarray(values), jnp.asarray(reflectors))


def estimates(function, count):
    drawn = [function(jax.random.key(seed)) for seed in range(count)]
    return np.array([e.value for e in drawn], np.float64), np.array([e.stderr for e in drawn], np.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "spectrum", [name if name == "polynomial" else pytest.param(name, marks=pytest.mark.slow) for name in SPECTRA]
)
def test_standard_errors_cover_the_truth_and_the_mean_is_it(method, spectrum, rng, x64):
    op, truth = rotated(rng, SPECTRA[spectrum]), SPECTRA[spectrum].sum()
    # A third of Hutch++'s products are samples, and of six means a Student's t leaves a tenth outside two errors.
    values, errors = estimates(lambda key: hj.trace(op, 36 if method == "hutch++" else 20, key, method=method), 80)
    assert np.mean(np.abs(values - truth) <= 2 * errors) >= 0.85
    assert abs(values.mean() - truth) < 4.5 * values.std() / len(values) ** 0.5
    # Nor are the errors empty words: for an estimate of few vectors a few times the truth at most.
    assert np.median(errors) < 6 * np.sqrt(np.mean((values - truth) ** 2))


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_frobenius_norm_lies_within_its_error(spectrum, rng, x64):
    op, truth = rotated(rng, SPECTRA[spectrum]), np.linalg.norm(SPECTRA[spectrum])
    values, errors = estimates(lambda key: hj.frobenius_norm(op, 20, key), 40)
    assert np.mean(np.abs(values - truth) <= 2 * errors) >= 0.85
    assert abs(np.mean(values**2) - truth**2) < 4.5 * (values**2).std() / len(values) ** 0.5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_low_rank_is_exact(dtype, scale, rng, x64):
    values = np.r_[np.arange(1.0, 6), np.zeros(N - 5)] * scale
    op = rotated(rng, values.astype(dtype))
    op = Rotated(op.eigenvalues.astype(dtype), op.reflectors.astype(dtype))
    tolerance = 300 * float(jnp.finfo(dtype).eps)
    for method in ("xtrace", "xnystrace", "hutch++"):
        np.testing.assert_allclose(hj.trace(op, 20, jax.random.key(0), method=method).value, 15 * scale, rtol=tolerance)
    np.testing.assert_allclose(hj.frobenius_norm(op, 20, jax.random.key(0)).value, 55**0.5 * scale, rtol=tolerance)


def test_xtrace_gains_on_hutchinson_as_the_spectrum_decays(rng, x64):
    """The errors after 2k products of A and after 4k: with eigenvalues 0.7ⁱ they fall by 0.7ᵏ, not by 1/√2."""
    op, truth = rotated(rng, SPECTRA["exponential"]), SPECTRA["exponential"].sum()
    few, many = (
        np.sqrt(np.mean((estimates(lambda key, m=m: hj.trace(op, m, key), 10)[0] - truth) ** 2)) for m in (20, 40)
    )
    assert many < 3 * 0.7**10 * few


@pytest.mark.parametrize("method", METHODS)
def test_as_many_products_as_entries_are_exact(method):
    values = jnp.arange(1.0, 8)
    estimate = hj.trace(Diagonal(values), 9, jax.random.key(0), method=method)
    assert (estimate.value, estimate.stderr, estimate.num_matvecs) == (28, 0, 7)
    norm = hj.frobenius_norm(Diagonal(values), 7, jax.random.key(0))
    np.testing.assert_allclose(norm.value, 140**0.5, rtol=1e-6)
    assert (norm.stderr, norm.num_matvecs) == (0, 7)


@pytest.mark.parametrize(("method", "spent"), [("xtrace", 10), ("xnystrace", 11), ("hutch++", 9), ("hutchinson", 11)])
def test_the_number_of_products_is_a_ceiling(method, spent):
    calls = []

    def matvec(v):
        jax.debug.callback(lambda _: calls.append(1), v[0])
        return jnp.arange(30.0) * v

    estimate = hj.trace(matvec, 11, jax.random.key(0), method=method, like=jnp.zeros(30))
    jax.effects_barrier()
    assert estimate.num_matvecs == spent
    assert len(calls) <= spent


def test_zero_has_trace_zero():
    for method in METHODS:
        estimate = hj.trace(Diagonal(jnp.zeros(30)), 6, jax.random.key(0), method=method)
        assert estimate.value == 0, method
    assert hj.frobenius_norm(Diagonal(jnp.zeros(30)), 6, jax.random.key(0)).value == 0


@pytest.mark.parametrize("method", ["xtrace", *(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[1:])])
def test_the_derivative_is_right_on_average(method, rng, x64):
    values, direction = jnp.asarray(rng.uniform(1, 2, 20)), jnp.asarray(rng.standard_normal(20))
    reflectors = jnp.asarray(rng.standard_normal((1, 20)) / 20**0.5)
    derivative = jax.jit(
        jax.vmap(
            lambda key: (
                jax.grad(lambda v: hj.trace(Rotated(v, reflectors), 9, key, method=method).value)(values) @ direction
            ),
        )
    )
    samples = np.asarray(derivative(jax.random.split(jax.random.key(0), 300)))
    # The reflection is not quite orthogonal: what multiplies the direction is the squared norm of its columns.
    h = np.eye(20) - 2 * np.outer(reflectors[0], reflectors[0])
    truth = np.sum((h**2).sum(0) * np.asarray(direction))
    assert abs(samples.mean() - truth) < 4 * samples.std() / 300**0.5


def test_same_key_same_bits_and_vmap_agrees():
    values = jnp.linspace(0.0, 1.0, 30)
    traces = jax.vmap(lambda scale: hj.trace(Diagonal(scale * values), 10, jax.random.key(0)).value)
    first, second = traces(jnp.array([1.0, 3.0]))
    again = hj.trace(Diagonal(values), 10, jax.random.key(0))
    assert again.value == hj.trace(Diagonal(values), 10, jax.random.key(0)).value
    np.testing.assert_allclose([first, second], [again.value, 3 * again.value], rtol=1e-4)


def test_errors_name_the_value():
    op = Diagonal(jnp.ones(5))
    with pytest.raises(ValueError, match=r'>= 2` for method="xtrace", got 1'):
        hj.trace(op, 1, jax.random.key(0))
    with pytest.raises(ValueError, match=r"'hutchinson', got 'exact'"):
        hj.trace(op, 2, jax.random.key(0), method="exact")
    with pytest.raises(TypeError, match="needs a `key`"):
        hj.trace(op, 2, None)
    with pytest.raises(TypeError, match="must be an integer"):
        hj.trace(op, 2.5, jax.random.key(0))
    with pytest.raises(ValueError, match="num_matvecs >= 2`, got 0"):
        hj.frobenius_norm(op, 0, jax.random.key(0))
    with pytest.raises(ValueError, match="at least one parameter"):
        hj.trace(lambda v: v, 4, jax.random.key(0), like=jnp.zeros(0))


@pytest.mark.parametrize("method", METHODS)
def test_a_wanted_error_ends_the_run_and_the_last_round_is_the_whole_run(method, rng, x64):
    op, truth = rotated(rng, SPECTRA["exponential"]), SPECTRA["exponential"].sum()
    run = jax.jit(lambda rtol, key: hj.trace(op, 96, key, method=method, rtol=rtol))
    spent, near = [], []
    for rtol in (0.3, 1e-3, 0.0):
        estimates = [run(rtol, jax.random.key(seed)) for seed in range(12)]
        for estimate in estimates:
            assert estimate.num_matvecs >= 90 or estimate.stderr <= rtol * abs(estimate.value)
            near.append(abs(estimate.value - truth) <= 2 * estimate.stderr + 1e-9)
        spent.append(np.mean([e.num_matvecs for e in estimates]))
    assert spent[0] < spent[1] <= spent[2] <= 96
    assert np.mean(near) >= 0.85
    whole = hj.trace(op, 96, jax.random.key(0), method=method)
    last = run(0.0, jax.random.key(0))
    np.testing.assert_allclose([last.value, last.num_matvecs], [whole.value, whole.num_matvecs], rtol=1e-6)


def test_with_products_to_spare_the_last_resort_is_exact():
    values = jnp.arange(40.0)
    for estimate in (
        hj.trace(Diagonal(values), 100, jax.random.key(0), rtol=0.0),
        hj.frobenius_norm(Diagonal(values), 100, jax.random.key(0), rtol=0.0),
        hj.diagonal(Diagonal(values), 100, jax.random.key(0), rtol=0.0),
    ):
        assert estimate.num_matvecs == 80
        assert np.all(estimate.stderr == 0)


def test_not_a_number_ends_the_run():
    estimate = hj.trace(Diagonal(jnp.full(N, jnp.nan)), 96, jax.random.key(0), rtol=0.0)
    assert np.isnan(estimate.value)
    assert estimate.num_matvecs == 32


def test_errors_of_a_wanted_error():
    for estimator in (hj.trace, hj.diagonal, hj.frobenius_norm):
        with pytest.raises(ValueError, match=r"`rtol >= 0`, got -1"):
            estimator(Diagonal(jnp.ones(5)), 4, jax.random.key(0), rtol=-1.0)
