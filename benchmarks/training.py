"""`hessjax.track_curvature` in training: is it right, and what does it cost?

Run `python -m benchmarks.training [--figures edge adam top grow wall rates] [--steps 2000] [--repeats 3]`. A tanh
network 64-100-100-10 (17,610 parameters) on all 1,797 digits, half the squared error, full batch, float32. It takes
about 15 minutes on two cores. One line per case:

- `edge`: the sharpness at every step of gradient descent with η = 0.2, over 2 / η; its mean and range over the second
  half. Three starts. Beside it the products a measurement, before the sharpness first reaches 2 / η and after.
- `adam`: the same of D⁻¹ᐟ² H D⁻¹ᐟ² over 38 / η, every 10th step, η = 0.001.
- `top`: the three largest eigenvalues against cold solves to 1e-5 at 20 checkpoints, and how many products each took.
  `wrong` counts the checkpoints at which some tracked value is off by more than 1e-3.
- `grow`: the products of up to five pairs, with `grow_above` = 2 / η and without.
- `wall`: seconds of a run with the tracker over those of the run without it, in turn, by the clock and of processor
  time; k = 1. At every tenth step also with the curvature of 128 images alone.
- `rates`: four learning rates in one program, by `jax.vmap`, against the four runs one by one.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray
from sklearn.datasets import load_digits

import hessjax as hj
from benchmarks._harness import compare, report
from benchmarks.networks import Params, forward

SIZES, RATE, ADAM_RATE, CHECKPOINTS, SEEDS = (64, 100, 100, 10), 0.2, 1e-3, 20, (0, 1, 2)
Batch = tuple[Array, Array]


class Trail(NamedTuple):
    """What is kept of every step."""

    loss: Array
    eigenvalues: Array
    num_matvecs: Array


def init(key: PRNGKeyArray) -> Params:
    """Weights and biases uniform within 1/√fan-in, as PyTorch's linear layers start."""
    shapes = list(pairwise(SIZES))
    layers = [
        jax.random.uniform(k, (m + 1, n), minval=-1, maxval=1) / m**0.5
        for k, (m, n) in zip(jax.random.split(key, len(shapes)), shapes, strict=True)
    ]
    return [{"w": layer[1:], "b": layer[0]} for layer in layers]


def digits() -> Batch:
    """All images, centred and on one scale, and one-hot labels."""
    data = load_digits()
    pixels = data.data / 16 - data.data.mean(0) / 16
    return jnp.asarray(pixels / pixels.std(), jnp.float32), jax.nn.one_hot(data.target, 10)


def loss(params: Params, x: Array, y: Array) -> Array:
    """Half the squared distance to the labels, averaged over the images."""
    return 0.5 * jnp.mean(jnp.sum((forward(params, x) - y) ** 2, -1))


def descend(
    params: Params, rate: Array, batch: Batch, steps: int, examples: int | None = None, **tracker: Any
) -> tuple[Params, Trail]:
    """Gradient descent with a tracker in its chain: the parameters at the checkpoints, and the trail.

    A checkpoint lies at the beginning of each of 20 equal parts. The curvature is that of the first `examples`.
    """
    measured = jax.tree.map(lambda leaf: leaf[:examples], batch)
    optimizer = optax.chain(hj.track_curvature(loss, key=jax.random.key(1), **tracker), optax.sgd(rate))

    def step(carry: Any, _: None) -> tuple[Any, Trail]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradient, state, params, batch=measured)
        trail = Trail(value, optax.tree.get(state, "eigenvalues"), optax.tree.get(state, "num_matvecs"))
        return (optax.apply_updates(params, updates), state), trail

    def part(carry: Any, _: None) -> tuple[Any, tuple[Params, Trail]]:
        after, trail = jax.lax.scan(step, carry, length=steps // CHECKPOINTS)
        return after, (carry[0], trail)

    start = params, optimizer.init(params)
    _, (checkpoints, trail) = jax.lax.scan(part, start, length=CHECKPOINTS)
    return checkpoints, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), trail)


