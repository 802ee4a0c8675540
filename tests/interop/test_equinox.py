import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj
from hessjax.interop import _equinox

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
X = np.sin(np.arange(24.0)).reshape(6, 4)
Y = np.arange(6) % 3


class Net(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    drop: eqx.nn.Dropout
    last: eqx.nn.Linear
    table: np.ndarray
    order: jax.Array

    def __init__(self, key):
        a, b = jax.random.split(key)
        self.first, self.last = eqx.nn.Linear(4, 5, key=a), eqx.nn.Linear(5, 3, key=b)
        self.norm, self.drop = eqx.nn.LayerNorm(5), eqx.nn.Dropout(0.5)
        self.table, self.order = np.arange(1.0, 6.0), jnp.arange(3)[::-1]

    def __call__(self, x, key=None):
        hidden = self.drop(jax.nn.gelu(self.norm(self.first(x))) * self.table, key=key)
        return self.last(hidden)[self.order]


@pytest.mark.slow
def test_the_hessian_is_that_of_the_module(x64, key):
    net = Net(key)
    model = hj.from_equinox(net, (X, Y), cross_entropy, trainable=lambda leaf: not isinstance(leaf, np.ndarray))
    params, static = eqx.partition(eqx.nn.inference_mode(net), lambda x: isinstance(x, jax.Array) and x.dtype == float)
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(flat):
        outputs = jax.vmap(eqx.combine(unravel(flat), static))(X)
        return cross_entropy(outputs, Y).mean()

    assert model.hessian().size == flat.size
    np.testing.assert_allclose(model.hessian().dense(), jax.hessian(loss)(flat), atol=1e-12)
    assert not net.drop.inference  # the user's module stays in train mode
    assert model.parity.dtype == "float64"
    assert [d.quantity for d in model.parity.differences] == ["outputs", "loss", "gradient"]


@pytest.mark.slow
def test_all_floating_point_arrays_are_parameters_unless_told(key):
    model = hj.from_equinox(Net(key), (X, Y), cross_entropy, verify="output")
    assert model.params.table.shape == (5,)
    assert model.params.order is None


def test_batch_norm_uses_its_state(key):
    class Normed(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state):
            return self.norm(self.linear(x), state)

    net, state = eqx.nn.make_with_state(
        lambda: Normed(eqx.nn.Linear(4, 3, key=key), eqx.nn.BatchNorm(3, "batch", mode="ema"))
    )()
    _, state = jax.vmap(net, (0, None), (0, None), axis_name="batch")(X, state)
    model = hj.from_equinox(net, (X, Y), cross_entropy, state=state)
    resting = eqx.nn.inference_mode(net)
    np.testing.assert_allclose(model.outputs()[2], resting(jnp.asarray(X[2]), state)[0], rtol=1e-5)


def test_chance_and_coupling_are_refused(key):
    def coupled(p, x):
        return x @ p - (x @ p).mean(0)

    weights = jax.random.normal(key, (4, 3))
    with pytest.raises(ValueError, match="depends on the others in the batch"):
        hj.from_equinox(eqx.Partial(coupled, weights), (X, Y), cross_entropy, batched=True)
    with pytest.raises(TypeError) as caught:
        hj.from_equinox(Net(key), (X, Y), cross_entropy, batched=True)
    assert "called on a batch: `batched=True`" in "".join(caught.value.__notes__)
    with pytest.raises(TypeError, match="callable"):
        hj.from_equinox(3, (X, Y), cross_entropy)
    with pytest.raises(ValueError, match="no floating-point parameters"):
        hj.from_equinox(eqx.nn.Identity(), (X, Y), cross_entropy)
    with pytest.raises(ValueError, match=r'"gradient".*True'):
        hj.from_equinox(Net(key), (X, Y), cross_entropy, verify=True)


@pytest.mark.parametrize("batched", [False, True])
def test_a_port_that_differs_from_the_module_is_refused(key, monkeypatch, batched):
    linear = eqx.nn.Linear(4, 3, key=key)
    module = eqx.filter_vmap(linear) if batched else linear
    right = _equinox._Forward.__call__
    monkeypatch.setattr(_equinox._Forward, "__call__", lambda *args: 2 * right(*args) + 1)
    with pytest.raises(ValueError, match=r"disagrees.*\n.*outputs: "):
        hj.from_equinox(module, (X, Y), cross_entropy, batched=batched)


def test_the_dtype_of_a_comparison_is_the_least_precise_that_parameters_pass_through(x64, key):
    weights = jax.random.normal(key, (4, 3))

    def through(inner):
        return lambda p, x: jax.jit(lambda p: (p.astype(inner) * 2).astype(p.dtype))(p).T @ x

    def made(function, x):
        return hj.from_equinox(eqx.Partial(function, weights), (x, Y), cross_entropy).parity.dtype

    assert made(through("bfloat16"), X) == "bfloat16"
    assert made(through("float32"), X) == "float32"
    assert made(through("float64"), X) == "float64"
    assert made(lambda p, x: x.reshape(-1) @ p, X.astype(np.float32)) == "float64"  # exact data are no rounding
