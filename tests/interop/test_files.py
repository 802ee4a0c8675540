import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

TREE = {
    "layer": {"w": np.array([[0.1, -1e-30], [1e30, 3.0]], np.float32), "b": np.array([1 / 3, 2 / 3])},
    "scale": np.array(0.1),
}
FLAT = {"layer.w": TREE["layer"]["w"], "layer.b": TREE["layer"]["b"], "scale": TREE["scale"]}


def assert_same_bits(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_flat_formats_keep_every_bit(tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    half = {"half": np.arange(5).astype(jnp.bfloat16), "count": np.arange(3), "none": np.zeros((0, 2), np.float32)}
    hj.save_params(path, TREE | half)
    assert_same_bits(hj.load_params(path), FLAT | half)


def test_json_keeps_every_digit(tmp_path):
    path = tmp_path / "net.json"
    hj.save_params(path, TREE)
    assert_same_bits(hj.load_params(path), jax.tree.map(np.float64, TREE))
    path.write_text('{"w": [[1, 2], [3, 4]], "layers": [[1.0], [2.0, 3.0]]}')
    loaded = hj.load_params(path)
    assert loaded["w"].dtype == np.float64
    assert [leaf.shape for leaf in loaded["layers"]] == [(1,), (2,)]


@pytest.mark.parametrize("value", ['["1", "2"]', "[true, false]", "[[1, null]]", '[[1, 2], ["3", 4]]', "true", "[]"])
def test_json_of_other_things_than_numbers_is_refused(tmp_path, value):
    (tmp_path / "net.json").write_text(f'{{"x": {value}}}')
    with pytest.raises(ValueError, match="must hold numbers"):
        hj.load_params(tmp_path / "net.json")


def test_json_beyond_float64_is_refused(tmp_path):
    (tmp_path / "net.json").write_text(json.dumps({"x": [1, 10**400]}))
    with pytest.raises(ValueError, match="beyond float64"):
        hj.load_params(tmp_path / "net.json")


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "json", "msgpack", "pt"])
def test_a_damaged_file_is_read_or_refused(tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    if suffix == "pt":
        torch = pytest.importorskip("torch")
        torch.save({name: torch.as_tensor(array) for name, array in FLAT.items()}, path)
    else:
        hj.save_params(path, FLAT)
    whole, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(150):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(len(whole), size=3)] = rng.integers(256, size=3)
        path.write_bytes(damaged.tobytes()[: rng.integers(1, 2 * len(whole))])
        try:
            hj.load_params(path)
        except ValueError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("cut", [0, 30, -1, -30])
def test_damaged_archives_are_refused(tmp_path, cut):
    path = tmp_path / "net.npz"
    hj.save_params(path, FLAT)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    with pytest.raises(ValueError, match=r"no npz archive, or it was cut off"):
        hj.load_params(path)
    path.write_bytes(whole[:200] + b"damaged" + whole[207:])
    with pytest.raises(ValueError, match="is damaged"):
        hj.load_params(path)


def test_msgpack_is_that_of_flax(tmp_path):
    pytest.importorskip("msgpack")
    serialization = pytest.importorskip("flax.serialization")
    path = tmp_path / "net.msgpack"
    tree = TREE | {"half": np.arange(5).astype(jnp.bfloat16)}
    hj.save_params(path, tree)
    assert_same_bits(serialization.msgpack_restore(path.read_bytes()), tree)
    path.write_bytes(serialization.msgpack_serialize(tree))
    assert_same_bits(hj.load_params(path), tree)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_orbax_directories_keep_every_bit(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    tree = TREE | {"half": np.arange(5).astype(jnp.bfloat16), "count": np.arange(3) + 2**40}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "net", tree)
    assert_same_bits(hj.load_params(tmp_path / "net"), tree)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty.*orbax"):
        hj.load_params(tmp_path / "empty")


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "json", "msgpack"])
def test_big_endian_numbers_keep_their_values(tmp_path, suffix):
    path = tmp_path / f"net.{suffix}"
    hj.save_params(path, {"a": np.arange(3.0).astype(">f8")})
    assert_same_bits(hj.load_params(path), {"a": np.arange(3.0)})


def test_a_foreign_big_endian_archive_is_read_in_native_order(tmp_path):
    np.savez(tmp_path / "net.npz", a=np.arange(3.0).astype(">f8"))
    assert_same_bits(hj.load_params(tmp_path / "net.npz"), {"a": np.arange(3.0)})


