"""What SciPy asks of its own `eigsh` for real symmetric matrices, asked of this one, through both of its doors.

Up to n = 256 the matrix is formed; `ncv` or `v0` sends the same problem through the iteration. Nearly all problems are
30 by 30 and share their compiled programs. Truth is `scipy.linalg.eigh`.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix, wanted
from scipy.linalg import eigh

import hessjax as hj

N, K = 30, 2
# SciPy's own tolerances, absolute and relative: a few thousand rounding units of entries and of eigenvalues.
UNITS = {"float32": 3000, "float64": 2000}


def kinds():
    """Symmetric matrices that single precision holds exactly, so that both precisions have the same eigenvalues."""
    rng = np.random.default_rng(2300)
    square = rng.random((N, N))
    gram, mean = square @ square.T / 8, (square + square.T) / 2
    holes = rng.random((N, N)) < 0.25
    band = np.diag(np.ones(N - 1), 1)
    matrices = {
        "positive semidefinite": gram,
        "symmetric": mean,
        "positive definite": mean + N * np.eye(N),
        "negative definite": -mean - N * np.eye(N),
        "sparse": np.where(holes | holes.T, 0, gram),
        "diagonal": np.diag(rng.standard_normal(N)),
        "tridiagonal": band + band.T - 2 * np.eye(N),
        "rank one": np.outer(square[0], square[0]),
        "identity": np.eye(N),
        "zero": np.zeros((N, N)),
    }
    return {name: matrix.astype(np.float32).astype(np.float64) for name, matrix in matrices.items()}


KINDS = kinds()


def operator_of(kind, dtype):
    return Matrix(jnp.asarray(KINDS[kind], dtype))


def units(dtype):
    return UNITS[dtype] * float(jnp.finfo(dtype).eps)


def assert_solves(pairs, matrix, exact, dtype):
    """SciPy's two checks, eigenvalues and A v = λ v, and that what passes them says so."""
    tolerance = units(dtype)
    values, vectors = np.asarray(pairs.eigenvalues, np.float64), np.asarray(pairs.eigenvectors, np.float64)
    assert pairs.eigenvalues.dtype == pairs.eigenvectors.dtype == dtype
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(values, exact, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(vectors @ matrix, values[:, None] * vectors, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("which", ["LM", "SM", "LA", "SA", "BE"])
def test_every_kind_by_its_matrix(which, dtype, x64, key):
    for kind, matrix in KINDS.items():
        pairs = hj.eigsh(operator_of(kind, dtype), K, key, which=which)
        assert_solves(pairs, matrix, wanted(eigh(matrix, eigvals_only=True), K, which), dtype)


@pytest.mark.parametrize(
    ("which", "dtype", "given"),
    [("LM", "float64", "key"), ("LA", "float32", "v0"), ("SA", "float64", "v0"), ("BE", "float32", "key")],
)
def test_every_kind_by_iteration(which, dtype, given, x64, key, rng):
    for kind, matrix in KINDS.items():
        start = dict(key=key) if given == "key" else dict(v0=rng.uniform(size=N))
        pairs = hj.eigsh(operator_of(kind, dtype), K, which=which, ncv=20, **start)
        assert_solves(pairs, matrix, wanted(eigh(matrix, eigvals_only=True), K, which), dtype)


@pytest.mark.parametrize("dtype", UNITS)
def test_sigma_is_nearest(dtype, x64, key):
    """SciPy's shift 0.5, the ends and beyond them, and shifts that are eigenvalues, where A - σ is singular."""
    for kind, matrix in KINDS.items():
        exact = eigh(matrix, eigvals_only=True)
        for sigma in (0.0, 0.5, exact[0], exact[N // 2], exact[-1], exact[0] - 1, exact[-1] + 100):
            pairs = hj.eigsh(operator_of(kind, dtype), K, key, sigma=sigma)
            distance, nearest = (
                np.abs(np.asarray(pairs.eigenvalues, np.float64) - sigma),
                np.sort(np.abs(exact - sigma)),
            )
            np.testing.assert_allclose(np.sort(distance), nearest[:K], atol=units(dtype) * max(1, np.abs(exact).max()))
            found = np.abs(np.asarray(pairs.eigenvalues)[:, None] - exact).min(axis=1)
            np.testing.assert_allclose(found, 0, atol=units(dtype) * max(1, np.abs(exact).max()))
            assert bool(pairs.converged.all())


def test_k_wanted_are_among_the_k_plus_one_wanted(x64, key):
    for kind in ("symmetric", "sparse"):
        for choice in (dict(which="LM"), dict(sigma=0.0), dict(sigma=5.0)):
            fewer = np.zeros(0)
            for k in (1, 2, 3):
                more = np.asarray(hj.eigsh(operator_of(kind, "float64"), k, key, **choice).eigenvalues)
                assert np.all(np.abs(fewer[:, None] - more).min(axis=1, initial=0) <= 1e-12 * N)
                fewer = more
            assert len(fewer) == 3


@pytest.mark.parametrize(("k", "extra"), [(N, {}), (N - 1, {}), (N - 1, dict(ncv=N))])
def test_all_or_all_but_one(k, extra, x64, key):
    matrix = KINDS["symmetric"]
    pairs = hj.eigsh(operator_of("symmetric", "float64"), k, key, which="LA", **extra)
    assert_solves(pairs, matrix, eigh(matrix, eigvals_only=True)[N - k :], "float64")


def test_no_convergence_returns_what_was_found(x64):
    """SciPy raises with the converged pairs attached; here all are returned, and the flags tell them apart."""
    matrix = KINDS["positive semidefinite"]
    pairs = hj.eigsh(operator_of("positive semidefinite", "float64"), 4, v0=matrix[:, 0], maxiter=2, ncv=9)
    converged, tolerance = np.asarray(pairs.converged), units("float64")
    assert 0 < converged.sum() < 4
    values, vectors = np.asarray(pairs.eigenvalues), np.asarray(pairs.eigenvectors)
    off = vectors @ matrix - values[:, None] * vectors
    np.testing.assert_allclose(off[converged], 0, atol=tolerance * values.max())
    np.testing.assert_allclose(np.linalg.norm(off, axis=1), pairs.residuals, atol=tolerance)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
def test_nine_largest_of_a_thousand_with_a_small_basis(dtype, x64, rng):
    values = jnp.arange(1.0, 1001.0, dtype=dtype)
    pairs = hj.eigsh(Diagonal(values), 9, v0=rng.random(1000), ncv=2 * 9 + 1)
    assert bool(pairs.converged.all())
    np.testing.assert_allclose(pairs.eigenvalues, np.arange(992.0, 1001.0), rtol=units(dtype))


def test_values_without_vectors_are_the_same(x64, key):
    op = operator_of("symmetric", "float64")
    alone = hj.eigsh(op, K, key, which="SA", return_eigenvectors=False)
    assert alone.eigenvectors is None
    np.testing.assert_array_equal(alone.eigenvalues, hj.eigsh(op, K, key, which="SA").eigenvalues)


def test_threads_agree_to_the_bit(key):
    op, found = operator_of("tridiagonal", "float32"), []

    def worker():
        found.append(np.asarray(hj.eigsh(op, K, key, which="LM").eigenvalues))

    threads = [threading.Thread(target=worker) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(np.array_equal(values, found[0]) for values in found)


def test_batches_agree_with_single_solves(x64, key):
    names = ["symmetric", "tridiagonal", "zero"]
    matrices = jnp.stack([jnp.asarray(KINDS[name]) for name in names])
    batch = jax.vmap(lambda matrix: hj.eigsh(Matrix(matrix), K, key, which="LA"))(matrices)
    assert bool(batch.converged.all())
    for name, values in zip(names, batch.eigenvalues, strict=True):
        np.testing.assert_allclose(values, eigh(KINDS[name], eigvals_only=True)[-K:], atol=1e-12)


def test_a_product_may_itself_solve_an_eigenproblem(x64, key):
    inner = Diagonal(jnp.array([3.0, 1.0, 2.0]))

    def product(v):
        return hj.eigsh(inner, 1, key, which="LA", return_eigenvectors=False).eigenvalues[0] * v

    pairs = hj.eigsh(product, 2, key, like=jnp.zeros(4))
    np.testing.assert_allclose(pairs.eigenvalues, 3.0, rtol=1e-14)


@pytest.mark.parametrize("which", ["LM", "BE", "SM"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_dimension(which, shape, key):
    pairs = hj.eigsh(hj.operator(lambda v: -3 * v, jnp.zeros(shape)), 1, key, which=which)
    np.testing.assert_allclose(pairs.eigenvalues, [-3.0])
    np.testing.assert_allclose(np.abs(pairs.eigenvectors), np.ones((1, *shape)))
    assert bool(pairs.converged.all())


REFUSED = {
    "unknown which": (lambda op, key: hj.eigsh(op, K, key, which="XX"), ValueError, "'XX'"),
    "which of another solver": (lambda op, key: hj.eigsh(op, K, key, which="LR"), ValueError, "LM, LA, SA, BE"),
    "k above n": (lambda op, key: hj.eigsh(op, N + 1, key), ValueError, f"{N}.*got {N + 1}"),
    "k zero": (lambda op, key: hj.eigsh(op, 0, key), ValueError, "got 0"),
    "not square": (
        lambda _, key: hj.eigsh(lambda v: jnp.ones((2, 3)) @ v, 1, key, like=jnp.zeros(3)),
        ValueError,
        r"\(3,\).*\(2,\)",
    ),
    "complex": (
        lambda _, key: hj.eigsh(lambda v: v, 1, key, like=jnp.zeros(4, jnp.complex64)),
        TypeError,
        "real.*complex64",
    ),
    "integers": (lambda _, key: hj.eigsh(lambda v: v, 1, key, like=jnp.zeros(4, int)), TypeError, "real.*int"),
    "nothing to multiply": (lambda _, key: hj.eigsh(lambda v: v, 1, key, like=()), ValueError, "got 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_what_came(case, key):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call(Diagonal(jnp.ones(N)), key)
