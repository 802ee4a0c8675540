"""The networks that the benchmarks look at: multilayer perceptrons on scikit-learn's handwritten digits.

In: layer sizes, a number of training steps and a dtype. Out: an `hj.Model`, and its Hessian as a float64 matrix for
checking. Nothing is downloaded; the same arguments give the same network. Training 1600 steps of the 64-40-30-10 net
takes about 10 s on two cores, its dense Hessian 20 s.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PRNGKeyArray, PyTree
from sklearn.datasets import load_digits

import hessjax as hj

Params = list[dict[str, Array]]
loss = optax.losses.softmax_cross_entropy_with_integer_labels


def init(key: PRNGKeyArray, sizes: tuple[int, ...], dtype: DTypeLike) -> Params:
    """Weights uniform within 1/√fan-in, biases zero.

    Drawn in float32 and cast, so that a network in float64 starts where its float32 sibling does.
    """
    shapes = list(pairwise(sizes))
    return [
        {
            "w": jax.random.uniform(k, (m, n), jnp.float32, -(m**-0.5), m**-0.5).astype(dtype),
            "b": jnp.zeros(n, dtype),
        }
        for k, (m, n) in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]


def forward(params: Params, x: Float[Array, " pixels"]) -> Float[Array, " classes"]:
    """The logits of one image: tanh between the layers."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


@partial(jax.jit, static_argnames="steps")
def train(params: Params, x: Array, y: Array, steps: int) -> Params:
    """Full-batch gradient descent with momentum: `steps` steps of optax in one scan."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def mean_loss(params: Params) -> Array:
        return loss(jax.vmap(forward, (None, 0))(params, x), y).mean()

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(mean_loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


def digits_mlp(sizes: tuple[int, ...], steps: int, dtype: DTypeLike = jnp.float32) -> hj.Model:
    """A perceptron trained on the 1797 digits, the pixels scaled to 0..1.

    Args:
        sizes: of the layers, 64 first and 10 last.
        steps: of full-batch gradient descent, learning rate 0.1, momentum 0.9.
        dtype: of the parameters and the pixels.

    Raises:
        ValueError: the outer sizes do not fit the digits, or `dtype` is float64 and JAX has it switched off.
    """
    if len(sizes) < 2 or (sizes[0], sizes[-1]) != (64, 10):
        raise ValueError(f"`sizes` must begin with 64 pixels and end with 10 classes, got {sizes}.")
    if jax.dtypes.canonicalize_dtype(dtype) != np.dtype(dtype):
        raise ValueError(f"`dtype` {np.dtype(dtype)} needs `jax_enable_x64`.")
    digits: Any = load_digits()
    x, y = jnp.asarray(digits.data / 16.0, dtype), jnp.asarray(digits.target)
    return hj.Model(train(init(jax.random.key(0), sizes, dtype), x, y, steps), (x, y), forward, loss)


def dense_hessian(model: hj.Model) -> Float[np.ndarray, "n n"]:
    """The Hessian at `model`'s very parameters, evaluated in float64 whatever their dtype."""

    def widen(tree: PyTree) -> PyTree:
        arrays = jtu.tree_map(np.asarray, tree)
        return jtu.tree_map(lambda a: a.astype(np.float64) if a.dtype.kind == "f" else a, arrays)

    with jax.enable_x64(True):
        wide = hj.Model(widen(model.params), widen(model.data), model.forward, model.loss)
        return np.asarray(wide.hessian().dense())
