import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj


def params():
    return {"in": {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), "b": jnp.ones(3)}, "out": [jnp.array(0.5), None]}


def last_update(optimizer, steps=3):
    """The last of a few updates with changing gradients, its gradient and the state after it."""
    tree = params()
    state = optimizer.init(tree)
    for step in range(1, steps + 1):
        gradient = jax.tree.map(lambda leaf, step=step: jnp.cos(step * leaf + 1.3 * step) + 0.1, params())
        updates, state = optimizer.update(gradient, state, tree)
    return updates, gradient, state


def moment(state):
    """μ, the running mean of the gradients."""
    return optax.tree.get(state, "mu")


def assert_divides(scale, numerator, updates, rtol=1e-12):
    """update = -numerator / D, leaf by leaf."""
    assert jax.tree.structure(scale) == jax.tree.structure(params())
    for d, x, u in zip(*map(jax.tree.leaves, (scale, numerator, updates)), strict=True):
        assert d.shape == u.shape
        assert d.dtype == u.dtype
        np.testing.assert_allclose(-x / d, u, rtol=rtol)


ADAMS = {
    "adam": (optax.adam(1.0), {}),
    "changed numbers": (optax.adam(1.0, b1=0.8, b2=0.95, eps=1e-2), {"b1": 0.8, "b2": 0.95, "eps": 1e-2}),
    "eps_root": (optax.adam(1.0, eps_root=1e-3), {"eps_root": 1e-3}),
    "adamw": (optax.adamw(1.0, weight_decay=0.0, b2=0.9), {"b2": 0.9}),
    "scale_by_adam": (optax.chain(optax.scale_by_adam(), optax.scale(-1.0)), {}),
    "clipped": (optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1.0)), {}),
    "named": (optax.named_chain(("first", optax.identity()), ("second", optax.adam(1.0))), {}),
    "amsgrad": (optax.amsgrad(1.0, b1=0.7), {"b1": 0.7}),
    "accumulated": (optax.MultiSteps(optax.adam(1.0), 1), {}),
    "injected": (optax.inject_hyperparams(optax.adam)(1.0, b1=0.6, b2=0.8, eps=1e-1, eps_root=1e-2), {}),
    "scheduled": (optax.inject_hyperparams(optax.adam)(1.0, b2=optax.linear_schedule(0.5, 0.9, 4)), {}),
    "chained and injected": (
        optax.chain(optax.clip(0.7), optax.inject_hyperparams(optax.scale_by_adam)(b2=0.7), optax.scale(-1.0)),
        {},
    ),
    "masked": (optax.masked(optax.adam(1.0), True), {}),
}


@pytest.mark.parametrize("case", ADAMS)
def test_adams_update_is_its_moment_over_the_scale(case, x64):
    optimizer, numbers = ADAMS[case]
    updates, _, state = last_update(optimizer)
    # Hyperparameters that a state holds have the precision of float32 at most.
    assert_divides(hj.adam_preconditioner(state, **numbers), moment(state), updates)


PLAIN = {
    "rmsprop": (optax.rmsprop(1.0), {}),
    "rmsprop, decay": (optax.rmsprop(1.0, decay=0.7, eps=1e-3), {"b2": 0.7, "eps": 1e-3}),
    "rmsprop, eps outside": (optax.rmsprop(1.0, eps=1e-2, eps_in_sqrt=False), {"eps": 1e-2, "eps_in_sqrt": False}),
    "rmsprop, corrected": (optax.rmsprop(1.0, decay=0.8, bias_correction=True), {"b2": 0.8}),
    "rmsprop, centred": (optax.rmsprop(1.0, centered=True), {}),
    "rmsprop, centred and corrected": (
        optax.rmsprop(1.0, decay=0.8, centered=True, bias_correction=True),
        {"b2": 0.8},
    ),
    "rmsprop, injected": (optax.inject_hyperparams(optax.rmsprop)(1.0, decay=0.6, bias_correction=True), {}),
    "scale_by_rms": (optax.chain(optax.scale_by_rms(), optax.scale(-1.0)), {}),
    "adagrad": (optax.adagrad(1.0), {}),
    "adagrad, eps": (optax.adagrad(1.0, eps=1e-2), {"eps": 1e-2}),
}


@pytest.mark.parametrize("case", PLAIN)
def test_the_others_update_is_the_gradient_over_the_scale(case, x64):
    optimizer, numbers = PLAIN[case]
    updates, gradient, state = last_update(optimizer)
    assert_divides(hj.adam_preconditioner(state, **numbers), gradient, updates)


@pytest.mark.parametrize("numbers", [{}, {"b2": 0.9, "eps": 1e-2}])
def test_schedule_free_adamw_is_read_with_its_own_defaults(numbers, x64):
    optimizer = optax.contrib.schedule_free_adamw(1.0, **numbers)
    theta, gradient = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -1e-3])}
    before = optimizer.update(gradient, optimizer.init(theta), theta)[1]
    _, after = optimizer.update(gradient, before, theta)
    step = jax.tree.map(jnp.subtract, after.z, before.z)
    scale = hj.adam_preconditioner(after, **numbers)
    np.testing.assert_allclose(-gradient["w"] / scale["w"], step["w"], rtol=1e-6)


def test_numbers_that_are_given_go_before_those_that_are_found(x64):
    _, _, state = last_update(optax.inject_hyperparams(optax.adam)(1.0, eps=0.5))
    found, given = (hj.adam_preconditioner(state, **numbers)["in"]["b"] for numbers in ({}, {"eps": 1.5}))
    np.testing.assert_allclose(given - found, 1 - 0.9**3, rtol=1e-6)


def labels(tree):
    return {"in": "adam", "out": jax.tree.map(lambda _: "other", tree["out"])}


def test_parts_of_a_partition_are_joined(x64):
    parts = {"adam": optax.adam(1.0, b1=0.0), "other": optax.rmsprop(1.0, decay=0.999, eps=1e-8)}
    updates, gradient, state = last_update(optax.multi_transform(parts, labels))
    assert_divides(hj.adam_preconditioner(state, b1=0.0, b2=0.999, eps=1e-8), gradient, updates)


def test_parameters_without_an_adaptive_state_have_scale_one(x64):
    optimizer = optax.multi_transform({"adam": optax.adam(1.0), "other": optax.sgd(1.0)}, labels)
    updates, gradient, state = last_update(optimizer)
    with pytest.raises(ValueError, match=r"no adaptive state for `\['out'\]\[0\]`.*`like=params`"):
        hj.adam_preconditioner(state)
    scale = hj.adam_preconditioner(state, like=params())
    numerator = {"in": optax.tree.get(state, "mu")["in"], "out": gradient["out"]}
    assert_divides(scale, numerator, updates)


def test_a_mask_may_cover_a_whole_subtree(x64):
    updates, gradient, state = last_update(optax.masked(optax.adagrad(1.0), {"in": True, "out": False}))
    scale = hj.adam_preconditioner(state, like=params())
    assert float(scale["out"][0]) == 1.0
    np.testing.assert_allclose(-gradient["in"]["b"] / scale["in"]["b"], updates["in"]["b"], rtol=1e-12)


def test_runs_inside_jit_and_feeds_the_operator():
    tree = params()
    optimizer = optax.inject_hyperparams(optax.adam)(0.1)
    _, _, state = last_update(optimizer)

    @jax.jit
    def top(tree, state):
        H = hj.hvp(lambda p: sum(jnp.sum(leaf**4) for leaf in jax.tree.leaves(p)))(tree)
        P = hj.precondition(H, hj.adam_preconditioner(state))
        return jax.tree.map(lambda leaf, d: 12 * leaf**2 / d, tree, hj.adam_preconditioner(state)), P(tree)

    diagonal, image = top(tree, state)
    for d, v, i in zip(*map(jax.tree.leaves, (diagonal, tree, image)), strict=True):
        np.testing.assert_allclose(i, d * v, rtol=1e-5)


def test_adagrad_without_a_gradient_yet_does_not_move():
    optimizer = optax.adagrad(1.0, initial_accumulator_value=0.0)
    scale = hj.adam_preconditioner(optimizer.init(jnp.ones(2)))
    assert np.isinf(scale).all()
    assert not hj.precondition(lambda v: v, scale)(jnp.ones(2)).any()


def test_states_without_an_accumulator_are_refused():
    for state in (optax.sgd(0.1, momentum=0.9).init(params()), params(), None, 3.0):
        with pytest.raises(ValueError, match=r"must hold one of ScaleByAdamState.*optimizer\.init"):
            hj.adam_preconditioner(state)
    twice = optax.chain(optax.scale_by_adam(), optax.scale_by_rms()).init(params())
    with pytest.raises(ValueError, match="two of them"):
        hj.adam_preconditioner(twice)
    masked = optax.masked(optax.adam(0.1), {"in": True, "out": False}).init(params())
    with pytest.raises(ValueError, match="`like` must have the structure"):
        hj.adam_preconditioner(masked, like={"in": jnp.ones(2)})
