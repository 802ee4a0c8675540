import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj


def params():
    return {
        "dict": {"w": np.linspace(-1, 1, 12).reshape(4, 3)},
        "list": [jnp.linspace(0, 1, 3), None, (jnp.array(0.3),)],
        "scalar": 0.7,
        "empty": jnp.zeros((0, 2)),
    }


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["dict"]["w"] + params["list"][0])
    prediction = params["scalar"] * hidden.sum(-1) * params["list"][2][0] + params["empty"].sum()
    return jnp.mean((prediction - y) ** 2 * jnp.exp(prediction / 5))


def data(n):
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (n, 4)), jax.random.normal(keys[1], (n,))


def exact(params, x, y):
    flat, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, params))
    return jax.hessian(lambda p: loss(unravel(p), x, y))(flat)


def test_product_on_an_odd_pytree(x64):
    op = hj.hvp(loss)(params(), *data(10))
    np.testing.assert_allclose(op.dense(), exact(params(), *data(10)), atol=1e-13)


@pytest.mark.parametrize("n", [1, 7, 8, 20])
@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_slices_are_weighted_by_their_count(n, batch_size, x64):
    op = hj.hvp(loss, batch_size=batch_size)(params(), *data(n))
    np.testing.assert_allclose(op.dense(), exact(params(), *data(n)), atol=1e-13)


def test_mixed_dtypes_are_kept(x64):
    mixed = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    op = hj.hvp(lambda p: jnp.sum(p["a"] ** 3 * p["b"] ** 2))(mixed)
    image = op(mixed)
    assert (image["a"].dtype, image["b"].dtype) == (jnp.float32, jnp.float64)
    np.testing.assert_allclose(op.dense(), op.dense().T, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_slices_add_up_in_half_precision(dtype):
    op = hj.hvp(lambda w, x: jnp.mean((x @ w) ** 2) / 2, batch_size=1)(jnp.ones(1, dtype), jnp.ones((2048, 1), dtype))
    np.testing.assert_allclose(op.dense(), [[1.0]], rtol=1e-2)


def test_integer_data_passes(x64):
    op = hj.hvp(lambda p, i, y: jnp.mean((p[i] ** 2 - y) ** 2), batch_size=2)(
        jnp.ones(3), jnp.array([0, 1, 1]), jnp.zeros(3)
    )
    np.testing.assert_allclose(op.dense(), jnp.diag(jnp.array([12.0, 24.0, 0.0])) / 3)


def test_arrays_without_axes_are_passed_whole(x64):
    op = hj.hvp(lambda p, x, c: jnp.mean((x * p) ** 2) + c * p**2, batch_size=2)(
        jnp.array(1.0), jnp.ones(5), jnp.array(3.0)
    )
    np.testing.assert_allclose(op.dense(), [[8.0]])


@pytest.mark.parametrize("value", [lambda p: p, lambda p: p[:1], lambda p: jnp.sum(p).astype(int), lambda p: "no"])
def test_a_loss_that_is_no_scalar_is_refused(value):
    with pytest.raises(ValueError, match="scalar, got"):
        hj.hvp(value)(jnp.ones(3))(jnp.ones(3))


def test_unequal_leading_lengths_are_refused():
    with pytest.raises(ValueError, match=r"3.*4|4.*3"):
        hj.hvp(loss, batch_size=2)(params(), jnp.ones((3, 4)), jnp.ones(4))
    with pytest.raises(ValueError, match="got 0"):
        hj.hvp(loss, batch_size=0)
    with pytest.raises(TypeError, match=r"2\.5"):
        hj.hvp(loss, batch_size=2.5)


def test_integer_parameters_are_refused_with_their_path():
    with pytest.raises(TypeError, match=r"\['n'\].*int32"):
        hj.hvp(lambda p: p["n"])({"n": jnp.array(1)})
