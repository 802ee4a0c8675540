"""An operator as lineax sees it."""

from typing import TYPE_CHECKING, Any

from jax.tree_util import Partial
from jaxtyping import PyTree

from hessjax.operators import Operator
from hessjax.operators._operator import as_operator, multiply

if TYPE_CHECKING:
    from lineax import FunctionLinearOperator


def as_lineax(op: Operator | Any, *, tags: Any = (), like: PyTree | None = None) -> "FunctionLinearOperator":
    """A `lineax.FunctionLinearOperator` for the same matrix, to be solved with lineax or composed with its operators.

    Args:
        op: a symmetric operator.
        tags: what else is known, such as `lineax.positive_semidefinite_tag`, which lineax's CG asks for; one tag or
            several. `lineax.symmetric_tag` is always there.
        like: a pytree shaped as the vectors, when `op` is a plain function.

    Returns:
        A pytree that holds the operator's arrays: it passes through `eqx.filter_jit` and can be differentiated.

        lineax's CG compares entry by entry and by absolute measures: give it `atol > 0` where the right-hand side has
        exact zeros, or it may end at once and call that a success; on float32 operators of small scale it may return
        NaN. `hj.solve` does neither.

    Raises:
        ImportError: lineax is not installed.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, lineax as lx
        >>> A = hj.operator(lambda v: jnp.array([2.0, 4.0]) * v, like=jnp.zeros(2))
        >>> B = hj.as_lineax(A, tags=lx.positive_semidefinite_tag)
        >>> lx.linear_solve(B, jnp.ones(2), lx.CG(rtol=1e-6, atol=1e-6)).value.tolist()
        [0.5, 0.25]
    """
    try:
        import lineax as lx
    except ImportError as error:
        raise ImportError("`as_lineax` needs lineax: pip install 'hessjax[lineax]'.") from error
    op = as_operator(op, like)
    given = tags if isinstance(tags, tuple | list | set | frozenset) else (tags,)
    # Not converted: the operator's arrays are leaves already, and new ones of the same shapes compile nothing.
    tags = frozenset({lx.symmetric_tag, *given})
    return lx.FunctionLinearOperator(Partial(multiply, op), op.structure, tags, closure_convert=False)
