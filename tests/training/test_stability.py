import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

RATE, MOMENTUM = 0.05, 0.8


def frozen_adam(b):
    """Adam on a Hessian that is preconditioned already."""
    return optax.chain(optax.ema(b, debias=False), optax.scale(-RATE))


OPTIMIZERS = {
    "sgd": optax.sgd(RATE),
    "gd": optax.sgd(RATE),
    "gradient_descent": optax.sgd(RATE),
    "rmsprop": optax.sgd(RATE),
    "heavy_ball": optax.sgd(RATE, momentum=MOMENTUM),
    "momentum": optax.sgd(RATE, momentum=MOMENTUM),
    "polyak": optax.sgd(RATE, momentum=MOMENTUM),
    "nesterov": optax.sgd(RATE, momentum=MOMENTUM, nesterov=True),
    "adam": frozen_adam(MOMENTUM),
    "adamw": frozen_adam(MOMENTUM),
    (MOMENTUM, 2.0, 0.3): None,
    (MOMENTUM, 1.5, -0.2): None,
    (-0.4, 1.0, -0.4): None,
}


def growth(optimizer, curvature, steps=400):
    """|w| after many steps on curvature · w² / 2, over that before."""
    w, state = jnp.ones(()), optimizer.init(jnp.ones(()))

    def step(carry, _):
        w, state = carry
        updates, state = optimizer.update(curvature * w, state, w)
        return (w + updates, state), jnp.abs(w)

    _, path = jax.lax.scan(step, (w, state), length=steps)
    return jnp.max(path[-20:])


def linear(b, p, q):
    """The optimizer with the coefficients (b, p, q)."""

    def update(g, m, _=None):
        m = b * m + g
        return -RATE * (p * g + q * m), m

    return optax.GradientTransformation(jnp.zeros_like, update)


@pytest.mark.parametrize("name", OPTIMIZERS, ids=str)
def test_optimizers_shrink_below_the_threshold_and_grow_above(name, x64):
    optimizer = OPTIMIZERS[name] or linear(*name)
    threshold = hj.edge_of_stability(name, RATE, momentum=MOMENTUM)
    below, above = jax.jit(jax.vmap(lambda curvature: growth(optimizer, curvature)))(
        threshold * jnp.array([0.97, 1.03])
    )
    assert below < 0.5
    assert above > 2


def test_threshold_of_adam_is_the_published_one():
    np.testing.assert_allclose(hj.edge_of_stability("adam", jnp.array([1e-3, 2.0])), [38000.0, 19.0], rtol=1e-5)


def test_optimizers_that_are_never_stable():
    assert hj.edge_of_stability((1.1, 1.0, 0.0), 0.1) == 0  # momentum that grows by itself
    assert hj.edge_of_stability((0.5, 1.0, -1.0), 0.1) == 0  # ascent
    assert hj.edge_of_stability((0.0, 0.0, 0.0), 0.1) == 0  # no step at all


def test_errors_name_the_optimizer_and_the_coefficients():
    with pytest.raises(ValueError, match=r"adam.*got 'lion'"):
        hj.edge_of_stability("lion", 0.1)
    with pytest.raises(ValueError, match=r"three coefficients.*got \(0.9, 1.0\)"):
        hj.edge_of_stability((0.9, 1.0), 0.1)
    with pytest.raises(ValueError, match="`learning_rate` must be positive"):
        hj.edge_of_stability("sgd", np.array([0.1, 0.0]))
    assert hj.edge_of_stability(np.array([0.0, 1.0, 0.0]), 0.1) == pytest.approx(20.0)
