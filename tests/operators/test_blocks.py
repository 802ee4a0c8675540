import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from models import columns, dense, mixture, problem

import hessjax as hj


def positions(params, where):
    """The places of the selected leaves' entries in the raveled vector."""
    sizes = [np.size(leaf) for leaf in jax.tree.leaves(params)]
    flags = [where(jax.tree_util.keystr(path)) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return np.flatnonzero(np.repeat(flags, sizes))


def hessian(network, loss):
    forward, params, inputs, targets = problem(network, loss)
    mean = lambda p, x, y: jnp.mean(jax.vmap(lambda x, y: mixture(forward(p, x), y))(x, y))
    return hj.hvp(mean)(params, inputs, targets), params


@pytest.mark.parametrize("where", [lambda path: "w" in path, lambda path: path == "['out'][1]", lambda path: True])
def test_restriction_is_the_diagonal_block(where, x64):
    op, params = hessian("mlp", "softmax")
    block, at = hj.restrict(op, where), positions(params, where)
    truth = dense("mlp", "softmax").hessian[np.ix_(at, at)]
    np.testing.assert_allclose(columns(block), truth, atol=1e-10 * np.abs(truth).max())
    assert block.size == len(at)


def test_a_tree_of_bools_selects_as_a_predicate_does(x64):
    op, params = hessian("mlp", "softmax")
    flags = jax.tree.map(np.bool_, {"in": {"w": True, "b": False}, "out": (False, True), "none": None})
    coarse = {"in": True, "out": (False, True), "none": None}
    for tree, where in [
        (flags, lambda path: path in ("['in']['w']", "['out'][1]")),
        (coarse, lambda path: path != "['out'][0]"),
    ]:
        block = hj.restrict(op, tree)
        assert block.structure == hj.restrict(op, where).structure
        at = positions(params, where)
        v = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), block.structure)
        truth = dense("mlp", "softmax").hessian[np.ix_(at, at)].sum(1)
        np.testing.assert_allclose(ravel_pytree(block(v))[0], truth, rtol=1e-9, atol=1e-12)


def test_unselected_leaves_are_none_and_eigenvectors_follow(x64, key):
    op, _ = hessian("mlp", "softmax")
    pairs = hj.eigsh(hj.restrict(op, lambda path: "out" in path), 2, key)
    assert pairs.eigenvectors["in"] == {"w": None, "b": None}
    assert pairs.eigenvectors["out"][0].shape == (2, 3, 4)


