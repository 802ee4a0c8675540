import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj
from hessjax.interop import _flax, _haiku

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
X = np.sin(np.arange(24.0, dtype=np.float64)).reshape(6, 4)
Y = np.arange(6) % 3


def dense_hessian(outputs_of, params):
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.hessian(lambda p: cross_entropy(outputs_of(unravel(p), X), Y).mean())(flat)


def linen_net():
    nn = pytest.importorskip("flax.linen")

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.Dense(5, param_dtype=jnp.result_type(float))(x)
            x = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype)(x)
            x = nn.Dropout(0.5, deterministic=not train)(nn.gelu(x))
            return nn.Dense(3, param_dtype=jnp.result_type(float))(x)

    return Net()


@pytest.mark.slow
def test_linen_hessian_is_that_of_the_module(x64, key):
    net = linen_net()
    variables = net.init(key, X, train=False)
    model = hj.from_flax(net, (X, Y), cross_entropy, variables=variables, train=False)
    stats = {"batch_stats": variables["batch_stats"]}
    expected = dense_hessian(lambda p, x: net.apply({"params": p, **stats}, x, train=False), variables["params"])
    np.testing.assert_allclose(model.hessian().dense(), expected, atol=1e-12)
    assert set(model.params) == {"Dense_0", "Dense_1", "BatchNorm_0"}


def test_linen_in_train_mode_says_which_flag(key):
    net = linen_net()
    variables = net.init(key, X, train=False)
    with pytest.raises(ValueError, match="train=False"):
        hj.from_flax(net, (X, Y), cross_entropy, variables=variables, train=True)
    with pytest.raises(ValueError, match=r'"params".*batch_stats'):
        hj.from_flax(net, (X, Y), cross_entropy, variables={"batch_stats": variables["batch_stats"]}, train=False)
    with pytest.raises(TypeError, match=r"linen\.Module.*got dict"):
        hj.from_flax({}, (X, Y), cross_entropy)


@pytest.mark.slow
def test_nnx_hessian_is_that_of_the_module_at_rest(x64):
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            make = {"rngs": rngs, "param_dtype": jnp.float64}
            self.layers = nnx.List([nnx.Linear(4, 5, **make), nnx.Linear(5, 3, **make)])
            self.norm = nnx.BatchNorm(5, **make)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            return self.layers[1](self.drop(jnp.tanh(self.norm(self.layers[0](x)))))

    net = Net(nnx.Rngs(0))
    net.train()
    model = hj.from_flax(net, (X, Y), cross_entropy)
    assert not net.drop.deterministic  # still in train mode
    graph, state, rest = nnx.split(
        nnx.view(net, deterministic=True, use_running_average=True, raise_if_not_found=False), nnx.Param, ...
    )
    expected = dense_hessian(lambda p, x: nnx.merge(graph, p, rest)(x), state)
    np.testing.assert_allclose(model.hessian().dense(), expected, atol=1e-12)


@pytest.mark.slow
def test_haiku_with_state(x64, key):
    hk = pytest.importorskip("haiku")

    def net(x, is_training):
        x = hk.Linear(5)(x)
        x = hk.BatchNorm(True, True, 0.9)(x, is_training)
        return hk.Linear(3)(jax.nn.gelu(x))

    function = hk.transform_with_state(net)
    params, state = function.init(key, X, is_training=True)
    model = hj.from_haiku(function, (X, Y), cross_entropy, params=params, state=state, is_training=False)
    expected = dense_hessian(lambda p, x: function.apply(p, state, None, x, is_training=False)[0], params)
    np.testing.assert_allclose(model.hessian().dense(), expected, atol=1e-12)
    with pytest.raises(ValueError, match=r"depends on the others in the batch.*inference mode"):
        hj.from_haiku(function, (X, Y), cross_entropy, params=params, state=state, is_training=True)
    with pytest.raises(ValueError, match=r"`state=`.*missing"):
        hj.from_haiku(function, (X, Y), cross_entropy, params=params, is_training=False)
    with pytest.raises(TypeError, match=r"hk\.transform"):
        hj.from_haiku(net, (X, Y), cross_entropy, params=params)


def test_haiku_without_state_on_one_example(key):
    hk = pytest.importorskip("haiku")
    function = hk.transform(lambda x: hk.Linear(3)(x))
    params = function.init(key, X[0])
    model = hj.from_haiku(function, (X, Y), cross_entropy, params=params, batched=False)
    np.testing.assert_allclose(model.outputs(), function.apply(params, None, X), rtol=1e-5)


@pytest.mark.parametrize("transform", ["transform", "transform_with_state"])
def test_haiku_without_a_key_is_haiku_with_one(key, transform):
    hk = pytest.importorskip("haiku")
    with_key = getattr(hk, transform)(lambda x: hk.Linear(3)(x))
    without = hk.without_apply_rng(with_key)
    made = with_key.init(key, X)
    given = {"params": made} if transform == "transform" else dict(zip(("params", "state"), made, strict=True))
    models = [hj.from_haiku(f, (X, Y), cross_entropy, **given) for f in (with_key, without)]
    np.testing.assert_array_equal(models[0].outputs(), models[1].outputs())
    with pytest.raises(ValueError, match=r"without_apply_rng.*leave `rng` out"):
        hj.from_haiku(without, (X, Y), cross_entropy, rng=key, **given)


@pytest.mark.parametrize("port", [_flax._Linen, _flax._Nnx, _haiku._Forward])
@pytest.mark.parametrize("verify", ["output", "gradient"])
def test_a_port_that_differs_from_its_source_is_refused(key, monkeypatch, port, verify):
    nn, nnx, hk = map(pytest.importorskip, ("flax.linen", "flax.nnx", "haiku"))
    dense, function = nn.Dense(3), hk.transform(lambda x: hk.Linear(3)(x))
    made = {
        _flax._Linen: lambda: hj.from_flax(dense, *rest, variables=dense.init(key, X), verify=verify),
        _flax._Nnx: lambda: hj.from_flax(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), *rest, verify=verify),
        _haiku._Forward: lambda: hj.from_haiku(function, *rest, params=function.init(key, X), verify=verify),
    }
    rest = (X, Y), cross_entropy
    right = port.__call__
    monkeypatch.setattr(port, "__call__", lambda *args: 2 * right(*args) + 1)
    with pytest.raises(ValueError, match=r"disagrees.*\n.*outputs: "):
        made[port]()


def test_a_linen_gradient_that_differs_is_refused(key, monkeypatch):
    nn = pytest.importorskip("flax.linen")
    dense, right = nn.Dense(3), _flax._Linen.__call__

    def stopped(self, params, x):
        return right(self, params | {"bias": jax.lax.stop_gradient(params["bias"])}, x)

    monkeypatch.setattr(_flax._Linen, "__call__", stopped)
    variables = dense.init(key, X)
    hj.from_flax(dense, (X, Y), cross_entropy, variables=variables, verify="output")
    with pytest.raises(ValueError, match=r"disagrees(.*\n)+.*at `gradient\['bias'\]`"):
        hj.from_flax(dense, (X, Y), cross_entropy, variables=variables)
