"""`hessjax.eigsh` against `scipy.sparse.linalg.eigsh` at three stages of training: products, time and error.

Run `python -m benchmarks.eigsh [--quick] [--x64]`. Both solvers see the Hessian of the 64-40-30-10 network on the
digits (4140 parameters), both with their default `ncv` and from normal start vectors, another seed for every call;
SciPy through `hj.as_scipy`, so that its time holds the copies of vectors between NumPy and JAX. SciPy's default budget
of 10 n restarts would let one hopeless case run for an hour, so it gets the restarts that make at most about 10 n
products, which is the default budget of hessjax.

A case is a stage, `which`, `k` and `tol`. Its line gives, of either solver:

- `products`: the median over the calls; `product_ratio` is ours / theirs. Ours include the certificate.
- `first_s`, `median_s`: seconds of the first call, compilation included, and of the later ones; `time_ratio` is the
  median over pairs of calls that ran in turn.
- `residual`: max ‖Av - λv‖ / max |λ|, the worst call; `residual_each` is max (‖Av - λv‖ / |λ|), which is what `tol`
  bounds. A is the Hessian at the same parameters as a dense float64 matrix, also when the solvers run in float32: the
  rounding of the float32 product is part of the error.
- `value_error`: max |λ - true λ| / max |true λ|, by LAPACK on that matrix. Large when an eigenvalue was missed.
- `unconverged`: calls in which a pair was flagged, or SciPy raised `ArpackNoConvergence`.

The last line holds the geometric means and the maxima of the ratios, over all cases and by stage. Cases in which a call
did not converge are counted there and left out of the ratios, as a budget spent in vain is no cost of an answer. On two
idle cores about 6 minutes with `--quick` (k = 1 and 6 after 400 steps) and 20 to 30 for the 54 cases, most of it in
SciPy's products for SA.
"""

import argparse
import statistics
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator
from scipy.sparse.linalg import eigsh as scipy_eigsh

import hessjax as hj
from benchmarks._cases import Problem
from benchmarks._harness import CountedProduct, compare, report, summary
from benchmarks.networks import dense_hessian, digits_mlp

SIZES = (64, 40, 30, 10)
REPEATS = 3  # pairs of calls after the first: with it, four start vectors


class Run(NamedTuple):
    """What one call returned, and what it spent."""

    values: np.ndarray
    vectors: np.ndarray  # (n, k)
    products: int
    converged: bool


class Ours:
    """`hj.eigsh` from a new key at every call; keeps the answers."""

    def __init__(self, hessian: hj.Operator, problem: Problem):
        self.hessian, self.problem = hessian, problem
        self.keys: Iterator[Any] = iter(jax.random.split(jax.random.key(1), 100))
        self.answers: list[hj.Eigenpairs] = []

    def __call__(self) -> hj.Eigenpairs:
        which, k, tol = self.problem
        self.answers.append(hj.eigsh(self.hessian, k, next(self.keys), which=which, tol=tol))
        return self.answers[-1]

    def runs(self) -> list[Run]:
        """The answers so far, on flat vectors in the order of `ravel_pytree`."""
        return [
            Run(
                np.asarray(pairs.eigenvalues),
                np.concatenate(
                    [np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(pairs.eigenvectors)], axis=1
                ).T,
                int(pairs.num_matvecs),
                bool(pairs.converged.all()),
            )
            for pairs in self.answers
        ]


class Theirs:
    """SciPy's `eigsh` on the same product, from a new start vector at every call; keeps the answers."""

    def __init__(self, matrix: LinearOperator, problem: Problem):
        self.matrix, self.problem = matrix, problem
        self.rng = np.random.default_rng(2)
        self.answers: list[Run] = []

    def __call__(self) -> None:
        which, k, tol = self.problem
        n = self.matrix.shape[0]
        ncv = min(n, max(2 * k + 1, 20))  # SciPy's default, for the budget alone
        product = CountedProduct(self.matrix)
        v0 = self.rng.standard_normal(n).astype(self.matrix.dtype)
        try:
            values, vectors = scipy_eigsh(
                product,
                k,
                which=which,
                tol=tol,  # pyright: ignore[reportArgumentType] inferred from the default 0
                v0=v0,
                maxiter=10 * n // (ncv - k),
            )
        except ArpackNoConvergence as error:
            self.answers.append(Run(error.eigenvalues, error.eigenvectors, product.calls, False))
        else:
            self.answers.append(Run(values, vectors, product.calls, True))

    def runs(self) -> list[Run]:
        """The answers so far."""
        return self.answers


