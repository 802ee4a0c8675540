"""How far a product is from a deterministic and symmetric one, measured."""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax import lax
from jaxtyping import PRNGKeyArray, Scalar

from hessjax._vectors import divide, draw, inner, norm
from hessjax.operators._operator import Operator

NOISE_PRODUCTS = 3


def product_noise(op: Operator, key: PRNGKeyArray) -> Scalar:
    """The norm of the error in one product with a unit vector, from three products.

    For random unit vectors u and w: how much Au changes when it is computed again, and |uᵀAw - wᵀAu| √(n/2), which is
    the norm of an error whose entries are independent.
    """
    first, second = jax.random.split(key)
    u, w = (divide(z, norm(z)) for z in (draw(first, op.structure), draw(second, op.structure)))
    images = lax.map(lambda v: op.product(v), jtu.tree_map(lambda a, b: jnp.stack([a, a, b]), u, w))
    once, again, other = (jtu.tree_map(lambda leaf, i=i: leaf[i], images) for i in range(NOISE_PRODUCTS))
    asymmetry = jnp.abs(inner(w, once) - inner(u, other)) * (op.size / 2) ** 0.5
    return jnp.maximum(norm(jtu.tree_map(jnp.subtract, once, again)), asymmetry)
