"""Parameters from and to files: exact bits, no framework, and never code from a file."""

import errno
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from hessjax._model import is_number, is_number_list
from hessjax.interop._jax_source import missing
from hessjax.interop._state_dict import load_state_dict

_SAFETENSORS = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip

# What the parsers of a file's bytes raise where those make no sense; of OSError a seek to no place (EINVAL).
_DAMAGE = (
    zipfile.BadZipFile, zlib.error, EOFError, LookupError, TypeError, AttributeError, NotImplementedError, OSError,
)  # fmt: skip


def load_params(path: Any) -> PyTree:
    """Reads parameters from a file, as NumPy arrays with the dtype and the bits that were written.

    Args:
        path: by its suffix: `.safetensors`, `.npz`, `.json` (nested lists of numbers become float64 arrays),
            `.msgpack` (flax's), `.pt`, `.pth`, `.bin` or `.ckpt` (a state_dict that `torch.save` wrote; tensors only,
            no code is run, PyTorch is not needed), or a directory (orbax).

    Returns:
        A flat dict by name, or nested dicts as the file has them. Buffers and counters are in it too, as far as the
        file has them: `eqx.partition(params, eqx.is_inexact_array_like)` separates them. In native byte order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the suffix is unknown, the file is damaged, or it holds other things than arrays.
        ImportError: msgpack or orbax is needed and not installed.

    Example:
        >>> import hessjax as hj, numpy as np, tempfile, os
        >>> path = os.path.join(tempfile.mkdtemp(), "net.safetensors")
        >>> hj.save_params(path, {"fc.weight": np.float32([[0.1, 0.2]])})
        >>> hj.load_params(path)["fc.weight"].tolist() == np.float32([[0.1, 0.2]]).tolist()
        True
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no file `{path}`.")
    if path.is_dir():
        return _load_orbax(path)
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(
            f"`load_params` reads {', '.join(sorted(_READERS))} and orbax directories, got `{path.name}`. Keras files "
            "go through `hj.from_keras`."
        )
    try:
        return reader(path)
    except _DAMAGE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        raise ValueError(f"`{path}` is damaged: {error}") from error


def save_params(path: Any, params: PyTree) -> None:
    """Writes parameters to an open format, by the file's suffix.

    Args:
        path: `.safetensors` or `.npz` (a flat dict: nested names are joined by dots), `.json` (nested lists, every
            digit), or `.msgpack` (flax's). An existing file is replaced.
        params: a pytree of arrays in dicts, for the flat formats also in lists and tuples.

    Raises:
        ValueError: the suffix is unknown, two names coincide once joined, or the format cannot hold what is in there.
        ImportError: msgpack is needed and not installed.
    """
    path = Path(path)
    writer = _WRITERS.get(path.suffix)
    if writer is None:
        raise ValueError(f"`save_params` writes {', '.join(sorted(_WRITERS))}, got `{path.name}`.")
    path.write_bytes(writer(jtu.tree_map(lambda leaf: _native(np.asarray(leaf)), params)))


def _native(array: np.ndarray) -> np.ndarray:
    """The same numbers in this machine's byte order: the formats but `.npz` know no other."""
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _flat(params: PyTree) -> dict[str, np.ndarray]:
    named: dict[str, np.ndarray] = {}
    for path, leaf in jtu.tree_leaves_with_path(params):
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)
        if name in named:
            raise ValueError(f"Two parameters are both called `{name}` once their names are joined by dots.")
        named[name or "params"] = leaf
    return named


def _load_safetensors(path: Path) -> dict[str, np.ndarray]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or length > len(raw) - 8:
        raise ValueError(f"`{path}` is no safetensors file, or it was cut off.")
    header, body = json.loads(raw[8 : 8 + length]), memoryview(raw)[8 + length :]
    out = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS:
            raise ValueError(f"`{name}` in `{path}` has dtype {entry['dtype']}, which is not known here.")
        dtype, (low, high) = jnp.dtype(_SAFETENSORS[entry["dtype"]]), entry["data_offsets"]
        count = int(np.prod(entry["shape"], dtype=np.int64))
        if not 0 <= low <= high <= len(body) or high - low != count * dtype.itemsize:
            raise ValueError(f"`{name}` in `{path}` lies outside the file: it is damaged or cut off.")
        out[name] = np.frombuffer(body[low:high], dtype).reshape(entry["shape"]).copy()
    return out


