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
import jax.tree_util as jtu
from jaxtyping import Array, Float, PyTree, Scalar

from hessjax._function import Function, as_function
from hessjax._vectors import scalar_dtype, subtract
from hessjax.operators._examples import Data, as_arguments, both_ways, losses_of
from hessjax.operators._operator import Operator, hoisted
from hessjax.operators._slices import as_batch_size, mean_over_slices


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
    batches of b drawn with replacement. Divided by N, not N - 1. Rounding errors stay relative to the gradients'
    spread, not to ḡ, however large that is; with `batch_size` that takes one more pass of cotangents.

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
        op = SecondMoment(as_function(forward, "forward"), as_function(loss, "loss"), params, data, batch_size, centred)
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
        if self.batch_size is None:
            slopes, combine = self._slopes(vector, self.data)
            return combine(_centre(_centre(slopes)) if self.centred else slopes)
        if self.centred:
            return self._centred_over_slices(vector, self.batch_size)

        def on(data: Data) -> PyTree:
            slopes, combine = self._slopes(vector, data)
            return combine(slopes)

        return mean_over_slices(on, self.data, self.batch_size, like=self.params)

    def _centred_over_slices(self, vector: PyTree, batch_size: int) -> PyTree:
        """(1/N) Σ gₙwₙ - ḡw̄ with the slopes w = gₙᵀv - g₁ᵀv, of the size of their spread and not of their mean."""
        reference, _ = self._slopes(vector, jtu.tree_map(lambda x: x[:1], self.data))

        def on(data: Data) -> tuple[PyTree, PyTree, Scalar]:
            slopes, combine = self._slopes(vector, data)
            slopes = slopes - reference
            return combine(slopes), combine(jnp.ones_like(slopes)), jnp.mean(slopes)

        wide = jtu.tree_map(lambda x: jnp.zeros(x.shape, jnp.result_type(x.dtype, jnp.float32)), self.params)
        like = wide, wide, jnp.zeros((), scalar_dtype(self.structure))
        weighted, gradient, mean = mean_over_slices(on, self.data, batch_size, like=like)
        return jtu.tree_map(lambda x, spec: x.astype(spec.dtype), subtract(weighted, mean, gradient), self.structure)

    def _slopes(self, vector: PyTree, data: Data) -> tuple[Array, Callable[[Array], PyTree]]:
        """The N numbers gₙᵀv, and w ↦ (1/N) Σ wₙgₙ."""

        def losses(params: PyTree) -> Float[Array, " examples"]:
            return losses_of(self.forward, self.loss, params, data, batched=False)

        at, pull = jax.vjp(losses, self.params)
        push, pull = both_ways(pull, at)
        return push(vector), lambda weights: pull((weights / len(at)).astype(at.dtype))


def _centre(x: Float[Array, " examples"]) -> Float[Array, " examples"]:
    """Without its mean. Done twice, no rounding of a large mean is left."""
    return x - jnp.mean(x)
