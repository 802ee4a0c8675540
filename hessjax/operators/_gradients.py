"""Second moments of the per-example gradients: the empirical Fisher matrix and the gradients' covariance.

Both are (1/N) Kᵀ P K for the N × n matrix K whose rows are the per-example gradients, with P = I or the projection that
removes the mean. K is the Jacobian of the vector of per-example losses, so that a product is one pass of tangents and
one of cotangents, and no gradient of a single example is ever formed.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree, Scalar

from hessjax._function import Function, as_function
from hessjax._vectors import scalar_dtype
from hessjax.operators._examples import Data, as_arguments, as_batch_size, hoisted, outputs_of
from hessjax.operators._hessian import as_scalar, mean_over_slices
from hessjax.operators._operator import Operator


def empirical_fisher(
    forward: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Scalar],
    *,
    batch_size: Any = None,
) -> Callable[[PyTree, PyTree, PyTree], Operator]:
    """Transforms a model and its loss into the uncentred second moment of the gradients: `(params, inputs, targets)`.

    E = (1/N) Σₙ gₙgₙᵀ with gₙ the gradient of the n-th example's loss at its own target. That is not the Fisher matrix,
    whose targets are drawn from the model: see `hj.fisher`. A product costs one pass of tangents and one of cotangents,
    as a Gauss-Newton product does, and memory for one slice.

    Args:
        forward: `forward(params, x)` on one example.
        loss: `loss(output, target)` on one example, a real scalar.
        batch_size: examples per slice, summed in a loop inside the program; None for all at once. A remainder is its
            own slice.

    Returns:
        A function of `(params, inputs, targets)`, the latter two pytrees of arrays with the N examples leading. Its
        operator acts on pytrees shaped as `params`, and is positive semi-definite with rank at most N.

    Raises:
        ValueError: `batch_size` is below 1; when called, the examples' leading lengths differ or are missing; when
            applied, the loss is not a scalar.
        TypeError: when called, a leaf of `params` is not a floating-point array.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, optax
        >>> data = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])   # gradients 1 and 2
        >>> E = hj.empirical_fisher(lambda w, x: w * x, optax.losses.l2_loss)(jnp.array(1.0), *data)
        >>> E(1.0).item()
        2.5

    Source: Kunstner, Hennig and Balles, Limitations of the empirical Fisher approximation for natural gradient descent,
    arXiv:1905.12558.
    """
    return _transform(forward, loss, as_batch_size(batch_size, "empirical_fisher"), centred=False)


def gradient_covariance(
    forward: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Scalar],
    *,
    batch_size: Any = None,
) -> Callable[[PyTree, PyTree, PyTree], Operator]:
    """Transforms a model and its loss into the covariance of the per-example gradients: `(params, inputs, targets)`.

    C = (1/N) Σₙ (gₙ - ḡ)(gₙ - ḡ)ᵀ with ḡ = ∇L the mean gradient: the noise of a stochastic gradient is C / b for
    batches of b drawn with replacement. Divided by N, not N - 1. The mean is removed before the product is summed, so
    that nothing cancels where ḡ is large; with `batch_size` that takes one more pass of tangents over the data.

    Args:
        forward: `forward(params, x)` on one example.
        loss: `loss(output, target)` on one example, a real scalar.
        batch_size: examples per slice, or None for all at once.

    Returns:
        A function of `(params, inputs, targets)`, as `hj.empirical_fisher` has it. The rank is at most N - 1.

    Raises:
        ValueError, TypeError: as `hj.empirical_fisher`.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, optax
        >>> data = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])   # gradients 1 and 2
        >>> C = hj.gradient_covariance(lambda w, x: w * x, optax.losses.l2_loss)(jnp.array(1.0), *data)
        >>> C(1.0).item()
        0.25
    """
    return _transform(forward, loss, as_batch_size(batch_size, "gradient_covariance"), centred=True)


def _transform(forward: Any, loss: Any, batch_size: int | None, centred: bool) -> Callable[..., Operator]:
    def build(params: PyTree, inputs: PyTree, targets: PyTree) -> Operator:
        params, data = as_arguments(params, inputs, targets)
        op = SecondMoment(as_function(forward), as_function(loss), params, data, batch_size, centred)
        return hoisted(op, op.forward, op.loss)

    return build


class SecondMoment(Operator):
    """(1/N) KᵀPK, where the rows of K are the per-example gradients, and P removes the mean if `centred`."""

    forward: Function
    loss: Function
    params: PyTree
    data: Data
    batch_size: int | None = eqx.field(static=True)
    centred: bool = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return self.params

    def product(self, vector: PyTree) -> PyTree:
        batch_size = self.batch_size
        mean = self._mean_slope(vector, batch_size) if self.centred and batch_size is not None else None

        def on(data: Data) -> PyTree:
            losses, push = jax.linearize(lambda params: self._losses(params, data), self.params)
            slopes = push(vector)
            if self.centred:
                slopes = slopes - (jnp.mean(slopes) if mean is None else mean.astype(slopes.dtype))
            return jax.linear_transpose(push, self.params)(slopes / losses.shape[0])[0]

        return on(self.data) if batch_size is None else mean_over_slices(on, self.data, batch_size, like=self.params)

    def _losses(self, params: PyTree, data: Data) -> Float[Array, " examples"]:
        outputs = outputs_of(self.forward, params, data[0], batched=False)
        return jax.vmap(lambda output, target: as_scalar(self.loss(output, target)))(outputs, data[1])

    def _mean_slope(self, vector: PyTree, batch_size: int) -> Scalar:
        """ḡᵀv, slice by slice."""

        def on(data: Data) -> Scalar:
            return jnp.mean(jax.jvp(lambda params: self._losses(params, data), (self.params,), (vector,))[1])

        return mean_over_slices(on, self.data, batch_size, like=jnp.zeros((), scalar_dtype(self.structure)))
