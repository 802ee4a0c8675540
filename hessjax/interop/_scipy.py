"""An operator as SciPy sees it."""

from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from hessjax._vectors import scalar_dtype
from hessjax.operators import Operator
from hessjax.operators._operator import as_operator, multiply

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


def as_scipy(op: Operator | Any, *, like: PyTree | None = None) -> "LinearOperator":
    """A `scipy.sparse.linalg.LinearOperator` that runs the compiled product on flat NumPy vectors.

    Args:
        op: a symmetric operator, n × n.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A LinearOperator of shape (n, n). Flat vectors have the order of `jax.flatten_util.ravel_pytree`. Every product
        copies a vector to the device and back.

    Raises:
        ImportError: SciPy is not installed.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, numpy as np
        >>> A = hj.operator(lambda v: jnp.arange(1.0, 4.0) * v, like=jnp.zeros(3))
        >>> (hj.as_scipy(A) @ np.ones(3)).tolist()
        [1.0, 2.0, 3.0]
    """
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:  # pragma: no cover - jax itself depends on SciPy
        raise ImportError("`as_scipy` needs SciPy: pip install 'hessjax[examples]'.") from error
    op = as_operator(op, like)
    dtype = np.dtype(scalar_dtype(op.structure))
    zeros = jax.tree_util.tree_map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), op.structure)
    unravel = ravel_pytree(zeros)[1]

    def matvec(flat: np.ndarray) -> np.ndarray:
        if np.iscomplexobj(flat):
            return matvec(np.real(flat)) + 1j * matvec(np.imag(flat))
        return np.asarray(_product(op, unravel(jnp.asarray(flat.reshape(-1), dtype))))

    return LinearOperator(shape=(op.size, op.size), matvec=matvec, rmatvec=matvec, dtype=dtype)  # pyright: ignore[reportCallIssue] SciPy's stub has no constructor


@eqx.filter_jit
def _product(op: Operator, vector: PyTree) -> Array:
    return ravel_pytree(multiply(op, vector))[0]
