import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import cross_entropy, digits_model, mlp_params
from cases import mlp as perceptron
from models import CASES, SLICES, assert_equal, dense, mixture, mlp, problem, softmax, squared

import hessjax as hj
from hessjax.operators._output_root import root_of


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_is_the_jacobian_around_the_loss_hessian(network, loss, x64):
    forward, params, inputs, targets = problem(network, loss)
    assert_equal(
        hj.ggn(forward, mixture, batch_size=SLICES[network])(params, inputs, targets), dense(network, loss).ggn
    )


@pytest.mark.parametrize(("network", "loss"), CASES)
def test_residual_is_what_the_hessian_has_beyond_it(network, loss, x64):
    forward, params, inputs, targets = problem(network, loss)
    truth = dense(network, loss)
    residual = hj.ggn_residual(forward, mixture, batch_size=SLICES[network])(params, inputs, targets)
    assert_equal(residual, truth.hessian - truth.ggn)


@pytest.mark.parametrize("batch_size", [None, 4, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 100))])
def test_slices_are_weighted_by_their_count(batch_size, x64):
    forward, params, inputs, targets = problem("mlp", "softmax")
    truth = dense("mlp", "softmax")
    G = hj.ggn(forward, mixture, batch_size=batch_size)(params, inputs, targets)
    R = hj.ggn_residual(forward, mixture, batch_size=batch_size)(params, inputs, targets)
    assert_equal(G + R, truth.hessian)


def test_outputs_are_pytrees_and_may_hold_integers(x64):
    def forward(w, x):
        return {"mean": jnp.sin(w[0] * x), "log_scale": (w[1] * x,), "class": jnp.argmax(x + w[0])}

    def loss(z, y):  # neither convex nor of a known kind, and joint in the two outputs
        return jnp.sum(jnp.cos(z["mean"] - y) * jnp.exp(z["log_scale"][0])) + 0.1 * z["class"]

    w, x, y = jnp.array([0.3, -0.2]), jnp.array([[1.0, 2.0], [0.5, 3.0]]), jnp.array([[0.1, 0.2], [0.3, 0.4]])
    stack = lambda w, x: jnp.concatenate([forward(w, x)["mean"], forward(w, x)["log_scale"][0]])
    joint = lambda z, y: jnp.sum(jnp.cos(z[:2] - y) * jnp.exp(z[2:]))
    J = jax.vmap(jax.jacrev(stack), (None, 0))(w, x)
    H = jax.vmap(jax.hessian(joint))(jax.vmap(stack, (None, 0))(w, x), y)
    truth = np.einsum("eij,eik,ekl->jl", J, H, J) / 2
    assert np.linalg.eigvalsh(truth)[0] < 0
    for batch_size in (None, 1):
        assert_equal(hj.ggn(forward, loss, batch_size=batch_size)(w, x, y), truth)


def test_of_a_model_that_takes_batches(x64):
    model = digits_model(mlp_params(jax.random.key(0), (64, 5, 10)), 7)
    batched = hj.Model(model.params, model.data, perceptron, cross_entropy, batched=True)
    truth = np.asarray(hj.ggn(perceptron, cross_entropy)(model.params, *model.data).dense())
    for each in (model, batched):
        for batch_size in (None, 3):
            assert_equal(each.ggn(batch_size), truth, rtol=1e-13)


def test_equals_the_hessian_of_a_linear_model(x64):
    inputs, targets = np.random.default_rng(0).standard_normal((6, 4)), np.arange(6) % 3
    forward = lambda w, x: w @ x
    mean = lambda w, x, y: jnp.mean(jax.vmap(lambda x, y: cross_entropy(forward(w, x), y))(x, y))
    H = hj.hvp(mean)(np.ones((3, 4)), inputs, targets)
    assert_equal(hj.ggn(forward, cross_entropy)(np.ones((3, 4)), inputs, targets), np.asarray(H.dense()))


def test_samples_average_to_it_and_have_their_rank(x64):
    forward, params, inputs, targets = problem("mlp", "softmax")
    truth = dense("mlp", "softmax").ggn

    @jax.jit
    def sampled(keys):
        return jax.lax.map(
            lambda key: hj.ggn(forward, mixture, mc_samples=1, key=key)(params, inputs, targets).dense(), keys
        )

    draws = np.asarray(sampled(jax.random.split(jax.random.key(0), 400)))
    stderr = draws.std(0) / 20
    seen = stderr > 1e-12
    assert np.abs((draws.mean(0) - truth)[seen] / stderr[seen]).max() < 5
    np.testing.assert_allclose(draws.mean(0)[~seen], truth[~seen], atol=1e-12)
    assert np.linalg.matrix_rank(draws[0], tol=1e-10) == 5  # one vector for each example
    assert np.linalg.eigvalsh(draws[0])[0] > -1e-12
    assert np.abs(draws[0] - draws[1]).max() > 0.1 * np.abs(truth).max()


