import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import cross_entropy, digits_model, mlp, mlp_params

import hessjax as hj


def linear(params, x):
    return params["w"] @ x + params["b"]


PARAMS = {"w": [[1.0, 2.0], [0.5, -1.0]], "b": [0.1, 0.2]}
DATA = ([[1.0, 2.0], [3.0, 4.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0], [2.0, 2.0]])


def squared(output, target):
    return jnp.sum((output - target) ** 2)


def test_nested_lists_become_arrays():
    model = hj.Model(PARAMS, DATA, linear, squared)
    assert model.params["w"].shape == (2, 2)
    assert model.outputs().shape == (3, 2)
    np.testing.assert_allclose(model.outputs()[0], [5.1, -1.3], rtol=1e-6)


def test_hessian_is_the_mean_over_examples(x64):
    model = hj.Model(PARAMS, DATA, linear, squared)
    x = np.array(DATA[0])
    for batch_size in (None, 1, 2):
        dense = model.hessian(batch_size=batch_size).dense()
        np.testing.assert_allclose(dense[2:, 2:], np.kron(np.eye(2), 2 * x.T @ x / 3), atol=1e-12)


def test_batched_forward_is_equal(x64):
    single = digits_model(mlp_params(jax.random.key(0)), 50)
    batch = hj.Model(single.params, single.data, mlp, cross_entropy, batched=True)
    v = jax.tree.map(jnp.ones_like, single.params)
    for a, b in zip(jax.tree.leaves(single.hessian()(v)), jax.tree.leaves(batch.hessian()(v)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(single.loss_value(), batch.loss_value(), rtol=1e-13)


@pytest.mark.parametrize("batched", [False, True])
def test_forward_one_takes_one_example(batched, x64):
    single = digits_model(mlp_params(jax.random.key(0)), 12)
    model = hj.Model(single.params, single.data, mlp, cross_entropy, batched=True) if batched else single
    one = model.forward_one(model.params, model.data[0][3])
    np.testing.assert_allclose(one, single.outputs()[3], atol=1e-13)
    kernel = hj.ntk(model.forward_one)(model.params, model.data[0])
    jacobian = jax.jacobian(lambda p: single.forward(p, model.data[0][3])[2])(model.params)
    expected = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jacobian))
    entry = jnp.zeros((12, 10)).at[3, 2].set(1.0)
    np.testing.assert_allclose(jnp.vdot(entry, kernel(entry)), expected, rtol=1e-10)


def test_a_model_is_an_argument_of_jit():
    model = hj.Model(PARAMS, DATA, linear, squared)
    loss = jax.jit(lambda params, data: hj.Model(params, data, linear, squared).loss_value())
    np.testing.assert_allclose(loss(model.params, model.data), model.loss_value(), rtol=1e-6)


def test_verify_accepts_itself_and_names_the_largest_difference():
    model = hj.Model(PARAMS, DATA, linear, squared)
    model.verify(model.outputs(), float(model.loss_value()), model.gradient())
    outputs = np.array(model.outputs())
    outputs[2, 1] += 0.5
    with pytest.raises(ValueError, match=r"tolerance 0\.0001: outputs: .*at `outputs` \(2, 1\).*eval"):
        model.verify(outputs=outputs)
    gradient = jax.tree.map(np.array, model.gradient())
    gradient["b"][0] *= 2
    with pytest.raises(ValueError, match=r"gradient\['b'\].*\(0,\)"):
        model.verify(gradient=gradient)
    with pytest.raises(ValueError, match="loss"):
        model.verify(loss=2 * model.loss_value())
    with pytest.raises(ValueError, match=r"nan|inf"):
        model.verify(loss=float("nan"))
    lost = hj.Model(jax.tree.map(lambda leaf: leaf * np.nan, model.params), DATA, linear, squared)
    with pytest.raises(ValueError, match=r"nan|inf"):
        lost.verify(lost.outputs(), lost.loss_value(), lost.gradient())
    with pytest.raises(ValueError, match=r"nan|inf"):
        lost.verify(model.outputs())
    with pytest.raises(ValueError, match="shape"):
        model.verify(outputs=outputs[:2])
    with pytest.raises(ValueError, match="something to compare"):
        model.verify()


def test_verify_finds_examples_that_see_each_other():
    def coupled(params, x):
        outputs = jax.vmap(linear, (None, 0))(params, x)
        return outputs - outputs.mean(0)

    hj.Model(PARAMS, DATA, linear, squared).verify(batch_size=2)
    hj.Model(PARAMS, DATA, jax.vmap(linear, (None, 0)), squared, batched=True).verify(batch_size=1)
    model = hj.Model(PARAMS, DATA, coupled, squared, batched=True)
    model.verify(batch_size=100)
    with pytest.raises(ValueError, match="outputs in slices"):
        model.verify(batch_size=2)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        model.verify(batch_size=0)