def test_safetensors_is_the_public_format(tmp_path):
    public = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "net.safetensors"
    hj.save_params(path, FLAT)
    assert_same_bits(public.load_file(path), FLAT)
    public.save_file(FLAT, path)
    assert_same_bits(hj.load_params(path), FLAT)


def test_damaged_safetensors_are_refused(tmp_path):
    path = tmp_path / "net.safetensors"
    hj.save_params(path, FLAT)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"outside the file.*cut off"):
        hj.load_params(path)
    path.write_bytes(b"\xff" * 8)
    with pytest.raises(ValueError, match="no safetensors file"):
        hj.load_params(path)


def test_a_state_dict_is_read_without_running_code(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    base = torch.arange(24.0).reshape(4, 6)
    saved = {
        "strided": base.T[1:4, ::2],
        "bfloat": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.tensor([[1.0 / 3]], dtype=torch.float64)),
        "nested": {"step": torch.tensor(3), "epoch": 7},
    }
    torch.save(saved, path)
    loaded = hj.load_params(path)
    np.testing.assert_array_equal(loaded["strided"], saved["strided"].numpy())
    assert loaded["bfloat"].dtype == jnp.bfloat16
    assert loaded["bfloat"].astype(float).tolist() == [1.5, -2.25]
    assert loaded["parameter"][0, 0] == 1.0 / 3
    assert loaded["nested"]["epoch"] == 7
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"Linear.*state_dict"):
        hj.load_params(path)


def test_conjugated_and_negated_tensors_are_read_as_pytorch_shows_them(tmp_path):
    torch = pytest.importorskip("torch")
    conjugated = torch.complex(torch.ones(3), torch.arange(3.0) + 1).conj()
    saved = {"conj": conjugated, "neg": conjugated.resolve_conj().conj().imag[1:]}
    assert saved["conj"].is_conj()
    assert saved["neg"].is_neg()
    torch.save(saved, tmp_path / "net.pt")
    loaded = hj.load_params(tmp_path / "net.pt")
    for name, tensor in saved.items():
        assert_same_bits(loaded[name], tensor.resolve_conj().resolve_neg().numpy())


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_unsigned_and_eight_bit_tensors_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "net.pt"
    unsigned = {f"uint{n}": torch.arange(4).to(getattr(torch, f"uint{n}"))[1:] for n in (16, 32, 64)}
    eighths = {f"float8_{n}": torch.tensor([1.5, -2.0, 0.25]) for n in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")}
    torch.save(unsigned | {name: t.to(getattr(torch, name)) for name, t in eighths.items()}, path)
    for name, array in hj.load_params(path).items():
        assert array.dtype == jnp.dtype(name)
        assert array.astype(float).tolist() == ([1, 2, 3] if name in unsigned else [1.5, -2.0, 0.25])
    torch.save(torch.zeros(2, dtype=torch.complex32), path)
    with pytest.raises(ValueError, match=r"torch\.complex32.*dtype"):
        hj.load_params(path)


class Hostile:
    def __reduce__(self):
        return os.system, ("touch {}",)


def test_a_hostile_pickle_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickle.dumps(Hostile()))
    with pytest.raises(ValueError, match=r"system.*no tensor"):
        hj.load_params(path)


def test_a_tensor_beyond_its_storage_is_refused():
    from hessjax.interop._state_dict import _tensor

    storage = np.arange(4.0)
    assert _tensor(storage, 1, (3,), (1,)).tolist() == [1, 2, 3]
    for offset, size, stride in ((2, (3,), (1,)), (0, (2, 2), (3, 1)), (-1, (1,), (1,)), (0, (3,), (-1,))):
        with pytest.raises(ValueError, match="in the file"):
            _tensor(storage, offset, size, stride)


def test_what_is_not_known_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hj.load_params(tmp_path / "nowhere.npz")
    (tmp_path / "net.h5").touch()
    with pytest.raises(ValueError, match=r"\.safetensors.*net\.h5.*from_keras"):
        hj.load_params(tmp_path / "net.h5")
    with pytest.raises(ValueError, match=r"writes.*\.npz.*net\.pt"):
        hj.save_params(tmp_path / "net.pt", FLAT)
    with pytest.raises(ValueError, match=r"both called `a\.b`"):
        hj.save_params(tmp_path / "net.npz", {"a": {"b": np.ones(1)}, "a.b": np.ones(1)})
    (tmp_path / "net.json").write_text(json.dumps({"w": "text"}))
    with pytest.raises(ValueError, match="numbers"):
        hj.load_params(tmp_path / "net.json")
