"""The eigendecomposition of a small symmetric matrix, the same on every device."""

import jax
from jax import lax
from jaxtyping import Array, Float


def eigh(matrix: Float[Array, "... m m"]) -> tuple[Float[Array, "... m"], Float[Array, "... m m"]]:
    """Eigenvalues ascending, and eigenvectors in columns, by QR iteration.

    JAX's own choice on a GPU is Jacobi's method up to 32 rows. On an H100 that left residuals of 8 to 42 rounding
    units, QR 1 to 9 (30 rows, both dtypes), and took 1.3 to 3 times as long from 4 to 20 rows.
    """

    def by_qr(matrix: Array) -> tuple[Array, Array]:
        return lax.linalg.eigh(matrix, implementation=lax.linalg.EighImplementation.QR)

    vectors, values = lax.platform_dependent(matrix, tpu=lax.linalg.eigh, default=by_qr)
    return values, vectors


@jax.custom_batching.sequential_vmap
def sequential_eigh(matrix: Float[Array, "m m"]) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """`eigh`, under `vmap` one after another (see `_projected.refresh`)."""
    return eigh(matrix)
