"""`hj.spectral_density` against the spectra of other packages: distance to the exact one at equal products, and time.

Run `python -m benchmarks.density [--keys 3] [--repeats 3] [--steps 20 40]`, some minutes on two cores. All in float32.
Exact spectra: a semicircle and a Wishart matrix (n = 500), and the Hessian of a 64-24-10 network after training on the
digits (1,810 parameters). Every package gets 10 probes:

- `matfree`: `tridiag_sym` with full reorthogonalization under `vmap`, and `eigh` of the tridiagonals, in one program.
- `curvlinops`: `fast_lanczos`, a probe after the other.
- `pyhessian`: `hessian.density`. It calls `torch.eig`, which PyTorch removed: here that is `torch.linalg.eigh` again.

Ours is given `outliers="found"`: one of the 10 finds outliers for the other nine, so that the products are equal.

The last two multiply by torch's double backward. A line gives, as the mean over the keys, `wasserstein`, the
1-Wasserstein distance to the exact spectrum, and `smoothed_l1`, ∫ |pdf - exact pdf| at a smoothing of a hundredth of
the range, with ours beside them. A rival's distribution function is the staircase of its nodes and its density their
Gaussian mixture, as each package draws it; ours is what `Density.cdf` and `.pdf` return. The last lines time 10 probes
by 100 steps on the digits, 64-32-32-10 (3,466 parameters), and against matfree 64-256-256-10 (85,002 parameters):
`time_ratio` is ours / theirs, the median over pairs.
"""

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats
from sklearn.datasets import load_digits

import hessjax as hj
from benchmarks._harness import compare, report
from benchmarks.trace import Dense

PROBES = 10
Rule = tuple[np.ndarray, np.ndarray]


def perceptron(sizes: tuple[int, ...]) -> tuple[hj.Model, Any, Any]:
    """A tanh network on the digits after 200 steps of gradient descent with momentum; its torch twin, and the data."""
    import torch

    digits = load_digits()
    x, y = np.asarray(digits.data / 16.0, np.float32), digits.target
    torch.manual_seed(0)
    layers: list[Any] = []
    for rows, columns in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(rows, columns), torch.nn.Tanh()]
    module = torch.nn.Sequential(*layers[:-1])
    inputs, targets = torch.tensor(x), torch.tensor(y)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module(inputs), targets).backward()
        optimizer.step()
    params = [
        (jnp.asarray(layer.weight.detach().numpy().T), jnp.asarray(layer.bias.detach().numpy()))
        for layer in module
        if isinstance(layer, torch.nn.Linear)
    ]

    def forward(params: Any, x: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        return x @ params[-1][0] + params[-1][1]

    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    return hj.Model(params, (jnp.asarray(x), jnp.asarray(y)), forward, loss), module, (inputs, targets)


def matfree_rule(op: hj.Operator, steps: int) -> Callable[[int], tuple[jax.Array, jax.Array]]:
    """The Lanczos iteration of matfree under vmap, one program for all keys, on the operator's own product."""
    from jax.flatten_util import ravel_pytree
    from matfree import decomp

    like = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), op.structure)
    flat, unravel = ravel_pytree(like)
    tridiagonalize = decomp.tridiag_sym(steps, reortho="full")

    @jax.jit
    def run(op: Any, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        def probe(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            start = jax.random.rademacher(key, flat.shape, flat.dtype)
            values, vectors = jnp.linalg.eigh(tridiagonalize(lambda v: ravel_pytree(op(unravel(v)))[0], start).J_small)
            return values, vectors[0] ** 2

        return jax.vmap(probe)(jax.random.split(key, PROBES))

    return lambda key: run(op, jax.random.key(key))


def curvlinops_rule(linear: Any, steps: int) -> Callable[[int], Rule]:
    """The Lanczos iteration of curvlinops, probe by probe."""
    import torch
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    def run(key: int) -> Rule:
        torch.manual_seed(key)
        rules = [fast_lanczos(linear, steps) for _ in range(PROBES)]
        return np.stack([v.numpy() for v, _ in rules]), np.stack([q[0].numpy() ** 2 for _, q in rules])

    return run


def pyhessian_rule(module: Any, criterion: Any, data: Any, steps: int) -> Callable[[int], Rule]:
    """The density of PyHessian."""
    import torch
    from pyhessian import hessian

    def eig(matrix: Any, eigenvectors: bool = True) -> tuple[Any, Any]:
        del eigenvectors
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    torch.eig = eig

    def run(key: int) -> Rule:
        torch.manual_seed(key)
        module.zero_grad(set_to_none=True)
        nodes, weights = hessian(module, criterion, data=data, cuda=False).density(iter=steps, n_v=PROBES)
        return np.array(nodes), np.array(weights)

    return run


def matrices(n: int) -> dict[str, np.ndarray]:
    """A semicircle on [-1.4, 1.4] and a Wishart matrix of ratio 1/2."""
    rng = np.random.default_rng(1)
    g, x = rng.standard_normal((n, n)), rng.standard_normal((2 * n, n))
    return {"semicircle": (g + g.T) / (2 * n) ** 0.5, "wishart": x.T @ x / (2 * n)}


def rivals_on_matrix(matrix: np.ndarray, steps: int) -> dict[str, Callable[[int], Any]]:
    """The packages on ½ wᵀAw, whose Hessian is A."""
    import torch
    from curvlinops.examples import TensorLinearOperator

    tensor = torch.tensor(matrix, dtype=torch.float32)

    class Quadratic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(len(matrix)))

        def forward(self, _x: Any) -> Any:
            return self.w @ (tensor @ self.w) / 2

    data = (torch.zeros(1), torch.zeros(1))
    return {
        "matfree": matfree_rule(Dense(jnp.asarray(matrix, jnp.float32)), steps),
        "curvlinops": curvlinops_rule(TensorLinearOperator(tensor), steps),
        "pyhessian": pyhessian_rule(Quadratic(), lambda output, _: output, data, steps),
    }


def rivals_on_network(model: hj.Model, module: Any, data: Any, steps: int) -> dict[str, Callable[[int], Any]]:
    """The packages on the Hessian of the mean loss."""
    import torch
    from curvlinops import HessianLinearOperator

    linear = HessianLinearOperator(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), [data])
    return {
        "matfree": matfree_rule(model.hessian(), steps),
        "curvlinops": curvlinops_rule(linear, steps),
        "pyhessian": pyhessian_rule(module, torch.nn.CrossEntropyLoss(), data, steps),
    }


