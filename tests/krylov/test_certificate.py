"""The certificate where it is hardest: wanted eigenvalues next to a dense bulk, of which a warm start knows nothing."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal

import hessjax as hj
from hessjax.krylov._restarted import Iteration
from hessjax.krylov._state import CERTIFIED, RUNNING, Plan

N, K, NCV = 1000, 6, 60


@pytest.fixture
def dense_bulk(rng, x64):
    """Outliers up to 10 above 980 values in [0, 0.05]: the lowest ones are 1e-6 of the norm apart."""
    return Diagonal(jnp.asarray(np.r_[10 * 0.8 ** np.arange(20), rng.uniform(0, 0.05, N - 20)]))


def test_a_solve_goes_on_from_its_own_result(dense_bulk, key):
    cold = hj.eigsh(dense_bulk, K, key, which="SA", tol=1e-6, ncv=NCV)
    warm = hj.eigsh(dense_bulk, K, jax.random.key(1), which="SA", tol=1e-6, ncv=NCV, v0=cold)
    exact = np.sort(dense_bulk.eigenvalues)[:K]
    for pairs in (cold, warm):
        assert bool(pairs.converged.all())
        np.testing.assert_allclose(pairs.eigenvalues, exact, atol=1e-12)
    assert int(warm.num_matvecs) < int(cold.num_matvecs)


def test_a_probe_stays_orthogonal_to_the_rows_and_gives_no_false_alarm(dense_bulk, key):
    exact = jnp.argsort(dense_bulk.eigenvalues)[:K]
    plan = Plan("SA", K, NCV, 100, random_start=False)
    iteration = Iteration(dense_bulk, plan, jnp.asarray(1e-6), key, jnp.zeros(()))
    basis, state = iteration.init(jax.nn.one_hot(exact, N))
    step = eqx.filter_jit(iteration.step)
    longest = 0
    while int(state.status) == RUNNING:
        active = bool(state.probe.active)
        basis, state = step(basis, state)
        assert not bool(state.probe.alarm)  # nothing is missing
        if active and bool(state.probe.active) and int(state.probe.steps) % 20 == 0:
            rows = np.asarray(basis.stack())
            assert np.linalg.norm(rows[np.asarray(state.expanded)] @ np.asarray(state.vector)) < 1e-12
            frontier = np.asarray(state.frontier)
            overlap = rows[frontier] @ np.asarray(state.vector)
            np.testing.assert_allclose(np.asarray(state.probe.overlap)[frontier], overlap, atol=1e-11)
            longest = max(longest, int(state.probe.steps))
    assert int(state.status) == CERTIFIED
    assert longest >= 200  # it has dug