def test_samples_depend_on_the_key_alone(x64, key):
    forward, params, inputs, targets = problem("mlp", "bernoulli")
    build = lambda batch_size, key: hj.ggn(forward, mixture, batch_size=batch_size, mc_samples=2, key=key)
    whole = np.asarray(build(None, key)(params, inputs, targets).dense())
    assert_equal(build(2, key)(params, inputs, targets), whole, rtol=1e-13)
    assert np.abs(whole - build(None, jax.random.key(1))(params, inputs, targets).dense()).max() > 1e-3


@pytest.mark.parametrize("rank", [0, 1, 3, 6])
def test_root_of_a_semidefinite_matrix_of_any_rank(rank, rng, x64):
    factor = rng.standard_normal((6, rank)) * 10.0 ** -np.arange(rank)
    root = root_of(jnp.asarray(factor @ factor.T))
    np.testing.assert_allclose(root @ root.T, factor @ factor.T, atol=1e-14)
    assert np.count_nonzero(np.abs(root).max(0)) == rank


@pytest.mark.parametrize("classes", [2, 10])
def test_root_does_not_hang_on_rounding(classes, rng, x64):
    """Another program rounds in another way, and must find the same root: samples are drawn through it."""
    z = jnp.asarray(rng.standard_normal((50, classes)))
    p = jax.nn.softmax(z)
    matrices = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    noise = 1 + np.finfo(float).eps * rng.integers(-1, 2, matrices.shape)
    roots = jax.jit(jax.vmap(root_of))(jnp.stack([matrices, matrices * noise]).reshape(-1, classes, classes))
    np.testing.assert_allclose(roots[:50], roots[50:], atol=1e-13)


def test_root_keeps_what_lies_beside_a_small_diagonal_entry(x64):
    matrix = jnp.array([[1e-15, 3e-8], [3e-8, 1.0]])
    root = root_of(matrix)
    np.testing.assert_allclose((root @ root.T)[0, 1], 3e-8, rtol=1e-12)


def test_runs_inside_one_jit_and_under_vmap_over_parameters(x64):
    forward, params, inputs, targets = problem("mlp", "softmax")
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf / 2, -leaf]), params)
    inputs, targets = jax.device_put((inputs, targets))
    traces = []

    def counted(params, x):
        traces.append(1)
        return forward(params, x)

    @jax.jit
    def images(stacked, inputs, targets):
        def image(params):
            op = hj.ggn(counted, mixture, batch_size=5)(params, inputs, targets)
            return jax.lax.fori_loop(0, 3, lambda _, v: op(v), params)

        return jax.vmap(image)(stacked)

    with jax.transfer_guard("disallow"):
        found = images(stacked, inputs, targets)
        images(jax.tree.map(jnp.negative, stacked), inputs, targets)
    assert len(traces) == 1
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    op = hj.ggn(forward, mixture)(second, inputs, targets)
    expected = op(op(op(second)))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-10)


