"""Vectors that are pytrees: their structure, inner product, norm, and random draws.

The left-most room. A *vector* is any pytree of floating-point arrays; the leaves keep their own shape, dtype and
sharding, and are never raveled into one array. Scalars that mix leaves (inner products, norms, Lanczos coefficients)
live in the widest dtype among the leaves, and at least in float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar


def structure_of(vector: PyTree) -> PyTree[jax.ShapeDtypeStruct]:
    """The shapes and dtypes of `vector`'s leaves, refusing leaves that are not floating-point numbers.

    Raises:
        TypeError: a leaf is not a real floating-point array; the message names its path, and what to do.
    """

    def describe(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, float) and not isinstance(leaf, np.floating):
            return jax.ShapeDtypeStruct((), jnp.result_type(float))
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            what = f"dtype {dtype}" if dtype is not None else f"type {type(leaf).__name__}"
            raise TypeError(
                f"Curvature is taken with respect to real floating-point arrays, but the leaf at "
                f"`{jtu.keystr(path) or 'the root'}` has {what}. Split the tree with "
                "`params, static = eqx.partition(tree, eqx.is_inexact_array)` and combine them inside the loss."
            )
        return jax.ShapeDtypeStruct(leaf.shape, jax.dtypes.canonicalize_dtype(dtype))

    return jtu.tree_map_with_path(describe, vector)


def row_structure(rows: PyTree[Array]) -> PyTree[jax.ShapeDtypeStruct]:
    """The structure of one vector of several, which are stacked on a leading axis."""
    return jtu.tree_map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), rows)


def as_vector(vector: PyTree, structure: PyTree[jax.ShapeDtypeStruct], name: str) -> PyTree[Array]:
    """`vector` with `structure`'s dtypes.

    Raises:
        ValueError: tree or shapes differ from `structure`, or a leaf is complex; the message names the first such leaf.
    """
    got, wanted = jtu.tree_structure(vector), jtu.tree_structure(structure)
    if got != wanted:
        raise ValueError(f"`{name}` must be a pytree with the structure {wanted}, got {got}.")

    def cast(path: tuple[Any, ...], spec: jax.ShapeDtypeStruct, leaf: Any) -> Array:
        if jnp.shape(leaf) != spec.shape:
            raise ValueError(
                f"`{name}` must have shape {spec.shape} at `{jtu.keystr(path) or 'the root'}`, got {jnp.shape(leaf)}."
            )
        if jnp.iscomplexobj(leaf):
            raise ValueError(f"`{name}` must be real, but is complex at `{jtu.keystr(path) or 'the root'}`.")
        return jnp.asarray(leaf, dtype=spec.dtype)

    return jtu.tree_map_with_path(cast, structure, vector)


def is_known(value: Any) -> bool:
    """Whether `value` is an array whose numbers can be looked at: not traced, a placeholder, donated or elsewhere."""
    if isinstance(value, jax.Array):
        return not isinstance(value, Tracer) and value.is_fully_addressable and not value.is_deleted()
    return eqx.is_array_like(value)


def are_known_scalars(*values: Any) -> bool:
    """Whether each is a number that can be looked at, and no batch of them."""
    return all(is_known(value) and jnp.ndim(value) == 0 for value in values)


def size_of(structure: PyTree) -> int:
    """The number of scalar entries n."""
    return sum(int(np.prod(leaf.shape)) for leaf in jtu.tree_leaves(structure))


def scalar_dtype(structure: PyTree) -> np.dtype:
    """The dtype of inner products: the widest of the leaves' dtypes, at least float32."""
    leaves = jtu.tree_leaves(structure)
    return jnp.result_type(jnp.float32, *(leaf.dtype for leaf in leaves)) if leaves else np.dtype(jnp.float32)


def epsilon(structure: PyTree) -> float:
    """The rounding unit of a vector: that of its least precise leaf."""
    units = (float(jnp.finfo(leaf.dtype).eps) for leaf in jtu.tree_leaves(structure) if size_of(leaf) > 0)
    return max(units, default=float(jnp.finfo(jnp.float32).eps))


def noise_of(image: PyTree[Array]) -> Scalar:
    """How long a vector may be that is nothing but the rounding of a product and of sums with it.

    32 rounding units of each leaf's own part; 4 of a leaf in half precision, whose sums are formed in float32, so that
    it is rounded only where it is stored.
    """
    dtype = scalar_dtype(image)

    def part(leaf: Array) -> Scalar:
        units = 32 if leaf.dtype.itemsize > 2 else 4
        return norm(leaf).astype(dtype) * (units * float(jnp.finfo(leaf.dtype).eps))

    return norm([part(leaf) for leaf in jtu.tree_leaves(image)]).astype(dtype)


def contract(x: Array, y: Array, axes: Any, dtype: DTypeLike) -> Array:
    """`tensordot` at the highest precision, accumulated in `dtype`."""
    return jnp.tensordot(x, y, axes=axes, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype)


