"""The whole path: train a network on handwritten digits, then look at both ends of its Hessian's spectrum.

You will see the three largest and three smallest of 3,466 eigenvalues with their residuals and what they cost, and
SciPy's answer on the same product beside them. Takes about 30 s on two cores, most of it compilation.
"""

import itertools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy.sparse.linalg import eigsh as scipy_eigsh
from sklearn.datasets import load_digits

import hessjax as hj

SIZES = (64, 32, 32, 10)
TOL = 1e-4


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Weights of a multilayer perceptron, uniform within 1/√fan-in."""
    keys = jax.random.split(key, len(SIZES) - 1)
    shapes = itertools.pairwise(SIZES)
    return [
        {"w": jax.random.uniform(k, (m, n), minval=-(m**-0.5), maxval=m**-0.5), "b": jnp.zeros(n)}
        for k, (m, n) in zip(keys, shapes, strict=True)
    ]


def forward(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """The logits of one image."""
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def train(params: Any, x: jax.Array, y: jax.Array, steps: int = 60) -> Any:
    """Full-batch gradient descent with momentum, in one scan."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def loss(params: Any) -> jax.Array:
        return optax.losses.softmax_cross_entropy_with_integer_labels(jax.vmap(forward, (None, 0))(params, x), y).mean()

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]


def main() -> None:
    """Trains, solves for both ends, and checks every eigenvalue against SciPy."""
    digits = load_digits()
    x, y = jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target)
    params = jax.jit(train)(init(jax.random.key(0)), x, y)

    model = hj.Model(params, (x, y), forward, optax.losses.softmax_cross_entropy_with_integer_labels)
    hessian = model.hessian()
    matrix = hj.as_scipy(hessian)
    print(f"{len(x)} digits, {hessian.size} parameters, loss {model.loss_value():.4f}\n")

    for which in ("LA", "SA"):
        times = []
        for key in jax.random.split(jax.random.key(1), 2):  # the first call compiles
            start = time.perf_counter()
            pairs = jax.block_until_ready(hj.eigsh(hessian, 3, key, which=which, tol=TOL))
            times.append(time.perf_counter() - start)

        calls = 0

        def counted(v: np.ndarray) -> np.ndarray:
            nonlocal calls
            calls += 1
            return matrix @ v

        matrix.matvec(np.ones(hessian.size))  # compiles
        start = time.perf_counter()
        operator = type(matrix)(matrix.shape, matvec=counted, dtype=matrix.dtype)
        reference = np.sort(scipy_eigsh(operator, 3, which=which, tol=TOL, return_eigenvectors=False))
        scipy_time = time.perf_counter() - start

        print(f"{which}: eigenvalue   SciPy        residual   converged")
        for value, other, residual, ok in zip(
            pairs.eigenvalues, reference, pairs.residuals, pairs.converged, strict=True
        ):
            print(f"   {value:11.6f}  {other:11.6f}   {residual:8.1e}   {bool(ok)}")
        print(f"    hessjax {pairs.num_matvecs} products, {times[1]:.2f} s, and {times[0] - times[1]:.1f} s to compile")
        print(f"    SciPy   {calls} products, {scipy_time:.2f} s\n")
        assert bool(pairs.converged.all())
        np.testing.assert_allclose(pairs.eigenvalues, reference, rtol=2e-3)


if __name__ == "__main__":
    main()
