import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, NETWORKS, assert_equal, columns, dense, mixture, problem

import hessjax as hj


@pytest.mark.parametrize("network", NETWORKS)
def test_is_the_gram_matrix_of_the_jacobian(network, x64):
    forward, params, inputs, _ = problem(network, "softmax")
    J = dense(network, "softmax").jacobian.reshape(15, -1)
    assert_equal(hj.ntk(forward)(params, inputs), J @ J.T)


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_small_side_has_the_nonzero_eigenvalues_of_the_large_one(network, loss, x64):
    forward, params, inputs, targets = problem(network, loss)
    small = columns(hj.ggn_gram(forward, mixture)(params, inputs, targets))
    np.testing.assert_allclose(small, small.T, atol=1e-13)
    large = np.linalg.eigvalsh(dense(network, loss).ggn)[::-1]
    np.testing.assert_allclose(np.linalg.eigvalsh(small)[::-1], large[:15], atol=1e-10 * large[0])


def test_solver_finds_the_same_eigenvalues_on_both_sides(x64, key):
    forward, params, inputs, targets = problem("mlp", "softmax")
    args = params, inputs, targets
    sides = [hj.eigsh(f(forward, mixture)(*args), 4, key, which="LA") for f in (hj.ggn, hj.ggn_gram)]
    np.testing.assert_allclose(sides[0].eigenvalues, sides[1].eigenvalues, rtol=1e-10)


def test_outputs_are_pytrees_with_leading_examples(x64):
    forward = lambda w, x: {"a": w["u"] * x, "b": (jnp.sum(w["v"]) * x[:1],)}
    w = {"u": jnp.array([1.0, 2.0]), "v": jnp.ones(3)}
    x = jnp.array([[1.0, 2.0], [0.0, 3.0], [4.0, 1.0]])
    K = hj.ntk(forward)(w, x)
    assert jax.tree.map(lambda leaf: leaf.shape, K.structure) == {"a": (3, 2), "b": ((3, 1),)}
    image = K({"a": jnp.ones((3, 2)), "b": (jnp.ones((3, 1)),)})
    np.testing.assert_allclose(image["a"], x * x.sum(0))
    np.testing.assert_allclose(image["b"][0], 3 * x[:, :1] * x[:, 0].sum())


def test_runs_inside_one_jit_and_under_vmap_over_parameters(x64):
    forward, params, inputs, targets = problem("mlp", "softmax")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), params)

    @jax.jit
    def norms(stacked, inputs, targets):
        def norm(params):
            small = hj.ggn_gram(forward, mixture)(params, inputs, targets)
            return jnp.linalg.norm(small.dense()), jnp.linalg.norm(hj.ntk(forward)(params, inputs).dense())

        return jax.vmap(norm)(stacked)

    inputs, targets = jax.device_put((inputs, targets))
    with jax.transfer_guard("disallow"):
        weighted, plain = norms(stacked, inputs, targets)
    truth = dense("mlp", "softmax")
    np.testing.assert_allclose(weighted[0], np.linalg.norm(truth.ggn), rtol=1e-10)
    J = truth.jacobian.reshape(15, -1)
    np.testing.assert_allclose(plain[0], np.linalg.norm(J @ J.T), rtol=1e-10)


@pytest.mark.parametrize(
    ("output", "what"),
    [
        (lambda z: jnp.argmax(z), "int"),
        (lambda z: {"a": z, "b": z > 0}, r"bool\[2, 3\] at `\['b'\]`"),
        (lambda z: None, "none"),
    ],
)
def test_outputs_that_are_not_real_numbers_are_refused(output, what):
    with pytest.raises(ValueError, match=f"real floating-point arrays.*{what}"):
        hj.ntk(lambda w, x: output(w * x))(np.ones(3), np.ones((2, 3)))
