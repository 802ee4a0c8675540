import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib import colors, pyplot

import hessjax as hj

VALUES = np.concatenate([[-2.0, 5.0, 7.0], np.linspace(0.0, 1.0, 97)])


@pytest.fixture(autouse=True)
def _no_window():
    before = pyplot.get_backend()
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")
    pyplot.switch_backend(before)


@pytest.fixture
def diagonal():
    return hj.operator(lambda v: jnp.asarray(VALUES, v.dtype) * v, like=jnp.zeros(VALUES.size))


def drawn(line):
    return np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_density_is_the_smoothed_density(diagonal, key):
    density = hj.spectral_density(diagonal, key, num_steps=20)
    ax = hj.plot.density(density, sigma=0.05, eigenvalues=[-2.0, 5.0, 7.0], label="A")
    (x, y), (known, _) = map(drawn, ax.lines)
    seen = np.isfinite(y)
    np.testing.assert_allclose(y[seen], density.pdf(x[seen], 0.05).value, rtol=1e-4)
    peak = 1 / (100 * 0.05 * (2 * np.pi) ** 0.5)
    assert np.all(y[seen] >= 0.2 * peak * 0.999)
    for value in (-2.0, 5.0, 7.0):  # of a hundred eigenvalues each is seen
        assert np.nanmax(y[np.abs(x - value) < 0.02]) > 0.5 * peak
    np.testing.assert_array_equal(known, [-2.0, 5.0, 7.0])
    assert ax.get_yscale() == "log"
    assert labels(ax) == ["A"]


def test_density_marks_what_converged(diagonal, key):
    pairs = hj.eigsh(diagonal, 3, key)
    pairs = type(pairs)(**{**vars(pairs), "converged": jnp.array([True, False, True])})
    ax = hj.plot.density(hj.spectral_density(diagonal, key, num_steps=20), eigenvalues=pairs)
    np.testing.assert_allclose(drawn(ax.lines[1])[0], [-2.0, 7.0], rtol=1e-5)


@pytest.mark.parametrize("options", [{"num_probes": 1}, {"num_probes": 3, "outliers": "found"}, {"method": "kpm"}])
def test_every_density_can_be_drawn(diagonal, key, options):
    hj.plot.density(hj.spectral_density(diagonal, key, num_steps=15, **options)).figure.canvas.draw()


def test_a_spectrum_of_one_point_can_be_drawn(key):
    op = hj.operator(lambda v: 0 * v, like=jnp.zeros(10))
    hj.plot.density(hj.spectral_density(op, key, num_steps=3)).figure.canvas.draw()


def test_eigenvalues_by_rank_with_their_bounds(diagonal, key):
    pairs = hj.eigsh(diagonal, 3, key)
    pairs = type(pairs)(**{**vars(pairs), "converged": jnp.array([False, True, True])})
    ax = hj.plot.eigenvalues(pairs, label="A")
    good, doubtful = (line for line in ax.lines if line.get_marker() == "o")
    np.testing.assert_allclose(drawn(good), [[1, 2], [7, 5]], rtol=1e-5)
    np.testing.assert_allclose(drawn(doubtful), [[3], [-2]], rtol=1e-5)
    assert doubtful.get_markerfacecolor() == "none"
    bars = ax.containers[0].lines[2][0].get_segments()
    heights = [bar[1, 1] - bar[0, 1] for bar in bars]
    np.testing.assert_allclose(heights, 2 * np.asarray(pairs.error_bounds)[::-1], rtol=0.2, atol=1e-6)
    assert labels(ax) == ["A"]


def test_an_array_of_eigenvalues_will_do():
    np.testing.assert_array_equal(drawn(hj.plot.eigenvalues(np.array([1.0, 3.0, 2.0])).lines[1])[1], [3, 2, 1])


def loss(w, x):
    return jnp.mean((x @ w) ** 2) / 2


def test_tracking_reads_the_history_out_of_an_optimizer(key):
    x = jnp.diag(jnp.array([1.0, 2.0, 3.0]))
    optimizer = optax.chain(hj.track_curvature(loss, 2, key, every=2, history=4), optax.sgd(0.1))
    w = jnp.ones(3)
    state = optimizer.init(w)
    for _ in range(11):  # measured at 0, 2, ..., 10: the ring holds the last four
        _, state = optimizer.update(jax.grad(loss)(w, x), state, w, batch=(x,))
    ax = hj.plot.tracking(state, threshold=2.5, label="H")
    largest, second, edge = map(drawn, ax.lines)
    np.testing.assert_array_equal(largest[0], [4, 6, 8, 10])
    np.testing.assert_allclose(largest[1], 3.0, rtol=1e-3)
    np.testing.assert_allclose(second[1], 4 / 3, rtol=1e-3)
    np.testing.assert_array_equal(edge[1], 2.5)
    assert labels(ax) == ["H", "edge of stability"]