def adapt(params: Params, rate: Array, batch: Batch, steps: int, every: int) -> Trail:
    """Adam, and the sharpness that it sees."""
    optimizer = optax.adam(rate, b2=0.99, eps=1e-7)
    scale = partial(hj.adam_preconditioner, b2=0.99, eps=1e-7)
    tracker = hj.track_curvature(loss, 1, jax.random.key(1), every=every, preconditioner=scale)

    def step(carry: Any, _: None) -> tuple[Any, Trail]:
        params, state, curvature = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradient, state, params)
        _, curvature = tracker.update(updates, curvature, params, batch=batch, opt_state=state)
        trail = Trail(value, curvature.eigenvalues, curvature.num_matvecs)
        return (optax.apply_updates(params, updates), state, curvature), trail

    return jax.lax.scan(step, (params, optimizer.init(params), tracker.init(params)), length=steps)[1]


def plain(params: Params, rate: Array, batch: Batch, steps: int) -> Array:
    """The same gradient descent without a tracker."""
    optimizer = optax.sgd(rate)

    def step(carry: Any, _: None) -> tuple[Any, Array]:
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params, *batch)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[1]


def line(figure: str, batch: Batch, steps: int, **fields: Any) -> None:
    """One case."""
    n = sum(leaf.size for leaf in jax.tree.leaves(init(jax.random.key(0))))
    report(f"training {figure}", sizes={"n": n, "examples": len(batch[0]), "steps": steps}, **fields)


