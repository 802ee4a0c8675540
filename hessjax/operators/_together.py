"""Products with many vectors: all of them at once, or one after another where that is faster."""

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.core
import jax.tree_util as jtu
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jaxtyping import Array, Float, PyTree

from hessjax._vectors import size_of
from hessjax.operators._convolutions import channel_last_program, may_trace

_CACHE = 4 << 20  # bytes of one intermediate result of all products together, above which they run one after another


def each(
    function: Callable[[PyTree[Array]], PyTree[Array]], block: PyTree[Float[Array, "count ..."]]
) -> PyTree[Float[Array, "count ..."]]:
    """`channel_last(function)` of every vector of a block; the function is traced once.

    All at once, products read once what they share. On a CPU that no longer pays where their intermediate results do
    not fit the cache. Ten Hessian products of perceptrons on 1,797 digits, one after another over all at once, on two
    cores: 1.2 with 3,466 parameters, 0.9 with 8,970, 0.74 to 0.84 with 17,610 to 1,853,610, 0.80 for a convolutional
    network; on 8 to 128 images 1.1 to 1.4.
    """
    count = jtu.tree_leaves(block)[0].shape[0]
    if not may_trace():
        return jax.vmap(function)(block)
    vector = jax.eval_shape(partial(jtu.tree_map, lambda leaf: leaf[0]), block)
    program, one = channel_last_program(function, vector)
    together, in_turn = jax.vmap(one), partial(lax.map, one)
    if count * _largest_result(program, vector) <= _CACHE:
        return together(block)
    return lax.platform_dependent(block, cpu=in_turn, default=together)


def _largest_result(program: ClosedJaxpr, vector: PyTree[jax.ShapeDtypeStruct]) -> int:
    """The bytes of the largest intermediate result that is not a leaf of a vector: those are there in either case."""
    leaves = {size_of(leaf) for leaf in jtu.tree_leaves(vector)}
    results = (result for result in _results(program) if result.size not in leaves)
    return max((result.size * result.dtype.itemsize for result in results), default=0)


def _results(program: object) -> Iterator[jax.core.ShapedArray]:
    """What the equations of a program compute, and of those within them."""
    if isinstance(program, ClosedJaxpr):
        program = program.jaxpr
    if isinstance(program, Jaxpr):
        for equation in program.eqns:
            yield from (out.aval for out in equation.outvars if isinstance(out.aval, jax.core.ShapedArray))
            for parameter in equation.params.values():
                yield from _results(parameter)
    if isinstance(program, tuple):
        for part in program:
            yield from _results(part)
