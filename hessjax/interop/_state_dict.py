"""What `torch.save` writes, read without PyTorch and without running code.

The file is a zip archive of one pickle and the tensors' raw bytes. A pickle can call any function; this reader knows
the few names that tensors need and refuses all others, so that a file can contribute numbers only.
"""

import collections
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "UntypedStorage": "uint8",
}  # fmt: skip
_UNTYPED = (
    "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz",
)  # fmt: skip


class _Storage:
    """A storage class by name; never instantiated."""

    def __init__(self, name: str):
        self.dtype = jnp.dtype(_STORAGES[name])


def _tensor(
    storage: np.ndarray,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: Any = False,
    hooks: Any = None,
    flags: Any = None,
) -> np.ndarray:
    """A strided window into a storage, after a look at its bounds; conjugated and negated where a flag says so."""
    del requires_grad, hooks
    window = _window(storage, offset, size, stride)
    for flag, holds in (flags or {}).items():
        if flag not in ("conj", "neg"):
            raise ValueError(f"A tensor in the file has the unknown property {flag!r}.")
        if holds:
            window = np.conj(window) if flag == "conj" else np.negative(window)
    return window


def _untyped_tensor(
    storage: np.ndarray,
    offset: int,
    size: Any,
    stride: Any,
    requires_grad: Any,
    hooks: Any,
    dtype: Any,
    flags: Any = None,
) -> np.ndarray:
    """A tensor of a dtype that has no storage class; its storage is bytes."""
    whole = storage[: storage.size // dtype.itemsize * dtype.itemsize].view(dtype)
    return _tensor(whole, offset, size, stride, requires_grad, hooks, flags)


def _window(storage: np.ndarray, offset: int, size: Any, stride: Any) -> np.ndarray:
    size, stride = tuple(map(int, size)), tuple(map(int, stride))
    if min((offset, *size, *stride), default=0) < 0:
        raise ValueError("A tensor in the file has a negative size, stride or offset.")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        return np.zeros(size, storage.dtype)
    if last >= storage.size:
        raise ValueError("A tensor in the file reaches beyond its data: the file is damaged or hostile.")
    steps = [step * storage.itemsize for step in stride]
    # Not by `as_strided`, which does not know every dtype of 8 bits.
    return np.ndarray(size, storage.dtype, storage.view(np.uint8), offset * storage.itemsize, steps).copy()


def _parameter(data: np.ndarray, *_: Any) -> np.ndarray:
    return data


_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _untyped_tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    ("torch", "Size"): tuple,
    ("torch.storage", "UntypedStorage"): _Storage("UntypedStorage"),
    **{("torch", name): _Storage(name) for name in _STORAGES},
    **{("torch", name): jnp.dtype(name) for name in _UNTYPED},
}


class _Reader(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, prefix: str):
        super().__init__(archive.open(f"{prefix}data.pkl"))
        self.archive, self.prefix = archive, prefix
        self.storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise ValueError(
                f"The file refers to `{module}.{name}`, which is no tensor, nor a dtype that is known here. "
                "Save the weights alone: `torch.save(module.state_dict(), path)`."
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage, key, _, count = pid
        if kind != "storage" or not isinstance(storage, _Storage):
            raise ValueError(f"The file holds a storage of the unknown kind {kind!r}.")
        if key not in self.storages:
            raw = self.archive.read(f"{self.prefix}data/{key}")
            if len(raw) < count * storage.dtype.itemsize:
                raise ValueError("A storage in the file is shorter than declared: the file is damaged.")
            self.storages[key] = np.frombuffer(raw, storage.dtype, count)
        return self.storages[key]


def load_state_dict(path: Path) -> PyTree:
    """The tensors of a file that `torch.save` wrote, in its own nesting.

    Raises:
        ValueError: it is not torch's zip format, is damaged, or refers to anything but tensors.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"`{path}` is not what `torch.save` writes since 1.6 (a zip archive). Save it again with it.")
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        heads = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(heads) != 1:
            raise ValueError(f"`{path}` is a zip archive, but not one of tensors (a TorchScript module?).")
        prefix = heads[0].removesuffix("data.pkl")
        if f"{prefix}byteorder" in names and archive.read(f"{prefix}byteorder") != b"little":
            raise ValueError(f"`{path}` was written on a big-endian machine.")
        try:
            tree = _Reader(archive, prefix).load()
        except (pickle.UnpicklingError, KeyError, EOFError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"`{path}` holds other things than tensors, or is damaged: {error}") from error
    return _plain(tree)


def _plain(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _plain(value) for key, value in node.items()}
    return node
