"""What holds for every operator of the family: one program, any parameters, derivatives."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from models import mixture, problem

import hessjax as hj

KEY = jax.random.key(3)


def mean_loss(forward, params, inputs, targets):
    return jnp.mean(jax.vmap(lambda x, y: mixture(forward(params, x), y))(inputs, targets))


def hessian(forward, *args, batch_size=None):
    return hj.hvp(lambda p, x, y: mean_loss(forward, p, x, y), batch_size=batch_size)(*args)


def scaled(forward, params, *data):
    return hj.precondition(hessian(forward, params, *data), jax.tree.map(lambda leaf: leaf**2 + 0.5, params))


def adam(forward, params, *data):
    optimizer = optax.adam(0.1)
    gradient = jax.tree.map(lambda leaf: jnp.cos(leaf) + 2, params)
    _, state = optimizer.update(gradient, optimizer.init(params), params)
    return hj.precondition(hj.ggn(forward, mixture)(params, *data), hj.adam_preconditioner(state))


def mirrored(forward, *args):
    G, H = hj.ggn(forward, mixture)(*args), hessian(forward, *args)
    return hj.compose(G, H, G)


def combined(forward, *args):
    return (hj.ggn(forward, mixture)(*args) - 2 * hj.ggn_residual(forward, mixture, batch_size=2)(*args)).shift(0.1)


def without(forward, params, *data):
    G = hj.ggn(forward, mixture)(params, *data)
    values, vectors = jnp.linalg.eigh(G.dense())
    unravel = ravel_pytree(params)[1]
    return hj.deflate(G, SimpleNamespace(eigenvalues=values[-2:], eigenvectors=jax.vmap(unravel)(vectors[:, -2:].T)))


FAMILY = {
    "hessian": hessian,
    "hessian, sliced": lambda f, *args: hessian(f, *args, batch_size=2),
    "ggn": lambda f, *args: hj.ggn(f, mixture)(*args),
    "ggn, sliced": lambda f, *args: hj.ggn(f, mixture, batch_size=2)(*args),
    "ggn, sampled": lambda f, *args: hj.ggn(f, mixture, mc_samples=4, key=KEY)(*args),
    "residual": lambda f, *args: hj.ggn_residual(f, mixture)(*args),
    "fisher": lambda f, p, x, _: hj.fisher(f, "categorical", batch_size=2)(p, x),
    "fisher, sampled": lambda f, p, x, _: hj.fisher(f, "gaussian", mc_samples=3, key=KEY)(p, x),
    "empirical fisher": lambda f, *args: hj.empirical_fisher(f, mixture, batch_size=2)(*args),
    "covariance": lambda f, *args: hj.gradient_covariance(f, mixture)(*args),
    "covariance, sliced": lambda f, *args: hj.gradient_covariance(f, mixture, batch_size=2)(*args),
    "ntk": lambda f, p, x, _: hj.ntk(f)(p, x),
    "small side": lambda f, *args: hj.ggn_gram(f, mixture)(*args),
    "preconditioned": scaled,
    "adam": adam,
    "restricted": lambda f, *args: hj.restrict(hessian(f, *args), lambda path: "w" in path),
    "block": lambda f, *args: hj.per_block(hj.ggn(f, mixture)(*args))["['in']"],
    "composed": mirrored,
    "combined": combined,
    "deflated": without,
}


@pytest.fixture
def arguments(x64):
    """The network, and the rest on the device."""
    forward, *args = problem("mlp", "softmax")
    return forward, jax.device_put(jax.tree.map(jnp.asarray, args))


def test_all_run_in_one_program_for_any_parameters_and_never_leave_the_device(arguments):
    forward, (params, inputs, targets) = arguments

    def images(params, inputs, targets):
        def image(op):
            ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), op.structure)
            return jax.lax.fori_loop(0, 2, lambda _, v: op(v), ones)

        return {name: image(build(forward, params, inputs, targets)) for name, build in FAMILY.items()}

    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2]), params)
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    together, alone = jax.jit(jax.vmap(images, (0, None, None))), jax.jit(images)
    with jax.transfer_guard("disallow"):
        found, truth = together(stacked, inputs, targets), alone(second, inputs, targets)
    for name in FAMILY:
        ours, exact = ravel_pytree(jax.tree.map(lambda leaf: leaf[1], found[name]))[0], ravel_pytree(truth[name])[0]
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-12 * np.abs(exact).max(), err_msg=name)


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), jnp.cos(x)), lambda cosine, g: (g * cosine,))


@pytest.mark.parametrize("name", ["ggn, sliced", "residual", "covariance", "ntk"])
def test_a_model_may_have_derivatives_of_its_own_making(name, x64):
    """A function with a `jax.custom_vjp` has no derivative in forward mode."""
    inputs = jnp.array([[1.0, 2.0, 0.5], [0.5, 1.0, 1.0], [-1.0, 0.2, 0.7]])
    targets = {"label": jnp.arange(3), "value": inputs, "bits": 1.0 * (inputs > 0), "weights": jnp.full((3, 3), 0.4)}
    own, plain = (
        FAMILY[name](lambda w, x, f=f: f(w @ x), jnp.linspace(-1, 1, 9).reshape(3, 3), inputs, targets).dense()
        for f in (sine, jnp.sin)
    )
    np.testing.assert_allclose(own, plain, atol=1e-13)
    assert np.abs(own).max() > 0.01


@pytest.mark.slow  # one solver to compile for each
@pytest.mark.parametrize("name", FAMILY)
def test_eigenvalues_have_derivatives(name, arguments):
    forward, (params, inputs, targets) = arguments
    build = lambda params: FAMILY[name](forward, params, inputs, targets)
    top = lambda params: hj.eigsh(build(params), 1, KEY, which="LA", tol=1e-9).eigenvalues[0]
    exact = jax.jit(lambda params: jnp.linalg.eigvalsh(build(params).dense())[-1])
    along = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
    move = lambda step: jax.tree.map(lambda leaf, v: leaf + step * v, params, along)
    value, slope = jax.jit(lambda params: jax.jvp(top, (params,), (along,)))(params)
    np.testing.assert_allclose(value, exact(params), rtol=1e-10)
    np.testing.assert_allclose(slope, (exact(move(1e-5)) - exact(move(-1e-5))) / 2e-5, rtol=1e-6)
