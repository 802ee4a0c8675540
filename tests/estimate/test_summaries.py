import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal

import hessjax as hj

INDEFINITE = np.r_[-np.linspace(0.5, 1, 40), np.linspace(0.1, 3, 160)]
POSITIVE = np.geomspace(1e-2, 1, 200)


def entropy(values):
    p = np.abs(values) / np.abs(values).sum()
    return -np.sum(p * np.log(p))


TRUTHS = {
    "effective_dimension": (lambda d: hj.effective_dimension(d, 0.05), POSITIVE, np.sum(POSITIVE / (POSITIVE + 0.05))),
    "nuclear_norm": (hj.nuclear_norm, INDEFINITE, np.abs(INDEFINITE).sum()),
    "stable_rank": (hj.stable_rank, INDEFINITE, np.sum(INDEFINITE**2) / 9),
    "num_negative": (hj.num_negative, INDEFINITE, 40),
    "spectral_entropy": (hj.spectral_entropy, POSITIVE, entropy(POSITIVE)),
}


@pytest.mark.parametrize("summary", TRUTHS)
@pytest.mark.parametrize("scale", [1.0, 1e-18])
def test_summaries_lie_within_their_errors(summary, scale):
    function, values, truth = TRUTHS[summary]
    if summary == "effective_dimension":
        function = lambda d: hj.effective_dimension(d, 0.05 * scale)
    if summary == "nuclear_norm":
        truth = truth * scale
    op = Diagonal(jnp.asarray(scale * values, jnp.float32))
    drawn = [function(hj.spectral_density(op, jax.random.key(s), num_steps=40)) for s in range(10)]
    assert np.mean([abs(e.value - truth) <= 2 * e.stderr for e in drawn]) >= 0.8
    assert all(e.stderr < 0.3 * truth for e in drawn)


def test_zero_eigenvalues_are_not_negative():
    density = hj.spectral_density(Diagonal(jnp.zeros(30).at[0].set(2.0)), jax.random.key(0))
    np.testing.assert_allclose(hj.num_negative(density).value, 0, atol=1e-4)
    rank = hj.stable_rank(density)
    assert abs(rank.value - 1) < 4 * rank.stderr


@pytest.mark.parametrize("function", [jnp.exp, jnp.sin, lambda x: 1 / (x + 4)])
def test_a_function_of_a_matrix_times_a_vector(function, rng, x64):
    values, vector = jnp.asarray(np.sort(rng.uniform(-3, 3, 60))), jnp.asarray(rng.standard_normal(60))
    truth = function(values) * vector
    for num_steps in (6, 12, 30):
        result = hj.apply_function(function, Diagonal(values), vector, num_steps)
        error = np.linalg.norm(result.value - truth)
        assert error <= 2 * result.error
        assert result.num_matvecs == num_steps
    assert error < 1e-6 * np.linalg.norm(truth)


def test_an_invariant_space_gives_the_function_exactly():
    values = jnp.array([1.0, 1.0, 4.0, 9.0, 9.0])
    result = hj.apply_function(jnp.sqrt, Diagonal(values), 1e15 * jnp.ones(5), 50)
    np.testing.assert_allclose(result.value, 1e15 * np.array([1, 1, 2, 3, 3]), rtol=1e-5)
    assert result.error < 1e-4 * 1e15
    assert result.num_matvecs == 5
    zero = hj.apply_function(jnp.sqrt, Diagonal(values), jnp.zeros(5), 50)
    np.testing.assert_array_equal(zero.value, 0)


def test_errors_name_the_value():
    with pytest.raises(ValueError, match="num_steps >= 1`, got 0"):
        hj.apply_function(jnp.exp, Diagonal(jnp.ones(3)), jnp.ones(3), 0)
    with pytest.raises(ValueError, match=r"must have shape \(3,\)"):
        hj.apply_function(jnp.exp, Diagonal(jnp.ones(3)), jnp.ones(4), 2)


def test_the_condition_number_lies_within_its_bound(x64):
    values = jnp.asarray(np.r_[0.01, np.linspace(5, 50, 299)])
    run = jax.jit(lambda v: hj.condition_number(Diagonal(v), jax.random.key(0)))
    estimate = run(values)
    assert abs(estimate.value - 5000) <= estimate.stderr < 11
    assert np.isnan(run(values.at[0].set(-1)).value)
    for rounded in (0.0, 1e-17, -1e-17):
        assert np.isposinf(run(values.at[0].set(rounded)).stderr)
    with pytest.raises(ValueError, match="at least two"):
        hj.condition_number(Diagonal(jnp.ones(1)), jax.random.key(0))


def test_an_operator_is_no_density(key):
    op = Diagonal(jnp.linspace(0.5, 2.0, 30))
    for summary in (hj.nuclear_norm, hj.stable_rank, hj.num_negative, hj.spectral_entropy):
        with pytest.raises(TypeError, match=r"reads a `Density`, got Diagonal.*spectral_density"):
            summary(op)
    with pytest.raises(TypeError, match="`effective_dimension` reads a `Density`"):
        hj.effective_dimension(op, 0.1)