def matmul(x: Array, y: Array) -> Array:
    """The product x @ y at the highest precision: a GPU's default shortens float32 to 10 bits of mantissa."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def inner(x: PyTree, y: PyTree) -> Scalar:
    """⟨x, y⟩, summed over all leaves."""
    dtype = scalar_dtype(x)
    parts = jtu.tree_map(lambda a, b: contract(a, b, a.ndim, dtype).astype(dtype), x, y)
    return sum(jtu.tree_leaves(parts), jnp.zeros((), dtype))


def gram(x: PyTree[Float[Array, "k ..."]], y: PyTree[Float[Array, "m ..."]]) -> Float[Array, "k m"]:
    """The inner products ⟨xᵢ, yⱼ⟩ of two stacks of vectors."""
    dtype = scalar_dtype(x)

    def pair(a: Array, b: Array) -> Array:
        axes = tuple(range(1, a.ndim))
        return contract(a, b, (axes, axes), dtype).astype(dtype)

    return sum(jtu.tree_leaves(jtu.tree_map(pair, x, y)), jnp.zeros((), dtype))


def combine(x: PyTree[Float[Array, "k ..."]], weights: Float[Array, "k m"]) -> PyTree[Float[Array, "m ..."]]:
    """The m combinations Σᵢ wᵢⱼ xᵢ of a stack of vectors."""
    return jtu.tree_map(lambda leaf: contract(weights.T, leaf, 1, weights.dtype).astype(leaf.dtype), x)


def stacked(
    first: PyTree[Float[Array, "k ..."]], second: PyTree[Float[Array, "m ..."]]
) -> PyTree[Float[Array, "both ..."]]:
    """Two stacks of vectors as one."""
    return jtu.tree_map(lambda a, b: jnp.concatenate([a, b]), first, second)


def or_one(x: Array) -> Array:
    """x, and 1 where it is not positive: a unit to divide by."""
    return jnp.where(x > 0, x, 1)


def norm(x: PyTree, size: Scalar | None = None) -> Scalar:
    """‖x‖₂, safe from overflow and underflow at any scale of x.

    Where a `size` is known that x does not exceed by far, and below whose rounding x does not matter, x is read once.
    """
    dtype = scalar_dtype(x)
    if size is None:
        peaks = [jnp.max(jnp.abs(leaf), initial=0).astype(dtype) for leaf in jtu.tree_leaves(x)]
        size = jnp.max(jnp.stack(peaks)) if peaks else jnp.zeros((), dtype)
    unit = or_one(size)
    # One quotient rather than one per entry, kept among the normal numbers.
    inverse = jnp.clip(1 / unit, jnp.finfo(dtype).tiny, jnp.finfo(dtype).max)
    squares = [jnp.sum(jnp.square(leaf.astype(dtype) * inverse)) for leaf in jtu.tree_leaves(x)]
    return jnp.sqrt(sum(squares, jnp.zeros((), dtype))) / inverse


def divide(x: PyTree, by: Scalar) -> PyTree:
    """Scales to x / by, and zero where `by` is zero."""
    safe = jnp.where(by == 0, 1, by)
    return jtu.tree_map(lambda leaf: jnp.where(by == 0, 0, leaf / safe).astype(leaf.dtype), x)


def subtract(x: PyTree, scalar: Scalar, y: PyTree) -> PyTree:
    """Computes x - scalar · y, in x's dtypes."""
    return jtu.tree_map(lambda a, b: (a - scalar * b).astype(a.dtype), x, y)


def select(predicate: Array, x: PyTree, y: PyTree) -> PyTree:
    """Chooses x where the scalar `predicate` holds, else y."""
    return jtu.tree_map(lambda a, b: jnp.where(predicate, a, b), x, y)


def draw(key: PRNGKeyArray, structure: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Float[Array, "..."]]:
    """A standard normal vector, one independent key per leaf."""
    leaves, treedef = jtu.tree_flatten(structure)
    # One leaf needs no keys of its own; a split costs as many kernels as a draw.
    keys = [key] if len(leaves) == 1 else jax.random.split(key, max(len(leaves), 1))[: len(leaves)]
    return treedef.unflatten(
        [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    )


def full_precision() -> contextlib.AbstractContextManager[None]:
    """Where matrix products and convolutions of unstated precision are computed in their own dtype.

    A GPU shortens float32 operands to 10 bits of mantissa (TF32) unless told otherwise. Forward values stand that; a
    curvature product is then wrong by 5e-4 of its norm and as asymmetric, so that small eigenvalues drown. What the
    user chose is kept: an explicit `precision=`, or `jax.default_matmul_precision`.
    """
    chosen = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue] added at run time
    return contextlib.nullcontext() if chosen is not None else jax.default_matmul_precision("highest")


@contextlib.contextmanager
def usual_promotion() -> Iterator[None]:
    """Where shapes and dtypes combine as NumPy's do, though the caller may have told JAX to be strict about them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield
