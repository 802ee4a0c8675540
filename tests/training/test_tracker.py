from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

import hessjax as hj

STEPS = 30


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["in"]["w"] + params["in"]["b"]) * params["scale"]
    return 0.5 * jnp.mean(jnp.sum((hidden @ params["out"] - y) ** 2, -1))


def network(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 4)
    params = {
        "in": {"w": jax.random.normal(keys[0], (5, 6), dtype) / 2, "b": jnp.zeros(6, dtype)},
        "scale": jnp.ones((), dtype),
        "out": jax.random.normal(keys[1], (6, 3), dtype) / 2,
        "none": jnp.zeros((0, 2), dtype),
    }
    return params, (jax.random.normal(keys[2], (40, 5), dtype), jax.random.normal(keys[3], (40, 3), dtype))


def follow(optimizer, params, state, batch, steps=STEPS):
    """Trains, and gives the carry together with the tracker's state and the parameters at every step."""

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params, batch=batch)
        return (optax.apply_updates(params, updates), state), (state[0], params)

    return jax.lax.scan(step, (params, state), length=steps)


def matrix(operator):
    """Its eigenvalues, ascending."""
    return np.linalg.eigvalsh(np.asarray(operator.dense(), np.float64))


@pytest.fixture(scope="module")
def run():
    """One tracked run of the float32 network, shared."""
    params, batch = network()
    optimizer = optax.chain(hj.track_curvature(loss, 2, jax.random.key(0), every=3, history=4), optax.sgd(0.3))
    go = jax.jit(partial(follow, optimizer))
    return optimizer, params, batch, go, go(params, optimizer.init(params), batch)


