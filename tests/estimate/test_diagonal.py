import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Rotated

import hessjax as hj

N = 60


def rotated(rng, values, dtype=jnp.float64):
    reflectors = rng.standard_normal((2, N))
    reflectors /= np.linalg.norm(reflectors, axis=1, keepdims=True)
    return Rotated(jnp.asarray(values, dtype), jnp.asarray(reflectors, dtype))


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_every_entry_and_the_sum_lie_within_their_errors(method, rng, x64):
    op = rotated(rng, 0.8 ** np.arange(N))
    truth = np.diag(op.exact())
    drawn = [hj.diagonal(op, 24, jax.random.key(seed), method=method) for seed in range(30)]
    values, errors = np.array([d.value for d in drawn]), np.array([d.stderr for d in drawn])
    assert np.mean(np.abs(values - truth) <= 2 * errors) >= 0.85
    assert np.max(np.abs(values.mean(0) - truth) / (values.std(0) / 30**0.5)) < 4.5
    sums, sum_errors = (np.array([getattr(d.sums, name) for d in drawn]) for name in ("value", "stderr"))
    np.testing.assert_allclose(sums, values.sum(1), rtol=1e-10)
    assert np.mean(np.abs(sums - truth.sum()) <= 2 * sum_errors) >= 0.8


def test_xdiag_is_nearer_where_the_spectrum_decays(rng, x64):
    op = rotated(rng, 0.6 ** np.arange(N))
    truth = np.diag(op.exact())
    near, far = (
        np.mean([np.linalg.norm(hj.diagonal(op, 24, jax.random.key(s), method=m).value - truth) for s in range(5)])
        for m in ("xdiag", "hutchinson")
    )
    assert near < far / 5


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_low_rank_is_exact(dtype, scale, rng, x64):
    op = rotated(rng, np.r_[[4.0, -2.0, 1.0], np.zeros(N - 3)] * scale, dtype)
    estimate = hj.diagonal(op, 12, jax.random.key(0))
    assert estimate.value.dtype == dtype
    np.testing.assert_allclose(estimate.value, np.diag(op.exact()), atol=100 * float(jnp.finfo(dtype).eps) * scale)


def test_hutchinson_is_exact_for_a_diagonal_and_its_ragged_last_batch_counts(rng):
    values = jnp.asarray(rng.standard_normal(N), jnp.float32)
    estimate = hj.diagonal(Diagonal(values), 33, jax.random.key(0), method="hutchinson")
    np.testing.assert_allclose(estimate.value, values, rtol=1e-6)
    assert np.all(estimate.stderr < 1e-5)
    assert estimate.num_matvecs == 33


def test_hutchinson_averages_the_samples_it_says(rng, x64):
    """The batched running moments against the plain ones of the same vectors."""
    op = rotated(rng, rng.standard_normal(N))
    estimate = hj.diagonal(op, 40, jax.random.key(5), method="hutchinson")
    signs = np.array(
        [jax.random.rademacher(jax.random.split(k, 1)[0], (N,)) for k in jax.random.split(jax.random.key(5), 40)]
    )
    samples = signs * (signs @ op.exact())
    np.testing.assert_allclose(estimate.value, samples.mean(0), rtol=1e-10)
    np.testing.assert_allclose(estimate.stderr, samples.std(0, ddof=1) / 40**0.5, rtol=1e-10)


@pytest.mark.parametrize("method", ["xdiag", "hutchinson"])
def test_the_value_has_the_operators_structure(method):
    like = {"w": jnp.zeros((3, 5)), "b": [jnp.zeros(()), jnp.zeros((0, 2))], "none": None}
    scale = {"w": 2.0, "b": [5.0, 1.0], "none": None}
    op = hj.operator(lambda v: jax.tree.map(lambda x, s: s * x, v, scale), like)
    for num_matvecs in (8, 16):  # below n, and n
        estimate = hj.diagonal(op, num_matvecs, jax.random.key(0), method=method)
        assert jax.tree.structure(estimate.value) == jax.tree.structure(like)
        assert jax.tree.structure(estimate.stderr) == jax.tree.structure(like)
        assert [x.shape for x in jax.tree.leaves(estimate.value)] == [x.shape for x in jax.tree.leaves(like)]
        assert int(estimate.num_matvecs) == num_matvecs
    np.testing.assert_allclose(estimate.value["w"], 2)
    assert (estimate.sums.value["w"], estimate.sums.value["b"][0], estimate.sums.value["b"][1]) == (30, 5, 0)
    assert estimate.stderr["b"][0] == 0


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r'>= 2` for method="xdiag", got 1'):
        hj.diagonal(Diagonal(jnp.ones(5)), 1, jax.random.key(0))
    with pytest.raises(ValueError, match="'hutchinson', got 'bekas'"):
        hj.diagonal(Diagonal(jnp.ones(5)), 2, jax.random.key(0), method="bekas")
