import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import pytest

import hessjax as hj
from hessjax.operators._operator import multiply, multiply_each

FEW, MANY = 5, 5000  # examples: the activations of the second no longer fit the cache, for four vectors together


def loss(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.mean((hidden @ params["v"] - 1) ** 2) + jnp.sum(params["scale"] ** 4)


def hessian(examples, **options):
    keys = jax.random.split(jax.random.key(examples), 4)
    shapes = {"w": (7, 64), "b": (64,), "v": (64,), "scale": ()}
    params = {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return hj.hvp(loss, **options)(params, jax.random.normal(keys[3], (examples, 7)))


def block_like(op, count=4):
    return jtu.tree_map(lambda leaf: jax.random.normal(jax.random.key(leaf.size), (count, *leaf.shape)), op.like)


@pytest.mark.parametrize("options", [{}, {"batch_size": 3000}])
@pytest.mark.parametrize("examples", [FEW, MANY])
def test_agrees_with_single_products(examples, options):
    op = hessian(examples, **options)
    block = block_like(op)
    images = multiply_each(op, block)
    for i in range(4):
        one = multiply(op, jtu.tree_map(lambda leaf, i=i: leaf[i], block))
        for name, leaf in one.items():
            np.testing.assert_allclose(images[name][i], leaf, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("examples", "platform", "loops"), [(FEW, "cpu", 0), (MANY, "cpu", 1), (MANY, "cuda", 0), (FEW, "cuda", 0)]
)
def test_products_run_in_turn_where_they_do_not_fit_the_cache_of_a_cpu(examples, platform, loops):
    op = hessian(examples)
    program = jax.jit(multiply_each).trace(op, block_like(op)).lower(lowering_platforms=(platform,)).as_text()
    assert program.count("stablehlo.while") == loops


def test_the_vectors_themselves_do_not_count():
    op = hj.operator(lambda v: {"w": 2 * jnp.tanh(v["w"] * 0 + 1)}, like={"w": jnp.zeros(2_000_000)})
    program = jax.jit(multiply_each).trace(op, block_like(op)).lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.while" not in program


def test_the_loss_is_traced_once():
    traces = []

    def counted(params, x):
        traces.append(None)
        return loss(params, x)

    op = hessian(MANY)
    op = hj.hvp(counted)(op.like, jnp.ones((MANY, 7)))
    block = block_like(op)
    traces.clear()
    jax.jit(multiply_each)(op, block)
    assert len(traces) == 1


def test_derivatives_are_those_of_single_products():
    block, x = block_like(hessian(FEW)), jnp.linspace(-1, 1, MANY * 7).reshape(MANY, 7)

    def sum_of_squares(params, each):
        images = each(hj.hvp(loss)(params, x), block)
        return sum(jnp.sum(leaf**2) for leaf in jtu.tree_leaves(images))

    def singly(op, block):
        return jax.vmap(lambda vector: multiply(op, vector))(block)

    params = jtu.tree_map(lambda leaf: 0.1 * leaf, hessian(FEW).like)
    gradients = [jax.grad(sum_of_squares)(params, each) for each in (multiply_each, singly)]
    for name, leaf in gradients[0].items():
        np.testing.assert_allclose(leaf, gradients[1][name], rtol=1e-3, atol=1e-3)
