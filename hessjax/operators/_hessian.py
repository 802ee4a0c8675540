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
from jaxtyping import PyTree, Scalar

from hessjax._function import Function, as_function
from hessjax._vectors import structure_of
from hessjax.operators._examples import as_scalar
from hessjax.operators._operator import Operator, hoisted
from hessjax.operators._slices import as_batch_size, count_examples, mean_over_slices


def hvp(loss: Callable[..., Scalar], *, batch_size: Any = None) -> Callable[..., Operator]:
    """Transforms a loss into its Hessian: `(params, *args) -> Operator`.

    The operator at (θ, *args) maps v to ∇²L(θ) v. `params` and `args` are its leaves: new values of the same shapes
    reuse the compiled program, so pass data as arguments rather than by closure. A Python number among `args` is
    static, as a loss may branch on it: each value is a program of its own. `jnp.asarray` makes it an argument.

    Args:
        loss: `loss(params, *args)`, a real scalar. Traced when a product is, and again where something that its code
            names from outside its arguments (`data`, `config.scale`, `self.net`) has been rebound; but not for what
            was changed in place, such as an array or an entry of a list or a dict.
        batch_size: None for one product over all of `args`. Otherwise `loss` must be a mean over the leading axis of
            `args`, and a product sums over slices of that many examples, weighted by their count, in a loop inside the
            program: memory for one slice. A remainder is its own slice. Arrays without axes are passed whole. Any
            other loss gives another matrix, without a word: `hj.check_hvp(..., batch_size=)` tells.

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
    batch_size = as_batch_size(batch_size, "hvp")

    def build(params: PyTree, *args: Any) -> Operator:
        structure = structure_of(params)
        params = jtu.tree_map(lambda leaf, spec: jnp.asarray(leaf, spec.dtype), params, structure)
        args = jtu.tree_map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, args)
        if batch_size is not None:
            count_examples(args)
        hessian = Hessian(as_function(loss, "loss"), params, args, batch_size)
        return hoisted(hessian, hessian.loss)

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
