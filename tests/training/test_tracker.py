import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

N, STEPS, K = 60, 24, 3
KEY = jax.random.key(5)
PARAMS = {"a": jnp.ones((7, 4)), "b": (jnp.ones(()), jnp.zeros((0, 3))), "c": [jnp.ones(31)], "none": None}


def flat(params):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def quadratic(params, matrix):
    """Its Hessian is `matrix`, whatever the parameters."""
    w = flat(params)
    return jnp.dot(w, jnp.matmul(matrix, w, precision="highest")) / 2


@functools.cache
def program(lanes=False, **kwargs):
    """Scans a tracker over a stack of matrices; all states come back, the last one apart."""
    tracker = hj.track_curvature(quadratic, K, KEY, **kwargs)

    def run(state, matrices):
        def step(state, matrix):
            updates, state = tracker.update(PARAMS, state, PARAMS, batch=(matrix,))
            return state, state

        return jax.lax.scan(step, state, matrices)

    fresh = lambda matrices: run(tracker.init(PARAMS), matrices)
    return tracker, jax.jit(run), jax.jit(jax.vmap(fresh) if lanes else fresh)


def symmetric(rng, values):
    q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    return q * values @ q.T


@pytest.fixture
def drifting(rng):
    """Matrices that turn a little at every step, with five outliers that cross."""
    start, end = (symmetric(rng, np.append(rng.uniform(-1, 1, N - 5), tops)) for tops in ([5, 6, 7, 8, 9], [9, 8, 6, 7, 5]))
    return jnp.asarray([(1 - t) * start + t * end for t in np.linspace(0, 0.2, STEPS)], jnp.float32)


def truth(matrices, which="LA", k=K):
    values = np.linalg.eigvalsh(np.asarray(matrices, np.float64))
    if which == "LM":
        order = np.sort(np.argsort(-np.abs(values), axis=-1)[..., :k], axis=-1)
        return np.take_along_axis(values, order, axis=-1)
    return values[..., -k:]


def vectors(state):
    """(..., k, n)"""
    lead = state.eigenvalues.shape
    return np.concatenate([np.asarray(leaf).reshape(*lead, -1) for leaf in jax.tree.leaves(state.eigenvectors)], axis=-1)


def test_every_state_of_a_scan_holds_the_eigenpairs(drifting):
    last, states = program()[2](drifting)
    exact = truth(drifting)
    np.testing.assert_allclose(states.eigenvalues, exact, rtol=3e-4)
    v = vectors(states)
    np.testing.assert_allclose(v @ v.swapaxes(1, 2), np.broadcast_to(np.eye(K), (STEPS, K, K)), atol=1e-5)
    residual = np.einsum("tij,tkj->tki", drifting, v) - np.asarray(states.eigenvalues)[..., None] * v
    np.testing.assert_allclose(states.residuals, np.linalg.norm(residual, axis=-1), rtol=0.05, atol=1e-4)
    assert np.all(states.residuals <= 3.1e-3 * np.abs(exact))
    peak = np.argmax(np.abs(v), axis=-1)
    assert np.all(np.take_along_axis(v, peak[..., None], axis=-1) > 0)
    np.testing.assert_array_equal(states.step, np.arange(1, STEPS + 1))
    np.testing.assert_array_equal(states.measured, np.arange(STEPS))
    spent = np.diff(states.num_matvecs)
    assert np.all(spent >= K + 1)
    assert np.mean(spent) <= 3 * K
    assert states.certified[0] == 0
    assert last.certified == 20
    turned = [np.arccos(np.clip(np.linalg.svd(v[t] @ v[t - 1].T)[1], -1, 1)) for t in range(1, STEPS)]
    assert np.all(np.isnan(states.angles[0]))
    np.testing.assert_allclose(states.angles[1:], turned, atol=2e-3)
    ones = np.asarray(flat(PARAMS), np.float64)
    np.testing.assert_allclose(states.gradient_overlap, np.sum((v @ ones) ** 2, axis=1) / np.sum(ones**2), rtol=1e-4)


def test_state_keeps_its_structure_and_update_is_the_identity(drifting):
    tracker = program()[0]
    state = tracker.init(PARAMS)
    updates, after = tracker.update(PARAMS, state, PARAMS, batch=(drifting[0],))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, updates, PARAMS))
    describe = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)
    assert describe(state) == describe(after)
    assert jax.tree.structure(state) == jax.tree.structure(after)


