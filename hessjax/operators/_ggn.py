"""The generalized Gauss-Newton matrix, and what the Hessian has beyond it.

With outputs z = f(θ, x) and a loss ℓ(z, y), the Hessian of the mean loss is G + R: G = (1/N) Σ Jᵀ ∇²ℓ J passes the
loss's own curvature through the model's Jacobian J, and R = (1/N) Σₖ (∂ℓ/∂zₖ) ∇²zₖ is the model's curvature weighted
by the residual. A product with G is one pass of tangents forward and one of cotangents back, both linear.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree, Scalar

from hessjax._function import Function, as_function
from hessjax.operators._examples import Data, as_arguments, as_samples, as_scalar, linearize, real_outputs
from hessjax.operators._operator import Operator, hoisted
from hessjax.operators._output_root import SampledCurvature
from hessjax.operators._slices import as_batch_size, count_examples, mean_over_slices


def ggn(
    forward: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Scalar],
    *,
    batch_size: Any = None,
    mc_samples: Any = None,
    key: Any = None,
) -> Callable[[PyTree, PyTree, PyTree], Operator]:
    """Transforms a model and its loss into the Gauss-Newton matrix: `(params, inputs, targets) -> Operator`.

    G = (1/N) Σₙ Jₙᵀ Hₙ Jₙ with Jₙ the Jacobian of the n-th output and Hₙ the loss's Hessian at that output: exact for
    any loss that is twice differentiable in its output, and positive semi-definite where it is convex. Hₙ is never
    formed, so that a vocabulary of any size costs a few arrays of the outputs' size. A product costs about 0.7 of a
    Hessian's time and half its memory (perceptrons in a solver's loop, on a CPU).

    Args:
        forward: `forward(params, x)` on one example, a pytree whose real floating-point arrays are the outputs z.
        loss: `loss(output, target)` on one example, a real scalar.
        batch_size: examples per slice, summed in a loop inside the program; None for all at once. A remainder is its
            own slice.
        mc_samples: None for G itself; otherwise M, and Hₙ is replaced by the mean of M matrices gᵢgᵢᵀ with expectation
            Hₙ, where gᵢ is a root of Hₙ times random signs. For a loss that is convex in its output, whose n-th output
            has few enough entries c to form the c × c matrix Hₙ. For a vocabulary see `hj.fisher`.
        key: draws those signs, an own key for every example: the same for every `batch_size`.

    Returns:
        A function of `(params, inputs, targets)`, the latter two pytrees of arrays with the N examples leading. Its
        operator acts on pytrees shaped as `params`.

    Raises:
        ValueError: `batch_size` or `mc_samples` is below 1, or one of `mc_samples` and `key` came alone; when called,
            the examples' leading lengths differ or are missing; when applied, the loss is not a scalar or no output is
            a real floating-point array.
        TypeError: when called, a leaf of `params` is not a floating-point array.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, optax
        >>> forward = lambda w, x: jnp.exp(w * x)
        >>> G = hj.ggn(forward, optax.losses.l2_loss)(jnp.array(0.0), jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> G(1.0).item()
        5.0

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent,
    doi:10.1162/08997660260028683.
    """
    batch_size = as_batch_size(batch_size, "ggn")
    mc_samples = as_samples(mc_samples, key, "ggn")

    def build(params: PyTree, inputs: PyTree, targets: PyTree) -> Operator:
        params, data = as_arguments(params, inputs, targets)
        return gauss_newton(
            as_function(forward, "forward"), as_function(loss, "loss"), params, data, False, batch_size, mc_samples, key
        )

    return build


def ggn_residual(
    forward: Callable[[PyTree, PyTree], PyTree],
    loss: Callable[[PyTree, PyTree], Scalar],
    *,
    batch_size: Any = None,
) -> Callable[[PyTree, PyTree, PyTree], Operator]:
    """Transforms a model and its loss into H - G, the Hessian less its Gauss-Newton part: `(params, inputs, targets)`.

    R = (1/N) Σₙ Σₖ (∂ℓₙ/∂zₙₖ) ∇²zₙₖ: the model's own curvature, weighted by the residual. It vanishes for a model that
    is linear in θ and wherever the loss's gradient at the outputs does. Formed directly, without the cancellation of
    H v - G v, at the cost of one Hessian product.

    Args:
        forward: `forward(params, x)` on one example.
        loss: `loss(output, target)` on one example, a real scalar.
        batch_size: examples per slice, or None for all at once.

    Returns:
        A function of `(params, inputs, targets)`, as `hj.ggn` takes them.

    Raises:
        ValueError, TypeError: as `hj.ggn`.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, optax
        >>> forward = lambda w, x: jnp.exp(w * x)
        >>> R = hj.ggn_residual(forward, optax.losses.l2_loss)(jnp.array(0.0), jnp.array([1.0, 3.0]), jnp.zeros(2))
        >>> R(1.0).item()
        5.0
    """
    batch_size = as_batch_size(batch_size, "ggn_residual")

    def build(params: PyTree, inputs: PyTree, targets: PyTree) -> Operator:
        params, data = as_arguments(params, inputs, targets)
        op = Residual(as_function(forward, "forward"), as_function(loss, "loss"), params, data, batch_size)
        return hoisted(op, op.forward, op.loss)

    return build


def gauss_newton(
    forward: Function,
    loss: Function,
    params: PyTree,
    data: Data,
    batched: bool,
    batch_size: int | None,
    mc_samples: int | None,
    key: Any,
) -> Operator:
    """The Gauss-Newton operator of checked arguments, also for a `forward` that takes a batch."""
    if mc_samples is None:
        curvature = LossCurvature(loss)
    else:
        curvature = SampledCurvature(loss, mc_samples)
        data = (data[0], (data[1], jax.random.split(key, count_examples(data))))
    return hoisted(GaussNewton(forward, curvature, params, data, batched, batch_size), forward, loss)


class LossCurvature(eqx.Module):
    """u ↦ ∇²ℓ(z, y) u on one example."""

    loss: Function

    def __call__(self, output: PyTree, constants: PyTree, target: PyTree, tangent: PyTree) -> PyTree:
        def value(output: PyTree) -> Scalar:
            return as_scalar(self.loss(eqx.combine(output, constants), target))

        return jax.jvp(jax.grad(value), (output,), (tangent,))[1]


class GaussNewton(Operator):
    """(1/N) Σₙ Jₙᵀ Cₙ Jₙ, where `curvature(output, constants, target, u)` is Cₙu on one example."""

    forward: Function
    curvature: Any
    params: PyTree
    data: Data
    batched: bool = eqx.field(static=True)
    batch_size: int | None = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return self.params

    def product(self, vector: PyTree) -> PyTree:
        def on(data: Data) -> PyTree:
            inputs, targets = data
            at = linearize(self.forward, self.params, inputs, self.batched)
            image = jax.vmap(self.curvature)(at.outputs, at.constants, targets, at.push(vector))
            count = count_examples(data)
            return at.pull(jtu.tree_map(lambda leaf: leaf / count, image))

        if self.batch_size is None:
            return on(self.data)
        return mean_over_slices(on, self.data, self.batch_size, like=self.params)


class Residual(Operator):
    """The derivative along v of (1/N) Σₙ Jₙᵀ ∇ℓₙ in which only Jₙ moves."""

    forward: Function
    loss: Function
    params: PyTree
    data: Data
    batch_size: int | None = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return self.params

    def product(self, vector: PyTree) -> PyTree:
        def on(data: Data) -> PyTree:
            inputs, targets = data

            def transposed(params: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree], PyTree]:
                return jax.vjp(lambda p: real_outputs(self.forward, p, inputs, batched=False), params, has_aux=True)

            def mean_loss(outputs: PyTree) -> Scalar:
                per_example = jax.vmap(lambda z, rest, y: as_scalar(self.loss(eqx.combine(z, rest), y)))
                return jnp.mean(per_example(outputs, constants, targets))

            # Jᵀ is a pytree of residuals, and has a derivative of its own, beside the weights that stay as they are.
            (outputs, pull, constants), (_, moved, _) = jax.jvp(transposed, (self.params,), (vector,))
            weights = jax.grad(mean_loss)(outputs)
            return jax.jvp(lambda pull: pull(weights)[0], (pull,), (moved,))[1]

        if self.batch_size is None:
            return on(self.data)
        return mean_over_slices(on, self.data, self.batch_size, like=self.params)
