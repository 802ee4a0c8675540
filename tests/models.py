"""Small networks on one example, losses on one output, and the dense matrices that the operators must equal."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

EXAMPLES = 5  # no multiple of the slices that the tests take


def mlp(params, x):
    hidden = jnp.tanh(params["in"]["w"] @ x["a"] + params["in"]["b"])
    return params["out"][0] @ hidden + params["out"][1]


def mlp_params(rng):
    return {
        "in": {"w": rng.standard_normal((4, 3)), "b": rng.standard_normal(4)},
        "out": (rng.standard_normal((3, 4)), rng.standard_normal(3)),
        "none": None,
    }


def cnn(params, x):
    image = jax.lax.conv_general_dilated(x["a"].reshape(1, 1, 6, 6), params["conv"], (1, 1), "SAME")
    image = jax.nn.softplus(image + params["bias"][:, None, None])
    pooled = jax.lax.reduce_window(image, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return pooled.reshape(-1) @ params["head"]


def cnn_params(rng):
    return {
        "conv": rng.standard_normal((2, 1, 3, 3)) / 3,
        "bias": rng.standard_normal(2),
        "head": rng.standard_normal((18, 3)) / 4,
    }


def transformer(params, x):
    h = params["embed"][x["a"]]
    normed = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    q, k, v = (normed @ params["attention"][name] for name in "qkv")
    h = h + jax.nn.softmax(q @ k.T / 2, axis=-1) @ v
    h = h + jax.nn.gelu(h @ params["mlp"][0]) @ params["mlp"][1]
    return h.mean(0) @ params["head"]


def transformer_params(rng):
    return {
        "embed": rng.standard_normal((5, 4)),
        "attention": {name: rng.standard_normal((4, 4)) / 2 for name in "qkv"},
        "mlp": [rng.standard_normal((4, 6)) / 2, rng.standard_normal((6, 4)) / 2],
        "head": rng.standard_normal((4, 3)),
    }


def softmax(z, y):
    return optax.losses.softmax_cross_entropy_with_integer_labels(z, y["label"])


def squared(z, y):
    return jnp.sum(optax.losses.l2_loss(z, y["value"]))


def bernoulli(z, y):
    return jnp.sum(optax.losses.sigmoid_binary_cross_entropy(z, y["bits"]))


def mixture(z, y):
    """One of the three, chosen by data: all of them share a compiled program."""
    return jnp.dot(y["weights"], jnp.stack([softmax(z, y), squared(z, y), bernoulli(z, y)]))


NETWORKS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
LOSSES = {"softmax": softmax, "squared": squared, "bernoulli": bernoulli}
# Unequal slices of the five examples where the programs are small enough to compile them.
SLICES = {"mlp": 2, "cnn": 3, "transformer": None}
CASES = [(network, loss) for network in NETWORKS for loss in LOSSES]


class Dense(NamedTuple):
    """The matrices on parameters raveled into one vector."""

    jacobian: np.ndarray  # (N, c, n)
    output_hessians: np.ndarray  # (N, c, c)
    gradients: np.ndarray  # (N, n)
    hessian: np.ndarray  # (n, n)

    @property
    def ggn(self):
        return np.einsum("eij,eik,ekl->jl", self.jacobian, self.output_hessians, self.jacobian) / len(self.gradients)

    @property
    def empirical_fisher(self):
        return self.gradients.T @ self.gradients / len(self.gradients)

    @property
    def covariance(self):
        centred = self.gradients - self.gradients.mean(0)
        return centred.T @ centred / len(self.gradients)


@functools.cache
def problem(network, loss):
    """(forward, params, inputs, targets) in NumPy; the targets tell `mixture` which loss is meant."""
    rng = np.random.default_rng(len(network))
    params = {"mlp": mlp_params, "cnn": cnn_params, "transformer": transformer_params}[network](rng)
    shape = {"mlp": (EXAMPLES, 3), "cnn": (EXAMPLES, 36), "transformer": (EXAMPLES, 4)}[network]
    values = rng.integers(0, 5, shape) if network == "transformer" else rng.standard_normal(shape)
    targets = {
        "label": rng.integers(0, 3, EXAMPLES),
        "value": rng.standard_normal((EXAMPLES, 3)),
        "bits": rng.integers(0, 2, (EXAMPLES, 3)).astype(float),
        "weights": np.tile(np.eye(3)[list(LOSSES).index(loss)], (EXAMPLES, 1)),
    }
    return NETWORKS[network], params, {"a": values}, targets


@functools.cache
def dense(network, loss):
    """The matrices of a problem, to be called in float64."""
    forward, params, inputs, targets = problem(network, loss)
    params, inputs, targets = jax.tree.map(jnp.asarray, (params, inputs, targets))
    return Dense(*map(np.asarray, _matrices(forward, params, inputs, targets)))


# These programs run once, on little data: compiling them is all they cost.
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def _matrices(forward, params, inputs, targets):
    flat, unravel = ravel_pytree(params)
    output = lambda flat, x: forward(unravel(flat), x)
    example = lambda flat, x, y: mixture(output(flat, x), y)
    mean = lambda flat: jnp.mean(jax.vmap(example, (None, 0, 0))(flat, inputs, targets))
    return (
        jax.vmap(jax.jacrev(output), (None, 0))(flat, inputs),
        jax.vmap(jax.hessian(mixture))(jax.vmap(output, (None, 0))(flat, inputs), targets),
        jax.vmap(jax.grad(example), (None, 0, 0))(flat, inputs, targets),
        jax.hessian(mean)(flat),
    )


@functools.partial(jax.jit, compiler_options=QUICK)
def columns(operator):
    """The dense matrix, one product at a time: a smaller program than `operator.dense()`."""
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), operator.structure)
    flat, unravel = ravel_pytree(zeros)
    return jax.lax.map(lambda row: ravel_pytree(operator.product(unravel(row)))[0], jnp.eye(flat.size)).T


def assert_equal(operator, truth, rtol=1e-10):
    """Every entry, relative to the largest."""
    np.testing.assert_allclose(columns(operator), truth, rtol=0, atol=rtol * np.abs(truth).max())