def test_differentiates_with_respect_to_a_closure(x64):
    x, y = jnp.array([[1.0, 2.0], [0.5, 1.0]]), jnp.zeros(2)

    def form(scale):
        op = hj.ggn(lambda w, x: jnp.sin(scale * jnp.dot(w, x)), lambda z, y: (z - y) ** 2)(jnp.ones(2) / 2, x, y)
        return hj.eigsh(op, 1, jax.random.key(0), which="LA").eigenvalues[0]

    step = 1e-5
    difference = (form(0.7 + step) - form(0.7 - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(form)(0.7), difference, rtol=1e-7)


def test_a_vocabulary_costs_a_few_arrays_of_its_size():
    size, examples = 20_000, 8
    forward = lambda w, x: jnp.outer(w, x).sum(0)
    op = hj.ggn(forward, cross_entropy)(jnp.ones(3), jnp.ones((examples, size)), jnp.arange(examples))
    program = jax.jit(lambda op, v: op.product(v)).lower(op, jnp.ones(3)).compile()
    assert program.memory_analysis().temp_size_in_bytes < 6 * 4 * size * examples


def test_a_product_takes_fewer_operations_than_one_with_the_hessian():
    model = digits_model(mlp_params(jax.random.key(0), (64, 256, 256, 10)), 256)
    flops = [
        jax.jit(lambda op, v: op.product(v)).lower(op, model.params).compile().cost_analysis()["flops"]
        for op in (model.ggn(), model.hessian())
    ]
    assert flops[0] < 0.8 * flops[1]


def test_half_precision_stays(key):
    params = {"w": jax.random.normal(key, (3, 4), jnp.bfloat16), "b": jnp.ones(3, jnp.float32)}
    op = hj.ggn(lambda p, x: jnp.tanh(p["w"] @ x + p["b"]), lambda z, y: jnp.sum((z - y) ** 2), batch_size=2)(
        params, jnp.ones((3, 4)), jnp.zeros((3, 3))
    )
    image = op(params)
    assert (image["w"].dtype, image["b"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(op.dense(), op.dense().T, atol=0.05)


def data():
    return {"a": np.ones((5, 3))}, {"label": np.zeros(5, int), "value": np.ones((5, 3)), "bits": np.ones((5, 3))}


def params():
    return {"in": {"w": np.ones((4, 3)), "b": np.ones(4)}, "out": (np.ones((3, 4)), np.ones(3))}


def test_bad_data_is_refused_in_the_callers_words():
    inputs, targets = data()
    for transform in (hj.ggn(mlp, softmax), hj.ggn_residual(mlp, softmax), hj.empirical_fisher(mlp, softmax)):
        with pytest.raises(ValueError, match=r"'label'\]'?\"?: 5.*'value'\]'?\"?: 4|5.*4|4.*5"):
            transform(params(), inputs, {**targets, "value": np.ones((4, 3))})
        with pytest.raises(ValueError, match=r"`inputs\['c'\]` must be an array .* without axes"):
            transform(params(), {**inputs, "c": jnp.ones(())}, targets)
        with pytest.raises(ValueError, match=r"`targets\['c'\]`.*the str 'cat'"):
            transform(params(), inputs, {**targets, "c": "cat"})
        with pytest.raises(ValueError, match=r"`targets\[0\]`.*the int 2"):
            transform(params(), inputs, [2, 3])
        with pytest.raises(TypeError, match=r"\['n'\].*int"):
            transform({**params(), "n": np.array(3)}, inputs, targets)


def test_bad_functions_and_numbers_are_refused():
    inputs, targets = data()
    with pytest.raises(ValueError, match=r"scalar, got shape \(3,\)"):
        hj.ggn(mlp, lambda z, y: z)(params(), inputs, targets)(params())
    with pytest.raises(ValueError, match=r"real floating-point arrays, got complex64\[5, 3\]"):
        hj.ggn(lambda p, x: mlp(p, x) * 1j, softmax)(params(), inputs, targets)(params())
    with pytest.raises(ValueError, match=r"real floating-point arrays, got int32\[5\]"):
        hj.ggn_residual(lambda p, x: jnp.argmax(mlp(p, x)), softmax)(params(), inputs, targets)(params())
    with pytest.raises(TypeError, match="function"):
        hj.ggn("mlp", softmax)(params(), inputs, targets)
    with pytest.raises(ValueError, match=r"`ggn` needs `batch_size >= 1`.* got 0"):
        hj.ggn(mlp, softmax, batch_size=0)
    with pytest.raises(TypeError, match=r"2\.5"):
        hj.ggn(mlp, softmax, batch_size=2.5)


def test_sampling_takes_a_number_and_a_key():
    with pytest.raises(ValueError, match="got `mc_samples` and no `key`"):
        hj.ggn(mlp, softmax, mc_samples=2)
    with pytest.raises(ValueError, match="got `key` and no `mc_samples`"):
        hj.ggn(mlp, softmax, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"`mc_samples >= 1`.* got 0"):
        hj.ggn(mlp, softmax, mc_samples=0, key=jax.random.key(0))
    with pytest.raises(TypeError, match="`key` such as"):
        hj.ggn(mlp, softmax, mc_samples=1, key=3)
    model = hj.Model(params(), data(), mlp, squared)
    with pytest.raises(ValueError, match=r"`Model.ggn` needs `batch_size >= 1`.* got -1"):
        model.ggn(-1)
