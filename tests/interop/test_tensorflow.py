import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

pytestmark = pytest.mark.slow  # minutes on two cores

X = np.sin(np.arange(24.0)).reshape(6, 4)
Y = np.cos(np.arange(18.0)).reshape(6, 3)


def squared(out, y):
    return optax.losses.squared_error(out, y).sum()


def forward(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


def test_a_function_is_compared_with_a_forward_by_hand(x64, tmp_path):
    tf = pytest.importorskip("tensorflow")

    class Net(tf.Module):
        def __init__(self):
            self.w = tf.Variable(np.linspace(-1, 1, 20).reshape(4, 5), name="w")
            self.v = tf.Variable(np.linspace(-1, 2, 15).reshape(5, 3), name="v")

        @tf.function(input_signature=[tf.TensorSpec([None, 4], tf.float64)])
        def __call__(self, x):
            return tf.tanh(x @ self.w) @ self.v

    net = Net()
    model = hj.from_tensorflow(net, (X, Y), squared, forward=forward)
    assert max(d.relative for d in model.parity.differences) < 1e-12
    assert set(model.params) == {"w", "v"}
    with pytest.raises(ValueError, match="disagrees"):
        hj.from_tensorflow(net, (X, Y), squared, forward=lambda p, x: 1.01 * forward(p, x))
    tf.saved_model.save(net, str(tmp_path / "net"))
    again = hj.from_tensorflow(tmp_path / "net", (X, Y), squared, forward=forward)
    np.testing.assert_allclose(again.loss_value(), model.loss_value(), rtol=1e-14)


def test_variables_of_keras_are_known_by_their_path():
    tf = pytest.importorskip("tensorflow")

    class Wrapped:  # as Keras 3 has them, whose backend is JAX in this process
        name = "kernel"

        def __init__(self, path, value):
            self.path, self.value = path, tf.Variable(value)

    w, v = Wrapped("first/kernel", np.ones((4, 5), np.float32)), Wrapped("second/kernel", np.ones((5, 3), np.float32))
    model = hj.from_tensorflow(
        lambda x: tf.tanh(x @ w.value) @ v.value,
        (X.astype(np.float32), Y.astype(np.float32)),
        squared,
        forward=lambda p, x: jnp.tanh(x @ p["first/kernel"]) @ p["second/kernel"],
        variables=[w, v],
    )
    assert {name: leaf.shape for name, leaf in model.params.items()} == {
        "first/kernel": (4, 5),
        "second/kernel": (5, 3),
    }


def test_what_has_no_sound_route_says_which_has():
    with pytest.raises(ValueError, match=r"\.keras.*forward="):
        hj.from_tensorflow(lambda x: x, (X, Y), squared)

    class Keras:
        trainable_variables = ()

        def save(self):
            pass

    with pytest.raises(TypeError, match=r"KERAS_BACKEND=jax"):
        hj.from_tensorflow(Keras(), (X, Y), squared)
