"""Adam at its own edge of stability: the sharpness of the Hessian that Adam sees settles at 38 / η.

You will see the largest eigenvalue of D⁻¹ᐟ² H D⁻¹ᐟ² reach (2 + 2 b1) / ((1 - b1) η) and stay there for two learning
rates, where D is what Adam divides by, read from its state; the picture is saved beside this file. Takes about 40 s
on two cores.
"""

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import hessjax as hj

SIZES, STEPS, EVERY = (64, 32, 32, 10), 1500, 5


def init(key: jax.Array) -> list[dict[str, jax.Array]]:
    """Weights and biases uniform within 1/√fan-in."""
    keys = jax.random.split(key, len(SIZES) - 1)
    layers = [
        jax.random.uniform(k, (m + 1, n), minval=-1, maxval=1) / m**0.5
        for k, (m, n) in zip(keys, itertools.pairwise(SIZES), strict=True)
    ]
    return [{"w": layer[1:], "b": layer[0]} for layer in layers]


def loss(params: list[dict[str, jax.Array]], x: jax.Array, y: jax.Array) -> jax.Array:
    """Half the squared distance to the one-hot labels, averaged over the images."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return 0.5 * jnp.mean(jnp.sum((x @ params[-1]["w"] + params[-1]["b"] - y) ** 2, axis=-1))


@jax.jit
def train(params: Any, rate: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sharpness that Adam sees at every step, and the products that were spent."""
    optimizer = optax.adam(rate, b2=0.99, eps=1e-7)
    scale = partial(hj.adam_preconditioner, b2=0.99, eps=1e-7)
    tracker = hj.track_curvature(loss, 1, jax.random.key(1), every=EVERY, preconditioner=scale)

    def step(carry: tuple[Any, Any, Any], _: None) -> tuple[tuple[Any, Any, Any], jax.Array]:
        params, adam, curvature = carry
        gradient = jax.grad(loss)(params, x, y)
        updates, adam = optimizer.update(gradient, adam, params)  # D belongs to the state after this gradient
        _, curvature = tracker.update(updates, curvature, params, batch=(x, y), opt_state=adam, grad=gradient)
        return (optax.apply_updates(params, updates), adam, curvature), curvature.eigenvalues[0]

    start = params, optimizer.init(params), tracker.init(params)
    (_, _, curvature), sharpness = jax.lax.scan(step, start, length=STEPS)
    return sharpness, curvature.num_matvecs


def main() -> None:
    """Trains at two learning rates and compares the second half with 38 / η."""
    digits = load_digits()
    x = digits.data[:500] / 16
    x = (x - x.mean(0)) / (x - x.mean(0)).std()
    x, y = jnp.asarray(x, jnp.float32), jnp.eye(10)[digits.target[:500]]
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for rate, ax in zip((1e-3, 3e-3), panels, strict=True):
        sharpness, spent = map(np.asarray, train(init(jax.random.key(0)), jnp.asarray(rate), x, y))
        edge = float(hj.edge_of_stability("adam", rate))
        ratio = sharpness / edge
        print(f"η = {rate}: 38/η = {38 / rate:.0f}, {EVERY * spent / STEPS:.1f} products a measurement")
        for start in range(0, STEPS, 150):
            part = ratio[start : start + 150].mean()
            print(f"  step {start:5d}  {part:5.3f} of 38/η  {'█' * round(40 * part)}")
        hj.plot.tracking(sharpness, threshold=edge, label="sharpness that Adam sees", ax=ax)
        ax.set(title=f"η = {rate}", ylim=(0, 1.4 * edge))
        late = ratio[STEPS // 2 :]
        print(f"  second half {late.mean():.3f} ({late.min():.3f} to {late.max():.3f})")
        assert ratio[50] < 0.5
        assert 0.97 < late.mean() < 1.03
        assert late.min() > 0.88
        assert late.max() < 1.1
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)


if __name__ == "__main__":
    main()
