import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Diagonal, Matrix, cross_entropy, digits_model, mlp, mlp_params

import hessjax as hj

N = 300


def symmetric(seed, n=N):
    matrix = np.random.default_rng(seed).standard_normal((n, n))
    return jnp.asarray(matrix + matrix.T + np.diag(10.0 * np.arange(n)))


@pytest.mark.parametrize("n", [40, N])
@pytest.mark.parametrize("mode", ["reverse", "forward"])
def test_derivative_of_a_simple_eigenvalue(n, mode, x64, key):
    matrix, direction = symmetric(0, n), symmetric(1, n) / 100

    def top(t):
        return hj.eigsh(Matrix(matrix + t * direction), 2, key, which="LA", tol=1e-10).eigenvalues

    def exact(t):
        return np.linalg.eigvalsh(np.asarray(matrix + t * direction))[-2:]

    step = 1e-5
    difference = (exact(step) - exact(-step)) / (2 * step)
    derivative = (jax.jacrev if mode == "reverse" else jax.jacfwd)(top)(0.0)
    np.testing.assert_allclose(derivative, difference, rtol=1e-6)


def test_derivative_with_respect_to_a_closed_over_array(x64, key):
    values = jnp.asarray(np.random.default_rng(0).permutation(np.arange(1.0, N + 1)))

    def top(values):
        return hj.eigsh(hj.operator(lambda v: values * v, values), 1, key, which="LA", tol=1e-10).eigenvalues[0]

    np.testing.assert_allclose(jax.grad(top)(values), values == N, atol=1e-6)


def test_derivative_of_sharpness_with_respect_to_parameters(x64, key):
    model = digits_model(mlp_params(jax.random.key(1), (64, 6, 10)), count=60)

    def sharpness(params):
        op = hj.Model(params, model.data, mlp, cross_entropy).hessian()
        return hj.eigsh(op, 1, key, which="LA", tol=1e-11).eigenvalues[0]

    gradient = jax.jit(jax.grad(sharpness))(model.params)
    direction = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), model.params)
    along = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
    step = 1e-4
    value = jax.jit(lambda t: sharpness(jax.tree.map(lambda p, d: p + t * d, model.params, direction)))
    np.testing.assert_allclose(along, (value(step) - value(-step)) / (2 * step), rtol=1e-5)


def test_derivative_of_a_repeated_eigenvalue_is_finite_and_sums_right(x64, key):
    def top(t):
        values = jnp.ones(N).at[:3].set(2.0) * (1 + t)
        return jnp.sum(hj.eigsh(Diagonal(values), 3, key, which="LA", tol=1e-10).eigenvalues)

    np.testing.assert_allclose(jax.grad(top)(0.0), 6.0, rtol=1e-9)


