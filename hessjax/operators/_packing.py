"""A view of an operator in which small leaves travel together.

A solver's program holds a few instructions for every leaf of its vectors, and a network has a hundred leaves of which
most are small. Here all leaves of one dtype below a size are laid out in one array, so that the program, and the time
to compile it, stay small. Large leaves, which carry the memory and may be sharded, stay as they are; so does every leaf
that lives on several devices.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jaxtyping import Array, PyTree

from hessjax._vectors import size_of
from hessjax.operators._operator import Operator, multiply

_SMALL = 1 << 17  # entries


class Packing(eqx.Module):
    """How a structure's leaves are grouped: lone ones by themselves, small ones of a dtype in one flat array."""

    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)
    groups: tuple[tuple[int, ...], ...] = eqx.field(static=True)

    @classmethod
    def of(cls, like: PyTree) -> "Packing":
        """The packing of vectors shaped as `like`, whose arrays (if it has any) tell where the leaves live."""
        leaves, treedef = jtu.tree_flatten(like)
        groups: list[tuple[int, ...]] = []
        together: dict[str, list[int]] = {}
        for index, leaf in enumerate(leaves):
            spread = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and len(leaf.devices()) > 1
            if spread or size_of(leaf) > _SMALL:
                groups.append((index,))
            else:
                together.setdefault(str(leaf.dtype), []).append(index)
        groups += [tuple(indices) for indices in together.values()]
        structs = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves)
        return cls(structs, treedef, tuple(groups))

    def pack(self, vector: PyTree, batch: int = 0) -> tuple[Array, ...]:
        """One array per group; the first `batch` axes of every leaf are left alone."""
        leaves = jtu.tree_leaves(vector)
        return tuple(
            jnp.squeeze(leaves[group[0]], self._thin(group[0], batch))
            if len(group) == 1
            else jnp.concatenate([leaves[i].reshape(*leaves[i].shape[:batch], -1) for i in group], axis=-1)
            for group in self.groups
        )

    def unpack(self, arrays: tuple[Array, ...], batch: int = 0) -> PyTree:
        """The inverse of `pack`."""
        out: dict[int, Array] = {}
        for group, array in zip(self.groups, arrays, strict=True):
            start = 0
            for index in group:
                spec = self.leaves[index]
                if len(group) == 1:
                    out[index] = jnp.expand_dims(array, self._thin(index, batch))
                    continue
                part = array[..., start : start + size_of(spec)]
                out[index] = part.reshape(*array.shape[:batch], *spec.shape)
                start += size_of(spec)
        return self.treedef.unflatten([out[i] for i in range(len(self.leaves))])

    def _thin(self, index: int, batch: int) -> tuple[int, ...]:
        """A lone leaf's axes of length 1, behind `batch` others. With one, XLA copies a whole basis to lay it anew."""
        return tuple(batch + axis for axis, length in enumerate(self.leaves[index].shape) if length == 1)


class Packed(Operator):
    """`operator` on packed vectors."""

    operator: Operator
    packing: Packing

    @property
    def like(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return jax.eval_shape(lambda v: self.packing.pack(v), self.operator.structure)

    def product(self, vector: tuple[Array, ...]) -> tuple[Array, ...]:
        return self.packing.pack(multiply(self.operator, self.packing.unpack(vector)))
