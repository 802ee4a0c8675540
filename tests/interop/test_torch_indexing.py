import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hessjax as hj

torch = pytest.importorskip("torch")
find = pytest.importorskip("hessjax.interop._torch._export").find  # whose import fills the table
X, AT = jnp.arange(1.0, 7.0).reshape(3, 2), jnp.array([[0, 1], [2, 0]])
READS = {
    "embedding": lambda f, i: f(X, i),
    "index.Tensor": lambda f, i: f(X, [i]),
    "index_select": lambda f, i: f(X, 0, i[0]),
    "gather": lambda f, i: f(X, 0, i),
    "take_along_dim": lambda f, i: f(X, i, 0),
}
WRITES = {
    "index_put": lambda f, i: f(X, [i], jnp.zeros(())),
    "scatter.src": lambda f, i: f(X, 0, i, jnp.ones((2, 2))),
    "scatter_add": lambda f, i: f(X, 0, i, jnp.ones((2, 2))),
    "index_add": lambda f, i: f(X, 0, i[0], jnp.ones((2, 2))),
}
FROM_THE_END = ("index.Tensor", "index_put", "take_along_dim")  # where torch counts so


@pytest.mark.parametrize("name", READS)
@pytest.mark.parametrize("wrong", [3, -1, -4])
def test_an_index_outside_reads_nan_there_alone(name, wrong):
    read, rule = READS[name], find(f"aten.{name}", {})
    right, found = read(rule, AT), read(rule, AT.at[0, 0].set(wrong))
    if wrong == -1 and name in FROM_THE_END:
        np.testing.assert_array_equal(found, read(rule, AT.at[0, 0].set(2)))
        return
    assert bool(jnp.isnan(found).any())
    np.testing.assert_array_equal(jnp.where(jnp.isnan(found), right, found), right)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("wrong", [3, -1, -4])
def test_a_write_outside_leaves_no_number(name, wrong):
    write, rule = WRITES[name], find(f"aten.{name}", {})
    found = write(rule, AT.at[0, 0].set(wrong))
    assert bool(jnp.isfinite(write(rule, AT)).all())
    if wrong == -1 and name in FROM_THE_END:
        np.testing.assert_array_equal(found, write(rule, AT.at[0, 0].set(2)))
    else:
        assert bool(jnp.isnan(found).all())


@pytest.mark.slow
def test_tokens_that_no_embedding_has_show_in_outputs_and_products():
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))
    tokens, targets = torch.randint(0, 10, (30, 3)), torch.arange(30) % 3
    tokens[1, 0], tokens[2, 1] = 10, -1
    loss = optax.losses.softmax_cross_entropy_with_integer_labels
    model = hj.from_torch(module, (tokens, targets), loss)
    np.testing.assert_array_equal(np.isnan(model.outputs()).any(1), np.isin(np.arange(30), [1, 2]))
    product = model.hessian()(jax.tree.map(jnp.ones_like, model.params))
    assert bool(jnp.isnan(product["2.weight"]).any())
