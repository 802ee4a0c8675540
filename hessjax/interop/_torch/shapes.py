"""Views, joins, cuts, pads and new arrays. Sizes are integers while JAX traces, so a view is a reshape."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hessjax.interop._torch._rules import RULES, rule

RULES.update(
    {
        "aten.permute": lambda x, dims: jnp.transpose(x, dims),
        "aten.transpose": lambda x, a, b: jnp.swapaxes(x, a, b),
        "aten.t": lambda x: x.T,
        "aten.unsqueeze": lambda x, dim: jnp.expand_dims(x, dim),
        "aten.cat": lambda xs, dim=0: jnp.concatenate([x for x in xs if x.shape != (0,)] or xs, dim),
        "aten.stack": lambda xs, dim=0: jnp.stack(xs, dim),
        "aten.flip": lambda x, dims: jnp.flip(x, tuple(dims)),
        "aten.detach": jax.lax.stop_gradient,
        "aten.movedim": lambda x, source, target: jnp.moveaxis(x, source, target),
        "aten.sym_size": lambda x, dim=None: x.shape if dim is None else x.shape[dim],
        "aten.sym_numel": lambda x: x.size,
        "aten.scalar_tensor": lambda value, dtype=None: jnp.asarray(value, dtype),
        "aten.tril": lambda x, k=0: jnp.tril(x, k),
        "aten.triu": lambda x, k=0: jnp.triu(x, k),
        "aten.diagonal": lambda x, offset=0, a=0, b=1: jnp.diagonal(x, offset, a, b),
        "aten.select": lambda x, dim, index: jax.lax.index_in_dim(x, index, dim, keepdims=False),
        "aten.narrow": lambda x, dim, start, length: jax.lax.slice_in_dim(x, start, start + length, axis=dim),
        "aten.unbind": lambda x, dim=0: [jnp.squeeze(part, dim) for part in jnp.split(x, x.shape[dim], dim)],
        "aten.repeat": lambda x, counts: jnp.tile(x, counts),
        "aten.zeros": lambda size, dtype=None: jnp.zeros(size, dtype),
        "aten.ones": lambda size, dtype=None: jnp.ones(size, dtype),
        "aten.empty": lambda size, dtype=None: jnp.zeros(size, dtype),
        "aten.full": lambda size, value, dtype=None: jnp.full(size, value, dtype),
        "aten.new_zeros": lambda x, size, dtype=None: jnp.zeros(size, dtype or x.dtype),
        "aten.new_ones": lambda x, size, dtype=None: jnp.ones(size, dtype or x.dtype),
        "aten.new_full": lambda x, size, value, dtype=None: jnp.full(size, value, dtype or x.dtype),
        "aten.zeros_like": lambda x, dtype=None: jnp.zeros_like(x, dtype),
        "aten.ones_like": lambda x, dtype=None: jnp.ones_like(x, dtype),
        "aten.empty_like": lambda x, dtype=None: jnp.zeros_like(x, dtype),
        "aten.full_like": lambda x, value, dtype=None: jnp.full_like(x, value, dtype),
        "aten.eye": lambda n, m=None, dtype=None: jnp.eye(n, m if isinstance(m, int) else None, dtype=dtype),
    }
)


@rule("clone", "contiguous", "alias", "lift_fresh_copy", "lift_fresh")
def same(x: Array) -> Array:
    return x


@rule("copy", "fill")
def copy(x: Array, src: Any, non_blocking: bool = False) -> Array:
    del non_blocking
    return jnp.broadcast_to(src, x.shape)


@rule("_to_copy", "to", "type_as")
def to(x: Array, dtype: Any = None, *_: Any) -> Array:
    return x.astype(dtype) if isinstance(dtype, np.dtype) else x


@rule("view", "reshape", "_unsafe_view", "view_copy")
def view(x: Array, size: Any) -> Array:
    if isinstance(size, np.dtype):
        return jax.lax.bitcast_convert_type(x, size)
    return x.reshape(tuple(size))


@rule("flatten.using_ints")
def flatten(x: Array, start: int = 0, end: int = -1) -> Array:
    start, end = start % max(x.ndim, 1), end % max(x.ndim, 1)
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


@rule("unflatten.int")
def unflatten(x: Array, dim: int, sizes: Any) -> Array:
    dim %= x.ndim
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


@rule("expand")
def expand(x: Array, size: Any, *, implicit: bool = False) -> Array:
    del implicit
    shape = (1,) * (len(size) - x.ndim) + x.shape
    return jnp.broadcast_to(x, tuple(old if new == -1 else new for old, new in zip(shape, size, strict=True)))


@rule("squeeze")
def squeeze(x: Array, dim: Any = None) -> Array:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return jnp.squeeze(x, tuple(d for d in dims if x.ndim and x.shape[d] == 1))


@rule("split.Tensor")
def split(x: Array, size: int, dim: int = 0) -> list[Array]:
    return jnp.split(x, list(range(size, x.shape[dim], size)), dim)


@rule("split_with_sizes", "split.sizes")
def split_with_sizes(x: Array, sizes: Any, dim: int = 0) -> list[Array]:
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist(), dim)


@rule("chunk")
def chunk(x: Array, count: int, dim: int = 0) -> list[Array]:
    return split(x, -(-x.shape[dim] // count), dim)


@rule("slice.Tensor")
def slice_of(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


@rule("slice_scatter")
def slice_scatter(x: Array, src: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x.at[tuple(index)].set(src)


@rule("select_scatter")
def select_scatter(x: Array, src: Array, dim: int, index: int) -> Array:
    return x.at[(slice(None),) * (dim % x.ndim) + (index,)].set(src)


@rule("roll")
def roll(x: Array, shifts: Any, dims: Any = ()) -> Array:
    return jnp.roll(x, tuple(shifts), tuple(dims) or None)


@rule("constant_pad_nd")
def constant_pad(x: Array, pad: Any, value: Any = 0) -> Array:
    return jax.lax.pad(x, jnp.asarray(value, x.dtype), [(low, high, 0) for low, high in _widths(x, pad)])


@rule("pad")
def pad_by(x: Array, pad: Any, mode: str = "constant", value: Any = None) -> Array:
    if mode == "constant":
        return constant_pad(x, pad, value or 0)
    return jnp.pad(x, _widths(x, pad), mode={"reflect": "reflect", "replicate": "edge", "circular": "wrap"}[mode])


def _widths(x: Array, pad: Any) -> list[tuple[int, int]]:
    """Torch lists the last axis first."""
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    return [(0, 0)] * (x.ndim - len(pairs)) + pairs


@rule("arange")
def arange(*bounds: Any, dtype: Any = None) -> Array:
    return jnp.arange(*bounds, dtype=dtype)


@rule("linspace")
def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None) -> Array:
    return jnp.linspace(start, end, steps, dtype=dtype)


@rule("unfold")
def unfold(x: Array, dim: int, size: int, step: int) -> Array:
    starts = np.arange(0, x.shape[dim] - size + 1, step)
    windows = jnp.take(x, starts[:, None] + np.arange(size), axis=dim)
    return jnp.moveaxis(windows, dim % x.ndim + 1, -1)


@rule("pixel_shuffle")
def pixel_shuffle(x: Array, factor: int) -> Array:
    *lead, channels, height, width = x.shape
    parts = x.reshape(*lead, channels // factor**2, factor, factor, height, width)
    moved = jnp.moveaxis(parts, (-4, -3), (-3, -1))
    return moved.reshape(*lead, channels // factor**2, height * factor, width * factor)


@rule("meshgrid")
def meshgrid(arrays: Any, *, indexing: str = "ij") -> list[Array]:
    return list(jnp.meshgrid(*arrays, indexing=indexing))