def wanted(spectrum: np.ndarray, problem: Problem) -> np.ndarray:
    """The eigenvalues asked for, ascending, out of all of them."""
    key = {"LA": -spectrum, "SA": spectrum, "LM": -np.abs(spectrum)}[problem.which]
    return np.sort(spectrum[np.argsort(key)[: problem.k]])


def errors(runs: list[Run], matrix: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """The largest errors over `runs`; None where every run came back empty."""
    worst: dict[str, list[float]] = {"residual": [], "residual_each": [], "value_error": []}
    for run in runs:
        if not len(run.values):
            continue
        values, vectors = run.values.astype(np.float64), run.vectors.astype(np.float64)
        residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
        worst["residual"].append(float(residuals.max() / np.abs(values).max()))
        worst["residual_each"].append(float((residuals / np.abs(values)).max()))
        if len(values) == len(truth):
            worst["value_error"].append(float(np.abs(np.sort(values) - truth).max() / np.abs(truth).max()))
    return {name: max(found) if found else None for name, found in worst.items()}


def describe(runs: list[Run], matrix: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    """What a line says of one solver besides its times."""
    return {
        "products": statistics.median(run.products for run in runs),
        **errors(runs, matrix, truth),
        "unconverged": sum(not run.converged for run in runs),
    }


class Ratios(NamedTuple):
    """Ours / theirs in one case, and whether every call of both converged."""

    products: float
    time: float
    converged: bool


def stage(steps: int, problems: list[Problem], dtype: Any) -> list[Ratios]:
    """Runs and reports every problem on the network after `steps` steps."""
    model = digits_mlp(SIZES, steps, dtype)
    hessian, dense = model.hessian(), dense_hessian(model)
    spectrum = np.linalg.eigvalsh(dense)
    ratios = []
    for problem in problems:
        ours, theirs = Ours(hessian, problem), Theirs(hj.as_scipy(hessian), problem)
        times = compare(ours, theirs, REPEATS)
        truth = wanted(spectrum, problem)
        mine, other = describe(ours.runs(), dense, truth), describe(theirs.runs(), dense, truth)
        converged = mine["unconverged"] + other["unconverged"] == 0
        ratios.append(Ratios(mine["products"] / other["products"], times.ratio, converged))
        report(
            "eigsh",
            sizes={"n": hessian.size, "examples": model.num_examples},
            dtype=np.dtype(dtype).name,
            steps=steps,
            loss=float(model.loss_value()),
            **problem._asdict(),
            product_ratio=ratios[-1].products,
            time_ratio=ratios[-1].time,
            ours={**mine, "first_s": times.ours_first, "median_s": times.ours},
            scipy={**other, "first_s": times.theirs_first, "median_s": times.theirs},
        )
    return ratios


def summarize(ratios: list[Ratios]) -> dict[str, Any]:
    """The means and maxima over the cases that converged, and how many did not."""
    both = [ratio for ratio in ratios if ratio.converged]
    return {
        "product_ratio": summary([ratio.products for ratio in both]),
        "time_ratio": summary([ratio.time for ratio in both]),
        "unconverged_cases": len(ratios) - len(both),
    }


def main() -> None:
    """Runs the cases and prints the means."""
    parser = argparse.ArgumentParser(description="hessjax.eigsh against SciPy's, one JSON line per case.")
    parser.add_argument("--quick", action="store_true", help="only k = 1 and 6, only after 400 steps")
    parser.add_argument("--x64", action="store_true", help="float64 instead of float32")
    options = parser.parse_args()
    if options.x64:
        jax.config.update("jax_enable_x64", True)

    ranks = (1, 6) if options.quick else (1, 6, 20)
    problems = [Problem(which, k, tol) for which in ("LA", "SA", "LM") for k in ranks for tol in (1e-3, 1e-6)]
    stages = (400,) if options.quick else (100, 400, 1600)
    dtype = jnp.float64 if options.x64 else jnp.float32
    ratios = {steps: stage(steps, problems, dtype) for steps in stages}

    total = [ratio for found in ratios.values() for ratio in found]
    by_stage = {steps: summarize(found) for steps, found in ratios.items()}
    report("eigsh summary", sizes={"cases": len(total)}, **summarize(total), stages=by_stage)


if __name__ == "__main__":
    main()
