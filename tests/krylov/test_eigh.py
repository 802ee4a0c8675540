import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessjax.krylov._eigh import eigh, sequential_eigh


@pytest.mark.parametrize(("platform", "call"), [("cuda", "cusolver_syevd_ffi"), ("rocm", "hipsolver_syevd_ffi")])
def test_gpus_iterate_by_qr(platform, call):
    program = jax.jit(eigh).trace(jnp.ones((5, 5))).lower(lowering_platforms=(platform,)).as_text()
    assert call in program
    assert "algorithm = 1 : ui8" in program  # 0 leaves the choice to XLA, 2 is Jacobi's method


def test_lowers_where_there_is_no_qr():
    program = jax.jit(eigh).trace(jnp.ones((5, 5))).lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" in program


@pytest.mark.parametrize("solve", [eigh, sequential_eigh])
def test_is_the_decomposition_of_each_matrix_of_a_batch(solve, rng):
    matrices = rng.normal(size=(3, 6, 6)).astype(np.float32)
    matrices = matrices + matrices.swapaxes(1, 2)
    values, vectors = jax.vmap(solve)(jnp.asarray(matrices))
    np.testing.assert_allclose(values, np.linalg.eigvalsh(matrices), atol=1e-5)
    np.testing.assert_allclose(matrices @ vectors, vectors * values[:, None], atol=1e-5)