def test_bad_data_is_refused():
    with pytest.raises(ValueError, match=r"'\[0\]': 3|3.*2"):
        hj.Model(PARAMS, (DATA[0], DATA[1][:2]), linear, squared)
    with pytest.raises(ValueError, match="pair"):
        hj.Model(PARAMS, DATA[0][0], linear, squared)
    with pytest.raises(ValueError, match="ragged"):
        hj.Model({"w": [[1.0], [1.0, 2.0]]}, DATA, linear, squared)
    with pytest.raises(TypeError, match=r"\['step'\]"):
        hj.Model({"w": jnp.ones(2), "step": jnp.array(3)}, DATA, linear, squared)


def test_optax_losses_fit(x64):
    model = hj.Model(
        {"w": jnp.ones(2)}, (jnp.ones((3, 2)), jnp.zeros(3)), lambda p, x: p["w"] @ x, optax.losses.l2_loss
    )
    np.testing.assert_allclose(model.loss_value(), 2.0)
    with pytest.raises(ValueError, match=r"scalar, got shape \(2,\)"):
        hj.Model(PARAMS, DATA, linear, optax.losses.l2_loss).loss_value()


def test_at_an_optimum_a_port_is_measured_against_the_terms_that_cancel(x64):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 6)), rng.normal(size=(6, 3))
    fitted = np.linalg.lstsq(x, x @ w)[0]
    model = hj.Model({"w": fitted}, (x, x @ w), lambda p, x: x @ p["w"], squared)
    residual = np.einsum("ni,ij->nj", x, fitted) - x @ w  # summed in another order
    assert np.sum(residual**2) < 1e-25
    loss = np.mean(np.sum(residual**2, 1))
    model.verify(x @ fitted, loss, {"w": x.T @ residual / 4})
    with pytest.raises(ValueError, match="loss"):
        model.verify(loss=loss + 1e-9)
    with pytest.raises(ValueError, match="gradient"):
        model.verify(gradient={"w": x.T @ residual / 4 + 1e-9})


def attention(params, x):
    q, k, v = (x @ params[name]["w"] + params[name]["b"] for name in "qkv")
    return jax.nn.softmax(q @ k.T) @ v


def attention_model(dtype):
    rng = np.random.default_rng(1)
    params = {name: {"w": rng.normal(size=(4, 4)), "b": rng.normal(size=4)} for name in "qkv"}
    params["q"]["w"] *= 3
    data = rng.normal(size=(5, 7, 4)), rng.normal(size=(5, 7, 4))
    return hj.Model(*jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, data)), attention, squared)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_bias_without_effect_has_a_gradient_of_rounding(x64, dtype):
    model = attention_model(dtype)
    gradient = jax.tree.map(np.array, model.gradient())
    unit = np.finfo(dtype).eps * np.max(np.abs(gradient["v"]["w"]))
    assert 0 < np.max(np.abs(gradient["k"]["b"])) < 10 * unit
    gradient["k"]["b"] = gradient["k"]["b"][::-1] + unit
    model.verify(gradient=gradient)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("leaf", [("q", "w"), ("v", "b")])
def test_a_small_leaf_is_refused_when_it_is_wrong_by_a_hundredth(x64, dtype, leaf):
    model = attention_model(dtype)

    def scaled(params, x):
        part, name = leaf
        small = jax.lax.stop_gradient(params[part][name]) * (1 - 1e-3) + 1e-3 * params[part][name]
        return attention({**params, part: {**params[part], name: small}}, x)

    model = hj.Model(model.params, model.data, scaled, squared)
    gradient = jax.tree.map(np.array, model.gradient())
    peak = max(np.max(np.abs(g)) for g in jax.tree.leaves(gradient))
    part, name = leaf
    assert np.max(np.abs(gradient[part][name])) < 2e-3 * peak
    model.verify(gradient=gradient)
    gradient[part][name] *= 1.01
    with pytest.raises(ValueError, match=rf"gradient\['{part}'\]\['{name}'\]"):
        model.verify(gradient=gradient)


def test_a_confident_model_has_a_loss_of_rounding(x64):
    x, y = np.eye(4), np.arange(4)
    model = hj.Model(
        {"w": 40 * x}, (x, y), lambda p, x: x @ p["w"], optax.losses.softmax_cross_entropy_with_integer_labels
    )
    exact = np.log1p(3 * np.exp(-40.0))
    assert abs(float(model.loss_value()) - exact) > 1e-2 * exact
    model.verify(loss=exact)
    with pytest.raises(ValueError, match="loss"):
        model.verify(loss=1e-8)
