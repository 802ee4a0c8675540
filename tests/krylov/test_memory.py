import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal

import hessjax as hj
from hessjax.krylov._memory import default_ncv

N = 20_000


def peak(k, ncv, storage=None, n=N, which="LA", dtype=jnp.float32):
    """Bytes of the compiled program: XLA's own figure."""

    def solve(values, key):
        return hj.eigsh(Diagonal(values), k, key, which=which, tol=1e-3, ncv=ncv, basis_dtype=storage)

    compiled = jax.jit(solve).lower(jnp.linspace(0.0, 1.0, n, dtype=dtype), jax.random.key(0)).compile()
    analysis = compiled.memory_analysis()
    return analysis.temp_size_in_bytes + analysis.output_size_in_bytes


@pytest.mark.parametrize(("k", "ncv"), [pytest.param(1, 20, marks=pytest.mark.slow), (6, 100)])
def test_compiled_program_holds_what_was_promised(k, ncv):
    op = Diagonal(jnp.linspace(0.0, 1.0, N))
    measured, estimate = peak(k, ncv), hj.memory_estimate(op, k, ncv)
    vectors = (ncv + 2 * k + 12) * N * 4
    assert measured <= vectors + 50 * ncv**2 * 4
    assert 0.8 * measured <= estimate <= 1.2 * measured


def test_narrow_basis_saves_memory():
    narrow = peak(6, 100, "bfloat16")
    assert narrow <= 0.75 * peak(6, 100)
    estimate = hj.memory_estimate(Diagonal(jnp.zeros(N)), 6, 100, basis_dtype="bfloat16")
    assert 0.8 * narrow <= estimate <= 1.25 * narrow


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_is_not_widened_as_a_whole(dtype):
    half = peak(6, 100, dtype=dtype)
    assert half <= 0.75 * peak(6, 100)
    estimate = hj.memory_estimate(Diagonal(jnp.zeros(N, dtype)), 6, 100)
    assert 0.9 * half <= estimate <= 1.25 * half


@pytest.mark.parametrize(("k", "ncv"), [pytest.param(20, 60, marks=pytest.mark.slow), (6, 40)])
def test_the_interior_needs_more(k, ncv):
    measured = peak(k, ncv, which="SM")
    estimate = hj.memory_estimate(Diagonal(jnp.zeros(N)), k, ncv, which="SM")
    assert measured <= estimate <= 1.15 * measured


def test_limit_sets_the_krylov_dimension(key):
    structure, op = jax.ShapeDtypeStruct((N,), jnp.float32), Diagonal(jnp.linspace(0.0, 1.0, N))
    limit = hj.memory_estimate(op, 6, 50)
    assert default_ncv(structure, 6, "LA", limit) == 50
    assert default_ncv(structure, 6, "LA", limit - 1) == 49
    assert default_ncv(structure, 6, "SA", 10**12) == 6 + 256
    pairs = hj.eigsh(op, 6, key, which="LA", tol=1e-2, memory_limit=limit)
    assert pairs.eigenvalues.shape == (6,)
    with pytest.raises(ValueError, match=r"`memory_limit` = 1,000 bytes.*20"):
        hj.eigsh(op, 6, key, memory_limit=1000)


def test_default_dimension_is_never_below_scipys():
    structure = jax.ShapeDtypeStruct((10**13,), jnp.float32)  # no machine holds one vector
    assert default_ncv(structure, 3, "LA") == 20
    assert default_ncv(structure, 40, "SA") == 81
    assert default_ncv(jax.ShapeDtypeStruct((30,), jnp.float32), 25, "BE") == 30


def test_large_vectors_get_few_rows_where_outliers_are_wanted():
    structure = jax.ShapeDtypeStruct((85_002,), jnp.float32)
    assert default_ncv(structure, 6, "SA", 10**12) == 6 + 256
    assert default_ncv(structure, 6, "LA", 10**12) == default_ncv(structure, 6, "LM", 10**12) == 2 * 6 + 20
    free = default_ncv(jax.ShapeDtypeStruct((20_000,), jnp.float32), 6, "LA", 10**12)
    assert free * 20_000 * 4 <= 2**23 < (free + 1) * 20_000 * 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(k=0), ValueError, "got 0"),
        (dict(k=6, ncv=N + 1), ValueError, f"got {N + 1}"),
        (dict(k=6, ncv=6), ValueError, "`ncv` above `k` = 6"),
        (dict(k=6, which="XX"), ValueError, "got 'XX'"),
        (dict(k=6, basis_dtype="int8"), TypeError, "int8"),
        (dict(k=6, basis_dtype="abc"), TypeError, "'abc'"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        hj.memory_estimate(Diagonal(jnp.zeros(N)), **arguments)


@pytest.mark.parametrize("shape", [(200_000, 1), (512, 400, 1, 1), (1, 200_000)])
def test_axes_of_length_one_cost_no_copy_of_the_basis(shape, key):
    def solve(values):
        return hj.eigsh(hj.operator(lambda v: values * v, values), 6, key, which="LA", ncv=40, tol=1e-3)

    def peak(shape):
        memory = jax.jit(solve).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    size = int(np.prod(shape))
    assert peak(shape) < 1.1 * peak((size,))
    spec = jax.ShapeDtypeStruct(shape, "float32")
    assert peak(shape) <= hj.memory_estimate(lambda v: v, 6, 40, which="LA", like=spec)