def test_derivative_through_a_loss_that_closes_over_traced_data(x64, key):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((30, 5)))
    w = jnp.linspace(-1.0, 1.0, 5)

    def energy(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 4)

    def by_closure(w, x):
        return hj.eigsh(hj.hvp(lambda w: energy(w, x))(w), 2, key, which="LA").eigenvalues[-1]

    def by_argument(w, x):
        return hj.eigsh(hj.hvp(energy)(w, x), 2, key, which="LA").eigenvalues[-1]

    for index in (0, 1):
        ours = jax.jit(jax.grad(by_closure, index))(w, x)
        np.testing.assert_allclose(ours, jax.grad(by_argument, index)(w, x), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(ours, jax.grad(by_closure, index)(w, x), rtol=1e-9, atol=1e-12)


def wanted(values, which):
    """The positions of the three that `eigsh` returns."""
    n = values.size
    nearest = np.argsort(np.abs(values))
    return {
        "LA": np.arange(n - 3, n),
        "SA": np.arange(3),
        "LM": np.sort(nearest[-3:]),
        "BE": np.array([0, n - 2, n - 1]),
        "SM": np.sort(nearest[:3]),
    }[which]


@pytest.mark.parametrize(
    ("which", "n"),
    [
        ("LA", N),
        ("BE", N),
        ("SM", 40),
        *(pytest.param(which, n, marks=pytest.mark.slow) for which in ("LM", "SA") for n in (40, N)),
    ],
)
def test_derivative_of_eigenvectors(which, n, x64, key):
    matrix, direction = symmetric(0, n) - 4.6 * n * jnp.eye(n), symmetric(1, n) / 100
    at, weights = wanted(np.linalg.eigvalsh(np.asarray(matrix)), which), jnp.cos(jnp.arange(float(n)))

    def ours(t):
        pairs = hj.eigsh(Matrix(matrix + t * direction), 3, key, which=which, tol=1e-11)
        return jnp.append(pairs.eigenvectors @ weights, pairs.eigenvalues[0])

    def exact(t):
        values, vectors = jnp.linalg.eigh(matrix + t * direction)
        vectors = vectors[:, at]
        peaks = jnp.take_along_axis(vectors, jnp.argmax(jnp.abs(vectors), axis=0)[None], axis=0)
        return jnp.append((vectors * jnp.sign(peaks)).T @ weights, values[at[0]])

    true = jax.jacfwd(exact)(0.0)
    for derivative in (jax.jacrev(ours)(0.0), jax.jit(jax.jacfwd(ours))(0.0)):
        np.testing.assert_allclose(derivative, true, rtol=1e-6, atol=1e-7 * np.max(np.abs(true)))


@pytest.mark.parametrize("n", [40, pytest.param(N, marks=pytest.mark.slow)])
def test_second_derivatives_of_eigenvalues(n, x64, key):
    matrix, direction = symmetric(0, n), symmetric(1, n) / 100

    def ours(t):
        curved = matrix + t * direction + t**2 * jnp.diag(jnp.arange(float(n)))
        return hj.eigsh(Matrix(curved), 2, key, which="LA", tol=1e-11).eigenvalues

    def exact(t):
        return jnp.linalg.eigh(matrix + t * direction + t**2 * jnp.diag(jnp.arange(float(n))))[0][-2:]

    true = jax.jacfwd(jax.jacfwd(exact))(0.0)
    np.testing.assert_allclose(jax.jacfwd(jax.jacrev(ours))(0.0), true, rtol=1e-7)
    np.testing.assert_allclose(jax.jacrev(jax.jacrev(ours))(0.0), true, rtol=1e-7)


def test_derivative_of_a_repeated_eigenspace(x64, key):
    # Three copies of 5: the projector onto all of them has a derivative, that onto two has none.
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.standard_normal((N, N)))[0]
    values = np.append(np.linspace(-1.0, 1.0, N - 3), [5.0, 5.0, 5.0])
    matrix, direction, probe = basis * values @ basis.T, rng.standard_normal((N, N)), rng.standard_normal(N)
    direction += direction.T

    def within(t, k):
        op = Matrix(jnp.asarray(matrix) + t * direction)
        return jnp.sum(jnp.square(hj.eigsh(op, k, key, which="LA", tol=1e-10).eigenvectors @ probe))

    inside, outside = basis[:, -3:], basis[:, :-3]
    weights = (inside.T @ direction @ outside) / (5.0 - values[:-3])
    true = 2 * (inside.T @ probe) @ weights @ (outside.T @ probe)
    np.testing.assert_allclose(jax.grad(within)(0.0, 3), true, rtol=1e-6)
    assert np.isnan(jax.grad(within)(0.0, 2))


def test_second_derivatives_of_a_repeated_eigenvalue_are_nan(x64, key):
    n = 30
    values = jnp.append(jnp.linspace(-1.0, 1.0, n - 3), jnp.array([5.0, 5.0, 7.0]))
    direction = symmetric(1, n) / 100

    def top(t, k):
        return hj.eigsh(Matrix(jnp.diag(values) + t * direction), k, key, which="LA").eigenvalues[-1]

    true = 2 * jnp.sum(jnp.square(direction[-1, :-1]) / (values[-1] - values[:-1]))
    for second in (jax.grad(jax.grad(top)), jax.jacfwd(jax.jacrev(top)), jax.jacfwd(jax.jacfwd(top))):
        np.testing.assert_allclose(second(0.0, 1), true, rtol=1e-6)
        assert np.isnan(second(0.0, 3))


def test_derivative_where_a_leaf_does_not_depend_on_it(x64, key):
    params = {"moved": jnp.linspace(0.5, 1.5, 12), "other": jnp.linspace(1.0, 2.0, 5), "empty": jnp.zeros(0)}

    def loss(params, t):
        moved = jnp.sum(params["moved"] ** 4) + t * jnp.sum(params["moved"]) ** 2
        return moved + jnp.sum(params["other"] ** 3)

    def within(t):
        top = hj.eigsh(hj.hvp(loss)(params, t), 2, key, which="LA").eigenvectors
        return top["moved"][-1, 0]

    def exact(t):
        vector = jnp.linalg.eigh(jnp.diag(12 * params["moved"] ** 2) + 2 * t)[1][:, -1]
        return vector[0] * jnp.sign(vector[-1])

    np.testing.assert_allclose(jax.grad(within)(1.0), jax.grad(exact)(1.0), rtol=1e-6)


@pytest.mark.slow
def test_derivative_of_eigenvectors_of_a_network(x64, key):
    model = digits_model(mlp_params(jax.random.key(1), (64, 6, 10)), count=60)
    weights = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), model.params)

    def alignment(params):
        op = hj.Model(params, model.data, mlp, cross_entropy).hessian()
        vectors = hj.eigsh(op, 2, key, which="LA", tol=1e-11).eigenvectors
        return sum(
            jnp.tensordot(v[1], w, w.ndim) for v, w in zip(*map(jax.tree.leaves, (vectors, weights)), strict=True)
        )

    gradient = jax.jit(jax.grad(alignment))(model.params)
    along = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, weights)), strict=True))
    value = jax.jit(lambda t: alignment(jax.tree.map(lambda p, d: p + t * d, model.params, weights)))
    np.testing.assert_allclose(along, (value(1e-5) - value(-1e-5)) / 2e-5, rtol=1e-5)


