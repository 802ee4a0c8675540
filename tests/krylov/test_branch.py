"""What an accelerator runs, both sides of small branches, gives what a CPU's branches give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj
from hessjax.krylov import _branch


@pytest.fixture
def both_sides(monkeypatch):
    """Programs traced from here on are those of an accelerator."""
    monkeypatch.setattr(_branch.jax, "default_backend", lambda: "gpu")
    jax.clear_caches()
    yield
    jax.clear_caches()


def solves(key):
    """Restarts, an alarm of the certificate (two copies of the largest), a closed space, and one pair by its start."""
    spread = jnp.concatenate([jnp.linspace(-1.0, 1.0, 395), jnp.array([2.0, 3.0, 3.0, 5.0, 5.0])])
    op = hj.operator(lambda v: spread * v, like=spread)
    low = hj.operator(lambda v: jnp.where(jnp.arange(400) < 3, v, 0.0), like=spread)
    return [
        hj.eigsh(op, 5, key, which="LA", tol=1e-4),
        hj.eigsh(op, 3, key, which="SA", tol=1e-3, ncv=12, maxiter=200),
        hj.eigsh(low, 5, key, which="LM", tol=1e-4, ncv=20),
        hj.eigsh(op, 1, key, which="SA", tol=1e-2, ncv=300),
    ]


def test_both_sides_of_a_branch_give_the_same_pairs(key, request):
    expected = solves(key)
    request.getfixturevalue("both_sides")
    assert _branch.better_computed(1000)
    assert not _branch.better_computed(1 << 30)
    for here, there in zip(solves(key), expected, strict=True):
        assert bool(here.converged.all())
        assert bool(there.converged.all())
        np.testing.assert_allclose(here.eigenvalues, there.eigenvalues, atol=3e-5)
        assert abs(int(here.num_matvecs) - int(there.num_matvecs)) <= 0.1 * int(there.num_matvecs) + 2


def test_a_tracker_runs_both_sides(key, both_sides):
    def loss(w, d):
        return jnp.sum(d * w**2) / 2

    tracker = hj.track_curvature(loss, 2, key, every=1)
    w, d = jnp.ones(300), jnp.linspace(0.0, 3.0, 300).at[-2:].set(jnp.array([5.0, 7.0]))
    state = tracker.init(w)
    for shift in (0.0, 0.1):
        _, state = tracker.update(w, state, w, batch=(d + shift,))
    np.testing.assert_allclose(state.eigenvalues, np.sort(np.asarray(d))[-2:] + 0.1, rtol=1e-4)
