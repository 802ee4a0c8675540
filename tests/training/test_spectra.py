"""A tracker on Hessians that are given as matrices, so that every spectrum can be made."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

N, STEPS, K, TOL = 60, 24, 3, 3e-3
KEY = jax.random.key(5)
PARAMS = {"a": jnp.ones((7, 4)), "b": (jnp.ones(()), jnp.zeros((0, 3))), "c": [jnp.ones(31)], "none": None}


def flat(params):
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(params)])


def quadratic(params, matrix):
    """Its Hessian is `matrix`, whatever the parameters."""
    w = flat(params)
    return jnp.dot(w, jnp.matmul(matrix, w, precision="highest")) / 2


def follow(matrices, **kwargs):
    """From a stack of matrices to the state after each, in one scan."""
    tracker = hj.track_curvature(quadratic, K, KEY, tol=TOL, **kwargs)

    def step(state, matrix):
        state = tracker.update(PARAMS, state, PARAMS, batch=(matrix,))[1]
        return state, state

    return jax.lax.scan(step, tracker.init(PARAMS), matrices)[1]


@functools.cache
def program(**kwargs):
    return jax.jit(functools.partial(follow, **kwargs))


@functools.cache
def growing(**kwargs):
    return jax.jit(lambda matrices, threshold: follow(matrices, grow_above=threshold, **kwargs))


def symmetric(rng, values):
    q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    return q * values @ q.T


@pytest.fixture
def drifting(rng):
    """Matrices that turn a little at every step, with five outliers."""
    ends = [symmetric(rng, np.append(rng.uniform(-1, 1, N - 5), tops)) for tops in ([5, 6, 7, 8, 9], [9, 8, 6, 7, 5])]
    return jnp.asarray([(1 - t) * ends[0] + t * ends[1] for t in np.linspace(0, 0.2, STEPS)], jnp.float32)


def truth(matrices):
    return np.linalg.eigvalsh(np.asarray(matrices, np.float64))[:, -K:]


def vectors(states):
    """(steps, k, n)"""
    return np.concatenate(
        [np.asarray(leaf).reshape(STEPS, K, -1) for leaf in jax.tree.leaves(states.eigenvectors)], axis=-1
    )


def test_every_state_of_a_scan_holds_the_eigenpairs(drifting):
    states, exact = program()(drifting), truth(drifting)
    np.testing.assert_allclose(states.eigenvalues, exact, rtol=3e-4)
    v = vectors(states)
    np.testing.assert_allclose(v @ v.swapaxes(1, 2), np.broadcast_to(np.eye(K), (STEPS, K, K)), atol=1e-5)
    residual = np.einsum("tij,tkj->tki", drifting, v) - np.asarray(states.eigenvalues)[..., None] * v
    np.testing.assert_allclose(states.residuals, np.linalg.norm(residual, axis=-1), rtol=0.05, atol=1e-4)
    assert np.all(states.residuals <= 1.01 * TOL * exact)
    spent = np.diff(states.num_matvecs)
    assert np.all(spent >= K)
    assert np.mean(spent) <= 1.6 * K
    assert states.certified[0] == 0


def test_angles_and_overlaps_are_those_of_the_spaces(drifting):
    states = program()(drifting)
    v = np.asarray(vectors(states), np.float64)
    turned = [np.arccos(np.clip(np.linalg.svd(v[t] @ v[t - 1].T)[1], -1, 1)) for t in range(1, STEPS)]
    assert np.all(np.isnan(states.angles[0]))
    np.testing.assert_allclose(states.angles[1:], turned, atol=2e-3)
    u = np.asarray(flat(PARAMS), np.float64)
    share = np.sum((v @ u) ** 2, axis=1) / np.sum(u**2)
    np.testing.assert_allclose(states.gradient_overlap, share, rtol=1e-4)


def test_after_what_is_not_finite_the_next_measurement_starts_afresh(drifting):
    states = program()(drifting.at[7].set(jnp.nan).at[8, 3, 3].set(jnp.inf))
    bad = np.isin(np.arange(STEPS), [7, 8])
    assert np.all(np.isnan(states.eigenvalues[bad]))
    assert np.all(np.isposinf(states.residuals[bad]))
    assert np.all(vectors(states)[bad] == 0)
    np.testing.assert_allclose(states.eigenvalues[~bad], truth(drifting)[~bad], rtol=3e-4)
    assert states.certified[9] == 9


def test_with_every_measurement_certified_none_is_wrong():
    values = np.tile(np.linspace(0.1, 1, N), (STEPS, 1))
    values[:, [10, 20, 30]] = [6, 7, 8]
    values[10:, 40] = 9  # its eigenvector is exactly orthogonal to all that was tracked
    matrices = jnp.asarray([np.diag(v) for v in values], jnp.float32)
    states = program(certify=1)(matrices)
    np.testing.assert_array_equal(states.certified, np.arange(STEPS))
    np.testing.assert_allclose(states.eigenvalues, np.sort(values, axis=1)[:, -K:], rtol=3e-4)


def test_what_is_certified_is_right_on_spectra_with_nothing_to_find():
    rank_one = np.zeros((N, N))
    rank_one[2, 2] = 3
    repeated = np.diag(np.where(np.arange(N) < 5, 2.0, 1.0))
    matrices = jnp.asarray(np.stack([np.zeros((N, N)), rank_one, repeated, np.eye(N)] * (STEPS // 4)), jnp.float32)
    states = program()(matrices)
    sure = np.asarray(states.certified) == np.asarray(states.measured)
    assert sure[:3].all()
    np.testing.assert_allclose(states.eigenvalues[sure], truth(matrices)[sure], atol=1e-3)
    assert np.isfinite(states.residuals).all()


@pytest.fixture
def crossing(rng):
    """Four eigenvalues that rise and fall past each other, in a basis that turns a little at every step."""
    steps, turning = np.arange(STEPS), np.cumsum(rng.standard_normal((STEPS, N, N)), axis=0)
    tops = [2 + 0.4 * steps, 1.9 + 0.3 * steps, 6 - np.abs(steps - 12), np.full(STEPS, 3.3)]
    bulk = np.tile(rng.uniform(-1, 1, N - len(tops)), (STEPS, 1))
    q = symmetric(rng, np.sign(rng.standard_normal(N)))
    matrices = np.einsum("ij,tj,kj->tik", q, np.column_stack([bulk, *tops]), q)
    return jnp.asarray(matrices + 0.01 * (turning + turning.swapaxes(1, 2)), jnp.float32)


@pytest.mark.parametrize(("grow_above", "counts"), [(3.0, {2, 3}), (8.0, {1, 2, 3}), (100.0, {1})])
def test_pairs_are_those_above_a_threshold_and_the_next(grow_above, counts, crossing):
    exact = np.linalg.eigvalsh(np.asarray(crossing, np.float64))
    want = np.minimum(np.sum(exact > grow_above, axis=1) + 1, K)
    assert set(want) == counts
    states = growing(certify=1)(crossing, grow_above)
    held = np.arange(K) >= K - want[:, None]
    np.testing.assert_array_equal(states.certified, np.arange(STEPS))
    np.testing.assert_array_equal(states.num_tracked, want)
    np.testing.assert_array_equal(np.isnan(states.eigenvalues), ~held)
    np.testing.assert_array_equal(np.isinf(states.residuals), ~held)
    np.testing.assert_allclose(states.eigenvalues[held], exact[:, -K:][held], rtol=3e-4)
    v = vectors(states)
    np.testing.assert_allclose(v @ v.swapaxes(1, 2), held[..., None] * np.eye(K), atol=1e-5)
    angles = np.minimum(want[1:], want[:-1])
    np.testing.assert_array_equal(np.sum(~np.isnan(states.angles[1:]), axis=1), angles)


def test_pairs_below_the_threshold_cost_no_products(drifting):
    everything, few = program()(drifting), growing()(drifting, 8.9)
    np.testing.assert_allclose(few.eigenvalues[:, -1], truth(drifting)[:, -1], rtol=3e-4)
    alone = np.asarray(few.num_tracked[1:] == 1)
    assert alone.sum() > STEPS / 2
    spent = [np.diff(states.num_matvecs)[alone] for states in (few, everything)]
    assert np.all(spent[0] >= 1)
    assert np.mean(spent[0]) < 0.7 * np.mean(spent[1])


def turning(rng, angles):
    """Matrices whose eigenvalues fall by 5% each, the upper of them mixed by a rotation by each of the angles."""
    q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    generator = np.zeros((N, N))
    generator[:14, :14] = rng.standard_normal((14, 14))
    values, axes = np.linalg.eigh(1j * (generator - generator.T))
    spectrum = 10 * 0.95 ** np.arange(N)
    turned = [q @ (axes * np.exp(-1j * angle * values) @ axes.conj().T).real for angle in angles]
    return jnp.asarray([u * spectrum @ u.T for u in turned], jnp.float32)


def spent(states):
    return np.diff(np.asarray(states.num_matvecs))


@pytest.mark.parametrize(
    ("angles", "prediction", "products"),
    [((-1.0) ** np.arange(STEPS) * 0.05, 1, 1.4), (0.03 * np.arange(STEPS), 2, 2.3), (np.zeros(STEPS), 0, 1.1)],
)
def test_swings_and_steady_turns_are_foreseen(rng, angles, prediction, products):
    matrices = turning(rng, angles)
    states = program()(matrices)
    np.testing.assert_allclose(states.eigenvalues, truth(matrices), rtol=5e-4)
    if np.any(angles):  # what stands still is foretold by everything
        assert np.mean(states.prediction[4:] == prediction) > 0.9
    assert np.mean(spent(states)[4:]) <= products * K


def test_a_long_run_keeps_its_vectors_orthonormal(rng):
    """Rounding must not add up: the vectors of one measurement are combinations of those of the last."""
    matrices = turning(rng, [0.0, 0.01, 0.03])

    @jax.jit
    def run(state):
        tracker = hj.track_curvature(quadratic, K, KEY, tol=TOL)

        def visit(state, index):
            return tracker.update(PARAMS, state, PARAMS, batch=(matrices[index % 3],))[1], None

        return jax.lax.scan(visit, state, jnp.arange(3000))[0]

    state = run(hj.track_curvature(quadratic, K, KEY).init(PARAMS))
    for rows in (state.eigenvectors, state.model_vectors):
        flat_rows = np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in jax.tree.leaves(rows)], axis=1)
        np.testing.assert_allclose(flat_rows @ flat_rows.T, np.eye(len(flat_rows)), atol=2e-6)
    np.testing.assert_allclose(state.eigenvalues, truth(matrices)[2], rtol=5e-4)
