"""The arguments of `track_curvature`, checked at the door."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from hessjax._arguments import as_integer, needs_key
from hessjax._function import Function, as_function
from hessjax.krylov._warm import WHICH
from hessjax.operators import adam_preconditioner


class Settings(eqx.Module):
    """What a tracker was asked for. The arrays of functions are leaves; everything else is static.

    Attributes:
        function: the loss, or what builds the operator if `builds`.
        grow_above: a scalar, or None.
        implementation: that of a typed key, None for a raw one.
    """

    function: Function
    builds: bool = eqx.field(static=True)
    preconditioner: Function | None
    grow_above: Array | None
    implementation: Any = eqx.field(static=True)
    k: int = eqx.field(static=True)
    every: int = eqx.field(static=True)
    which: str = eqx.field(static=True)
    tol: float = eqx.field(static=True)
    certify: int = eqx.field(static=True)
    guards: int = eqx.field(static=True)
    history: int = eqx.field(static=True)

    @classmethod
    def of(
        cls,
        *,
        loss: Any,
        key: Any,
        k: Any,
        every: Any,
        which: str,
        preconditioner: Any,
        operator: Any,
        grow_above: Any,
        tol: Any,
        certify: Any,
        guards: Any,
        history: Any,
    ) -> "Settings":
        """Raises ValueError or TypeError in the caller's words."""
        if (loss is None) == (operator is None):
            which_came = "neither" if loss is None else "both"
            raise ValueError(f"`track_curvature` needs either a `loss` or an `operator=`, got {which_came}.")
        if which not in WHICH:
            raise ValueError(f"`which` must be one of {', '.join(WHICH)}, got {which!r}.")
        positive, others = {"k": k, "every": every, "certify": certify}, {"guards": guards, "history": history}
        for name, value in {**positive, **others}.items():
            least = int(name in positive)
            if as_integer(name, value) < least:
                raise ValueError(f"`track_curvature` needs `{name} >= {least}`, got {value}.")
        if not isinstance(tol, int | float | np.number | np.ndarray) or not 0 < float(tol) < 1:
            raise ValueError(f"`track_curvature` needs a number 0 < `tol` < 1, known at compile time, got {tol!r}.")
        if grow_above is not None:
            if which != "LA":
                raise ValueError(f'`grow_above` goes with `which="LA"`, got {which!r}.')
            if not _is_threshold(grow_above):
                raise ValueError(
                    "`grow_above` must be a real scalar, such as `hj.edge_of_stability('sgd', learning_rate)`, got "
                    f"{grow_above!r}."
                )
        if preconditioner == "from_opt_state":
            preconditioner = adam_preconditioner
        if not (preconditioner is None or callable(preconditioner)):
            raise ValueError(
                "`preconditioner` must be None, 'from_opt_state', or a function from an optax state to D, got "
                f"{preconditioner!r}."
            )
        needs_key(key, "track_curvature")
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        return cls(
            function=as_function(loss, "loss") if operator is None else as_function(operator, "operator"),
            builds=loss is None,
            preconditioner=None if preconditioner is None else as_function(preconditioner, "preconditioner"),
            grow_above=None if grow_above is None else jnp.asarray(grow_above, float),
            implementation=jax.random.key_impl(key) if typed else None,
            k=as_integer("k", k),
            every=as_integer("every", every),
            which=which,
            tol=float(tol),
            certify=as_integer("certify", certify),
            guards=as_integer("guards", guards),
            history=as_integer("history", history),
        )


def _is_threshold(value: Any) -> bool:
    """A real scalar, and a number where its value is known."""
    if not eqx.is_array_like(value) or jnp.ndim(value) != 0 or jnp.iscomplexobj(value):
        return False
    return isinstance(value, Tracer) or not np.isnan(float(value))
