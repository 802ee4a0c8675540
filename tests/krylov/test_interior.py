import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal

import hessjax as hj

N = 2100  # above the size up to which the matrix is formed
OUTER = np.r_[np.linspace(-1.0, -0.4, N // 2), np.linspace(0.5, 1.0, N - N // 2 - 8)]
SPECTRA = {
    "a group in a gap": (np.r_[OUTER, 0.1 * np.arange(-4, 4) + 0.03], 0.0),
    "equally far on both sides": (np.r_[OUTER, [-0.3, -0.2, -0.1, -0.05, 0.05, 0.1, 0.2, 0.3]], 0.0),
    "at the end": (np.r_[OUTER, 1.2 + 0.1 * np.arange(8)], 2.0),
    "an eigenvalue four times": (np.r_[OUTER, [0.1] * 4, [-0.2, -0.25, 0.3, 0.35]], 0.12),
    "singular": (np.r_[5.0, 3.0, -2.0, np.zeros(N - 3)], 0.0),
    "scale 1e15": (1e15 * np.r_[OUTER, 0.1 * np.arange(-4, 4) + 0.03], 1e13),
}


def nearest(values, sigma, k):
    return np.sort(values[np.argsort(np.abs(values - sigma), kind="stable")[:k]])


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.float64])
def test_eigenvalues_nearest_to_a_shift_without_the_matrix(dtype, x64, key):
    k, tol = 4, 1e-4
    for name, (spectrum, sigma) in SPECTRA.items():
        values = jnp.asarray(np.random.default_rng(0).permutation(spectrum), dtype)
        pairs = hj.eigsh(Diagonal(values), k, key, sigma=sigma, tol=tol)
        exact, scale = np.asarray(values, np.float64), np.abs(spectrum).max()
        found, vectors = np.asarray(pairs.eigenvalues, np.float64), np.asarray(pairs.eigenvectors, np.float64)
        rounding = 100 * float(jnp.finfo(dtype).eps) * scale
        assert bool(pairs.converged.all()), name
        np.testing.assert_allclose(found, nearest(exact, sigma, k), atol=tol * np.abs(found).max() + rounding)
        true = np.linalg.norm(vectors * exact - found[:, None] * vectors, axis=1)
        assert np.all(true <= tol * np.abs(found) + rounding), name
        np.testing.assert_allclose(pairs.residuals, true, atol=rounding)
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-4 if dtype == jnp.float32 else 1e-10)
        assert int(pairs.num_matvecs) > k


@pytest.mark.parametrize("sigma", [40.0, -1e4, 1e10])
def test_from_far_outside_the_outermost_eigenvalues_are_nearest(sigma, x64, key):
    group = np.sign(sigma) * (1.2 + 0.1 * np.arange(4))
    for dtype in (jnp.float32, jnp.float64):
        values = jnp.asarray(np.r_[OUTER, group], dtype)
        for matrix in (values, values[-40:]):  # by filters, and from the matrix
            pairs = hj.eigsh(Diagonal(matrix), 3, key, sigma=sigma, tol=1e-4)
            assert bool(pairs.converged.all())
            found = np.asarray(pairs.eigenvalues, np.float64)
            np.testing.assert_allclose(found, np.sort(group[1:]), rtol=1e-3)


def test_interior_solves_at_any_scale_and_of_zero(key):
    spectrum = np.r_[OUTER, 0.1 * np.arange(-4, 4) + 0.03]
    for scale in (1e-25, 1e-20):
        pairs = hj.eigsh(Diagonal(jnp.asarray(scale * spectrum, jnp.float32)), 3, key, which="SM", tol=1e-4)
        assert bool(pairs.converged.all())
        np.testing.assert_allclose(pairs.eigenvalues, scale * nearest(spectrum, 0, 3), rtol=1e-3)
    zero = hj.eigsh(Diagonal(jnp.zeros(N)), 3, key, which="SM", tol=1e-4)
    assert bool(zero.converged.all())
    assert not zero.eigenvalues.any()


