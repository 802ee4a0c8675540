"""From a Keras 3 model to a `Model`, under the JAX backend."""

import collections
import os
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import PyTree

from hessjax.interop._jax_source import missing, port
from hessjax.interop._parity import Ported

ROUTE = (
    'Save it (`model.save("model.keras")`), and in a new process call `hj.from_keras("model.keras", ...)`, or set the '
    "environment variable KERAS_BACKEND=jax before Keras is imported and load it there, without TensorFlow."
)


class _Forward(eqx.Module):
    model: Any = eqx.field(static=True)
    names: tuple[str, ...] = eqx.field(static=True)
    rest: list[Any]
    kwargs: dict[str, Any]

    def __call__(self, params: PyTree, inputs: PyTree) -> PyTree:
        # Keras takes several inputs as one list.
        inputs = list(inputs) if isinstance(inputs, tuple) else inputs
        values = [params[name] for name in self.names]
        return self.model.stateless_call(values, self.rest, inputs, training=False, **self.kwargs)[0]


def from_keras(model: Any, data: Any, loss: Any, *, verify: Any = "gradient", **kwargs: Any) -> Ported:
    """Makes a `Model` of a Keras 3 model, called with `training=False`.

    A model trained under the TensorFlow backend is saved, and loaded here under JAX. Where the two disagree on a
    Hessian of a network with layer normalisation, JAX is right: TensorFlow's `tf.nn.moments` stops a gradient, which
    leaves the first derivative right and the second wrong (`hj.check_hvp` shows it). Keras computes in float32 inside
    even where asked for float64, so expect 1e-6, not 1e-15.

    Args:
        model: a built Keras model under the JAX backend, or the path of a `.keras` or `.h5` file. A path also chooses
            the backend, if Keras is not imported yet.
        data: `(inputs, targets)`, the examples on the leading axis. A tuple of inputs reaches the model as a list, a
            dict by name.
        loss: `loss(output, target)` on one example, a scalar.
        verify: what is compared with the model's own call: `"gradient"` (with outputs and loss), `"output"` or False.
            For a model from another process, compare with what it said there by `model.verify(outputs=...)`.
        kwargs: passed on to the model's call.

    Returns:
        A `Model` whose `params` are a flat dict keyed by the variables' paths, `#1`, `#2` ... added where a path occurs
        again; trainable ones only. And with `parity`.

    Raises:
        ImportError: Keras is not installed.
        ValueError: Keras runs on another backend, the model is not built, has nothing to train, or its outputs depend
            on the other examples, or differ.
        TypeError: it is no Keras model.
    """
    keras = _keras()
    if keras.backend.backend() != "jax":
        raise ValueError(f"The model runs on Keras's {keras.backend.backend()} backend, not on JAX. {ROUTE}")
    if isinstance(model, str | Path):
        model = keras.saving.load_model(model, compile=False)
    if not isinstance(model, keras.Model):
        raise TypeError(f"`from_keras` needs a Keras 3 model or the path of one, got {type(model).__name__}.")
    if not model.built:
        raise ValueError("The model has no variables yet: call it on an example, or `model.build(input_shape)`.")
    names = unique_names([variable.path for variable in model.trainable_variables])
    params = {name: jnp.asarray(v.value) for name, v in zip(names, model.trainable_variables, strict=True)}
    rest = [jnp.asarray(v.value) for v in model.non_trainable_variables]
    forward = _Forward(model, tuple(names), rest, kwargs)

    def call(params: PyTree | None, inputs: PyTree) -> PyTree:
        """The model's own call. In the scope its variables keep their values, whatever the call assigns to them."""
        values = [] if params is None else zip(model.trainable_variables, map(params.get, names), strict=True)
        with keras.StatelessScope(state_mapping=list(values)):
            return model(list(inputs) if isinstance(inputs, tuple) else inputs, training=False, **kwargs)

    return port("keras", params, data, forward, loss, batched=True, verify=verify, call=call)


def _keras() -> Any:
    """Keras, on the JAX backend if it is imported here; the environment stays as it was."""
    if "keras" in sys.modules:
        return sys.modules["keras"]
    before = os.environ.get("KERAS_BACKEND")
    os.environ["KERAS_BACKEND"] = "jax"
    try:
        import keras
    except ImportError as error:
        raise missing("from_keras", "Keras 3", "keras") from error
    finally:
        if before is None:
            del os.environ["KERAS_BACKEND"]
        else:
            os.environ["KERAS_BACKEND"] = before
    return keras


def unique_names(paths: list[str]) -> list[str]:
    """Numbers the second and later occurrence of a path."""
    seen: collections.Counter[str] = collections.Counter()
    names = []
    for path in paths:
        names.append(f"{path}#{seen[path]}" if seen[path] else path)
        seen[path] += 1
    return names
