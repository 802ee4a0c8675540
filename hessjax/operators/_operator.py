"""`Operator`: a symmetric linear map on a pytree, and the arithmetic of such maps.

What flows in: a function and the arrays it needs. What flows out: an object that every algorithm to the right takes.
An operator's arrays are leaves of the operator, so that they travel through `jax.jit` as arguments; only the functions
it calls are static, and two operators that differ in their arrays alone share one compiled program.
"""

import abc
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree, Scalar

from hessjax._function import Function, as_function
from hessjax._reads import reads_tracers
from hessjax._vectors import as_vector, full_precision, inner, scalar_dtype, size_of, structure_of, subtract
from hessjax.operators._convolutions import channel_last
from hessjax.operators._together import each

_DENSE_COLUMNS = 32  # products that `Operator.dense` runs together


class Operator(eqx.Module):
    """A symmetric linear map A on vectors that are pytrees of floating-point arrays.

    `op(v)` and `op @ v` apply it. Operators on the same structure add and subtract; a scalar multiplies or divides;
    `op.shift(s)` is A + sI. Symmetry is trusted here and measured by `hj.eigsh`.

    Subclasses define `like`, a pytree whose leaves have the shapes and dtypes of the vectors, and `product`.
    """

    @property
    @abc.abstractmethod
    def like(self) -> PyTree:
        """A pytree (of arrays or `jax.ShapeDtypeStruct`) shaped as the vectors are."""

    @abc.abstractmethod
    def product(self, vector: PyTree) -> PyTree:
        """Av for a vector that is known to have the right structure."""

    @property
    def structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the vectors, leaf by leaf."""
        return structure_of(self.like)

    @property
    def size(self) -> int:
        """The dimension n: the number of entries in all leaves together."""
        return size_of(self.structure)

    def __call__(self, vector: PyTree) -> PyTree:
        """Av.

        Args:
            vector: a pytree of `structure`; its leaves are cast to the structure's dtypes.

        Raises:
            ValueError: the tree or a shape differs.
        """
        return _apply(self, as_vector(vector, self.structure, "vector"))

    def __matmul__(self, vector: PyTree) -> PyTree:
        return self(vector)

    def shift(self, scalar: Any) -> "Operator":
        """A + sI, for a real scalar s."""
        return _Shifted(self, _scalar(scalar, self))

    def dense(self) -> Float[Array, "n n"]:
        """The matrix, rows and columns in the order of `jax.flatten_util.ravel_pytree`.

        Costs n products, run 32 at a time, and n² entries of memory: for small n, and for checking.
        """
        return _dense(self)

    def __add__(self, other: Any) -> "Operator":
        return _Sum(self, _partner(self, other)) if isinstance(other, Operator) else NotImplemented

    def __sub__(self, other: Any) -> "Operator":
        return self + (-1 * other) if isinstance(other, Operator) else NotImplemented

    def __mul__(self, scalar: Any) -> "Operator":
        return _Scaled(self, _scalar(scalar, self)) if _is_scalar(scalar) else NotImplemented

    def __rmul__(self, scalar: Any) -> "Operator":
        return self * scalar

    def __truediv__(self, scalar: Any) -> "Operator":
        return _Scaled(self, 1 / _scalar(scalar, self)) if _is_scalar(scalar) else NotImplemented

    def __neg__(self) -> "Operator":
        return -1 * self


def _is_scalar(value: Any) -> bool:
    return eqx.is_array_like(value) and jnp.ndim(value) == 0 and not jnp.iscomplexobj(value)


def _scalar(value: Any, op: Operator) -> Scalar:
    """A real number in the dtype of the operator's inner products, put on the device explicitly."""
    if not _is_scalar(value):
        what = f"shape {jnp.shape(value)}, dtype {jnp.result_type(value)}" if eqx.is_array_like(value) else repr(value)
        raise TypeError(f"An operator takes a real scalar here, got {what}.")
    dtype = scalar_dtype(op.structure)
    return value.astype(dtype) if isinstance(value, jax.Array) else jax.device_put(np.asarray(value, dtype))


def _partner(first: Operator, second: Operator) -> Operator:
    if first.structure != second.structure:
        raise ValueError(
            f"Operators add only on vectors of one structure, got {first.structure} and {second.structure}."
        )
    return second


@eqx.filter_jit
def _apply(operator: Operator, vector: PyTree) -> PyTree:
    return multiply(operator, vector)


@eqx.filter_jit
def _dense(operator: Operator) -> Float[Array, "n n"]:
    structure = operator.structure
    leaves, treedef = jtu.tree_flatten(structure)
    ends, n, dtype = [], 0, scalar_dtype(structure)
    for leaf in leaves:
        ends.append((n, n + size_of(leaf)))
        n += size_of(leaf)

    def column(index: Array) -> Array:
        flat = [
            (jnp.arange(low, high) == index).astype(leaf.dtype).reshape(leaf.shape)
            for (low, high), leaf in zip(ends, leaves, strict=True)
        ]
        image = jtu.tree_leaves(multiply(operator, treedef.unflatten(flat)))
        return jnp.concatenate([part.reshape(-1).astype(dtype) for part in image])

    return jax.lax.map(column, jnp.arange(n), batch_size=min(_DENSE_COLUMNS, n)).T


