"""The networks that the benchmarks look at, trained on scikit-learn's handwritten digits.

In: layer sizes, a number of training steps and a dtype. Out: an `hj.Model`, and its Hessian as a float64 matrix for
checking. Nothing is downloaded; the same arguments give the same network. Training 1600 steps of the 64-40-30-10 net
takes about 10 s on two cores, its dense Hessian 20 s. `NETWORKS` names three of another size each; on two cores the
wide one trains for about a minute, the others for seconds.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import equinox as eqx
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


def conv_init(key: PRNGKeyArray, channels: tuple[int, int], hidden: int, dtype: DTypeLike) -> Params:
    """Two 3 × 3 convolutions with a pooling between them, then two dense layers; scaled as in `init`."""
    first, second = channels
    *kernels, head = jax.random.split(key, 3)
    shapes = [(first, 1, 3, 3), (second, first, 3, 3)]
    convolutions = []
    for k, shape in zip(kernels, shapes, strict=True):
        bound = (shape[1] * 9) ** -0.5
        kernel = jax.random.uniform(k, shape, jnp.float32, -bound, bound).astype(dtype)
        convolutions.append({"w": kernel, "b": jnp.zeros(shape[0], dtype)})
    return convolutions + init(head, (second * 16, hidden, 10), dtype)


def conv_forward(params: Params, x: Float[Array, "examples 64"]) -> Float[Array, "examples classes"]:
    """The logits of a batch of images in NCHW: conv, tanh, 2 × 2 max-pool, conv, tanh, and `forward` on top."""
    x = x.reshape(-1, 1, 8, 8)
    for index, layer in enumerate(params[:2]):
        if index:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x = jax.lax.conv_general_dilated(x, layer["w"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = jnp.tanh(x + layer["b"][:, None, None])
    return forward(params[2:], x.reshape(x.shape[0], -1))


def train(model: hj.Model, steps: int) -> hj.Model:
    """Full-batch gradient descent: `steps` steps of optax, learning rate 0.1, momentum 0.9.

    A Python loop over a compiled step, because XLA runs convolutions slowly inside a compiled loop on the CPU.
    """
    optimizer = optax.sgd(0.1, momentum=0.9)

    @eqx.filter_jit
    def step(model: hj.Model, state: PyTree) -> tuple[hj.Model, PyTree]:
        updates, state = optimizer.update(model.gradient(), state)
        return eqx.tree_at(lambda m: m.params, model, optax.apply_updates(model.params, updates)), state

    state = optimizer.init(model.params)
    for _ in range(steps):
        model, state = step(model, state)
    return model


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
    _check_dtype(dtype)
    return train(hj.Model(init(jax.random.key(0), sizes, dtype), _digits(dtype), forward, loss), steps)


def digits_cnn(channels: tuple[int, int], hidden: int, steps: int, dtype: DTypeLike = jnp.float32) -> hj.Model:
    """A convolutional network trained on the same digits; see `conv_forward`.

    Args:
        channels: of the two convolutions.
        hidden: width of the dense layer before the classes.
        steps: as in `digits_mlp`.
        dtype: likewise.

    Raises:
        ValueError: `dtype` is float64 and JAX has it switched off.
    """
    _check_dtype(dtype)
    params = conv_init(jax.random.key(0), channels, hidden, dtype)
    return train(hj.Model(params, _digits(dtype), conv_forward, loss, batched=True), steps)


NETWORKS: dict[str, Callable[[], hj.Model]] = {
    "mlp": partial(digits_mlp, (64, 256, 256, 10), 400),
    "cnn": partial(digits_cnn, (16, 32), 38, 400),
    "wide": partial(digits_mlp, (64, 1324, 1324, 10), 200),
}


def dense_hessian(model: hj.Model) -> Float[np.ndarray, "n n"]:
    """The Hessian at `model`'s very parameters, evaluated in float64 whatever their dtype."""

    def widen(tree: PyTree) -> PyTree:
        arrays = jtu.tree_map(np.asarray, tree)
        return jtu.tree_map(lambda a: a.astype(np.float64) if a.dtype.kind == "f" else a, arrays)

    with jax.enable_x64(True):
        wide = hj.Model(widen(model.params), widen(model.data), model.forward, model.loss, batched=model.batched)
        return np.asarray(wide.hessian().dense())


def _digits(dtype: DTypeLike) -> tuple[Array, Array]:
    """The 1797 images of 64 pixels in 0..1, and their labels."""
    digits: Any = load_digits()
    return jnp.asarray(digits.data / 16.0, dtype), jnp.asarray(digits.target)


def _check_dtype(dtype: DTypeLike) -> None:
    if jax.dtypes.canonicalize_dtype(dtype) != np.dtype(dtype):
        raise ValueError(f"`dtype` {np.dtype(dtype)} needs `jax_enable_x64`.")
