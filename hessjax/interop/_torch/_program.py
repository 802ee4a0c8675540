"""An exported graph as a list of instructions, and their execution in JAX.

What flows in is a graph of ATen operations; what flows out is a function of arrays that any JAX transformation takes.
Every instruction is found a rule here, at conversion, so that nothing is missing later. PyTorch's objects end here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax.interop._torch._rules import Rule


@dataclasses.dataclass(frozen=True)
class Ref:
    """The value of an earlier instruction."""

    name: str


@dataclasses.dataclass(frozen=True)
class Dtype:
    """A dtype written into the graph."""

    name: str


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """`name = function(*args, **kwargs)`, whose arrays get `dtypes`; `layer` and `op` are for messages."""

    name: str
    function: Rule
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtypes: tuple[str | None, ...]
    op: str
    layer: str


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Instructions with named inputs and outputs. Static data: two programs are equal if they are one object.

    Attributes:
        inputs: the names of the user's inputs, in order.
        arrays: name in the graph → key among parameters and constants.
        outputs: the names of the results, in order.
    """

    instructions: tuple[Instruction, ...]
    inputs: tuple[str, ...]
    arrays: dict[str, str]
    outputs: tuple[Ref, ...]

    def dtypes(self) -> set[str]:
        """The dtypes that its instructions produce."""
        return {dtype for step in self.instructions for dtype in step.dtypes if dtype is not None}

    def run(self, arrays: dict[str, Array], inputs: list[Array], wide: bool = False) -> list[Array]:
        """The results on `inputs`, with `arrays` for parameters and constants.

        Args:
            arrays: by key.
            inputs: in the order of `self.inputs`.
            wide: whether to compute in float64 what the graph says is in less.
        """
        values: dict[str, Any] = {name: arrays[key] for name, key in self.arrays.items()}
        values.update(zip(self.inputs, inputs, strict=True))

        def fill(node: Any) -> Any:
            if isinstance(node, Ref):
                return values[node.name]
            if isinstance(node, Dtype):
                return _resolve(node.name, wide)
            if isinstance(node, list | tuple):
                return [fill(part) for part in node]
            return node

        for step in self.instructions:
            args, kwargs = fill(step.args), {key: fill(part) for key, part in step.kwargs.items()}
            with jax.named_scope(step.layer.replace(".", "/") or "root"):
                values[step.name] = _cast(_call(step, args, kwargs), step.dtypes, wide)
        return [fill(output) for output in self.outputs]


def _call(step: Instruction, args: list[Any], kwargs: dict[str, Any]) -> Any:
    try:
        return step.function(*args, **kwargs)
    except Exception as error:
        raise NotImplementedError(
            f"The operation `{step.op}` in layer `{step.layer or 'the module itself'}` has no equivalent in JAX as it "
            f"is used there: {error}"
        ) from error


def _resolve(name: str, wide: bool) -> np.dtype:
    dtype = jnp.dtype(name)
    if wide and jnp.issubdtype(dtype, jnp.floating):
        dtype = jnp.dtype("float64")
    return jax.dtypes.canonicalize_dtype(dtype)


def _cast(value: Any, dtypes: tuple[str | None, ...], wide: bool) -> Any:
    """Torch's promotion differs from JAX's: the graph says what came out."""
    if isinstance(value, list | tuple):
        return [_cast(part, (dtype,), wide) for part, dtype in zip(value, dtypes, strict=False)]
    if not dtypes or dtypes[0] is None or not isinstance(value, jax.Array | np.ndarray):
        return value
    wanted = _resolve(dtypes[0], wide)
    return value if value.dtype == wanted else value.astype(wanted)


def getitem(value: Any, index: Any) -> Any:
    """One of several results."""
    return value[index]