def test_repeated_eigenvalues_are_flagged(x64, key):
    for n in (20, N):
        values = jnp.zeros(n).at[:4].set(jnp.array([3.0, 2.0, 2.0, 1.0]))
        pairs = hj.eigsh(Diagonal(values), 3, key, which="LA", tol=1e-10)
        np.testing.assert_allclose(pairs.eigenvalues, [2, 2, 3], atol=1e-10)
        assert pairs.simple.tolist() == [False, False, True]


def test_operators_and_models_are_arguments_of_jit(key):
    model = digits_model(mlp_params(jax.random.key(1), (64, 3, 10)), count=20)
    op = model.hessian()
    v = jax.tree.map(jnp.ones_like, model.params)
    for a, b in zip(jax.tree.leaves(jax.jit(lambda op, v: op(v))(op, v)), jax.tree.leaves(op(v)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda m: m.loss_value())(model), model.loss_value(), rtol=1e-6)


@pytest.mark.parametrize("n", [50, N])
def test_vmap_equals_a_python_loop(n, x64, key):
    values = jnp.asarray(np.random.default_rng(2).standard_normal((3, n)))
    solve = lambda v: hj.eigsh(Diagonal(v), 3, key, which="LA", tol=1e-8, ncv=None if n == 50 else 40)
    batched = jax.jit(jax.vmap(solve))(values)
    for index in range(3):
        single = solve(values[index])
        np.testing.assert_allclose(batched.eigenvalues[index], single.eigenvalues, rtol=1e-8)
        assert bool(batched.converged[index].all())


def test_inside_scan_and_a_jitted_training_step(key):
    model = digits_model(mlp_params(jax.random.key(1)), count=100)

    @jax.jit
    def train(params, data):
        def step(params, _):
            here = hj.Model(params, data, mlp, cross_entropy)
            top = hj.eigsh(here.hessian(), 1, key, which="LA", tol=1e-3, return_eigenvectors=False)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, here.gradient()), (top.eigenvalues[0], top.converged)

        return jax.lax.scan(step, params, length=3)

    _, (sharpness, converged) = train(model.params, model.data)
    assert bool(converged.all())
    first = hj.eigsh(model.hessian(), 1, key, which="LA", tol=1e-6).eigenvalues[0]
    np.testing.assert_allclose(sharpness[0], first, rtol=1e-3)


def counted_loss():
    traces = []

    def loss(params, x, y):
        traces.append(1)
        return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)

    return loss, traces


def regression(seed, n=64):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {"w": jax.random.normal(keys[0], (20, 15)), "v": jax.random.normal(keys[1], (15,))}
    return params, jax.random.normal(keys[2], (n, 20)), jax.random.normal(keys[3], (n,))


@pytest.mark.parametrize("batch_size", [None, 24])
def test_one_trace_per_compile_and_none_for_new_values(batch_size, key):
    loss, traces = counted_loss()
    for seed in range(3):
        op = hj.hvp(loss, batch_size=batch_size)(*regression(seed))
        hj.eigsh(op, 2, key, which="LA", tol=1e-3 / (1 + seed))
        assert len(traces) <= 2
    solve = jax.jit(lambda *args: hj.eigsh(hj.hvp(loss, batch_size=batch_size)(*args), 2, key, which="LA", tol=1e-3))
    before = len(traces)
    for seed in range(3):
        solve(*regression(seed))
        assert len(traces) - before <= 2


def test_compiled_program_is_self_contained(key):
    loss, _ = counted_loss()
    arguments = regression(0, n=3000)
    solve = jax.jit(lambda *args: hj.eigsh(hj.hvp(loss)(*args), 2, key, which="LA", tol=1e-3))
    lowered = solve.lower(*arguments)
    text = lowered.as_text()
    for word in ("callback", "infeed", "outfeed"):
        assert word not in text.replace("lapack", "")
    assert text.count("stablehlo.tanh") == 1  # one copy of the product
    # 60,000 numbers of data as a constant would be a quarter of a megabyte of text.
    assert len(text) < 900_000
    compiled = lowered.compile()
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(compiled(*arguments))


def test_eager_solve_moves_nothing_between_host_and_device(key):
    loss, _ = counted_loss()
    op = hj.hvp(loss)(*regression(0))
    hj.eigsh(op, 2, key, which="LA", tol=1e-3)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(hj.eigsh(op, 2, key, which="LA", tol=1e-3))


def test_same_key_same_bits(key):
    op = Diagonal(jnp.linspace(-1.0, 1.0, N))
    first, second = (hj.eigsh(op, 3, key, which="LA", tol=1e-4) for _ in range(2))
    assert all(bool(jnp.array_equal(a, b)) for a, b in zip(*map(jax.tree.leaves, (first, second)), strict=True))
