"""`hessjax.eigsh` against other eigensolvers on networks of three sizes: products, time and what was delivered.

Run `python -m benchmarks.rivals [--networks mlp cnn wide] [--which LA] [--repeats 3] [--product plain]`. The Hessian
of each network on the digits, in float32; k = 6, tol = 1e-3. The rivals, each a line of its own:

- `scipy`: ARPACK with its default `ncv`, over `hj.as_scipy`.
- `matfree`: `tridiag_sym` with full reorthogonalization, and `eigh` of the tridiagonal.
- `furax`: `lanczos_tr`.
- `lobpcg`: `jax.experimental.sparse.linalg.lobpcg_standard` from k random columns.

matfree, furax and LOBPCG run as one compiled program each, and multiply by `jvp(grad(loss))` as a user of theirs would
write it; with `--product hessjax` they get the operator's own product. matfree and furax must be told how many steps to
take. They get the smallest number that suffices from every start that is timed, found beforehand and not timed; LOBPCG
gets a tolerance at which it stops at the first sufficient iteration. `hj.eigsh` is told the tolerance and no more, and
certifies its result. Each call starts from another random vector. A rival that cannot be imported, cannot compute
`which`, or needs more than `--budget` products or 512 basis vectors gets a line that says so.

A line gives of either solver, over all its calls:

- `products`, the median; `first_s`, `median_s`: seconds of the first call, compilation included, and of the later ones.
- `residual_ratio`: the largest true residual, by a product, over tol · max(eps^(2/3) ‖A‖, |λ|). At most 1 if the
  tolerance was reached; `reached` says whether the rival did.
- `shortfall`: by how much its values fall short of the other's, relative to the largest: large if one was missed.

`time_ratio` is the median over pairs of calls, in turn, of ours / theirs; `first_ratio` and `product_ratio` likewise.
The last line says for each network which rival that reached the tolerance was fastest, and our time over its time.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import hessjax as hj
from benchmarks._cases import (
    Answer,
    Case,
    Problem,
    own_product,
    plain_product,
    residual_ratio,
    shortfall,
    sufficient_depth,
)
from benchmarks._harness import compare, report
from benchmarks._rivals import RIVALS, Attempt, Unavailable
from benchmarks.networks import NETWORKS

K, TOL = 6, 1e-3
PRODUCTS = {"plain": plain_product, "hessjax": own_product}


class Calls:
    """A solver that takes the next start at every call, and keeps what it returned."""

    def __init__(self, solve: Callable[[int], Any]):
        self.solve = solve
        self.returned: list[Any] = []

    def __call__(self) -> Any:
        self.returned.append(self.solve(len(self.returned)))
        return self.returned[-1]


class Ratios(NamedTuple):
    """Ours / theirs against one rival."""

    time: float
    first: float
    products: float


def ours(case: Case) -> Attempt:
    """`hj.eigsh`, called with the tolerance and a key."""
    hessian, (which, k, tol) = case.model.hessian(), case.problem
    return Attempt(
        {},
        lambda index: hj.eigsh(hessian, k, case.keys[index], which=which, tol=tol),
        lambda pairs: Answer(pairs.eigenvalues, pairs.eigenvectors, pairs.num_matvecs),
    )


def describe(case: Case, answers: list[Answer], others: list[Answer]) -> dict[str, Any]:
    """What a line says of one solver besides its times; None where pairs are missing."""
    residuals = [residual_ratio(case.model, answer, case.problem, case.scale) for answer in answers]
    missing = [shortfall(mine, other, case.problem) for mine, other in zip(answers, others, strict=True)]
    return {
        "products": statistics.median(int(answer.products) for answer in answers),
        "residual_ratio": None if None in residuals else max(x for x in residuals if x is not None),
        "shortfall": None if None in missing else max(x for x in missing if x is not None),
    }


def duel(case: Case, attempt: Attempt) -> tuple[Ratios, dict[str, Any]]:
    """Times one attempt against ours, and the fields of its line."""
    mine, theirs = Calls(ours(case).solve), Calls(attempt.solve)
    times = compare(mine, theirs, len(case.keys) - 1)
    answers = [ours(case).read(pairs) for pairs in mine.returned]
    others = [attempt.read(returned) for returned in theirs.returned]
    one, other = describe(case, answers, others), describe(case, others, answers)
    ratios = Ratios(times.ratio, times.ours_first / times.theirs_first, one["products"] / other["products"])
    return ratios, {
        "settings": attempt.settings,
        "reached": other["residual_ratio"] is not None and other["residual_ratio"] <= 1,
        "time_ratio": ratios.time,
        "first_ratio": ratios.first,
        "product_ratio": ratios.products,
        "ours": {**one, "first_s": times.ours_first, "median_s": times.ours},
        "theirs": {**other, "first_s": times.theirs_first, "median_s": times.theirs},
    }


def meet(case: Case, name: str) -> tuple[Ratios | None, dict[str, Any]]:
    """The first attempt of a rival that reaches the tolerance, or else the last; no ratios if none does."""
    fields: dict[str, Any] = {}
    try:
        for attempt in RIVALS[name](case):
            ratios, fields = duel(case, attempt)
            if fields["reached"]:
                return ratios, fields
    except Unavailable as reason:
        return None, {"skipped": str(reason)}
    return None, fields


def best(ratios: dict[str, Ratios]) -> dict[str, Any] | None:
    """The rival that was fastest, and ours / theirs; None if no rival reached the tolerance."""
    if not ratios:
        return None
    name = max(ratios, key=lambda rival: ratios[rival].time)
    return {"rival": name, "time_ratio": ratios[name].time, "all": {rival: r.time for rival, r in ratios.items()}}


def run(network: str, problem: Problem, product: str, repeats: int, budget: int, rivals: list[str]) -> Any:
    """Meets every rival on one network, a line each."""
    model = NETWORKS[network]()
    keys = list(jax.random.split(jax.random.key(1), repeats + 1))
    depth, scale = sufficient_depth(model, problem, keys)
    case = Case(model, PRODUCTS[product], problem, keys, depth, scale, budget)
    found = {}
    for name in rivals:
        ratios, fields = meet(case, name)
        if ratios is not None:
            found[name] = ratios
        report(
            "rivals",
            sizes={"n": model.hessian().size, "examples": model.num_examples},
            network=network,
            loss=float(model.loss_value()),
            **problem._asdict(),
            rival=name,
            product="hessjax" if name == "scipy" else product,
            **fields,
        )
    return best(found)


def main() -> None:
    """Runs the networks and prints the summary."""
    parser = argparse.ArgumentParser(description="hessjax.eigsh against other eigensolvers, one JSON line per rival.")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--which", choices=("LA", "SA", "LM", "SM"), default="LA")
    parser.add_argument("--product", choices=PRODUCTS, default="plain", help="what the rivals in JAX multiply by")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of calls after the first")
    parser.add_argument("--budget", type=int, default=2000, help="products that a rival may spend on one call")
    options = parser.parse_args()
    problem = Problem(options.which, K, TOL)
    summary = {
        name: run(name, problem, options.product, options.repeats, options.budget, options.rivals)
        for name in options.networks
    }
    report("rivals summary", sizes={"networks": len(summary)}, **problem._asdict(), time_over_best=summary)


if __name__ == "__main__":
    main()
