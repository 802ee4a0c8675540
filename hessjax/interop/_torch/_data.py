"""Tensors, datasets and loaders as arrays, with nothing in PyTorch moved on their account."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import torch
from jaxtyping import PyTree

_LABELS = ("labels", "label", "targets", "target")


@contextlib.contextmanager
def untouched(*holders: Any) -> Iterator[None]:
    """Autograd as in a fresh process, and every random state put back that reading data or running a module moves."""
    generators = [g for h in holders for g in _generators(h)]
    states = [g.get_state() for g in generators]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _generators(loader: Any) -> list[Any]:
    owners = [loader, getattr(loader, "sampler", None)]
    found = {id(g): g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None}
    return list(found.values())


def x64_is_on() -> bool:
    """Whether JAX keeps float64."""
    return jax.dtypes.canonicalize_dtype(np.float64) == np.float64


def to_numpy(leaf: Any) -> Any:
    """A copy in the same dtype; what is no array stays."""
    if isinstance(leaf, torch.Tensor):
        tensor = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().copy().view(jnp.bfloat16)
        return tensor.numpy().copy()
    return np.array(leaf) if hasattr(leaf, "__array__") else leaf


def to_tensor(leaf: np.ndarray) -> torch.Tensor:
    """The inverse of `to_numpy`."""
    if leaf.dtype == jnp.bfloat16:
        return torch.from_numpy(np.array(leaf).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(leaf))


def at_jax_width(leaf: Any) -> Any:
    """NumPy's float64 in float32 while x64 is off, as everywhere in JAX; anything else stays."""
    wide = isinstance(leaf, np.ndarray) and leaf.dtype == np.float64
    return leaf.astype(np.float32) if wide and not x64_is_on() else leaf


def to_jax(leaf: Any, name: str) -> Any:
    """An array on the device.

    Raises:
        ValueError: an integer does not fit JAX's default integers.
    """
    if not isinstance(leaf, np.ndarray):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
    if leaf.dtype.kind in "iu" and leaf.size and dtype != leaf.dtype:
        limits = np.iinfo(dtype)
        if leaf.min() < limits.min or leaf.max() > limits.max:
            raise ValueError(
                f"`{name}` holds integers up to {int(np.abs(leaf).max())}, beyond {dtype}: enable JAX's x64."
            )
    return jnp.asarray(leaf, dtype)


def read(data: Any) -> tuple[PyTree, PyTree]:
    """`(inputs, targets)` in NumPy: several inputs as a tuple, named ones as a dict.

    Args:
        data: the pair itself; or a Dataset or DataLoader of such pairs, or of dicts with `labels` among them. It is
            read once, to its end.

    Raises:
        ValueError: an item is no pair, or batches have unequal structure; the message names the batch.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and not isinstance(data, torch.utils.data.Dataset):
        return _arrays(_arguments(data[0])), _arrays(data[1])
    if isinstance(data, Mapping):
        return _pair(data, "`data`")
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise ValueError(
            "`data` must be the pair `(inputs, targets)`, a Dataset or a DataLoader, got "
            f"{type(data).__name__}{f' of {len(data)} items' if hasattr(data, '__len__') else ''}."
        )
    if isinstance(data, tuple | list):
        raise ValueError(f"`data` must be the pair `(inputs, targets)`, got {len(data)} items.")
    with untouched(data):
        if isinstance(data, torch.utils.data.DataLoader) or not hasattr(data, "__getitem__"):
            batches = [_pair(batch, f"batch {i}") for i, batch in enumerate(data)]
            if not isinstance(data, torch.utils.data.DataLoader) and batches and _is_single(batches[0]):
                batches = [jtu.tree_map(lambda leaf: np.asarray(leaf)[None], batch) for batch in batches]
        else:
            items = [data[i] for i in range(len(data))]
            batches = [_pair(torch.utils.data.default_collate(items), "the dataset")] if items else []
    if not batches:
        raise ValueError("`data` is empty: it yields no batch.")
    return _joined(batches)


def _is_single(batch: PyTree) -> bool:
    """Items of an iterable dataset are examples, not batches: their targets have no axis."""
    return any(np.ndim(leaf) == 0 for leaf in jtu.tree_leaves(batch))


def _pair(batch: Any, what: str) -> tuple[PyTree, PyTree]:
    if isinstance(batch, Mapping):
        labels = [key for key in _LABELS if key in batch]
        if not labels:
            raise ValueError(f"Of a dict, one key must hold the targets, `labels` say; {what} has {sorted(batch)}.")
        inputs = {key: value for key, value in batch.items() if key != labels[0]}
        return _arrays(inputs), _arrays(batch[labels[0]])
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return _arrays(_arguments(batch[0])), _arrays(batch[1])
    got = f"{len(batch)} items" if isinstance(batch, tuple | list) else type(batch).__name__
    raise ValueError(f"Every batch must be a pair `(inputs, targets)`, got {got} in {what}.")


def _arguments(inputs: Any) -> Any:
    """Collated tuples come as lists, tokenizers return mappings of their own."""
    return dict(inputs) if isinstance(inputs, Mapping) else tuple(inputs) if isinstance(inputs, list) else inputs


def _arrays(tree: Any) -> Any:
    if isinstance(tree, Mapping):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, list) and not any(hasattr(part, "__array__") for part in jtu.tree_leaves(tree)):
        return np.asarray(tree)
    return jtu.tree_map(to_numpy, tree)


def _joined(batches: list[PyTree]) -> PyTree:
    first = batches[0]
    for number, batch in enumerate(batches):
        if jtu.tree_structure(batch) != jtu.tree_structure(first):
            raise ValueError(
                f"Batches must have one structure: batch {number} is {jtu.tree_structure(batch)}, batch 0 is "
                f"{jtu.tree_structure(first)}. A `collate_fn` can give all the same nesting and keys."
            )
        for (path, leaf), other in zip(jtu.tree_leaves_with_path(batch), jtu.tree_leaves(first), strict=True):
            if np.shape(leaf)[1:] != np.shape(other)[1:]:
                raise ValueError(
                    f"Batches must have one shape beyond the batch axis: `{jtu.keystr(path)}` of batch {number} has "
                    f"{np.shape(leaf)[1:]}, of batch 0 {np.shape(other)[1:]}. Pad all examples to one length."
                )
    return jtu.tree_map(lambda *leaves: np.concatenate(leaves), *batches)
