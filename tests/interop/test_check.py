import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj


def layer_norm(x, stop):
    mean = x.mean()
    return (x - mean) / jnp.sqrt(jnp.mean((x - stop(mean)) ** 2) + 1e-3)


def loss_with(stop):
    return lambda p, x: jnp.sum(jnp.tanh(layer_norm(p["w"] @ x, stop) * p["g"]) ** 2)


PARAMS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3) ** 3, "g": np.array([1, 2, 3, 4], np.float32)}
X = np.array([0.3, -1.0, 0.7], np.float32)


def test_a_right_product_passes_and_its_error_is_returned():
    error = hj.check_hvp(loss_with(lambda m: m), PARAMS, X)
    assert 0 <= error < 1e-7


def test_a_stopped_gradient_inside_a_variance_is_found_though_gradients_are_right():
    stopped, right = loss_with(jax.lax.stop_gradient), loss_with(lambda m: m)
    np.testing.assert_allclose(
        jax.grad(stopped)(PARAMS, X)["g"], jax.grad(right)(PARAMS, X)["g"], rtol=1e-6
    )  # the mean's own derivative vanishes
    np.testing.assert_allclose(jax.grad(stopped)(PARAMS, X)["w"], jax.grad(right)(PARAMS, X)["w"], rtol=1e-4)
    with pytest.raises(ValueError, match=r"central difference.*`\['(w|g)'\]` \(\d"):
        hj.check_hvp(stopped, PARAMS, X)


def test_linear_and_kinked_losses_are_no_false_alarm():
    assert hj.check_hvp(lambda w: 1e6 * w @ jnp.arange(3.0), jnp.ones(3)) <= 1
    assert hj.check_hvp(lambda w: jnp.sum(jax.nn.relu(w) ** 2), jnp.array([1.0, -1.0, 0.5])) < 1e-7


def test_a_hessian_that_should_vanish_and_does_not_is_found():
    @jax.custom_jvp
    def gradient_of_linear(w):
        return jnp.ones_like(w)

    gradient_of_linear.defjvp(lambda p, t: (jnp.ones_like(p[0]), t[0]))

    @jax.custom_jvp
    def linear(w):
        return jnp.sum(w)

    linear.defjvp(lambda p, t: (jnp.sum(p[0]), gradient_of_linear(p[0]) @ t[0]))
    with pytest.raises(ValueError, match="second derivative is wrong"):
        hj.check_hvp(linear, jnp.ones(3))


def test_what_cannot_be_checked_says_so():
    def noisy(w):
        return jnp.sum(jnp.sin(1e9 * w))

    with pytest.raises(ValueError, match="do not settle"):
        hj.check_hvp(noisy, jnp.ones(3))
    with pytest.raises(ValueError, match="finite `vector`"):
        hj.check_hvp(jnp.sum, jnp.ones(3), vector=jnp.zeros(3))
    with pytest.raises(TypeError, match="step"):
        hj.check_hvp(lambda p: p["w"], {"w": jnp.ones(()), "step": 3})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_inside_a_loss_is_named(dtype):
    def layer(carry, _):
        return (1.5 * carry.astype(dtype)).astype(carry.dtype), None

    with pytest.raises(ValueError, match=f"computes in {dtype}"):
        hj.check_hvp(lambda w: jnp.sum(jax.lax.scan(layer, w, None, length=2)[0] ** 4), jnp.array([1.0, 2.0]))


def test_the_x64_flag_stays():
    before = jax.config.jax_enable_x64
    hj.check_hvp(lambda w: jnp.sum(w**3), jnp.ones(2))
    assert jax.config.jax_enable_x64 == before
    assert jnp.ones(1).dtype == (jnp.float64 if before else jnp.float32)


def test_slices_of_a_loss_that_is_no_mean_are_found():
    x, y = jax.random.normal(jax.random.key(0), (30, 3)), jnp.arange(30) % 3
    weights = jnp.array([1.0, 5.0, 20.0])

    def mean(w, x, y):
        return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(x @ w, y))

    def weighted(w, x, y):
        each = optax.losses.softmax_cross_entropy_with_integer_labels(x @ w, y)
        return jnp.sum(weights[y] * each) / jnp.sum(weights[y])

    w = jax.random.normal(jax.random.key(1), (3, 3))
    assert hj.check_hvp(mean, w, x, y, batch_size=7) < 1e-6
    assert hj.check_hvp(weighted, w, x, y) < 1e-6
    with pytest.raises(ValueError, match="no mean over the examples"):
        hj.check_hvp(weighted, w, x, y, batch_size=7)
    with pytest.raises(ValueError, match="batch_size >= 1"):
        hj.check_hvp(mean, w, x, y, batch_size=0)
