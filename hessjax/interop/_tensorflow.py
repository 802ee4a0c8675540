"""From TensorFlow to a `Model`: saved Keras models by way of Keras, other functions by a forward in JAX."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from hessjax._compare import tolerance_in
from hessjax._model import Model, differences
from hessjax.interop._jax_source import missing
from hessjax.interop._keras import ROUTE, from_keras, unique_names
from hessjax.interop._parity import EXAMPLES, Parity, Ported, check_verify, demand, take


def from_tensorflow(
    source: Any,
    data: Any,
    loss: Any,
    *,
    forward: Any = None,
    variables: Any = None,
    verify: Any = "gradient",
    **kwargs: Any,
) -> Ported:
    """Makes a `Model` of what TensorFlow trained.

    There are two sound routes. A Keras model is saved and loaded under the JAX backend, which the path of its file
    does here: see `hj.from_keras`. Any other function or SavedModel keeps its variables, and its forward is written in
    JAX by hand and compared with TensorFlow's outputs and gradient here. Graphs are not converted: the converter that
    exists fails on recurrent layers, and copies TensorFlow's wrong second derivative of layer normalisation.

    Args:
        source: the path of a `.keras` or `.h5` file; or, with `forward`, a SavedModel's directory, a `tf.Module`, a
            Keras model under TensorFlow, or a function of a batch of inputs (`tf.function` or plain).
        data: `(inputs, targets)`, the examples on the leading axis. A tuple of inputs is several arguments.
        loss: `loss(output, target)` on one example in JAX, a scalar.
        forward: `forward(params, x)` on one example, in JAX.
        variables: the `tf.Variable`s that count as parameters, by default `source.trainable_variables`.
        verify: what is compared with TensorFlow: `"gradient"` (with outputs and loss), `"output"` or False.
        kwargs: passed on to `hj.from_keras`, or to the function's call.

    Returns:
        A `Model` whose `params` are a flat dict keyed by the variables' names without `:0` (for Keras's, by their
        paths), and with `parity`.

    Raises:
        ImportError: TensorFlow, or Keras, is not installed.
        ValueError: `forward` or the variables are missing, or port and source disagree.
        TypeError: a Keras model came as an object under another backend than JAX.
    """
    check_verify(verify, "from_tensorflow")
    if isinstance(source, str | Path) and Path(source).suffix in (".keras", ".h5"):
        return from_keras(source, data, loss, verify=verify, **kwargs)
    if forward is None:
        if hasattr(source, "trainable_variables") and hasattr(source, "save"):
            raise TypeError(f"A Keras model under TensorFlow cannot move to JAX within one process. {ROUTE}")
        raise ValueError(
            "`from_tensorflow` converts no graphs. Pass the path of a `.keras` file, or `forward=`, the function of "
            "one example in JAX, which is then compared with TensorFlow's outputs and gradient."
        )
    try:
        import tensorflow as tf
    except ImportError as error:
        raise missing("from_tensorflow", "TensorFlow", "tensorflow") from error
    if isinstance(source, str | Path):
        source = tf.saved_model.load(str(source))
    held = _trainable(tf, source) if variables is None else list(variables)
    if not held:
        raise ValueError("The function has no `trainable_variables` of its own: pass them as `variables=`.")
    names = unique_names([getattr(v, "path", v.name).removesuffix(":0") for v in held])
    held = [v if isinstance(v, tf.Variable) else v.value for v in held]  # Keras wraps them
    params = {name: np.array(v.numpy()) for name, v in zip(names, held, strict=True)}
    model = Ported(params, jtu.tree_map(_to_numpy, data), forward, loss)
    if verify is False:
        return model
    return model.proven(_proof(tf, model, _callable(source), names, held, verify, kwargs))


def _trainable(tf: Any, source: Any) -> list[Any]:
    """What the source says is trainable, or else what is found in it: a SavedModel says nothing."""
    declared = getattr(source, "trainable_variables", None)
    if declared is not None:
        return list(declared)
    if not hasattr(source, "_self_setattr_tracking"):
        return []
    found = tf.train.TrackableView(source).descendants()
    return [part for part in found if isinstance(part, tf.Variable) and part.trainable]


def _to_numpy(leaf: Any) -> Any:
    return leaf.numpy() if hasattr(leaf, "numpy") else leaf


def _callable(source: Any) -> Callable[..., Any]:
    """A function's call, or a SavedModel's default signature."""
    if callable(source):
        return source
    signature = getattr(source, "signatures", {}).get("serving_default")
    if signature is None:
        raise ValueError("The SavedModel has neither a call nor the signature `serving_default`.")

    def call(*inputs: Any) -> Any:
        names = list(signature.structured_input_signature[1])
        results = list(signature(**dict(zip(names, inputs, strict=True))).values())
        return results[0] if len(results) == 1 else results

    return call


def _proof(
    tf: Any,
    model: Ported,
    call: Callable[..., Any],
    names: list[str],
    held: list[Any],
    verify: Any,
    kwargs: dict[str, Any],
) -> Parity:
    count = min(model.num_examples, EXAMPLES)
    inputs, targets = take(model.data, slice(count))
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    tensors = jtu.tree_map(lambda leaf: tf.constant(np.asarray(leaf)), given)
    with tf.GradientTape() as tape:
        tape.watch(held)
        outputs = call(*tensors, **kwargs)
    theirs = jtu.tree_map(_to_numpy, outputs)
    ours = Model(model.params, (inputs, targets), model.forward, model.loss)
    value = gradient = None
    if verify == "gradient":

        def mean_loss(outputs: PyTree) -> Any:
            return jnp.mean(jax.vmap(model.loss)(outputs, targets))

        value, weights = jax.value_and_grad(mean_loss)(jtu.tree_map(jnp.asarray, theirs))
        seeds = jtu.tree_map(lambda w: tf.constant(np.asarray(w)), weights)
        slopes = tape.gradient(outputs, held, output_gradients=seeds, unconnected_gradients="zero")
        gradient = {name: np.asarray(tf.convert_to_tensor(s)) for name, s in zip(names, slopes, strict=True)}
    dtype = np.dtype(next(iter(model.params.values())).dtype)
    found = differences(ours, theirs, value, gradient, dtype)
    return demand(Parity("TensorFlow", count, str(dtype), tolerance_in(dtype), found))
