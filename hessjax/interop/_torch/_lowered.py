"""Programs as functions of a `Model`: a forward, and a loss."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from hessjax.interop._torch._program import Program


class Converted(eqx.Module):
    """A program with its constants as a forward function; on one example if `single`, else on a batch."""

    program: Program = eqx.field(static=True)
    constants: dict[str, Array]
    result: Any = eqx.field(static=True)
    single: bool = eqx.field(static=True)
    wide: bool = eqx.field(static=True, default=False)

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        leaves = [jnp.asarray(leaf) for leaf in jtu.tree_leaves(arguments(inputs))]
        leaves = [leaf[None] for leaf in leaves] if self.single else leaves
        outputs = self.program.run({**self.constants, **params}, leaves, self.wide)
        return jtu.tree_unflatten(self.result, [out[0] for out in outputs] if self.single else outputs)


class ConvertedLoss(eqx.Module):
    """A torch loss on one example, which it takes for a batch of one."""

    program: Program = eqx.field(static=True)
    constants: dict[str, Array]
    wide: bool = eqx.field(static=True, default=False)

    def __call__(self, output: PyTree, target: PyTree) -> Array:
        leaves = [jnp.asarray(leaf)[None] for leaf in jtu.tree_leaves(((output, target), {}))]
        return self.program.run(self.constants, leaves, self.wide)[0]


def arguments(inputs: PyTree) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tuple is several arguments, a dict named ones, anything else is one."""
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
