import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import qr, subspace_angles

from hessjax.training._subspace import overlap, principal_angles


def stack(rows):
    """Rows of length 12 as a pytree with odd leaves."""
    return {"a": jnp.asarray(rows[:, :6]).reshape(-1, 2, 3), "b": (jnp.asarray(rows[:, 6]), jnp.asarray(rows[:, 7:]))}


@pytest.mark.parametrize("turn", [0.0, 1e-9, 1e-4, 0.3, 1.0])
def test_angles_are_scipy_s_at_every_size(turn, x64, rng):
    x = qr(rng.standard_normal((12, 3)), mode="economic")[0]
    y = qr(x @ qr(rng.standard_normal((3, 3)))[0] + turn * rng.standard_normal((12, 3)), mode="economic")[0]
    angles = principal_angles(stack(x.T), stack(y.T))
    np.testing.assert_allclose(angles, subspace_angles(x, y)[::-1], rtol=1e-6, atol=1e-14)


def test_angles_of_orthogonal_spaces_are_right(x64):
    identity = np.eye(12)
    np.testing.assert_allclose(principal_angles(stack(identity[:2]), stack(identity[1:3])), [0, np.pi / 2])


def test_overlap_is_the_share_of_the_square(x64, rng):
    q = qr(rng.standard_normal((12, 3)), mode="economic")[0]
    u = rng.standard_normal(12)
    given = stack(u[None])
    vector = {"a": given["a"][0], "b": tuple(leaf[0] for leaf in given["b"])}
    np.testing.assert_allclose(overlap(vector, stack(q.T)), np.sum((q.T @ u) ** 2) / np.sum(u**2))
    assert np.isnan(overlap(stack(np.zeros((1, 12)))["b"][1][0], stack(q.T)["b"][1]))


@pytest.mark.parametrize(("p", "q"), [(1, 3), (3, 1), (2, 2), (0, 2)])
def test_angles_of_stacks_that_are_partly_empty(p, q, x64, rng):
    x, y = np.zeros((2, 3, 12))
    x[3 - p :], y[3 - q :] = (np.linalg.qr(rng.standard_normal((12, 3)))[0].T[:rows] for rows in (p, q))
    least = min(p, q)
    want = np.full(3, np.nan)
    if least:
        want[3 - q : 3 - q + least] = subspace_angles(x[3 - p :].T, y[3 - q :].T)[::-1]
    np.testing.assert_allclose(principal_angles(stack(x), stack(y)), want, rtol=1e-9)