def test_tracking_leaves_a_gap_where_nothing_was_measured():
    nan = np.nan
    values = np.array([[nan, 1.0], [nan, 2.0], [0.5, nan], [nan, 3.0], [nan, 4.0]])
    largest, second, alone = hj.plot.tracking(values, steps=[10, 20, 30, 40, 50]).lines
    np.testing.assert_array_equal(drawn(largest), [[10, 20, 30, 40, 50], [1, 2, nan, 3, 4]])
    np.testing.assert_array_equal(drawn(second)[1], [nan, nan, 0.5, nan, nan])
    np.testing.assert_array_equal(drawn(alone), [[30], [0.5]])  # a line through one point would not show
    assert alone.get_marker() == "."


def test_two_thresholds_share_a_label():
    ax = hj.plot.tracking(np.ones(3), threshold=1.0)
    hj.plot.tracking(np.ones(3), threshold=2.0, ax=ax)
    assert labels(ax) == ["edge of stability"]


def test_a_quadratic_loss_is_its_parabola(key):
    w = jnp.array([1.0, -1.0, 2.0])
    scales = jnp.array([1.0, 2.0, 3.0])

    def quadratic(w):
        return jnp.sum(scales * w**2) / 2 + jnp.sum(w)

    pairs = hj.eigsh(hj.hvp(quadratic)(w), 2, key, which="LA")
    ax = hj.plot.loss_along(quadratic, pairs, params=w, radius=0.5, num_points=5)
    assert labels(ax) == ["λ = 3", "λ = 2"]
    for line, parabola in zip(ax.lines[::2], ax.lines[1::2], strict=True):
        x, y = drawn(line)
        np.testing.assert_allclose(x, [-0.5, -0.25, 0, 0.25, 0.5])
        np.testing.assert_allclose(y, drawn(parabola)[1], rtol=1e-5)
        np.testing.assert_allclose(y[2], quadratic(w), rtol=1e-6)
    direction = np.asarray(pairs.eigenvectors[1])
    np.testing.assert_allclose(drawn(ax.lines[0])[1][-1], quadratic(w + 0.5 * direction), rtol=1e-5)


def test_a_model_brings_its_parameters_and_a_radius(key):
    model = hj.Model(
        {"a": jnp.array([2.0, 1.0])}, (jnp.eye(2), jnp.zeros(2)), lambda w, x: w["a"] @ x, optax.losses.squared_error
    )
    ax = hj.plot.loss_along(model, hj.eigsh(model.hessian(), 1, key), num_points=3)
    x, y = drawn(ax.lines[0])
    np.testing.assert_allclose(y[1], model.loss_value(), rtol=1e-6)
    np.testing.assert_allclose(x[-1], (2 * 2.5 / 1.0) ** 0.5, rtol=1e-5)  # the loss is 2.5, its Hessian 1


def test_blocks_keep_their_line_by_name():
    ax = hj.plot.blocks({"b": np.float32(1), "a": [2.0], 3: [5.0]}, label="first")
    hj.plot.blocks({"a": [2.5], "new": [7.0], "b": [1.5]}, label="second", ax=ax)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["b", "a", "3", "new"]
    points = [drawn(line) for line in ax.lines if line.get_marker() == "o" and line.get_xdata().size]
    np.testing.assert_array_equal(np.squeeze(points), [[1, 0], [2, 1], [5, 2], [2.5, 1], [7, 3], [1.5, 0]])
    assert ax.get_ylim() == (3.5, -0.5)


def test_many_blocks_get_a_higher_figure():
    heights = [hj.plot.blocks({f"{i}": 1.0 for i in range(n)}).figure.get_figheight() for n in (3, 60)]
    assert heights[1] == 13.0 > heights[0]


def test_blocks_in_the_order_of_the_dict(key):
    op = hj.operator(lambda v: {"b": 2 * v["b"], "a": 3 * v["a"]}, {"b": jnp.ones(5), "a": jnp.ones(4)})
    results = {
        "pairs": hj.eigsh(op, 2, key),
        "estimate": hj.Estimate(jnp.asarray(4.0), jnp.asarray(0.5), jnp.asarray(1)),
        "array": np.array([1.0, np.nan]),
    }
    ax = hj.plot.blocks(results, label="A")
    assert [text.get_text() for text in ax.get_yticklabels()] == ["pairs", "estimate", "array"]
    points = [drawn(line) for line in ax.lines if line.get_marker() == "o" and line.get_xdata().size]
    np.testing.assert_allclose(points[0], [[3, 3], [0, 0]], rtol=1e-5)
    np.testing.assert_allclose(points[1], [[4], [1]])
    np.testing.assert_allclose(points[2], [[1], [2]])
    bar = ax.containers[1].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bar[:, 0], [3, 5])  # two standard errors either way
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first block stands on top


def test_axes_are_the_given_ones_or_new_ones():
    ax = pyplot.subplots()[1]
    assert hj.plot.eigenvalues([1.0], ax=ax) is ax
    assert hj.plot.eigenvalues([2.0], ax=ax) is ax
    first, second = (line for line in ax.lines if line.get_marker() == "o" and line.get_xdata().size)
    assert colors.to_hex(first.get_color()) != colors.to_hex(second.get_color())
    assert hj.plot.eigenvalues([1.0]) is not hj.plot.eigenvalues([1.0])