STRUCTURES = {
    "pairs": ([(np.ones((2, 2)), np.ones(2)), (np.ones((2, 2)), np.ones(2))], ["[0]", "[1]"]),
    "flat": ({"a": np.ones(2), "b": np.ones(3)}, ["['a']", "['b']"]),
    "flax": (
        {"params": {"Dense_0": {"kernel": np.ones(2), "bias": np.ones(2)}, "Embed": {"table": np.ones(3)}}},
        ["['params']['Dense_0']", "['params']['Embed']['table']"],
    ),
    "nested": (
        {"block": {"mlp": [{"w": np.ones(1), "b": np.ones(1)}], "norm": {"scale": np.ones(2)}}, "temperature": 1.0},
        ["['block']['mlp'][0]", "['block']['norm']['scale']", "['temperature']"],
    ),
    "mixed": (
        {"cell": {"w": np.ones(1), "u": np.ones(1), "out": {"w": np.ones(2), "b": np.ones(2)}, "no": None}},
        ["['cell']"],
    ),
    "one array": (np.ones(3), [""]),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_layer_is_the_outermost_node_that_holds_several_arrays(name):
    params, expected = STRUCTURES[name]
    blocks = hj.per_block(hj.operator(lambda v: v, params))
    assert list(blocks) == expected
    assert sum(block.size for block in blocks.values()) == sum(np.size(leaf) for leaf in jax.tree.leaves(params))


def test_blocks_are_those_of_the_matrix(x64):
    op, params = hessian("mlp", "softmax")
    matrix = dense("mlp", "softmax").hessian
    for name, block in hj.per_block(op).items():
        at = positions(params, lambda path, name=name: path.startswith(name))
        np.testing.assert_allclose(columns(block), matrix[np.ix_(at, at)], atol=1e-10 * np.abs(matrix).max())


def test_a_function_of_the_path_groups_the_leaves(x64):
    op, _ = hessian("mlp", "softmax")
    blocks = hj.per_block(op, lambda path: {"w": "first", "0": "second"}.get(path.split("][")[1].strip("']")))
    assert {name: block.size for name, block in blocks.items()} == {"first": 12, "second": 12}
    assert blocks["first"].structure["in"]["b"] is None


def layers(rng):
    """A loss over layers of which several have equal shapes, and its parameters."""
    params = {
        "a": {"w": rng.standard_normal((3, 3)), "b": rng.standard_normal(3)},
        "b": {"w": rng.standard_normal((3, 3)), "b": rng.standard_normal(3)},
        "c": {"w": rng.standard_normal((3, 3)), "b": rng.standard_normal(3)},
        "out": {"w": rng.standard_normal((3, 2))},
    }

    def loss(params, x):
        for name in "abc":
            x = jnp.tanh(x @ params[name]["w"] + params[name]["b"])
        return jnp.mean((x @ params["out"]["w"]) ** 2)

    return hj.hvp(loss)(params, rng.standard_normal((4, 3))), params


def test_an_algorithm_runs_on_every_block_and_is_traced_once_per_shape(rng, x64, key):
    op, params = layers(rng)
    traces = []

    def top(block, key):
        traces.append(block.size)
        return hj.eigsh(block, 2, key, which="BE", tol=1e-9)

    found = hj.map_blocks(top, op, key)
    assert sorted(set(traces)) == [6, 12]
    assert len(traces) < 4
    matrix = np.asarray(op.dense())
    for name, block in hj.per_block(op).items():
        at = positions(params, lambda path, name=name: path.startswith(name))
        exact = np.linalg.eigvalsh(matrix[np.ix_(at, at)])
        np.testing.assert_allclose(found[name].eigenvalues, exact[[0, -1]], rtol=1e-8)
        assert jax.tree.map(lambda leaf: leaf.shape[1:], found[name].eigenvectors) == jax.tree.map(
            lambda spec: spec.shape, block.structure
        )
        image = block(jax.tree.map(lambda leaf: leaf[1], found[name].eigenvectors))
        vector = ravel_pytree(jax.tree.map(lambda leaf: leaf[1], found[name].eigenvectors))[0]
        np.testing.assert_allclose(ravel_pytree(image)[0], exact[-1] * vector, atol=1e-7)


def test_blocks_draw_from_different_keys(rng, key):
    op, _ = layers(rng)
    draws = hj.map_blocks(lambda block, key: jax.random.normal(key), op, key)
    assert list(draws) == ["['a']", "['b']", "['c']", "['out']['w']"]
    assert len({float(x) for x in draws.values()}) == 4


def test_runs_inside_jit(rng, key):
    op, _ = layers(rng)
    norm = lambda block, _: jnp.linalg.norm(block.dense())
    found = jax.jit(lambda op, key: hj.map_blocks(norm, op, key))(op, key)
    for name, block in hj.per_block(op).items():
        np.testing.assert_allclose(found[name], jnp.linalg.norm(block.dense()), rtol=1e-5)


def test_before_a_batch_norm_curvature_along_the_weights_is_minus_the_gradient(rng, x64):
    """The loss does not depend on the weights' length: ⟨θ, g⟩ = 0 and Hθ = -g on their block, and 0 on the others."""

    def loss(params, images, labels):
        maps = jax.lax.conv_general_dilated(images, params["conv"], (1, 1), "SAME")
        mean, var = maps.mean((0, 2, 3), keepdims=True), maps.var((0, 2, 3), keepdims=True)
        maps = jnp.tanh(params["scale"][:, None, None] * (maps - mean) / jnp.sqrt(var) + params["shift"][:, None, None])
        logits = jax.nn.log_softmax(maps.mean((2, 3)) @ params["head"])
        return -jnp.mean(jnp.take_along_axis(logits, labels[:, None], 1))

    params = {
        "conv": rng.standard_normal((3, 1, 3, 3)),
        "scale": rng.uniform(0.5, 2, 3),
        "shift": rng.standard_normal(3),
        "head": rng.standard_normal((3, 4)),
    }
    args = rng.standard_normal((8, 1, 5, 5)), rng.integers(0, 4, 8)
    op = hj.hvp(loss)(params, *args)
    gradient = jax.grad(loss)(params, *args)
    size = np.abs(gradient["conv"]).max()
    only = jax.tree.map(jnp.zeros_like, params) | {"conv": params["conv"]}
    image = op(only)
    np.testing.assert_allclose(jnp.vdot(params["conv"], gradient["conv"]), 0, atol=1e-9 * size)
    np.testing.assert_allclose(image["conv"], -gradient["conv"], atol=1e-9 * size)
    assert all(np.abs(image[name]).max() < 1e-9 * size for name in ("scale", "shift", "head"))
    block = hj.restrict(op, lambda path: "conv" in path)
    np.testing.assert_allclose(
        block({**dict.fromkeys(params), "conv": params["conv"]})["conv"], -gradient["conv"], atol=1e-9 * size
    )


def test_bad_selections_are_refused(key):
    op = hj.operator(lambda v: v, {"a": np.ones(2), "b": np.ones(3)})
    with pytest.raises(ValueError, match=r"at least one leaf, got none of `\['a'\]`, `\['b'\]`"):
        hj.restrict(op, lambda path: False)
    with pytest.raises(ValueError, match="`where` must be bools in the structure"):
        hj.restrict(op, {"a": True})
    with pytest.raises(ValueError, match=r"or coarser, got PyTreeDef\(None\)"):
        hj.restrict(op, None)
    for wrong in (lambda path: 1, {"a": 1.0, "b": True}, "a", {"a": jnp.array(True), "b": True}):
        with pytest.raises(TypeError, match="Python bool"):
            hj.restrict(op, wrong)
    with pytest.raises(TypeError, match=r"`group` must return a string or None, got 3 for `\['a'\]`"):
        hj.per_block(op, lambda path: 3)
    with pytest.raises(ValueError, match="at least one block"):
        hj.per_block(op, lambda path: None)
    with pytest.raises(TypeError, match="`key`"):
        hj.map_blocks(lambda block, key: 0.0, op, 3)
    with pytest.raises(TypeError, match="like="):
        hj.restrict(lambda v: v, lambda path: True)