def test_a_start_at_a_tiny_eigenvalue_sets_no_scale(key):
    spectrum = np.r_[1e-30, OUTER, np.full(7, 0.2)]
    start = jnp.zeros(N).at[0].set(1.0)
    pairs = hj.eigsh(Diagonal(jnp.asarray(spectrum, jnp.float32)), 1, key, which="SM", tol=1e-4, v0=start)
    assert bool(pairs.converged.all())
    assert abs(float(pairs.eigenvalues[0])) < 1e-6
    assert float(pairs.residuals[0]) >= 1e-7  # no product is exact to less


def test_what_hides_below_the_filters_sight_is_not_called_converged(x64, key):
    x, keys = 1e-9, jax.random.split(key, 3)
    spectrum = jnp.asarray(np.r_[x, -x / 10, x / 3, np.where(np.arange(N - 3) % 2, 1, -1) * np.linspace(1, 5, N - 3)])
    for k in keys:
        pairs = hj.eigsh(Diagonal(spectrum), 1, k, sigma=0.0, tol=1e-3, v0=jnp.zeros(N).at[0].set(1.0))
        assert not bool(pairs.converged.all()) or abs(float(pairs.eigenvalues[0]) + x / 10) < 1e-12


def test_interior_products_are_all_counted(x64, key):
    calls = []

    def product(v):
        jax.debug.callback(lambda: calls.append(1))
        return values * v

    values = jnp.asarray(SPECTRA["singular"][0])
    pairs = hj.eigsh(product, 4, key, which="SM", tol=1e-4, like=values)
    jax.effects_barrier()
    assert len(calls) == int(pairs.num_matvecs)


@pytest.mark.slow
def test_giving_up_inside_the_spectrum_is_said(x64, key):
    values = jnp.linspace(-1.0, 1.0, N)
    pairs = hj.eigsh(Diagonal(values), 4, key, which="SM", tol=1e-4, ncv=20, maxiter=1)
    assert not bool(pairs.converged.all())
    assert np.all(np.isfinite(pairs.eigenvalues))
    image = np.asarray(pairs.eigenvectors) * np.asarray(values)
    true = np.linalg.norm(image - np.asarray(pairs.eigenvalues)[:, None] * np.asarray(pairs.eigenvectors), axis=1)
    np.testing.assert_allclose(pairs.residuals, true, atol=1e-12)


@pytest.mark.parametrize("n", [5, 300])
@pytest.mark.parametrize("sigma", [None, -0.3, 100.0])
def test_small_operators_are_solved_by_their_matrix(n, sigma, x64, key):
    values = np.random.default_rng(n).standard_normal(n)
    choice = dict(which="SM") if sigma is None else dict(sigma=sigma)
    pairs = hj.eigsh(Diagonal(jnp.asarray(values)), 3, key, **choice)
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(pairs.eigenvalues, nearest(values, sigma or 0.0, 3), atol=1e-13)
    assert int(pairs.num_matvecs) == n


def test_shift_may_be_traced_and_derivatives_pass(x64, key):
    values = jnp.arange(1.0, 21.0)

    def near(values, sigma):
        return jnp.sum(hj.eigsh(Diagonal(values), 2, key, sigma=sigma).eigenvalues)

    for sigma in (4.4, 11.6):
        gradient = jax.jit(jax.grad(near))(values, sigma)
        low = int(sigma)
        np.testing.assert_allclose(gradient, (values == low) | (values == low + 1), atol=1e-12)


@pytest.mark.slow
def test_nan_inside_the_spectrum_ends_unconverged(key):
    pairs = hj.eigsh(Diagonal(jnp.full(N, jnp.nan)), 4, key, which="SM")
    assert not bool(pairs.converged.any())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sigma=0.0, which="SA"), "`sigma`.*'SA'"),
        (dict(sigma=float("inf")), "`sigma`.*inf"),
        (dict(sigma="a"), "`sigma`.*'a'"),
        (dict(sigma=1j), "`sigma`"),
    ],
)
def test_bad_shifts_are_named(arguments, message, key):
    with pytest.raises(ValueError, match=message):
        hj.eigsh(Diagonal(jnp.ones(5)), 2, key, **arguments)
