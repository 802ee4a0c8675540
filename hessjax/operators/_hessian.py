"""The Hessian of a scalar loss, as an operator.

A product is forward over reverse: the derivative along v of the gradient, ∂/∂ε ∇L(θ + εv). It costs 2 to 3 gradients
and about twice a gradient's memory, and never forms the matrix.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from hessjax._function import Function, as_function, as_integer, closes_over_tracers
from hessjax._vectors import structure_of
from hessjax.operators._operator import Operator, operator


def hvp(loss: Callable[..., Scalar], *, batch_size: Any = None) -> Callable[..., Operator]:
    """Transforms a loss into its Hessian: `(params, *args) -> Operator`.

    The operator at (θ, *args) maps v to ∇²L(θ) v. `params` and `args` are its leaves: new values of the same shapes
    reuse the compiled program, so pass data as arguments rather than by closure.

    Args:
        loss: `loss(params, *args)`, a real scalar. Traced when a product is.
        batch_size: None for one product over all of `args`. Otherwise `loss` must be a mean over the leading axis of
            `args`, and a product sums over slices of that many examples, weighted by their count, in a loop inside the
            program: memory for one slice. A remainder is its own slice. Arrays without axes are passed whole.

    Returns:
        A function of `(params, *args)`. Its product raises ValueError when the loss is not a scalar.

    Raises:
        ValueError: `batch_size` is below 1, or (when called) the leading lengths of `args` differ.
        TypeError: (when called) a leaf of `params` is not a floating-point array; the message names its path.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2) / 2
        >>> A = hj.hvp(loss)(jnp.zeros(2), jnp.array([[2.0, 0.0], [0.0, 4.0]]))
        >>> A(jnp.ones(2)).tolist()
        [2.0, 8.0]

    Source: Pearlmutter, Fast exact multiplication by the Hessian, doi:10.1162/neco.1994.6.1.147.
    """
    if batch_size is not None and (batch_size := as_integer("batch_size", batch_size)) < 1:
        raise ValueError(f"`hvp` needs `batch_size >= 1`, or None for one slice, got {batch_size}.")

    def build(params: PyTree, *args: Any) -> Operator:
        structure = structure_of(params)
        params = jtu.tree_map(lambda leaf, spec: jnp.asarray(leaf, spec.dtype), params, structure)
        args = jtu.tree_map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, args)
        if batch_size is not None:
            count_examples(args)
        hessian = Hessian(as_function(loss), params, args, batch_size)
        # Traced arrays in a closure are made leaves, so that the algorithms can differentiate with respect to them.
        return operator(hessian.product, params) if closes_over_tracers(hessian.loss) else hessian

    return build


class Hessian(Operator):
    """∇²L(θ) for `loss(params, *args)`. Made by `hj.hvp`."""

    loss: Function
    params: PyTree
    args: tuple[Any, ...]
    batch_size: int | None = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return self.params

    def product(self, vector: PyTree) -> PyTree:
        def on(args: tuple[Any, ...]) -> PyTree:
            gradient = jax.grad(lambda params: as_scalar(self.loss(params, *args)))
            return jax.jvp(gradient, (self.params,), (vector,))[1]

        if self.batch_size is None:
            return on(self.args)
        return mean_over_slices(on, self.args, self.batch_size, like=self.params)


def as_scalar(value: Any) -> Scalar:
    """`value`, if it is a real scalar.

    Raises:
        ValueError: it is not; the message says what came.
    """
    if (
        not eqx.is_array_like(value)
        or jnp.shape(value) != ()
        or not jnp.issubdtype(jnp.result_type(value), jnp.floating)
    ):
        what = f"shape {jnp.shape(value)}, dtype {jnp.result_type(value)}" if eqx.is_array_like(value) else repr(value)
        raise ValueError(f"The loss must be a real floating-point scalar, got {what}. Reduce it, e.g. by `jnp.mean`.")
    return jnp.asarray(value)


def _is_sliced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim > 0


def count_examples(args: PyTree) -> int:
    """The common length of the leading axes in `args`.

    Raises:
        ValueError: there is none, or they differ.
    """
    lengths = {jtu.keystr(path): leaf.shape[0] for path, leaf in jtu.tree_leaves_with_path(args) if _is_sliced(leaf)}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise ValueError(
            "Data must have one leading length, at least 1, over all its arrays, got "
            f"{lengths or 'no array'}. Arrays that are not per example belong in a closure or in the parameters."
        )
    return next(iter(lengths.values()))


def mean_over_slices(
    function: Callable[[PyTree], PyTree[Array]], args: PyTree, batch_size: int, like: PyTree[Array]
) -> PyTree[Array]:
    """Σ_b (n_b / N) function(slice b): the mean over N examples, from means over slices of at most `batch_size`.

    `like` has the shapes and dtypes of function's values. The slices run in one `lax.scan`, the remainder after it.
    """
    count = count_examples(args)
    whole, rest = divmod(count, batch_size)
    sliced, fixed = eqx.partition(args, _is_sliced)

    # Slices are read in place: a stack of them would copy the data wherever there is a remainder.
    def weighted(start_at: Any, examples: int) -> PyTree:
        part = jtu.tree_map(lambda x: jax.lax.dynamic_slice_in_dim(x, start_at, examples), sliced)
        value = function(eqx.combine(part, fixed))
        return jtu.tree_map(lambda x, total: (examples / count) * x.astype(total.dtype), value, start)

    def step(total: PyTree, index: Array) -> tuple[PyTree, None]:
        return jtu.tree_map(jnp.add, total, weighted(index * batch_size, batch_size)), None

    # In half precision a running sum of small terms would stand still.
    start = jtu.tree_map(lambda x: jnp.zeros(x.shape, jnp.result_type(x.dtype, jnp.float32)), like)
    total = start
    if whole:
        total, _ = jax.lax.scan(step, start, jnp.arange(whole))
    if rest:
        total = jtu.tree_map(jnp.add, total, weighted(whole * batch_size, rest))
    return jtu.tree_map(lambda x, y: x.astype(y.dtype), total, like)
