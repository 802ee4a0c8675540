"""The Fisher information matrix of a model whose outputs parameterize a distribution.

F = (1/N) Σₙ E[s sᵀ], where s is the gradient of log p(y | f(θ, xₙ)) and the expectation is over targets drawn from the
model itself, so that the data's own targets play no part. For the three families here the expectation is a closed form
in the outputs, equal to the Hessian of the negative log-likelihood there: F is the Gauss-Newton matrix of that loss.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from hessjax._function import as_function
from hessjax.operators._examples import as_arguments, as_samples
from hessjax.operators._ggn import GaussNewton
from hessjax.operators._operator import Operator, hoisted
from hessjax.operators._output_root import through_samples
from hessjax.operators._slices import as_batch_size, count_examples


def fisher(
    forward: Callable[[PyTree, PyTree], PyTree],
    distribution: Any,
    *,
    batch_size: Any = None,
    mc_samples: Any = None,
    key: Any = None,
) -> Callable[[PyTree, PyTree], Operator]:
    """Transforms a model into its Fisher information matrix: `(params, inputs) -> Operator`.

    F = (1/N) Σₙ Jₙᵀ Cₙ Jₙ with Jₙ the Jacobian of the n-th output z and Cₙ the covariance of the score there. The
    entries along further axes, and several output arrays, are independent of each other.

    - "categorical": z are logits over the last axis, C = diag(p) - ppᵀ with p = softmax(z); the Gauss-Newton matrix of
      softmax cross-entropy.
    - "bernoulli": z are logits, one per entry, C = diag(s(1 - s)) with s = sigmoid(z); that of sigmoid cross-entropy
      summed over entries.
    - "gaussian": z are means with unit variance, C = I; that of half the squared error, summed over entries.

    Args:
        forward: `forward(params, x)` on one example, a pytree whose real floating-point arrays are the outputs z.
        distribution: "categorical", "bernoulli" or "gaussian".
        batch_size: examples per slice, summed in a loop inside the program; None for all at once.
        mc_samples: None for F itself; otherwise M, and Cₙ is replaced by the mean of M matrices ssᵀ at targets drawn
            from the model. No matrix of an output's size squared is formed.
        key: draws those targets, an own key for every example: the same for every `batch_size`.

    Returns:
        A function of `(params, inputs)`, `inputs` a pytree of arrays with the N examples leading. Its operator acts on
        pytrees shaped as `params`, and is positive semi-definite.

    Raises:
        ValueError: `distribution` is none of the three, `batch_size` or `mc_samples` is below 1, or one of `mc_samples`
            and `key` came alone; when called, the examples' leading lengths differ or are missing; when applied, no
            output is a real floating-point array, or the logits of a categorical have no axis.
        TypeError: when called, a leaf of `params` is not a floating-point array.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> F = hj.fisher(lambda w, x: w * x, "bernoulli")(jnp.array(0.0), jnp.array([2.0, 4.0]))
        >>> F(1.0).item()
        2.5

    Source: Martens, New insights and perspectives on the natural gradient method, arXiv:1412.1193.
    """
    batch_size = as_batch_size(batch_size, "fisher")
    mc_samples = as_samples(mc_samples, key, "fisher")
    if not isinstance(distribution, str) or distribution not in _COVARIANCES:
        raise ValueError(f"`distribution` must be one of {', '.join(_COVARIANCES)}, got {distribution!r}.")

    def build(params: PyTree, inputs: PyTree) -> Operator:
        params, data = as_arguments(params, inputs, None)
        if mc_samples is not None:
            data = (data[0], jax.random.split(key, count_examples(data)))
        curvature = ScoreCovariance(distribution, mc_samples)
        op = GaussNewton(as_function(forward, "forward"), curvature, params, data, False, batch_size)
        return hoisted(op, op.forward)

    return build


class ScoreCovariance(eqx.Module):
    """u ↦ E[s (sᵀu)] on one example; its target is None, or the example's key if the expectation is sampled."""

    distribution: str = eqx.field(static=True)
    num_samples: int | None = eqx.field(static=True)

    def __call__(self, output: PyTree, _: PyTree, key: Any, tangent: PyTree) -> PyTree:
        if self.distribution == "categorical" and any(leaf.ndim == 0 for leaf in jtu.tree_leaves(output)):
            raise ValueError("A categorical's logits need an axis of classes, got an output without axes.")
        if self.num_samples is None:
            return jtu.tree_map(_COVARIANCES[self.distribution], output, tangent)
        keys = jax.random.split(key, self.num_samples)
        samples = jax.vmap(lambda key: ravel_pytree(self._score(key, output))[0])(keys)
        return through_samples(samples, tangent)

    def _score(self, key: PRNGKeyArray, output: PyTree) -> PyTree:
        """-∂ log p(y | z)/∂z at a target y drawn from z."""
        leaves, treedef = jtu.tree_flatten(output)
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten([_SCORES[self.distribution](k, z) for k, z in zip(keys, leaves, strict=True)])


def _categorical_covariance(logits: Float[Array, "*axes c"], tangent: Float[Array, "*axes c"]) -> Array:
    # The second derivative of log Σ exp, by JAX. Written out as p (u - pᵀu), XLA's CPU compiler takes the exponentials
    # again for every entry: a product with a small perceptron's matrix then costs a fifth more.
    def log_partition(logits: Array) -> Array:
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1))

    return jax.jvp(jax.grad(log_partition), (logits,), (tangent,))[1]


def _categorical_score(key: PRNGKeyArray, logits: Float[Array, "*axes c"]) -> Array:
    drawn = jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1], dtype=logits.dtype)
    return jax.nn.softmax(logits) - drawn


def _bernoulli_covariance(logits: Array, tangent: Array) -> Array:
    return jax.nn.sigmoid(logits) * jax.nn.sigmoid(-logits) * tangent


def _bernoulli_score(key: PRNGKeyArray, logits: Array) -> Array:
    s = jax.nn.sigmoid(logits)
    return s - jax.random.bernoulli(key, s).astype(logits.dtype)


def _gaussian_covariance(_: Array, tangent: Array) -> Array:
    return tangent


def _gaussian_score(key: PRNGKeyArray, mean: Array) -> Array:
    return jax.random.normal(key, mean.shape, mean.dtype)


_COVARIANCES = {
    "categorical": _categorical_covariance,
    "bernoulli": _bernoulli_covariance,
    "gaussian": _gaussian_covariance,
}
_SCORES = {"categorical": _categorical_score, "bernoulli": _bernoulli_score, "gaussian": _gaussian_score}