def _dump_safetensors(params: PyTree) -> bytes:
    codes = {jnp.dtype(name): code for code, name in _SAFETENSORS.items()}
    header: dict[str, Any] = {}
    blocks, start = [], 0
    for name, leaf in _flat(params).items():
        if leaf.dtype not in codes:
            raise ValueError(f"`{name}` has dtype {leaf.dtype}, which safetensors cannot hold.")
        block = np.ascontiguousarray(leaf).tobytes()
        header[name] = {
            "dtype": codes[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": [start, start + len(block)],
        }
        blocks.append(block)
        start += len(block)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(blocks)


def _load_npz(path: Path) -> dict[str, np.ndarray]:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"`{path}` is no npz archive, or it was cut off.")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    # NumPy's format has no name for bfloat16 and stores it as two raw bytes.
    return {name: a.view(jnp.bfloat16) if a.dtype == np.dtype("V2") else _native(a) for name, a in arrays.items()}


def _dump_npz(params: PyTree) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **_flat(params))  # pyright: ignore[reportArgumentType] names are the user's
    return buffer.getvalue()


def _load_json(path: Path) -> PyTree:
    def arrays(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: arrays(value) for key, value in node.items()}
        if is_number(node) or is_number_list(node):  # NumPy would take texts, booleans and null for numbers too
            try:
                return np.array(node, np.float64)
            except OverflowError as error:
                raise ValueError(f"`{path}` holds a number beyond float64: {error}") from error
            except ValueError:  # lists of unequal lengths
                return [arrays(part) for part in node]
        if isinstance(node, list) and node:
            return [arrays(part) for part in node]
        raise ValueError(f"`{path}` must hold numbers, in lists and objects, got {node!r}.")

    return arrays(json.loads(path.read_text()))


def _dump_json(params: PyTree) -> bytes:
    for name, leaf in _flat(params).items():
        if not np.issubdtype(leaf.dtype, np.number) and leaf.dtype != jnp.bfloat16:
            raise ValueError(f"`{name}` has dtype {leaf.dtype}, which JSON cannot hold.")
        if not np.all(np.isfinite(leaf.astype(np.float64))):
            raise ValueError(f"`{name}` is not finite everywhere, which JSON cannot hold.")
    return json.dumps(jtu.tree_map(lambda leaf: leaf.tolist(), params)).encode()


def _msgpack() -> Any:
    try:
        import msgpack
    except ImportError as error:
        raise missing("load_params", "msgpack", "files") from error
    return msgpack


def _load_msgpack(path: Path) -> PyTree:
    msgpack = _msgpack()

    def array(code: int, data: bytes) -> Any:
        if code not in (1, 3):  # flax's arrays and NumPy scalars
            raise ValueError(f"`{path}` holds a value of the unknown kind {code}.")
        shape, dtype, buffer = msgpack.unpackb(data, raw=True)
        value = np.frombuffer(buffer, jnp.dtype(dtype.decode())).reshape(shape).copy()
        return value if code == 1 else value[()]

    def joined(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if "__msgpack_chunked_array__" in node:  # flax cuts what exceeds a gigabyte
            parts = [node["chunks"][str(i)] for i in range(len(node["chunks"]))]
            return np.concatenate(parts).reshape([node["shape"][str(i)] for i in range(len(node["shape"]))])
        return {key: joined(value) for key, value in node.items()}

    return joined(msgpack.unpackb(path.read_bytes(), ext_hook=array, raw=False, strict_map_key=False))


def _dump_msgpack(params: PyTree) -> bytes:
    msgpack = _msgpack()

    def pack(node: Any) -> Any:
        if isinstance(node, np.ndarray | np.generic):
            array = np.asarray(node)
            return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))
        raise ValueError(f"msgpack holds dicts of arrays here, got {type(node).__name__}.")

    return msgpack.packb(params, default=pack, strict_types=True)


def _load_orbax(path: Path) -> PyTree:
    try:
        import orbax.checkpoint as ocp
    except ImportError as error:
        raise missing("load_params", "orbax-checkpoint", "files") from error
    with jax.enable_x64(True), ocp.StandardCheckpointer() as checkpointer:
        try:
            restored = checkpointer.restore(path.resolve())
        except FileNotFoundError as error:
            raise ValueError(f"The directory `{path}` holds no orbax checkpoint of a pytree: {error}") from error
        return jtu.tree_map(np.asarray, restored)


_READERS: dict[str, Callable[[Path], PyTree]] = {
    ".safetensors": _load_safetensors,
    ".npz": _load_npz,
    ".json": _load_json,
    ".msgpack": _load_msgpack,
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), load_state_dict),
}
_WRITERS: dict[str, Callable[[PyTree], bytes]] = {
    ".safetensors": _dump_safetensors,
    ".npz": _dump_npz,
    ".json": _dump_json,
    ".msgpack": _dump_msgpack,
}
