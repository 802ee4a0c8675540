"""Trace estimators on the test matrices of the XTrace paper: error against products.

Run `python -m benchmarks.trace [--x64] [--size 1000] [--keys 20]`. Four spectra of n eigenvalues on a random orthogonal
basis (Epperly, Tropp and Webber, arXiv:2301.07825): flat 3 - 2i/(n - 1), polynomial 1/i², exponential 0.7ⁱ, and a
step of 50 ones above 1e-3. For each method and number of products, one line:

- `error`: the root mean square over the keys of |estimate - tr A| / tr A;
- `stderr`: the median of the standard errors that were reported, on the same scale; `covered`: the share of keys with
  an error of at most two of them.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import hessjax as hj
from benchmarks._harness import report

METHODS = ("xtrace", "xnystrace", "hutch++", "hutchinson")
PRODUCTS = (20, 40, 80, 120, 160)


def spectra(n: int) -> dict[str, np.ndarray]:
    """Eigenvalues of the four test matrices."""
    return {
        "flat": np.linspace(3, 1, n),
        "polynomial": 1.0 / np.arange(1, n + 1) ** 2,
        "exponential": 0.7 ** np.arange(n),
        "step": np.r_[np.ones(50), np.full(n - 50, 1e-3)],
    }


class Dense(hj.Operator):
    """A symmetric matrix."""

    matrix: jax.Array

    @property
    def like(self) -> jax.Array:
        return self.matrix[0]

    def product(self, vector: jax.Array) -> jax.Array:
        return jnp.matmul(self.matrix, vector, precision=jax.lax.Precision.HIGHEST)


def main() -> None:
    """Prints the table, a line of JSON for each spectrum, method and number of products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--x64", action="store_true")
    parser.add_argument("--size", type=int, default=1000)
    parser.add_argument("--keys", type=int, default=20)
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", args.x64)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((args.size, args.size)))[0]
    for name, values in spectra(args.size).items():
        op, truth = Dense(jnp.asarray((basis * values) @ basis.T, float)), values.sum()
        for method in METHODS:
            for products in PRODUCTS:
                found = [hj.trace(op, products, jax.random.key(key), method=method) for key in range(args.keys)]
                errors = np.array([abs(float(e.value) - truth) / truth for e in found])
                reported = np.array([float(e.stderr) / truth for e in found])
                report(
                    f"trace {name} {method}",
                    sizes={"n": args.size, "products": products, "keys": args.keys},
                    error=float(np.sqrt(np.mean(errors**2))),
                    stderr=float(np.median(reported)),
                    covered=float(np.mean(errors <= 2 * reported)),
                )


if __name__ == "__main__":
    main()
