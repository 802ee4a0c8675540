"""What a loss reads from outside its arguments: rebound, it counts anew; traced, it can be differentiated."""

import dataclasses
import datetime
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hessjax as hj

P = jnp.ones(3)
FACTOR = jnp.arange(1.0, 4.0)
TRACES: list[int] = []


def loss(p, x):
    return jnp.sum((p * x) ** 4) / 12


def of_global(p):
    return loss(p, FACTOR)


def helped(p):
    return of_global(p)


class Holder:
    """Reads its array by an attribute, a method or a property."""

    def __init__(self, x):
        self.x = x
        self.calls = 0

    @property
    def scaled(self):
        return self.x * 1.0

    def inner(self, p):
        return loss(p, self.scaled)

    def by_method(self, p):
        self.calls += 1
        return self.inner(p)

    def __call__(self, p):
        return loss(p, self.x)


class Slotted:
    __slots__ = ("x",)

    def __init__(self, x):
        self.x = x


@dataclasses.dataclass
class Unhashable:
    x: jax.Array

    def __call__(self, p):
        return loss(p, self.x)


def by_cell(x):
    return lambda p: loss(p, x)


def by_default(x):
    def function(p, x=x):
        return loss(p, x)

    return function


def by_keyword_default(x):
    def function(p, *, x=x):
        return loss(p, x)

    return function


def by_cell_of_a_dict(x):
    data = {"a": [x]}
    return lambda p: loss(p, data["a"][0])


MAKERS = {
    "cell": by_cell,
    "default": by_default,
    "keyword default": by_keyword_default,
    "dict in a cell": by_cell_of_a_dict,
    "partial": lambda x: functools.partial(loss, x=x),
    "partial of jit": lambda x: functools.partial(jax.jit(loss), x=x),
    "jit": lambda x: jax.jit(by_cell(x)),
    "filter_jit": lambda x: eqx.filter_jit(by_cell(x)),
    "method": lambda x: Holder(x).by_method,
    "object": Holder,
    "dataclass": Unhashable,
    "tree partial": lambda x: jax.tree_util.Partial(lambda x, p: loss(p, x), x),
    "equinox partial": lambda x: eqx.Partial(lambda x, p: loss(p, x), x),
}


def curvature(function):
    """Its Hessian's diagonal at ones, p² x⁴ = x⁴."""
    return np.asarray(hj.hvp(function)(P).dense().diagonal())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_eigenvalues_differentiate_by_what_a_loss_holds(make, key):
    def sharpness(x):
        return hj.eigsh(hj.hvp(make(x))(P), 1, key, which="LA").eigenvalues[0]

    np.testing.assert_allclose(curvature(make(FACTOR)), FACTOR**4, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(sharpness)(FACTOR), [0, 0, 4 * 27], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jvp(sharpness, (FACTOR,), (FACTOR,))[1], 4 * 81, rtol=1e-4)


@pytest.mark.parametrize("function", [of_global, helped, lambda p: loss(p, FACTOR)])
def test_a_global_is_read_again_when_it_is_rebound(function, monkeypatch):
    np.testing.assert_allclose(curvature(function), FACTOR**4, rtol=1e-5)
    monkeypatch.setitem(globals(), "FACTOR", 2 * FACTOR)
    np.testing.assert_allclose(curvature(function), FACTOR**4, rtol=1e-5)


@pytest.mark.parametrize("name", ["by_method", "inner", "__call__"])
def test_an_attribute_is_read_again_when_it_is_rebound(name):
    holder = Holder(FACTOR)
    np.testing.assert_allclose(curvature(getattr(holder, name)), FACTOR**4, rtol=1e-5)
    operator = hj.hvp(getattr(holder, name))(P)
    operator @ P
    holder.x = 2 * FACTOR
    np.testing.assert_allclose(curvature(getattr(holder, name)), 16 * FACTOR**4, rtol=1e-5)
    np.testing.assert_allclose(operator @ P, 16 * FACTOR**4, rtol=1e-5)


def test_cells_slots_helpers_and_numbers_count_as_well():
    x, power, slotted = FACTOR, 4, Slotted(1.0)

    def function(p):
        return jnp.sum(abs(p * x) ** power) * slotted.x

    first = curvature(function)
    x = 2 * FACTOR
    second = curvature(function)
    np.testing.assert_allclose(second, 16 * first, rtol=1e-5)
    slotted.x = 3.0
    np.testing.assert_allclose(curvature(function), 3 * second, rtol=1e-5)
    power = 2
    np.testing.assert_allclose(curvature(function), 6 * x**2, rtol=1e-5)


def test_a_model_reads_again_too():
    scale = 1.0
    model = hj.Model(P, (P, P), lambda p, x: jnp.sum(p) * x, lambda output, target: scale * output**2)
    before = model.loss_value(), model.gradient(), model.hessian().dense(), model.ggn().dense()
    scale = 2.0
    after = model.loss_value(), model.gradient(), model.hessian().dense(), model.ggn().dense()
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(2 * a, b, rtol=1e-6)