PAIRS_ONLY = "needs the `Eigenpairs` of `hj.eigsh`, got float"
REFUSED = {
    "density": (lambda: hj.plot.density(np.ones(3)), TypeError, "what `hj.spectral_density` returns, got ndarray"),
    "eigenvalues": (lambda: hj.plot.eigenvalues("LA"), TypeError, "an array of eigenvalues, got str"),
    "no tracker": (lambda: hj.plot.tracking(optax.sgd(0.1).init(jnp.ones(2))), TypeError, "no `hj.track_curvature`"),
    "no history": (
        lambda: hj.plot.tracking(hj.track_curvature(loss, 1, jax.random.key(0)).init(jnp.ones(2))),
        ValueError,
        "history=n",
    ),
    "steps": (lambda: hj.plot.tracking(np.ones(3), steps=[1, 2]), ValueError, r"each of 3 measurements, got .*\(2,\)"),
    "three axes": (lambda: hj.plot.tracking(np.ones((2, 2, 2))), ValueError, r"\(steps, k\), got \(2, 2, 2\)"),
    "no pairs": (lambda: hj.plot.loss_along(jnp.sum, 1.0), TypeError, PAIRS_ONLY),
    "no blocks": (lambda: hj.plot.blocks({}), ValueError, "no blocks"),
    "a list of blocks": (lambda: hj.plot.blocks([1.0]), TypeError, "a dict from block name to result.*got list"),
    "a block of words": (lambda: hj.plot.blocks({"a": "b"}), TypeError, "got str for 'a'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    call, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        call()


def test_a_line_needs_vectors_parameters_and_points(diagonal, key):
    pairs = hj.eigsh(diagonal, 1, key)
    with pytest.raises(ValueError, match="`params=`"):
        hj.plot.loss_along(jnp.sum, pairs)
    with pytest.raises(ValueError, match="num_points >= 2`, got 1"):
        hj.plot.loss_along(jnp.sum, pairs, params=jnp.ones(100), num_points=1)
    with pytest.raises(ValueError, match=r"positive `radius`, got -1\.0"):
        hj.plot.loss_along(jnp.sum, pairs, params=jnp.ones(100), radius=-1.0)
    with pytest.raises(TypeError, match="a function of the parameters, got 3"):
        hj.plot.loss_along(3, pairs)
    with pytest.raises(ValueError, match="return_eigenvectors=False"):
        hj.plot.loss_along(jnp.sum, hj.eigsh(diagonal, 1, key, return_eigenvectors=False), params=jnp.ones(100))
    with pytest.raises(ValueError, match=r"positive `radius`, got inf"):
        hj.plot.loss_along(jnp.sum, pairs, params=jnp.ones(100), radius=np.inf)
    with pytest.raises(ValueError, match=r"eigenvectors shaped as `params`.*\(99,\).*\(100,\)"):
        hj.plot.loss_along(jnp.sum, pairs, params=jnp.ones(99))


def test_a_batch_of_results_is_not_one_picture(diagonal, key):
    keys = jax.random.split(key, 3)
    pairs = jax.vmap(lambda key: hj.eigsh(diagonal, 2, key))(keys)
    density = jax.vmap(lambda key: hj.spectral_density(diagonal, key, num_probes=2, num_steps=5))(keys)
    tracker = hj.track_curvature(jnp.sum, 1, key, history=2)
    states = jax.vmap(tracker.init)(jnp.ones((3, 4)))
    calls = (
        lambda: hj.plot.eigenvalues(pairs),
        lambda: hj.plot.blocks({"a": pairs}),
        lambda: hj.plot.loss_along(jnp.sum, pairs, params=jnp.ones(100)),
        lambda: hj.plot.density(density),
        lambda: hj.plot.tracking(states),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"draws one result, got a batch of \(3,\)"):
            call()
    with pytest.raises(ValueError, match="draws one tracker, got a state with 2"):
        hj.plot.tracking((tracker.init(jnp.ones(4)),) * 2)


@pytest.mark.parametrize("sigma", [0.0, -1.0, np.nan, np.inf])
def test_a_density_needs_a_width_and_finite_numbers(diagonal, key, sigma):
    with pytest.raises(ValueError, match="positive `sigma`"):
        hj.plot.density(hj.spectral_density(diagonal, key, num_probes=2, num_steps=5), sigma=sigma)
    bad = hj.operator(lambda v: np.nan * v, like=jnp.zeros(100))
    with pytest.raises(ValueError, match="needs a finite density"):
        hj.plot.density(hj.spectral_density(bad, key, num_probes=2, num_steps=5))


def test_matplotlib_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'hessjax\[plot\]'"):
        hj.plot.eigenvalues([1.0])


def test_importing_hessjax_does_not_import_matplotlib():
    code = "import hessjax, sys; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