def distances(
    name: str, op: hj.Operator, values: np.ndarray, rivals: dict[str, Callable[[int], Any]], steps: int, keys: int
) -> None:
    """Prints both distances of each rival, and ours."""
    spread = values[-1] - values[0]
    sigma, grid = spread / 100, np.linspace(values[0] - 0.1 * spread, values[-1] + 0.1 * spread, 4001)

    def bell(nodes: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return stats.norm.pdf(grid[:, None], nodes, sigma) @ weights

    exact_pdf = bell(values, np.full(len(values), 1 / len(values)))
    exact_cdf = np.searchsorted(values, grid, side="right") / len(values)

    def ours(key: int) -> tuple[float, float]:
        density = hj.spectral_density(op, jax.random.key(key), num_probes=PROBES, num_steps=steps, outliers="found")
        return (
            float(np.trapezoid(np.abs(np.asarray(density.cdf(grid)) - exact_cdf), grid)),
            float(np.trapezoid(np.abs(np.asarray(density.pdf(grid, sigma)) - exact_pdf), grid)),
        )

    def theirs(rule: Any) -> tuple[float, float]:
        nodes, weights = (np.asarray(part, float).ravel() for part in rule)
        weights = weights / weights.sum()
        return (
            float(stats.wasserstein_distance(values, nodes, None, weights)),
            float(np.trapezoid(np.abs(bell(nodes, weights) - exact_pdf), grid)),
        )

    mine = np.mean([ours(key) for key in range(keys)], axis=0)
    for rival, rule in rivals.items():
        other = np.mean([theirs(rule(key)) for key in range(keys)], axis=0)
        report(
            f"density {name} {rival}",
            sizes={"n": len(values), "probes": PROBES, "steps": steps, "keys": keys},
            ours={"wasserstein": mine[0], "smoothed_l1": mine[1]},
            theirs={"wasserstein": other[0], "smoothed_l1": other[1]},
        )


def times(name: str, op: hj.Operator, rule: Callable[[int], Any], repeats: int) -> None:
    """Prints the seconds of 10 probes by 100 steps, ours and a rival's in turn."""
    found = compare(
        lambda: hj.spectral_density(op, jax.random.key(0), num_probes=PROBES, num_steps=100), lambda: rule(0), repeats
    )
    report(
        f"density time {name}",
        sizes={"n": op.size, "probes": PROBES, "steps": 100},
        ours_s=found.ours,
        theirs_s=found.theirs,
        ours_first_s=found.ours_first,
        theirs_first_s=found.theirs_first,
        time_ratio=found.ratio,
    )


def main() -> None:
    """Prints the distances, then the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs="*", default=[20, 40])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    for steps in args.steps:
        for name, matrix in matrices(500).items():
            op = Dense(jnp.asarray(matrix, jnp.float32))
            distances(name, op, np.linalg.eigvalsh(matrix), rivals_on_matrix(matrix, steps), steps, args.keys)
        model, module, data = perceptron((64, 24, 10))
        dense = np.asarray(model.hessian().dense(), float)
        values = np.linalg.eigvalsh((dense + dense.T) / 2)
        rivals = rivals_on_network(model, module, data, steps)
        distances("network", model.hessian(), values, rivals, steps, args.keys)
    model, module, data = perceptron((64, 32, 32, 10))
    for name, rule in rivals_on_network(model, module, data, 100).items():
        times(name, model.hessian(), rule, args.repeats)
    hessian = perceptron((64, 256, 256, 10))[0].hessian()
    times("matfree", hessian, matfree_rule(hessian, 100), args.repeats)


if __name__ == "__main__":
    main()