def test_a_tracker_in_a_loop_reads_again(key):
    holder = Holder(FACTOR)
    tracker = hj.track_curvature(holder.by_method, 1, key)
    _, state = tracker.update(P, tracker.init(P), P, batch=())
    holder.x = 2 * FACTOR
    _, state = tracker.update(P, state, P, batch=())
    np.testing.assert_allclose(state.eigenvalues, [16 * 81], rtol=1e-4)


def test_blocks_read_again(key):
    shift = 1.0

    def top(block, key):
        return hj.eigsh(block, 1, key, which="LA").eigenvalues[0] + shift

    operator = hj.operator(lambda v: [2 * v[0], 3 * v[1]], [P, P])
    assert [float(x) for x in hj.map_blocks(top, operator, key).values()] == pytest.approx([3.0, 4.0])
    shift = 2.0
    assert [float(x) for x in hj.map_blocks(top, operator, key).values()] == pytest.approx([4.0, 5.0])


def test_what_a_loss_counts_of_its_own_traces_compiles_nothing_anew():
    traces, counter, count = [], {"n": 0}, 0
    holder = Holder(FACTOR)

    def function(p):
        nonlocal count
        count += 1
        counter["n"] += 1
        traces.append(p.shape)
        TRACES.append(1)
        return holder.by_method(p)

    TRACES.clear()
    for scale in (1.0, 2.0, 3.0):
        hj.hvp(function)(scale * P) @ P
    assert count == counter["n"] == len(traces) == len(TRACES) == holder.calls == 1


def test_a_matrix_that_is_a_global_becomes_a_leaf():
    operator = hj.operator(lambda v: FACTOR * v, P)
    assert [leaf.tolist() for leaf in jax.tree.leaves(operator)] == [FACTOR.tolist()]


def test_a_loss_that_reads_the_model_it_is_part_of():
    def forward(p, x):
        return jnp.sum(p) * x * jnp.mean(held["model"].data[0])

    held = {}
    held["model"] = hj.Model(P, (2 * P, P), forward, lambda output, target: output**2)
    assert float(held["model"].loss_value()) == pytest.approx(144.0)


def test_objects_that_are_rebound_unread_or_equal_compile_nothing_anew():
    traces = []

    class State:
        def __init__(self, apply, params, step):
            self.apply, self.params, self.step = apply, params, step

    class Trainer:
        def __init__(self):
            self.state, self.rate, self.static = State(loss, P, 0), float("nan"), None

        def bump(self):
            self.calls = getattr(self, "calls", 0) + 1

        def loss(self, p, x):
            traces.append(datetime.datetime.now(tz=datetime.UTC))
            self.bump()
            return self.state.apply(p, x) + 0 * np.float32(self.calls) + (self.rate == 1) + (self.static is None)

    trainer, model = Trainer(), eqx.nn.MLP(3, 1, 4, 1, key=jax.random.key(0))
    for step in range(3):
        trainer.state = State(loss, step * P, step)
        trainer.rate = float("nan")
        trainer.static = eqx.partition(model, eqx.is_array)[1]  # equal, and another object
        hj.hvp(trainer.loss)(P + step, FACTOR) @ P
    assert len(traces) == 1


def test_the_place_of_a_value_counts():
    flags = [True, True, False]

    class Config:
        a, b, c = flags

    def function(p):
        return jnp.sum(p**2) * (1 + 10 * Config.a + 100 * Config.b + 1000 * Config.c)

    first = curvature(function)
    Config.a, Config.b, Config.c = True, False, True
    np.testing.assert_allclose(curvature(function), first / 111 * 1011, rtol=1e-6)


def test_rules_of_a_custom_derivative_are_read_as_well():
    slope = 2.0

    @jax.custom_jvp
    def square(p):
        return p**2

    @square.defjvp
    def _rule(primals, tangents):
        return square(primals[0]), slope * primals[0] * tangents[0]

    def function(p):
        return jnp.sum(square(p))

    first = curvature(function)
    slope = 6.0
    np.testing.assert_allclose(curvature(function), 3 * first, rtol=1e-6)


class Proxy:
    """Answers for every name, by running code that must not run."""

    def __getattr__(self, name):
        raise KeyError(name)


def test_odd_objects_are_left_alone():
    proxy, itself, empty = Proxy(), [], Slotted.__new__(Slotted)
    itself.append(itself)
    node = None
    for _ in range(3000):
        node = [node]

    class Raises:
        def __hash__(self):
            raise RuntimeError

        def __call__(self, p):
            held = (proxy, itself, empty, node)
            return jnp.sum(p**2) * len(held)

    np.testing.assert_allclose(curvature(Raises()), 8.0)
    chain = [lambda p: jnp.sum(p**2)]
    for _ in range(300):
        chain.append(lambda p, inner=chain[-1]: inner(p))
    assert hj.hvp(lambda p: chain[5](p))(P).size == 3
