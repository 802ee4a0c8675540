import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix

import hessjax as hj


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal((6, 6)) for _ in range(2))
    return jnp.asarray(first + first.T, jnp.float32), jnp.asarray(second + second.T, jnp.float32)


def test_arithmetic_is_that_of_the_matrices(pair):
    first, second = pair
    a, b = Matrix(first), Matrix(second)
    combination = (2 * a - b / 4 + a * 0.5).shift(-3.0)
    np.testing.assert_allclose(combination.dense(), 2.5 * first - second / 4 - 3 * jnp.eye(6), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose((-a) @ jnp.ones(6), -first @ jnp.ones(6), rtol=1e-5)
    np.testing.assert_allclose((np.float32(2) * a).dense(), 2 * first, rtol=1e-6)
    np.testing.assert_allclose((jnp.array(2.0) * a).dense(), 2 * first, rtol=1e-6)


def test_arithmetic_keeps_the_dtype(pair, x64):
    a = Matrix(pair[0])
    for op in (2 * a, a / jnp.array(3.0), a.shift(jnp.array(0.1)), np.float64(2) * a):
        assert (op @ jnp.ones(6, jnp.float32)).dtype == jnp.float32


def test_dense_of_a_pytree_is_in_ravel_order():
    like = {"b": jnp.zeros((2, 2)), "a": [jnp.zeros(()), jnp.zeros((0,)), jnp.zeros(3)]}
    scale = jax.tree.map(lambda leaf: jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape) + leaf.size, like)
    op = hj.operator(lambda v: jax.tree.map(jnp.multiply, scale, v), like)
    flat = jax.flatten_util.ravel_pytree(scale)[0]
    np.testing.assert_allclose(op.dense(), jnp.diag(flat))
    assert op.size == 8


def test_closed_over_arrays_are_leaves():
    data = jnp.arange(3.0)
    op = hj.operator(lambda v: data * v, data)
    assert any(leaf.shape == (3,) for leaf in jax.tree.leaves(op))


def test_structure_is_checked():
    op = Diagonal(jnp.ones(3))
    with pytest.raises(ValueError, match=r"\(3,\).*\(4,\)"):
        op(jnp.ones(4))
    with pytest.raises(ValueError, match="structure"):
        op({"a": jnp.ones(3)})
    with pytest.raises(ValueError, match="one structure"):
        op + Diagonal(jnp.ones(4))
    with pytest.raises(ValueError, match=r"matvec\(v\)"):
        hj.operator(lambda v: v[:2], jnp.ones(3))


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(3, complex), jnp.ones(3, bool), "text"])
def test_leaves_that_are_not_floats_are_refused_with_their_path(leaf):
    with pytest.raises(TypeError, match=r"\['x'\]\[1\].*eqx.partition"):
        hj.operator(lambda v: v, {"x": [jnp.zeros(2), leaf]})


def test_lineax_operators_are_accepted(key):
    class Like:
        def mv(self, v):
            return 3 * v

        def in_structure(self):
            return jax.ShapeDtypeStruct((4,), jnp.float32)

    np.testing.assert_allclose(hj.eigsh(Like(), 1, key).eigenvalues, [3.0], rtol=1e-6)


def test_scalars_keep_their_precision(x64):
    identity = Diagonal(jnp.ones(3))
    np.testing.assert_allclose((identity * 0.1) @ jnp.ones(3), 0.1, rtol=1e-15)
    np.testing.assert_allclose((identity / 3) @ jnp.ones(3), 1 / 3, rtol=1e-15)


@pytest.mark.parametrize("scalar", [jnp.ones(3), 1j, "1"])
def test_shift_takes_a_real_scalar(scalar):
    with pytest.raises(TypeError, match="real scalar"):
        Diagonal(jnp.ones(3)).shift(scalar)


def test_scalars_only():
    with pytest.raises(TypeError):
        Diagonal(jnp.ones(3)) * jnp.ones(3)
    with pytest.raises(TypeError):
        Diagonal(jnp.ones(3)) + 1.0


def precisions(function, *args) -> set:
    """The precisions of all matrix products and convolutions in a program."""
    found = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                found.add(equation.params["precision"])
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def products_of_every_kind(precision=None):
    """Operators whose product has a matrix product or a convolution in it, and a vector for each."""
    w, x = jnp.ones((3, 4)), jnp.ones((5, 3))
    image, kernel = jnp.ones((2, 1, 6, 6)), jnp.ones((4, 1, 3, 3))

    def dense(w, x):
        return jnp.mean(jnp.tanh(jnp.matmul(x, w, precision=precision)) ** 2)

    def convolved(kernel, image):
        dimensions = ("NCHW", "OIHW", "NCHW")
        out = jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", None, None, dimensions, precision=precision)
        return jnp.mean(jnp.tanh(out) ** 2)

    def forward(w, x):
        return jnp.matmul(x, w, precision=precision)

    matrix = jnp.eye(4)
    return [
        (hj.hvp(dense)(w, x), w),
        (hj.hvp(jax.jit(dense), batch_size=2)(w, x), w),
        (hj.hvp(convolved)(kernel, image), kernel),
        (hj.ggn(forward, lambda out, y: jnp.sum((out - y) ** 2))(w, x, jnp.zeros((5, 4))), w),
        (hj.operator(lambda v: jnp.matmul(matrix, v, precision=precision), jnp.ones(4)), jnp.ones(4)),
        (hj.operator(lambda v: jnp.matmul(jnp.eye(4), v, precision=precision), jnp.ones(4)), jnp.ones(4)),
    ]


@pytest.mark.parametrize("index", range(6))
def test_products_use_full_precision_unless_another_is_chosen(index):
    highest, default = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT
    op, vector = products_of_every_kind()[index]
    assert precisions(lambda op, v: op @ v, op, vector) == {(highest, highest)}
    key = jax.random.key(0)
    assert (default, default) not in precisions(lambda op: hj.lanczos(op, 3, key).diagonal, op)
    assert None not in precisions(lambda op: hj.lanczos(op, 3, key).diagonal, op)
    chosen, vector = products_of_every_kind(default)[index]
    assert (default, default) in precisions(lambda op, v: op @ v, chosen, vector)
    with jax.default_matmul_precision("high"):
        op, vector = products_of_every_kind()[index]
        high = jax.lax.Precision.HIGH
        assert (high, high) in precisions(lambda op, v: op @ v, op, vector)
    assert jax.config.jax_default_matmul_precision is None
