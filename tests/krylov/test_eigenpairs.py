import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix, wanted

import hessjax as hj

N = 400


def outliers(rng):
    return np.r_[np.linspace(5.0, 12.0, 9), 0.01 * rng.standard_normal(N - 9)]


@pytest.mark.parametrize("n", [100, N])
@pytest.mark.parametrize("which", ["LA", *(pytest.param(which, marks=pytest.mark.slow) for which in ("LM", "BE"))])
def test_error_bounds_hold_and_are_sharper_than_residuals(n, which, x64, key, rng):
    turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
    spectra = (outliers(rng)[:n], rng.standard_normal(n), np.r_[1 + 1e-6 * np.arange(5), rng.uniform(-1, 0.9, n - 5)])
    sharper = 0
    for values in spectra:
        matrix = Matrix(jnp.asarray((turn * values) @ turn.T))
        for tol in (1e-1, 1e-3, 1e-6):
            pairs = hj.eigsh(matrix, 7, key, which=which, tol=tol)
            distance = np.abs(np.asarray(pairs.eigenvalues)[:, None] - values).min(axis=1)
            assert np.all(distance <= np.asarray(pairs.error_bounds))
            assert np.all(pairs.error_bounds <= jnp.maximum(pairs.residuals, 4 * pairs.noise))
            sharper += int(jnp.sum(pairs.error_bounds < 0.1 * pairs.residuals))
    assert sharper > 0 or n < N  # a dense solve is at the rounding floor


def test_angle_bounds_hold(x64, key, rng):
    values = outliers(rng)
    turn = np.linalg.qr(rng.standard_normal((N, N)))[0]
    matrix = Matrix(jnp.asarray((turn * values) @ turn.T))
    known = 0
    for tol in (1e-2, 1e-4):
        pairs = hj.eigsh(matrix, 7, key, which="LA", tol=tol)
        for value, vector, bound in zip(pairs.eigenvalues, pairs.eigenvectors, pairs.angle_bounds, strict=True):
            exact = turn[:, np.argmin(np.abs(values - value))]
            sine = np.linalg.norm(np.asarray(vector) - (exact @ vector) * exact)
            assert sine <= np.sin(bound) + 1e-12
            known += int(bound < 0.1)
        assert float(pairs.angle_bounds[0]) == pytest.approx(np.pi / 2)
    assert known >= 6


@pytest.mark.slow
def test_no_sharp_bound_inside_a_cluster(x64, key):
    pairs = hj.eigsh(
        Diagonal(jnp.asarray(np.r_[np.ones(3), np.linspace(-1, 0.5, N - 3)])), 4, key, which="LA", tol=1e-6
    )
    np.testing.assert_array_equal(pairs.isolation[1:], 0)
    np.testing.assert_array_equal(pairs.angle_bounds[1:], np.pi / 2)


@pytest.mark.parametrize("n", [100, N])
def test_measured_noise_of_a_nonsymmetric_product(n, x64, key, rng):
    error = 1e-4 * rng.standard_normal((n, n)) / n**0.5
    matrix = jnp.asarray(np.diag(np.linspace(0.0, 2.0, n)) + error)
    measured = []
    for measure in (False, True):
        pairs = hj.eigsh(Matrix(matrix), 3, key, which="LA", tol=1e-8, measure_noise=measure)
        assert not bool(pairs.converged.any())
        measured.append(int(pairs.num_matvecs))
        assert 1e-5 < float(pairs.noise) < 1e-3
    assert measured[1] == measured[0] + 3


def test_a_product_that_changes_is_not_converged(key):
    noise, values = np.random.default_rng(0), jnp.linspace(0.0, 2.0, N)

    def product(v):
        shake = jax.pure_callback(
            lambda x: (1e-3 * noise.standard_normal(x.shape)).astype(x.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype), v
        )
        return values * v + shake

    pairs = hj.eigsh(product, 2, key, which="LA", tol=1e-4, like=jnp.zeros(N), measure_noise=True)
    assert not bool(pairs.converged.any())
    assert float(pairs.noise) > 1e-3