def summary(trail: Trail, edge: float, every: int) -> dict[str, Any]:
    """The largest eigenvalue over the threshold in the second half, and the products a measurement."""
    ratio = np.asarray(trail.eigenvalues)[::every, -1] / edge
    spent = np.diff(np.asarray(trail.num_matvecs)[::every])
    late, below = ratio[len(ratio) // 2 :], int(np.argmax(ratio < 1))
    rises = np.flatnonzero(ratio[below:] > 1)  # Adam's D has to warm up, so that a first value may lie above
    crossing = below + int(rises[0]) if rises.size else len(ratio) - 1
    return {
        "first": ratio[0],
        "crosses_at_step": crossing * every if rises.size else None,
        "mean": late.mean(),
        "low": late.min(),
        "high": late.max(),
        "loss": trail.loss[-1],
        "products_first": trail.num_matvecs[0],
        "products_before_edge": spent[:crossing].mean() if crossing else None,
        "products_on_edge": spent[crossing:].mean() if rises.size else None,
    }


def edge(batch: Batch, steps: int, _: int) -> None:
    """Gradient descent at 2 / η, tracked at every step."""
    run, threshold = jax.jit(partial(descend, steps=steps, k=1)), float(hj.edge_of_stability("gd", RATE))
    for seed in SEEDS:
        _, trail = run(init(jax.random.key(seed)), jnp.asarray(RATE), batch)
        line("edge", batch, steps, seed=seed, k=1, every=1, **summary(trail, threshold, 1))


def adam(batch: Batch, steps: int, _: int) -> None:
    """Adam at 38 / η."""
    every = 10
    run, threshold = jax.jit(partial(adapt, steps=steps, every=every)), float(hj.edge_of_stability("adam", ADAM_RATE))
    for seed in SEEDS:
        trail = run(init(jax.random.key(seed)), jnp.asarray(ADAM_RATE), batch)
        line("adam", batch, steps, seed=seed, k=1, every=every, **summary(trail, threshold, every))


def top(batch: Batch, steps: int, _: int) -> None:
    """Three eigenvalues against cold solves, at every step and at even intervals."""
    threshold, start = float(hj.edge_of_stability("gd", RATE)), init(jax.random.key(0))

    @jax.jit
    def cold(params: Params, tol: Array) -> hj.Eigenpairs:
        return hj.eigsh(hj.hvp(loss)(params, *batch), 3, jax.random.key(2), which="LA", tol=tol)

    for every in (1, 2, 10):
        run = jax.jit(partial(descend, steps=steps, k=3, every=every))
        checkpoints, trail = run(start, jnp.asarray(RATE), batch)
        errors, products = [], []
        for index in range(CHECKPOINTS):
            params = jax.tree.map(lambda leaf, index=index: leaf[index], checkpoints)
            tracked, truth = trail.eigenvalues[index * steps // CHECKPOINTS], cold(params, jnp.asarray(1e-5))
            errors.append(float(jnp.max(jnp.abs(tracked / truth.eigenvalues - 1))))
            products.append(int(cold(params, jnp.asarray(3e-3)).num_matvecs))
        fields = {"error": max(errors), "wrong": sum(error > 1e-3 for error in errors)}
        fields |= {"products_cold": float(np.mean(products))}
        line("top", batch, steps, seed=0, k=3, every=every, **fields, **summary(trail, threshold, every))


def grow(batch: Batch, steps: int, _: int) -> None:
    """Up to five pairs, as they come to the edge."""
    threshold, start = float(hj.edge_of_stability("gd", RATE)), init(jax.random.key(0))
    for grow_above in (None, threshold):
        run = jax.jit(partial(descend, steps=steps, k=5, grow_above=grow_above))
        _, trail = run(start, jnp.asarray(RATE), batch)
        tracked = np.mean(np.sum(~np.isnan(trail.eigenvalues), axis=1))
        fields = {"grow_above": grow_above, "tracked": tracked, **summary(trail, threshold, 1)}
        line("grow", batch, steps, seed=0, k=5, every=1, **fields)


def processor_seconds(function: Callable[[], Any]) -> float:
    """Those of all threads, which other programs on the machine do not lengthen as they do the time on the clock."""
    start = time.process_time()
    jax.block_until_ready(function())
    return time.process_time() - start


def wall(batch: Batch, steps: int, repeats: int) -> None:
    """A run with the tracker against the same run without it."""
    start, rate = init(jax.random.key(0)), jnp.asarray(RATE)
    bare = jax.jit(partial(plain, steps=steps))
    for every, examples in ((100, None), (10, None), (10, 128), (1, None)):
        tracked = jax.jit(partial(descend, steps=steps, examples=examples, k=1, every=every))
        ours, theirs = partial(tracked, start, rate, batch), partial(bare, start, rate, batch)
        times = compare(ours, theirs, repeats)
        processor = statistics.median(processor_seconds(ours) / processor_seconds(theirs) for _ in range(repeats))
        spent = int(tracked(start, rate, batch)[1].num_matvecs[-1])
        fields = {
            "ratio": times.ratio,
            "processor_ratio": processor,
            "tracked_s": times.ours,
            "bare_s": times.theirs,
            "first_s": times.ours_first,
        }
        line(
            "wall",
            batch,
            steps,
            k=1,
            every=every,
            measured_on=examples or len(batch[0]),
            products=spent / (steps / every),
            **fields,
        )


def rates(batch: Batch, steps: int, repeats: int) -> None:
    """Four learning rates side by side."""
    start, each = init(jax.random.key(0)), jnp.array([0.05, 0.1, 0.2, 0.3])
    run = partial(descend, steps=steps, k=1, every=10)
    alone, together = jax.jit(run), jax.jit(jax.vmap(run, in_axes=(None, 0, None)))
    times = compare(lambda: together(start, each, batch), lambda: [alone(start, r, batch) for r in each], repeats)
    ours = np.asarray(together(start, each, batch)[1].eigenvalues)
    theirs = np.stack([alone(start, rate, batch)[1].eigenvalues for rate in each])
    early = np.max(np.abs(ours / theirs - 1)[:, : steps // 10])
    late = np.mean(ours[:, steps // 2 :, -1], axis=1) * np.asarray(each) / 2
    fields = {"rates": each, "ratio": times.ratio, "difference_in_first_tenth": early, "late_mean_over_edge": late}
    line("rates", batch, steps, k=1, every=10, **fields)


FIGURES = {"edge": edge, "adam": adam, "top": top, "grow": grow, "wall": wall, "rates": rates}


def main() -> None:
    """Runs the figures that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES))
    parser.add_argument("--steps", type=int, default=2000, help="a multiple of 20; `rates` takes at most 600")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of timed runs")
    options = parser.parse_args()
    for figure in options.figures:
        steps = min(options.steps, 600) if figure == "rates" else options.steps
        FIGURES[figure](digits(), steps, options.repeats)


if __name__ == "__main__":
    main()