class _Sum(Operator):
    first: Operator
    second: Operator

    @property
    def like(self) -> PyTree:
        return self.first.like

    def product(self, vector: PyTree) -> PyTree:
        return jtu.tree_map(jnp.add, self.first.product(vector), self.second.product(vector))


class _Scaled(Operator):
    operator: Operator
    scalar: Scalar

    @property
    def like(self) -> PyTree:
        return self.operator.like

    def product(self, vector: PyTree) -> PyTree:
        return jtu.tree_map(lambda x: (self.scalar * x).astype(x.dtype), self.operator.product(vector))


class _Shifted(Operator):
    operator: Operator
    scalar: Scalar

    @property
    def like(self) -> PyTree:
        return self.operator.like

    def product(self, vector: PyTree) -> PyTree:
        return subtract(self.operator.product(vector), -self.scalar, vector)


class _Wrapped(Operator):
    """A user's `v -> Av`: its closed-over arrays, hoisted into leaves, and its structure."""

    matvec: Function
    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return self.treedef.unflatten(self.leaves)

    def product(self, vector: PyTree) -> PyTree:
        return as_image(self.matvec(vector), self.like, "matvec")


class _Foreign(Operator):
    """An object with lineax's `mv` and `in_structure`; its arrays stay leaves."""

    operator: Any

    @property
    def like(self) -> PyTree:
        return self.operator.in_structure()

    def product(self, vector: PyTree) -> PyTree:
        return as_image(self.operator.mv(vector), self.like, "mv")


def as_image(image: PyTree, structure: PyTree, name: str) -> PyTree:
    """Checks that a product lies in the space of its argument."""
    return as_vector(image, structure, f"{name}(v)")


def operator(matvec: Any, like: PyTree) -> Operator:
    """Wraps a symmetric v ↦ Av as an `Operator`.

    Arrays that `matvec` closes over, or reads from a global, become leaves of the operator, so that they are arguments
    of every compiled program that uses it, and can be differentiated. `matvec` is traced once, here; with such arrays
    every call is a trace of its own, for which what uses it is compiled anew. In a loop, wrap once and pass the
    operator through `jax.jit`, or write a subclass of `hj.Operator` with the arrays as fields.

    Args:
        matvec: a linear and symmetric function from pytrees shaped as `like` to the same. Trusted, not checked.
        like: a pytree of floating-point arrays, or of `jax.ShapeDtypeStruct`s; only shapes and dtypes are used.

    Raises:
        TypeError: `matvec` is no function, or a leaf of `like` is not a real floating-point array.
        ValueError: `matvec` returns another structure than it takes.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.array([3.0, 1.0, -1.0]) * v, like=jnp.zeros(3))
        >>> (A.shift(1.0) @ jnp.ones(3)).tolist()
        [4.0, 2.0, 0.0]
    """
    if not callable(matvec):
        raise TypeError(f"`operator` needs a function, got {type(matvec).__name__}. For a matrix A: `lambda v: A @ v`.")
    structure = structure_of(like)
    leaves, treedef = jtu.tree_flatten(structure)
    with full_precision():
        converted = eqx.filter_closure_convert(lambda v: matvec(v), structure)  # a lambda, so that globals count too
    eqx.filter_eval_shape(lambda v: as_image(converted(v), structure, "matvec"), structure)
    # A function without closed-over arrays stays itself: its identity then keys the compilation cache.
    hoisted = jtu.tree_leaves(eqx.filter(converted, eqx.is_array))
    return _Wrapped(as_function(converted if hoisted else matvec, "matvec"), tuple(leaves), treedef)


def hoisted(op: Operator, *functions: Function) -> Operator:
    """`op`, in which arrays being traced that a function closes over are leaves, so that they can be differentiated."""
    if reads_tracers(*(function.static for function in functions)):
        return operator(op.product, op.like)
    return op


def as_operator(op: Any, like: PyTree | None) -> Operator:
    """Any operator-like object: an `Operator`, a callable with `like=`, or one with lineax's `mv` and `in_structure`.

    Raises:
        TypeError: `op` is none of these, or a plain callable came without `like=`.
    """
    if isinstance(op, Operator):
        return op
    if callable(getattr(op, "mv", None)) and callable(getattr(op, "in_structure", None)):
        return _Foreign(op)
    if callable(op):
        if like is None:
            raise TypeError(
                "A plain function needs `like=`, a pytree shaped as its vectors. A transform such as `hj.hvp(loss)` is "
                "no operator yet: call it with the parameters, `hj.hvp(loss)(params, *args)`."
            )
        return operator(op, like)
    raise TypeError(
        f"Needs an `hj.Operator`, a function with `like=`, or a lineax operator, got {type(op).__name__}. "
        "A dense matrix A is `hj.operator(lambda v: A @ v, like=jnp.zeros(n))`."
    )


def multiply(op: Operator, vector: PyTree) -> PyTree:
    """Av, as every algorithm computes it: in full precision, its convolutions laid out for the platform."""
    with full_precision():
        return channel_last(op.product)(vector)


def multiply_each(op: Operator, block: PyTree[Float[Array, "count ..."]]) -> PyTree[Float[Array, "count ..."]]:
    """`multiply` of every vector of a block, as fast as the platform does that."""
    with full_precision():
        return each(op.product, block)


def quadratic_form(op: Operator, vector: PyTree) -> Scalar:
    """vᵀAv."""
    return inner(vector, multiply(op, vector))
