import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj
from hessjax.interop import _keras

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's own

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
X = np.sin(np.arange(24.0, dtype=np.float32)).reshape(6, 4)
Y = np.arange(6) % 3
FIXTURES = Path(__file__).parent / "fixtures"  # made under TensorFlow by `make_tensorflow.py` there


@pytest.fixture
def keras():
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "jax"
    module = pytest.importorskip("keras")
    os.environ.pop("KERAS_BACKEND")
    if before is not None:
        os.environ["KERAS_BACKEND"] = before
    if module.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend in this process")
    return module


def test_the_hessian_is_that_of_the_loaded_model(keras, tmp_path):
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.layers.Dense(5, "tanh"),
            keras.layers.LayerNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3),
        ]
    )
    with pytest.raises(ValueError, match=r"no variables yet.*build"):
        hj.from_keras(net, (X, Y), cross_entropy)
    net.build((None, 4))
    net.save(tmp_path / "net.keras")
    model = hj.from_keras(tmp_path / "net.keras", (X, Y), cross_entropy)
    assert len(model.params) == 6
    np.testing.assert_allclose(model.outputs(), net(X), atol=1e-6)

    def loss(w1, b1, scale, shift, w2, b2):
        hidden = jnp.tanh(X @ w1 + b1)
        centred = hidden - hidden.mean(1, keepdims=True)
        hidden = shift + scale * centred / jnp.sqrt((centred**2).mean(1, keepdims=True) + 1e-3)
        return cross_entropy(hidden @ w2 + b2, Y).mean()

    weights = [jnp.asarray(v.value) for v in net.trainable_variables]
    ones = [jnp.ones_like(w) for w in weights]
    expected = jax.jvp(jax.grad(loss, range(6)), weights, ones)[1]
    ours = model.hessian()(jax.tree.map(jnp.ones_like, model.params))
    for name, theirs in zip(names_of(model), expected, strict=True):
        np.testing.assert_allclose(ours[name], theirs, atol=1e-5)


FULL = [pytest.param(name, marks=pytest.mark.slow) for name in ("convolutional", "recurrent")]


@pytest.mark.parametrize("name", ["mlp", "normalized", *FULL])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Keras's, about the optimizer's state
def test_what_tensorflow_trained_is_the_same_under_jax(keras, name):
    said = np.load(FIXTURES / f"{name}.npz")
    model = hj.from_keras(FIXTURES / f"{name}.keras", (said["x"], said["y"]), cross_entropy)
    names = names_of(model)

    def named(quantity):
        return {key: said[f"{quantity}{n}"] for n, key in enumerate(names)}

    model.verify(outputs=said["outputs"], loss=said["loss"], gradient=named("gradient"), rtol=1e-5)
    vector = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), named("vector"))
    ours, theirs = model.hessian()(vector), named("product")
    scale = max(np.max(np.abs(part)) for part in theirs.values())
    for key in names:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=0, atol=1e-5 * scale, err_msg=key)


def names_of(model):
    """The parameters' names in Keras's order."""
    return model.forward.inner.names


def test_a_port_that_differs_from_the_model_is_refused(keras, monkeypatch):
    net = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
    right = _keras._Forward.__call__
    monkeypatch.setattr(_keras._Forward, "__call__", lambda *args: 2 * right(*args) + 1)
    with pytest.raises(ValueError, match=r"disagrees.*\n.*outputs: "):
        hj.from_keras(net, (X, Y), cross_entropy)


def test_mixed_precision_is_compared_in_its_least_precise_dtype(keras):
    policy = keras.mixed_precision.dtype_policy()
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        for seed in range(3):
            keras.utils.set_random_seed(seed)
            layers = [keras.Input((4,)), keras.layers.Dense(5, "tanh"), keras.layers.Dense(3, dtype="float32")]
            model = hj.from_keras(keras.Sequential(layers), (X, Y), cross_entropy)
            assert model.parity.dtype == "bfloat16"
            assert model.parity.tolerance == 5e-2
    finally:
        keras.mixed_precision.set_global_policy(policy)


def test_what_is_no_keras_model_is_named(keras):
    with pytest.raises(TypeError, match=r"Keras 3 model.*dict"):
        hj.from_keras({}, (X, Y), cross_entropy)


def test_clashing_paths_are_numbered():
    from hessjax.interop._keras import unique_names

    assert unique_names(["d/kernel", "d/bias", "d/kernel", "d/kernel"]) == [
        "d/kernel",
        "d/bias",
        "d/kernel#1",
        "d/kernel#2",
    ]
