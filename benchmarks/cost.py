"""What `hessjax.eigsh` costs beyond its products: solver time, first call and memory.

Run `python -m benchmarks.cost [--networks mlp cnn wide] [--repeats 5]`. The Hessian of each network on the digits, in
float32; the 6 largest eigenpairs to 1e-3. Against the bare product: one compiled `lax.scan` that applies the operator
as often as the solver did, each product to the last one's image. One line per network and figure:

- `share`: seconds of a compiled call over seconds of the bare products, the median over pairs in turn. What exceeds 1
  is the solver's own.
- `first call`: the same of first calls, compilation included, each in emptied caches, in alternating order.
- `memory`: XLA's count of the compiled program's temporary and output bytes less the temporary bytes of one product, in
  vectors of n numbers, beside the ncv + 2k + 12 that `eigsh` documents; for the default `ncv` and for 40. Inside a
  loop XLA also keeps what the products have in common: `vectors_beside_loop` subtracts the bare scan's bytes instead.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

import hessjax as hj
from benchmarks._harness import compare, first_call, report
from benchmarks.networks import NETWORKS
from hessjax.krylov._memory import default_ncv

K, TOL, WHICH = 6, 1e-3, "LA"


@eqx.filter_jit
def bare_products(hessian: hj.Operator, vector: PyTree, scale: Array, count: int) -> PyTree:
    """The solver's products and nothing else: (A / scale)^count v."""

    def step(vector: PyTree, _: None) -> tuple[PyTree, None]:
        return jtu.tree_map(lambda leaf: leaf / scale, hessian @ vector), None

    return jax.lax.scan(step, vector, length=count)[0]


def solve(hessian: hj.Operator, key: Array, ncv: int | None = None) -> hj.Eigenpairs:
    """The call that is measured."""
    return hj.eigsh(hessian, K, key, which=WHICH, tol=TOL, ncv=ncv)


def first_ratio(ours: Callable[[], Any], theirs: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Seconds of first calls, in alternating order, and the median of their ratios."""
    pairs = []
    for index in range(repeats):
        if index % 2:
            second = first_call(theirs)
            pairs.append((first_call(ours), second))
        else:
            pairs.append((first_call(ours), first_call(theirs)))
    return {
        "ratio": statistics.median(mine / other for mine, other in pairs),
        "eigsh_s": statistics.median(mine for mine, _ in pairs),
        "products_s": statistics.median(other for _, other in pairs),
    }


def program_bytes(function: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """Temporary and output bytes of a compiled function, as XLA counts them."""
    analysis = eqx.filter_jit(function).lower(*args).compile().compiled.memory_analysis()
    return analysis.temp_size_in_bytes, analysis.output_size_in_bytes


def memory(hessian: hj.Operator, key: Array, vector: PyTree, count: int, ncv: int | None) -> dict[str, Any]:
    """The solver's memory in vectors of n numbers."""
    unit = sum(leaf.size * leaf.dtype.itemsize for leaf in jtu.tree_leaves(hessian.structure))
    dimension = default_ncv(hessian.structure, K, WHICH) if ncv is None else ncv
    temporary, output = program_bytes(lambda op, key: solve(op, key, ncv), hessian, key)
    product, _ = program_bytes(lambda op, v: op @ v, hessian, vector)
    looped, _ = program_bytes(lambda op, v: bare_products(op, v, jnp.ones(()), count), hessian, vector)
    return {
        "ncv": dimension,
        "vectors": (temporary + output - product) / unit,
        "vectors_beside_loop": (temporary + output - looped) / unit,
        "documented": dimension + 2 * K + 12,
        "product": product / unit,
        "product_in_loop": looped / unit,
    }


def run(network: str, repeats: int, first_repeats: int) -> None:
    """Reports the three figures of one network."""
    model = NETWORKS[network]()
    hessian, key = model.hessian(), jax.random.key(1)
    pairs = solve(hessian, key)
    count, scale = int(pairs.num_matvecs), pairs.eigenvalues[-1]
    vector = jtu.tree_map(lambda leaf: leaf[0], pairs.eigenvectors)
    fields = {"network": network, "which": WHICH, "k": K, "tol": TOL, "products": count}
    sizes = {"n": hessian.size, "examples": model.num_examples}

    def ours() -> hj.Eigenpairs:
        return solve(hessian, key)

    def theirs() -> PyTree:
        return bare_products(hessian, vector, scale, count)

    times = compare(ours, theirs, repeats)
    seconds = {"eigsh_s": times.ours, "products_s": times.theirs}
    report("cost", sizes=sizes, figure="share", **fields, ratio=times.ratio, **seconds)
    report("cost", sizes=sizes, figure="first call", **fields, **first_ratio(ours, theirs, first_repeats))
    for ncv in (None, 40):
        report("cost", sizes=sizes, figure="memory", **fields, **memory(hessian, key, vector, count, ncv))


def main() -> None:
    """Runs the networks."""
    parser = argparse.ArgumentParser(description="What hessjax.eigsh costs beyond its products, one line per figure.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=5, help="pairs of compiled calls")
    parser.add_argument("--first-repeats", type=int, default=3, help="pairs of first calls")
    options = parser.parse_args()
    for network in options.networks:
        run(network, options.repeats, options.first_repeats)


if __name__ == "__main__":
    main()
