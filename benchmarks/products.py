"""Products with the curvature family against products with the Hessian: time alone and in a compiled loop, and memory.

Run `python -m benchmarks.products [--x64] [--sizes 64 256 256 10]`; half a minute on two idle cores. The network is a
perceptron on the 1797 digits (85,002 parameters unless other sizes are given), untrained. Both programs make 20
products in one `lax.fori_loop`, as a solver does, so that what does not depend on the vector is computed once. A case
is an operator and a slice size (`batch_size`; null for all examples at once). Its line gives:

- `time_ratio`: the median over pairs of calls that ran in turn of this operator's time by the Hessian's; `median_s`.
- `single_ratio`: the same of one compiled product by itself.
- `memory_ratio`: temporaries of the two compiled loops, by XLA's own account; `memory_mb` of this one.
- `error`: for `ggn`, max |Gv + Rv - Hv| / max |Hv| with R the residual part; null for the others.
"""

import argparse
from collections.abc import Callable

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

import hessjax as hj
from benchmarks._harness import compare, report
from benchmarks.networks import digits_mlp, forward, loss

SIZES = (64, 256, 256, 10)
PRODUCTS = 20
FAMILY: dict[str, Callable[..., Callable[..., hj.Operator]]] = {
    "ggn": lambda batch_size: hj.ggn(forward, loss, batch_size=batch_size),
    "ggn_residual": lambda batch_size: hj.ggn_residual(forward, loss, batch_size=batch_size),
    "empirical_fisher": lambda batch_size: hj.empirical_fisher(forward, loss, batch_size=batch_size),
    "gradient_covariance": lambda batch_size: hj.gradient_covariance(forward, loss, batch_size=batch_size),
}


@jax.jit
def power(op: hj.Operator, vector: PyTree) -> PyTree:
    """Several products, each with the last one's direction."""

    def step(_: int, v: PyTree) -> PyTree:
        image = op(v)
        length = jnp.sqrt(sum(jnp.vdot(x, x) for x in jtu.tree_leaves(image)))
        return jtu.tree_map(lambda x: x / length, image)

    return jax.lax.fori_loop(0, PRODUCTS, step, vector)


@jax.jit
def product(op: hj.Operator, vector: PyTree) -> PyTree:
    """One product."""
    return op(vector)


def memory(op: hj.Operator, vector: PyTree) -> float:
    """Temporaries of the compiled loop, in megabytes."""
    return power.lower(op, vector).compile().memory_analysis().temp_size_in_bytes / 1e6


def split_error(model: hj.Model, vector: PyTree, batch_size: int | None) -> float:
    """How far G and the residual part are from adding up to the Hessian, relative to the largest entry."""
    args = model.params, *model.data
    parts = FAMILY["ggn"](batch_size)(*args)(vector), FAMILY["ggn_residual"](batch_size)(*args)(vector)
    whole = model.hessian(batch_size)(vector)
    gaps = jtu.tree_map(lambda g, r, h: jnp.max(jnp.abs(g + r - h)), *parts, whole)
    return max(jtu.tree_leaves(gaps)) / max(jnp.max(jnp.abs(leaf)) for leaf in jtu.tree_leaves(whole))


def main() -> None:
    """Prints one line for every operator and slice size."""
    parser = argparse.ArgumentParser(
        description="Products with the curvature family against products with the Hessian."
    )
    parser.add_argument("--x64", action="store_true", help="float64")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=SIZES, help="widths of the layers, 64 and 10 at the ends"
    )
    arguments = parser.parse_args()
    sizes = tuple(arguments.sizes)
    with jax.enable_x64(arguments.x64):
        model = digits_mlp(sizes, steps=0, dtype=jnp.float64 if arguments.x64 else jnp.float32)
        vector = jtu.tree_map(jnp.ones_like, model.params)
        for batch_size in (None, 256):
            hessian = model.hessian(batch_size)
            for name, transform in FAMILY.items():
                op = transform(batch_size)(model.params, *model.data)
                times = compare(lambda op=op: power(op, vector), lambda: power(hessian, vector), repeats=9)  # noqa: B023 called at once
                single = compare(lambda op=op: product(op, vector), lambda: product(hessian, vector), repeats=49)  # noqa: B023
                report(
                    "products",
                    sizes={"network": sizes, "examples": model.num_examples, "products": PRODUCTS},
                    operator=name,
                    batch_size=batch_size,
                    time_ratio=times.ratio,
                    single_ratio=single.ratio,
                    median_s=times.ours,
                    memory_ratio=memory(op, vector) / memory(hessian, vector),
                    memory_mb=memory(op, vector),
                    error=split_error(model, vector, batch_size) if name == "ggn" else None,
                )


if __name__ == "__main__":
    main()