@pytest.mark.slow
def test_a_clean_product_measures_as_rounding(key):
    values = jnp.linspace(0.0, 2.0, N)
    plain, measured = (
        hj.eigsh(Diagonal(values), 3, key, which="LA", tol=1e-3, measure_noise=measure) for measure in (False, True)
    )
    assert bool(measured.converged.all())
    assert float(measured.noise) <= 1e-5
    np.testing.assert_allclose(measured.eigenvalues, plain.eigenvalues, rtol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "storage", "reach"),
    [("float32", "bfloat16", 0.05), pytest.param("float64", "float32", 1e-6, marks=pytest.mark.slow)],
)
def test_narrow_basis_keeps_its_word(dtype, storage, reach, x64, key, rng):
    values = outliers(rng)
    op, scale = Diagonal(jnp.asarray(values, dtype)), 12.0
    pairs = hj.eigsh(op, 5, key, which="LA", tol=reach, basis_dtype=storage)
    vectors, found = np.asarray(pairs.eigenvectors, np.float64), np.asarray(pairs.eigenvalues, np.float64)
    true = np.linalg.norm(vectors * values - found[:, None] * vectors, axis=1)
    assert pairs.eigenvectors.dtype == dtype
    assert bool(pairs.converged.all())
    assert np.all(true <= reach * scale)
    np.testing.assert_allclose(found, wanted(values, 5, "LA"), atol=reach * scale)
    finer = hj.eigsh(op, 5, key, which="LA", tol=1e-9, basis_dtype=storage)
    assert np.all(np.asarray(finer.residuals) >= float(jnp.finfo(storage).eps) * scale)


@pytest.mark.parametrize("k", [2, 3])
def test_results_of_a_vmap_are_read_as_one_by_one(k, key):
    def solve(scale):
        values = scale * jnp.arange(20.0)
        return hj.eigsh(Diagonal(values), k, key, which="LA"), hj.lanczos(Diagonal(values), 5, key)

    pairs, krylov = jax.vmap(solve)(jnp.array([1.0, 1e3, 1e6]))
    for name in ("simple", "error_bounds", "angle_bounds"):
        one_by_one = jax.vmap(lambda p, name=name: getattr(p, name))(pairs)
        np.testing.assert_array_equal(getattr(pairs, name), one_by_one)
    for ours, theirs in zip(krylov.ritz(), jax.vmap(lambda x: x.ritz())(krylov), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_small_product_that_is_not_symmetric_or_not_the_same_twice_is_not_called_converged(key):
    matrix = jnp.diag(jnp.linspace(0.0, 3.0, 100)).at[3, 7].set(5.0)
    skew = hj.eigsh(lambda v: matrix @ v, 3, key, which="LA", like=matrix[0])
    assert not bool(skew.converged.any())
    assert float(skew.residuals.min()) >= float(skew.noise) > 0.1
    draws = np.random.default_rng(0)

    def trembling(v):
        factor = jax.pure_callback(
            lambda x: np.float32(1 + 1e-2 * draws.standard_normal()),
            jax.ShapeDtypeStruct((), v.dtype),
            v[0],
            vmap_method="sequential",
        )
        return jnp.linspace(0.0, 2.0, 100) * v * factor

    pairs = hj.eigsh(trembling, 2, key, which="LA", tol=1e-4, like=jnp.zeros(100), measure_noise=True)
    assert not bool(pairs.converged.any())
    assert int(pairs.num_matvecs) == 103


def test_pairs_print_as_a_table(key):
    op = hj.operator(lambda v: jnp.arange(300.0) * v, jnp.zeros(300))
    pairs = hj.eigsh(op, 2, key, which="LA", tol=1e-3)
    first, *rows = str(pairs).split("\n")
    assert first == f"2 of 2 eigenpairs converged, {int(pairs.num_matvecs)} products"
    assert [float(row.split()[0]) for row in rows] == pytest.approx(pairs.eigenvalues.tolist(), rel=1e-6)
    short = hj.eigsh(op, 2, key, which="SM", maxiter=1, ncv=3)
    assert str(short).count("not converged") == int(np.sum(~np.asarray(short.converged)))
    batch = jax.vmap(lambda key: hj.eigsh(op, 2, key, which="LA", tol=1e-2))(jax.random.split(key, 2))
    assert str(batch) == repr(batch)
    assert "f32[2,2]" in repr(batch)
    skew = 1e-4 * np.random.default_rng(0).standard_normal((300, 300)).astype(np.float32)
    never = hj.eigsh(lambda v: jnp.linspace(0.0, 1.0, 300) * v + skew @ v, 1, key, tol=1e-6, like=jnp.zeros(300))
    assert repr(never).endswith("not converged, at the product's noise")
    jax.jit(lambda pairs: pairs, donate_argnums=0)(never)
    assert "f32[1]" in repr(never)
    shown = []
    jax.jit(lambda pairs: shown.append(repr(pairs)))(pairs)
    assert "f32[2]" in shown[0]


def test_a_forgotten_call_and_a_key_out_of_place_are_named(key):
    with pytest.raises(TypeError, match=r"hvp\(loss\)\(params"):
        hj.eigsh(hj.hvp(jnp.sum), 2, key)
    with pytest.raises(TypeError, match="`key` should be"):
        hj.eigsh(lambda v: v, key, 2, like=jnp.zeros(3))
