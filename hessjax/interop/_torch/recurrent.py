"""Recurrent layers: one `lax.scan` per layer and direction, never unrolled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hessjax.interop._torch._rules import rule

_HIGHEST = jax.lax.Precision.HIGHEST
Step = Callable[[Any, Array, Array, Any], Any]


def _lstm_step(state: Any, projected: Array, weight: Array, bias: Any) -> Any:
    h, c = state
    gates = projected + jnp.matmul(h, weight.T, precision=_HIGHEST) + bias
    i, f, g, o = jnp.split(gates, 4, -1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru_step(state: Any, projected: Array, weight: Array, bias: Any) -> Any:
    (h,) = state
    recurrent = jnp.matmul(h, weight.T, precision=_HIGHEST) + bias
    (r, z, n), (hr, hz, hn) = jnp.split(projected, 3, -1), jnp.split(recurrent, 3, -1)
    r, z = jax.nn.sigmoid(r + hr), jax.nn.sigmoid(z + hz)
    n = jnp.tanh(n + r * hn)
    return ((1 - z) * n + z * h,)


def _plain_step(activation: Callable[[Array], Array]) -> Step:
    def step(state: Any, projected: Array, weight: Array, bias: Any) -> Any:
        return (activation(projected + jnp.matmul(state[0], weight.T, precision=_HIGHEST) + bias),)

    return step


def _run(
    step: Step, x: Array, states: list[Array], parameters: list[Array], biases: bool, layers: int, both: bool
) -> tuple[Array, list[Array]]:
    """All layers over time-first `x`; `states` are stacked over layer and direction, and so are those returned."""
    per_cell = 4 if biases else 2
    directions = 2 if both else 1
    if len(parameters) != per_cell * directions * layers:
        raise NotImplementedError("recurrent layers with a projection (`proj_size`) have no rule")
    last = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            cell = layer * directions + direction
            w_in, w_state, *b = parameters[cell * per_cell : (cell + 1) * per_cell]
            projected = jnp.matmul(x, w_in.T, precision=_HIGHEST) + (b[0] if b else 0)
            bias = b[1] if b else 0

            def advance(state: Any, part: Array, weight: Array = w_state, bias: Any = bias) -> tuple[Any, Array]:
                state = step(state, part, weight, bias)
                return state, state[0]

            state, output = jax.lax.scan(advance, tuple(s[cell] for s in states), projected, reverse=bool(direction))
            outputs.append(output)
            last.append(state)
        x = jnp.concatenate(outputs, -1) if both else outputs[0]
    return x, [jnp.stack(parts) for parts in zip(*last, strict=True)]


def _layers(
    step: Step, x: Array, states: list[Array], parameters: Any, biases: bool, layers: int, both: bool, first: bool
) -> tuple[Array, ...]:
    x = jnp.swapaxes(x, 0, 1) if first else x
    y, final = _run(step, x, states, list(parameters), biases, layers, both)
    return (jnp.swapaxes(y, 0, 1) if first else y, *final)


def _refuse_dropout(dropout: float, train: bool) -> None:
    if train and dropout > 0:
        raise NotImplementedError("it drops activations between its layers at random although in eval mode")


@rule("lstm.input")
def lstm(
    x: Array,
    states: Any,
    parameters: Any,
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    both: bool,
    batch_first: bool,
) -> tuple[Array, ...]:
    _refuse_dropout(dropout, train)
    return _layers(_lstm_step, x, list(states), parameters, biases, layers, both, batch_first)


def _single_state(step: Step) -> Callable[..., tuple[Array, ...]]:
    def layers_of(
        x: Array,
        state: Array,
        parameters: Any,
        biases: bool,
        layers: int,
        dropout: float,
        train: bool,
        both: bool,
        batch_first: bool,
    ) -> tuple[Array, ...]:
        _refuse_dropout(dropout, train)
        return _layers(step, x, [state], parameters, biases, layers, both, batch_first)

    return layers_of


rule("gru.input")(_single_state(_gru_step))
rule("rnn_tanh.input")(_single_state(_plain_step(jnp.tanh)))
rule("rnn_relu.input")(_single_state(_plain_step(jax.nn.relu)))