def test_a_run_that_is_saved_donated_and_resumed_has_the_same_bits(drifting, tmp_path):
    tracker, run, fresh = program()
    whole = fresh(drifting)[0]
    donated = jax.jit(lambda state, matrices: run(state, matrices), donate_argnums=0)
    half = donated(tracker.init(PARAMS), drifting[: STEPS // 2])[0]
    eqx.tree_serialise_leaves(tmp_path / "state.eqx", half)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "state.eqx", tracker.init(PARAMS))
    resumed = donated(loaded, drifting[STEPS // 2 :])[0]
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)


def test_nothing_is_measured_in_between(drifting):
    last, states = program(every=5, history=3)[2](drifting)
    measured = np.arange(STEPS) // 5 * 5
    np.testing.assert_array_equal(states.measured, measured)
    np.testing.assert_allclose(states.eigenvalues, truth(drifting)[measured], rtol=3e-4)
    changes = np.flatnonzero(np.diff(states.num_matvecs)) + 1
    np.testing.assert_array_equal(changes, [5, 10, 15, 20])
    order = np.argsort(last.history_steps)
    np.testing.assert_array_equal(last.history_steps[order], [10, 15, 20])
    np.testing.assert_allclose(last.history[order], truth(drifting)[[10, 15, 20]], rtol=3e-4)


def test_lanes_of_one_vmap_are_the_runs_alone(drifting, rng):
    other = jnp.asarray(rng.permuted(drifting, axis=0))
    both = program(lanes=True)[2](jnp.stack([drifting, other]))[1]
    for lane, matrices in enumerate([drifting, other]):
        np.testing.assert_allclose(both.eigenvalues[lane], truth(matrices), rtol=1e-3)
    alone = program()[2](drifting)[1]
    np.testing.assert_array_equal(both.num_matvecs[0][:5], alone.num_matvecs[:5])


def test_not_finite_measurements_say_so_and_the_next_one_starts_afresh(drifting):
    broken = drifting.at[7].set(jnp.nan).at[8, 3, 3].set(jnp.inf)
    last, states = program()[2](broken)
    bad = np.isin(np.arange(STEPS), [7, 8])
    assert np.all(np.isnan(states.eigenvalues[bad]))
    assert np.all(np.isposinf(states.residuals[bad]))
    assert np.all(vectors(states)[bad] == 0)
    np.testing.assert_allclose(states.eigenvalues[~bad], truth(drifting)[~bad], rtol=3e-4)
    assert states.certified[9] == 9
    assert np.isfinite(last.eigenvalues).all()


def test_a_value_that_no_start_vector_sees_is_found_by_the_next_certificate():
    values = np.tile(np.linspace(0.1, 1, N), (STEPS, 1))
    values[:, [10, 20, 30]] = [6, 7, 8]
    values[10:, 40] = 9  # its eigenvector is exactly orthogonal to all that was tracked
    matrices = jnp.asarray([np.diag(v) for v in values], jnp.float32)
    exact = np.sort(values, axis=1)[:, -K:]
    states = program(certify=1)[2](matrices)[1]
    np.testing.assert_array_equal(states.certified, np.arange(STEPS))
    np.testing.assert_allclose(states.eigenvalues, exact, rtol=3e-4)
    states = program()[2](matrices)[1]
    fresh = np.asarray(states.certified) == np.asarray(states.measured)
    assert fresh[[0, 20]].all()
    np.testing.assert_allclose(states.eigenvalues[fresh], exact[fresh], rtol=3e-4)
    np.testing.assert_allclose(states.eigenvalues[20:], exact[20:], rtol=3e-4)


def test_spectra_with_nothing_to_find():
    rank_one = np.zeros((N, N))
    rank_one[2, 2] = 3
    repeated = np.diag(np.where(np.arange(N) < 5, 2.0, 1.0))
    matrices = jnp.asarray(np.stack([np.zeros((N, N)), rank_one, repeated, np.eye(N)] * (STEPS // 4)), jnp.float32)
    states = program()[2](matrices)[1]
    sure = np.asarray(states.certified) == np.asarray(states.measured)
    assert sure[:3].all()
    np.testing.assert_allclose(states.eigenvalues[sure], truth(matrices)[sure], atol=1e-2)
    assert np.isfinite(states.residuals).all()


def test_largest_magnitude(drifting):
    states = program(which="LM")[2](-drifting)[1]
    np.testing.assert_allclose(states.eigenvalues, truth(-drifting, "LM"), rtol=3e-4)


@pytest.mark.parametrize("n", [1, 2])
def test_as_many_pairs_as_parameters(n, x64):
    tracker = hj.track_curvature(lambda w, a: jnp.sum(a * w**2) / 2, n, KEY)
    w, a = jnp.ones(n), 1.0 + jnp.arange(n)
    state = tracker.init(w)
    for scale in (1.0, 2.0):
        state = tracker.update(None, state, w, batch=(scale * a,))[1]
        np.testing.assert_allclose(state.eigenvalues, scale * a, rtol=1e-9)
    assert np.isnan(state.update_overlap)


def test_errors_say_what_is_missing(drifting):
    tracker = program()[0]
    state = tracker.init(PARAMS)
    with pytest.raises(ValueError, match="params=None"):
        tracker.update(PARAMS, state, batch=(drifting[0],))
    with pytest.raises(ValueError, match="`batch=`, a tuple.*NoneType"):
        tracker.update(PARAMS, state, PARAMS)
    with pytest.raises(ValueError, match="`batch=`, a tuple"):
        tracker.update(PARAMS, state, PARAMS, batch=drifting[0])
    with pytest.raises(ValueError, match="opt_state"):
        hj.track_curvature(quadratic, 1, KEY, preconditioner="from_opt_state").update(
            PARAMS, state, PARAMS, batch=(drifting[0],)
        )
    with pytest.raises(ValueError, match="`k` <= 60.*61"):
        hj.track_curvature(quadratic, 61, KEY).init(PARAMS)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"k": 0}, "`k >= 1`, got 0"),
        ({"every": 0}, "`every >= 1`, got 0"),
        ({"which": "SM"}, "got 'SM'"),
        ({"tol": 0}, "`tol` < 1, got 0"),
        ({"history": -1}, "`history >= 0`, got -1"),
        ({"preconditioner": "adam"}, "got 'adam'"),
        ({"loss": None}, "got neither"),
        ({"operator": hj.hvp(quadratic)}, "got both"),
    ],
)
def test_errors_at_the_door(kwargs, match):
    with pytest.raises(ValueError, match=match):
        hj.track_curvature(**{"loss": quadratic, "k": 1, "key": KEY, **kwargs})


def test_errors_of_type():
    with pytest.raises(TypeError, match="jax.random.key"):
        hj.track_curvature(quadratic, 1, None)
