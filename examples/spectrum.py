"""The whole spectrum of a network's Hessian: its density, counts and trace, each beside the exact value.

You will see what 800 products tell of 1,210 eigenvalues: how many are large and how many negative, the trace with and
without the outliers deflated, and how far the density is from the exact one. The picture is saved beside this file.
Takes about 40 s on two cores.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import hessjax as hj

SIZES = (64, 16, 10)


def forward(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    """The logits of one image."""
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


@jax.jit
def train(model: hj.Model) -> hj.Model:
    """200 steps of gradient descent with momentum."""
    optimizer = optax.sgd(0.1, momentum=0.9)

    def at(params: Any) -> hj.Model:
        return hj.Model(params, model.data, forward, optax.losses.softmax_cross_entropy_with_integer_labels)

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        updates, state = optimizer.update(at(params).gradient(), state)
        return (optax.apply_updates(params, updates), state), None

    return at(jax.lax.scan(step, (model.params, optimizer.init(model.params)), length=200)[0][0])


def main() -> None:
    """Trains, estimates, and checks every number against the dense Hessian."""
    digits, keys = load_digits(), jax.random.split(jax.random.key(0), 5)
    data = (jnp.asarray(digits.data / 16.0, jnp.float32), jnp.asarray(digits.target))
    shapes = itertools.pairwise(SIZES)
    params = [(jax.random.normal(k, s) / s[0] ** 0.5, jnp.zeros(s[1])) for k, s in zip(keys[:2], shapes, strict=True)]
    model = train(hj.Model(params, data, forward, optax.losses.softmax_cross_entropy_with_integer_labels))
    hessian = model.hessian()
    dense = np.asarray(hessian.dense(), float)
    exact = np.linalg.eigvalsh((dense + dense.T) / 2)

    outliers = hj.eigsh(hessian, 9, keys[2], which="LA", tol=1e-4)
    plain = hj.spectral_density(hessian, keys[3], num_steps=80)
    deflated = hj.spectral_density(hessian, keys[3], num_steps=80, outliers=outliers)
    edge, noise = 0.01 * exact[-1], 1e-5 * exact[-1]
    rows = {
        "above a hundredth of the largest": (plain.count(edge, np.inf), np.sum(exact >= edge)),
        "the same, outliers deflated": (deflated.count(edge, np.inf), np.sum(exact >= edge)),
        "below -1e-5 of the largest": (hj.num_negative(plain, noise), np.sum(exact < -noise)),
        "trace, from the density": (hj.trace_of(lambda x: x, hessian, 800, keys[3], num_steps=80), exact.sum()),
        "trace, from XTrace": (hj.trace(hessian, 160, keys[4]), exact.sum()),
        "Frobenius norm": (hj.frobenius_norm(hessian, 160, keys[4]), np.linalg.norm(exact)),
    }
    for name, (estimate, truth) in rows.items():
        print(f"{name:34} {float(estimate):10.4f} ± {float(estimate.stderr):.2g}   exactly {truth:.4f}")
        assert abs(float(estimate) - truth) < 5 * float(estimate.stderr) + 1e-3 * abs(truth)
    figure, ax = plt.subplots(figsize=(9, 4), layout="constrained")
    hj.plot.density(plain, label="800 products", ax=ax)
    hj.plot.density(deflated, label="the same and 9 outliers", eigenvalues=exact, ax=ax)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=100)
    grid = np.linspace(exact[0], exact[-1], 4001)
    exact_cdf = np.searchsorted(exact, grid, side="right") / exact.size
    distance = np.trapezoid(np.abs(np.asarray(deflated.cdf(grid)) - exact_cdf), grid)
    print(f"Wasserstein distance to the exact spectrum: {distance / (exact[-1] - exact[0]):.1e} of its range")
    assert distance < 2e-3 * (exact[-1] - exact[0])


if __name__ == "__main__":
    main()