def test_eigenpairs_are_those_of_the_dense_hessian_at_the_params_before_the_update(run):
    _, _, batch, _, (_, (states, trail)) = run
    for step in range(STEPS):
        at = jtu.tree_map(lambda leaf, i=step - step % 3: leaf[i], trail)
        truth = matrix(hj.hvp(loss)(at, *batch))[-2:]
        np.testing.assert_allclose(states.eigenvalues[step], truth, rtol=1e-3)
        assert np.all(states.residuals[step] <= 3.1e-3 * truth)
    np.testing.assert_array_equal(states.step, np.arange(STEPS) + 1)
    np.testing.assert_array_equal(states.measured, np.arange(STEPS) // 3 * 3)


def test_products_are_counted_and_spent_at_measurements_only(run):
    spent = np.diff(np.asarray(run[-1][1][0].num_matvecs))
    assert np.all(spent[np.arange(1, STEPS) % 3 != 0] == 0)
    assert np.all(spent[np.arange(1, STEPS) % 3 == 0] >= 3)


def test_vectors_are_eigenvectors_and_orthonormal(run):
    _, _, batch, _, (_, (states, trail)) = run
    at, last = (jtu.tree_map(lambda leaf, i=i: leaf[i], tree) for i, tree in ((27, trail), (29, states)))
    H = hj.hvp(loss)(at, *batch)
    flat = jax.vmap(lambda v: jax.flatten_util.ravel_pytree(v)[0])(last.eigenvectors)
    np.testing.assert_allclose(flat @ flat.T, np.eye(2), atol=1e-5)
    assert all(row[np.argmax(np.abs(row))] > 0 for row in np.asarray(flat))
    for i in range(2):
        v = jtu.tree_map(lambda leaf, i=i: leaf[i], last.eigenvectors)
        rest = jax.flatten_util.ravel_pytree(H @ v)[0] - last.eigenvalues[i] * flat[i]
        np.testing.assert_allclose(jnp.linalg.norm(rest), last.residuals[i], rtol=0.1, atol=1e-5)


def test_updates_pass_through_and_the_state_keeps_its_structure():
    params, batch = network()
    tracker = hj.track_curvature(loss, 2, jax.random.key(0))
    updates = jtu.tree_map(jnp.ones_like, params)
    before = tracker.init(params)
    same, after = tracker.update(updates, before, params, batch=batch)
    assert all(a is b for a, b in zip(jtu.tree_leaves(same), jtu.tree_leaves(updates), strict=True))
    assert jtu.tree_structure(before) == jtu.tree_structure(after)
    for a, b in zip(jtu.tree_leaves(before), jtu.tree_leaves(after), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, b.weak_type)


def test_the_history_is_a_ring(run):
    states = run[-1][1][0]
    order = np.argsort(states.history_steps[-1])
    np.testing.assert_array_equal(states.history_steps[-1][order], [18, 21, 24, 27])
    np.testing.assert_array_equal(states.history[-1][order], states.eigenvalues[18:28:3])
    np.testing.assert_array_equal(np.isnan(states.history[2, :, 0]), [False, True, True, True])


def test_resuming_from_a_file_gives_the_same_bits(run, tmp_path):
    optimizer, params, batch, _, (end, _) = run
    half = jax.jit(partial(follow, optimizer, steps=STEPS // 2), donate_argnums=(1,))
    carry, _ = half(params, optimizer.init(params), batch)
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", carry)
    carry = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", (params, optimizer.init(params)))
    carry, _ = half(*carry, batch)
    for a, b in zip(jtu.tree_leaves(carry), jtu.tree_leaves(end), strict=True):
        np.testing.assert_array_equal(a, b)


def test_learning_rates_run_side_by_side_and_still_skip_the_work_in_between():
    params, batch = network()

    def train(rate):
        optimizer = optax.chain(hj.track_curvature(loss, 1, jax.random.key(0), every=5), optax.sgd(rate))
        return follow(optimizer, params, optimizer.init(params), batch, 12)[1][0]

    rates = jnp.array([0.05, 0.1, 0.2, 0.4])
    together = jax.jit(jax.vmap(train))(rates)
    alone = jax.jit(train)
    for i, rate in enumerate(rates):
        np.testing.assert_allclose(together.eigenvalues[i], alone(rate).eigenvalues, rtol=1e-3)
    measuring = [e for e in equations(jax.make_jaxpr(jax.vmap(train))(rates).jaxpr) if e.primitive.name == "cond"]
    assert any("while" in str(branch) for e in measuring for branch in e.params["branches"])


def equations(jaxpr):
    """All of a program's, those of the programs inside it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


def test_a_loss_that_is_not_finite_shows_and_is_got_over():
    params, batch = network()
    tracker = hj.track_curvature(loss, 2, jax.random.key(0))
    update = jax.jit(lambda state, params: tracker.update(params, state, params, batch=batch)[1])
    state = update(tracker.init(params), params)
    lost = update(state, {**params, "out": params["out"].at[0, 0].set(jnp.nan)})
    assert np.all(np.isnan(lost.eigenvalues))
    assert np.all(np.isposinf(lost.residuals))
    assert all(np.all(np.isfinite(leaf)) for leaf in jtu.tree_leaves(lost.eigenvectors))
    assert lost.certified == 0
    found = update(lost, params)
    np.testing.assert_allclose(found.eigenvalues, state.eigenvalues, rtol=1e-3)
    assert found.certified == 2


@pytest.mark.parametrize("which", ["LA", "LM", "BE", pytest.param("SA", marks=pytest.mark.slow)])
def test_every_end_of_the_spectrum(which, x64):
    values = np.array([-9.0, -8.0, -1.0, 0.0, 1.0, 2.0, 7.0, 12.0])
    want = {"LA": [2, 7, 12], "SA": [-9, -8, -1], "LM": [-9, -8, 12], "BE": [-9, 7, 12]}[which]

    def operator(w, diagonal):
        return hj.operator(lambda v: diagonal * v, like=w)

    tracker = hj.track_curvature(None, 3, jax.random.key(0), which=which, operator=operator)
    w = jnp.ones(8)
    _, state = tracker.update(w, tracker.init(w), w, batch=(jnp.asarray(values),))
    np.testing.assert_allclose(state.eigenvalues, want, atol=1e-3)
    assert state.eigenvalues.dtype == jnp.float64


def test_a_value_that_the_tracked_vectors_cannot_see_is_found_by_the_next_certificate():
    def operator(w, diagonal):
        return hj.operator(lambda v: diagonal * v, like=w)

    tracker = hj.track_curvature(None, 2, jax.random.key(0), operator=operator, certify=4)
    w = jnp.ones(50)
    update = jax.jit(lambda state, d: tracker.update(w, state, w, batch=(d,))[1])
    diagonal = jnp.linspace(0, 1, 50).at[0].set(5.0).at[1].set(4.0)
    state = update(tracker.init(w), diagonal)
    np.testing.assert_allclose(state.eigenvalues, [4, 5], rtol=1e-4)
    hidden = diagonal.at[20].set(6.0)
    for _ in range(4):
        state = update(state, hidden)
    np.testing.assert_allclose(state.eigenvalues, [5, 6], rtol=1e-4)
    assert state.certified == 4


def test_sudden_change_calls_for_a_fresh_solve():
    params, batch = network()
    tracker = hj.track_curvature(loss, 2, jax.random.key(0), certify=100)
    update = jax.jit(lambda state, params: tracker.update(params, state, params, batch=batch)[1])
    state = update(tracker.init(params), params)
    other = jtu.tree_map(lambda leaf, i: 2 * jnp.roll(leaf, i), params, {**jtu.tree_map(lambda _: 1, params)})
    state = update(state, other)
    np.testing.assert_allclose(state.eigenvalues, matrix(hj.hvp(loss)(other, *batch))[-2:], rtol=1e-3)
    assert state.certified == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # orbax's own
def test_orbax_keeps_the_state(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params, batch = network()
    params.pop("none")  # orbax saves no empty arrays
    optimizer = optax.chain(hj.track_curvature(loss, 2, jax.random.key(0), history=2), optax.sgd(0.3))
    half = jax.jit(partial(follow, optimizer, steps=5))
    carry, _ = half(params, optimizer.init(params), batch)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "carry", carry)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "carry", (params, optimizer.init(params)))
    for a, b in zip(jtu.tree_leaves(half(*carry, batch)), jtu.tree_leaves(half(*restored, batch)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_plain_numbers_are_parameters_too():
    tracker = hj.track_curvature(lambda p: 3 * p["a"] ** 2, 1, jax.random.key(0))
    _, state = tracker.update({"a": 2.0}, tracker.init({"a": 1.0}), {"a": 1.0}, batch=())
    np.testing.assert_allclose(state.eigenvalues, [6.0], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, pytest.param(3.0, marks=pytest.mark.slow)])
def test_no_more_dimensions_than_pairs(value):
    tracker = hj.track_curvature(lambda w: value * jnp.sum(w**2) / 2, 2, jax.random.key(0))
    w = jnp.ones(2)
    state = tracker.init(w)
    assert all(leaf.size for leaf in jtu.tree_leaves(state))  # orbax saves no empty arrays
    for _ in range(2):
        _, state = tracker.update(w, state, w, batch=())
        np.testing.assert_allclose(state.eigenvalues, [value, value], atol=1e-5)


def test_adam_preconditioned_hessian_is_that_of_the_state_given():
    params, batch = network()
    params.pop("none")
    tracker = hj.track_curvature(loss, 2, jax.random.key(0), preconditioner="from_opt_state", tol=1e-3)
    adam = optax.adam(1e-2)

    @jax.jit
    def step(params, adam_state, state):
        g = jax.grad(loss)(params, *batch)
        updates, adam_state = adam.update(g, adam_state, params)
        _, state = tracker.update(updates, state, params, batch=batch, opt_state=adam_state, grad=g)
        return optax.apply_updates(params, updates), adam_state, state

    adam_state, state, before = adam.init(params), tracker.init(params), params
    for _ in range(4):
        before = params
        params, adam_state, state = step(params, adam_state, state)
    H = hj.precondition(hj.hvp(loss)(before, *batch), hj.adam_preconditioner(adam_state))
    np.testing.assert_allclose(state.eigenvalues, matrix(H)[-2:], rtol=1e-4)
    assert 0 < state.update_overlap < 1
    assert state.update_overlap != state.gradient_overlap


WRAPPERS = {
    "inject": lambda tracker: optax.inject_hyperparams(lambda rate: optax.chain(tracker, optax.sgd(rate)))(0.1),
    "after others": lambda tracker: optax.chain(optax.clip_by_global_norm(1e-3), tracker, optax.adam(0.1)),
    "before MultiSteps": lambda tracker: optax.chain(
        tracker, optax.MultiSteps(optax.sgd(0.1), 3).gradient_transformation()
    ),
}


@pytest.mark.parametrize("name", [n if n == "inject" else pytest.param(n, marks=pytest.mark.slow) for n in WRAPPERS])
def test_other_optax_wrappers_pass_the_batch_on(name):
    params, batch = network()
    optimizer = WRAPPERS[name](hj.track_curvature(loss, 1, jax.random.key(0)))
    g, state = jax.grad(loss)(params, *batch), optimizer.init(params)
    update = jax.jit(lambda state: optimizer.update(g, state, params, batch=batch)[1])
    for step in range(2):
        state = update(state)
        assert optax.tree.get(state, "measured") == step
    truth = matrix(hj.hvp(loss)(params, *batch))[-1]
    np.testing.assert_allclose(optax.tree.get(state, "eigenvalues")[0], truth, rtol=1e-3)


def test_the_same_key_gives_the_same_bits_and_mixed_dtypes_keep_theirs(x64):
    def mixed(params, x):
        return jnp.sum(jnp.sin(params[0] * x)) + jnp.sum(params[1].astype(jnp.float64) ** 4)

    params = (jnp.arange(3.0), jnp.ones(2, jnp.float32))
    states = []
    for _ in range(2):
        tracker = hj.track_curvature(mixed, 1, jax.random.PRNGKey(3))
        states.append(tracker.update(params, tracker.init(params), params, batch=(jnp.ones(3),))[1])
    assert [leaf.dtype for leaf in states[0].eigenvectors] == [jnp.float64, jnp.float32]
    for a, b in zip(jtu.tree_leaves(states[0]), jtu.tree_leaves(states[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(states[0].eigenvalues, [12.0], rtol=1e-5)


def test_errors_at_the_door_name_the_remedy():
    params, batch = network()
    key = jax.random.key(0)
    tracker = hj.track_curvature(loss, 1, key)
    state = tracker.init(params)
    with pytest.raises(ValueError, match="params"):
        tracker.update(params, state, batch=batch)
    with pytest.raises(ValueError, match=r"batch=\(x, y\).*apply_gradients"):
        tracker.update(params, state, params)
    with pytest.raises(ValueError, match="tuple"):
        tracker.update(params, state, params, batch=batch[0])
    adaptive = hj.track_curvature(loss, 1, key, preconditioner="from_opt_state")
    with pytest.raises(ValueError, match="opt_state="):
        adaptive.update(params, state, params, batch=batch)
    with pytest.raises(ValueError, match="number of parameters"):
        hj.track_curvature(loss, 100, key).init(params)
    for wrong in ({"k": 0}, {"every": 0}, {"certify": 0}, {"history": -1}, {"tol": 0.0}, {"which": "SM"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hj.track_curvature(loss, **{"k": 1, "key": key, **wrong})
    with pytest.raises(ValueError, match="both"):
        hj.track_curvature(loss, 1, key, operator=lambda p: hj.hvp(loss)(p, *batch))
    with pytest.raises(ValueError, match="preconditioner"):
        hj.track_curvature(loss, 1, key, preconditioner="adam")
    with pytest.raises(ValueError, match=r"grow_above.*'SA'"):
        hj.track_curvature(loss, 1, key, grow_above=3.0, which="SA")
    with pytest.raises(ValueError, match=r"grow_above.*'2/lr'"):
        hj.track_curvature(loss, 1, key, grow_above="2/lr")
    with pytest.raises(TypeError, match="every"):
        hj.track_curvature(loss, 1, key, every=1.5)
    with pytest.raises(TypeError, match="key"):
        hj.track_curvature(loss, 1, None)
    for wrong in ({"tol": None}, {"tol": "a"}, {"tol": np.nan}, {"grow_above": np.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hj.track_curvature(loss, 1, key, **wrong)
    with pytest.raises(ValueError, match=r"init.*got tuple"):
        tracker.update(params, (state,), params, batch=batch)
    with pytest.raises(ValueError, match=r"init.*2 pairs.*got 1"):
        hj.track_curvature(loss, 2, key).update(params, state, params, batch=batch)
    with pytest.raises(ValueError, match=r"init.*these parameters"):
        tracker.update(params, state, params["in"], batch=batch)
    with pytest.raises(ValueError, match="1 of them are masked"):
        optax.masked(tracker, {"in": True, "scale": False, "out": True, "none": True}).init(params)
    builder = hj.track_curvature(None, 1, key, operator=lambda p, *_: lambda v: v)
    with pytest.raises(TypeError, match=r"`operator` must return an `hj.Operator`, got function"):
        builder.update(params, builder.init(params), params, batch=batch)


def test_a_run_is_differentiable_by_what_the_tracked_loss_holds():
    def trained(strength):
        def held(w):
            return strength * jnp.sum(w**4) / 12

        tracker = hj.track_curvature(held, 1, jax.random.key(0))

        def step(carry, _):
            w, state = carry
            gradient = jax.grad(held)(w)
            _, state = tracker.update(gradient, state, w, batch=())
            return (w - 0.1 * gradient, state), state.eigenvalues

        w = jnp.array([1.0, 2.0])
        (w, _), values = jax.lax.scan(step, (w, tracker.init(w)), length=3)
        return jnp.sum(w), values

    (_, values), slope = jax.value_and_grad(trained, has_aux=True)(1.0)
    np.testing.assert_allclose(values[0], [4.0], rtol=1e-4)
    numeric = (trained(1.01)[0] - trained(0.99)[0]) / 0.02
    np.testing.assert_allclose(slope, numeric, rtol=1e-2)


@pytest.mark.slow
def test_guards_save_products_on_digits_and_lose_nothing():
    """Past the edge of stability, where five eigenvalues lie within 4% and their vectors mix between measurements."""
    from benchmarks.training import RATE, descend, digits, init

    batch, every, steps = digits(), 10, 1000
    trails = {}
    for guards in (0, 7):
        run = jax.jit(partial(descend, steps=steps, k=3, every=every, guards=guards))
        trails[guards] = run(init(jax.random.key(3)), jnp.asarray(RATE), batch)[1]
    spent = {guards: np.mean(np.diff(trail.num_matvecs[::every])) for guards, trail in trails.items()}
    assert spent[7] <= 9
    assert spent[7] < 0.8 * spent[0]
    np.testing.assert_allclose(trails[7].eigenvalues[:500], trails[0].eigenvalues[:500], rtol=2e-3)
    np.testing.assert_allclose(np.mean(trails[7].eigenvalues[700:, -1]), 2 / RATE, rtol=0.05)
