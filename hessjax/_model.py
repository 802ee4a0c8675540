"""`Model`: the four objects that mediate between a trained network and its curvature.

Parameters, data, an output function and a loss function are all that any framework's model contributes. The adapters in
`interop` produce a `Model`; its `hessian` and `ggn` lead to the operators. `verify` compares it with what the source
framework says, because a wrong port gives a plausible, wrong spectrum.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree, Scalar

from hessjax._compare import Difference, difference, least_precise, tolerance_in
from hessjax._function import Function, as_function
from hessjax._vectors import full_precision, structure_of
from hessjax.operators import Operator, hvp
from hessjax.operators._examples import as_samples, as_scalar, losses_of, outputs_of, real_outputs
from hessjax.operators._ggn import gauss_newton
from hessjax.operators._operator import hoisted
from hessjax.operators._slices import as_batch_size, count_examples


class Model(eqx.Module):
    """A trained model as a pure function of its parameters: L(θ) = mean over examples of loss(forward(θ, x), y).

    Arrays of the four objects are leaves, so that a `Model` passes through `jax.jit` as an argument.

    Args:
        params: θ. A pytree of floating-point arrays (jax or numpy), in which a nested list of numbers stands for one
            array, as in a JSON file.
        data: `(inputs, targets)`, pytrees of arrays with the examples on the leading axis. Nested lists as above.
        forward: `forward(params, x)` on one example, or on a batch if `batched`.
        loss: `loss(output, target)` on one example, a scalar; the functions of `optax.losses` fit.
        batched: whether `forward` takes a batch; `forward_one` never does.

    Raises:
        TypeError: a parameter is not a floating-point array; the message names its path.
        ValueError: `data` is not a pair, a nested list is ragged, or the leading lengths differ.

    Example:
        >>> import hessjax as hj, optax
        >>> forward = lambda w, x: w["a"] * x
        >>> model = hj.Model({"a": 2.0}, ([1.0, 3.0], [2.0, 5.0]), forward, optax.losses.squared_error)
        >>> float(model.loss_value())
        0.5
        >>> model.hessian().dense().tolist()
        [[10.0]]
    """

    params: PyTree[Array]
    data: tuple[PyTree, PyTree]
    forward: Function
    loss: Function
    batched: bool = eqx.field(static=True)

    def __init__(
        self,
        params: PyTree,
        data: Any,
        forward: Callable[[PyTree, PyTree], PyTree],
        loss: Callable[[PyTree, PyTree], Scalar],
        *,
        batched: bool = False,
    ):
        params = _join_lists(params, "params")
        structure = structure_of(params)
        self.params = jtu.tree_map(lambda leaf, spec: jnp.asarray(leaf, spec.dtype), params, structure)
        if not isinstance(data, tuple | list) or len(data) != 2 or is_number(data[0]):
            what = f"{len(data)} items" if isinstance(data, tuple | list) else type(data).__name__
            raise ValueError(f"`data` must be the pair `(inputs, targets)`, got {what}.")
        inputs, targets = (
            _to_jax(_join_lists(part, name)) for part, name in zip(data, ("inputs", "targets"), strict=True)
        )
        self.data = (inputs, targets)
        count_examples(self.data)
        self.forward = as_function(forward, "forward")
        self.loss = as_function(loss, "loss")
        self.batched = batched

    @property
    def num_examples(self) -> int:
        """The length of the data's leading axis."""
        return count_examples(self.data)

    @property
    def forward_one(self) -> Function:
        """`forward(params, x)` on one example, as `hj.ntk`, `hj.fisher` and their like take it."""
        return as_function(_OneExample(self.forward), "forward") if self.batched else self.forward

    def outputs(self) -> PyTree[Array]:
        """The outputs on all inputs, the examples on the leading axis."""
        with full_precision():
            return outputs_of(self.forward, self.params, self.data[0], self.batched)

    def loss_value(self) -> Scalar:
        """L(θ), the mean over the examples."""
        return _jitted_loss(self)

    def gradient(self) -> PyTree[Array]:
        """∇L(θ), with the structure of `params`."""
        return _jitted_gradient(self)

    def hessian(self, batch_size: int | None = None) -> Operator:
        """∇²L(θ) as an operator.

        Args:
            batch_size: examples per slice, summed in a loop inside the program; None for all at once. See `hj.hvp`.
        """
        mean_loss = _MeanLoss(self.forward, self.loss, self.batched)
        op = hvp(mean_loss, batch_size=batch_size)(self.params, *self.data)
        return hoisted(op, self.forward, self.loss)

    def ggn(self, batch_size: Any = None, *, mc_samples: Any = None, key: Any = None) -> Operator:
        """The generalized Gauss-Newton matrix as an operator, exact or sampled.

        Args:
            batch_size: examples per slice, summed in a loop inside the program; None for all at once.
            mc_samples: None for the exact matrix; see `hj.ggn`.
            key: goes with `mc_samples`.
        """
        batch_size = as_batch_size(batch_size, "Model.ggn")
        mc_samples = as_samples(mc_samples, key, "Model.ggn")
        model = (self.forward, self.loss, self.params, self.data, self.batched)
        return gauss_newton(*model, batch_size, mc_samples, key)

    def verify(
        self,
        outputs: PyTree | None = None,
        loss: Any = None,
        gradient: PyTree | None = None,
        rtol: float | None = None,
        batch_size: Any = None,
    ) -> None:
        """Compares this model with what another framework computed for it, or with itself in slices.

        Differences are relative to the largest magnitude of the expected array, leaf by leaf; but where that is below
        the rounding of the terms that it was summed from, as at an optimum, to those.

        Args:
            outputs: expected outputs on the model's inputs, with the structure of `outputs()`.
            loss: expected mean loss.
            gradient: expected gradient, with the structure of `params`.
            rtol: tolerance; by default 1e-8, 1e-4 where the model or the expectation is in float32, and 5e-2 where it
                is in half precision.
            batch_size: compare the outputs on slices of that many examples with those on all: they differ where a
                `batched` forward lets an example see the others, as by batch statistics, and then neither slices nor
                `forward_one` give this model's curvature.

        Raises:
            ValueError: a difference exceeds the tolerance, or a value is not finite. The message gives the largest
                difference, its place and the tolerance, and the usual causes. Also raised when nothing is given to
                compare with, its structure differs, or `batch_size` is below 1.
            TypeError: `batch_size` is no integer.
        """
        size = as_batch_size(batch_size, "Model.verify")
        if outputs is None and loss is None and gradient is None and size is None:
            raise ValueError(
                "`verify` needs something to compare with: `outputs`, `loss` or `gradient`; or a `batch_size`."
            )
        given = {
            "outputs": _join_lists(outputs, "outputs"),
            "loss": loss,
            "gradient": _join_lists(gradient, "gradient"),
        }
        dtype = least_precise(self.params, given)
        tolerance = tolerance_in(dtype) if rtol is None else rtol
        if not all(np.all(np.isfinite(np.asarray(leaf, np.float64))) for leaf in jtu.tree_leaves(given)):
            raise ValueError("`verify` compares finite numbers, but what was expected holds nan or inf.")
        found = [*differences(self, **given, dtype=dtype)]
        if size is not None:
            found.append(difference("outputs in slices", self._outputs_in_slices(size), self.outputs(), 0.0, dtype))
        wrong = [str(each) for each in found if not each.relative <= tolerance]
        if wrong:
            raise ValueError(
                f"The model disagrees with what was expected. Largest relative differences above the tolerance "
                f"{tolerance:.3g}: {'; '.join(wrong)}. Usual causes: train instead of eval mode (dropout, batch "
                "statistics), a sum for a mean in the loss, another dtype, transposed weights, another order of the "
                "examples."
            )

    def _outputs_in_slices(self, size: int) -> PyTree[Array]:
        starts = range(0, self.num_examples, size)
        slices = [jtu.tree_map(lambda leaf, at=at: leaf[at : at + size], self.data[0]) for at in starts]
        with full_precision():
            parts = [outputs_of(self.forward, self.params, part, self.batched) for part in slices]
        return jtu.tree_map(lambda *leaves: jnp.concatenate(leaves), *parts)


def differences(
    model: Model, outputs: PyTree | None, loss: Any, gradient: PyTree | None, dtype: Any
) -> tuple[Difference, ...]:
    """A model's largest differences from what is given (not None) of its source's, both computed in `dtype`.

    Raises:
        ValueError: a structure or a shape differs.
    """
    found = []
    if outputs is not None:
        found.append(difference("outputs", model.outputs(), outputs, 0.0, dtype))
    if loss is not None:
        found.append(difference("loss", model.loss_value(), loss, float(_loss_terms(model)), dtype))
    if gradient is not None:
        found.append(difference("gradient", model.gradient(), gradient, float(_gradient_terms(model)), dtype))
    return tuple(found)


class _OneExample(eqx.Module):
    """A forward that takes a batch, on one example."""

    forward: Function

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        return jtu.tree_map(lambda out: out[0], self.forward(params, jtu.tree_map(lambda leaf: leaf[None], x)))


class _MeanLoss(eqx.Module):
    """The mean of a per-example loss, as a function of parameters, inputs and targets."""

    forward: Function
    loss: Function
    batched: bool = eqx.field(static=True)

    def __call__(self, params: PyTree, inputs: PyTree, targets: PyTree) -> Scalar:
        return jnp.mean(losses_of(self.forward, self.loss, params, (inputs, targets), self.batched))


@eqx.filter_jit
def _jitted_loss(model: Model) -> Scalar:
    with full_precision():
        return _MeanLoss(model.forward, model.loss, model.batched)(model.params, *model.data)


@eqx.filter_jit
def _jitted_gradient(model: Model) -> PyTree[Array]:
    with full_precision():
        return jax.grad(_MeanLoss(model.forward, model.loss, model.batched))(model.params, *model.data)


@eqx.filter_jit
def _loss_terms(model: Model) -> Scalar:
    """The size of what the loss is computed from: the examples' losses, and the outputs times the loss's slope.

    At an optimum that slope is zero too, though the outputs' rounding stays inside the loss, log Σexp(f) - f[y]. So the
    slope at outputs of zero counts as well, up to 1: beyond, as of a square, it says nothing about the optimum.
    """
    with full_precision():
        outputs, constants = real_outputs(model.forward, model.params, model.data[0], model.batched)
        losses, here, origin = _slopes(model, outputs, constants)
        sizes = [
            _largest(f) * jnp.maximum(_largest(a), jnp.minimum(_largest(b), 1))
            for f, a, b in zip(*map(jtu.tree_leaves, (outputs, here, origin)), strict=True)
        ]
        return jnp.max(jnp.stack([_largest(losses), *sizes]))


@eqx.filter_jit
def _gradient_terms(model: Model) -> Scalar:
    """The size of the terms that cancel in the gradient at an optimum: Jᵀ of the slopes with other signs.

    Where an output fits its target, its slope is a rounded zero; the slope at an output of zero stands for what was
    subtracted.
    """
    with full_precision():
        outputs, pull, constants = jax.vjp(
            lambda params: real_outputs(model.forward, params, model.data[0], model.batched),
            model.params,
            has_aux=True,
        )
        _, here, origin = _slopes(model, outputs, constants)

        def signed(a: Array, b: Array) -> Array:
            size = jnp.maximum(_finite(a), _finite(b)) / model.num_examples
            return size * jax.random.rademacher(jax.random.key(0), size.shape, size.dtype)

        return jnp.max(
            jnp.stack([_largest(leaf) for leaf in jtu.tree_leaves(pull(jtu.tree_map(signed, here, origin)))])
        )


def _slopes(model: Model, outputs: PyTree, constants: PyTree) -> tuple[Array, PyTree, PyTree]:
    """The examples' losses, and their derivatives by the outputs: there, and at outputs of zero."""

    def loss(output: PyTree, constant: PyTree, target: PyTree) -> Scalar:
        return as_scalar(model.loss(eqx.combine(output, constant), target))

    slopes = jax.vmap(jax.value_and_grad(loss))
    losses, here = slopes(outputs, constants, model.data[1])
    return losses, here, slopes(jtu.tree_map(jnp.zeros_like, outputs), constants, model.data[1])[1]


def _finite(leaf: Array) -> Array:
    return jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), 0)


def _largest(leaf: Array) -> Scalar:
    return jnp.max(_finite(leaf), initial=0)


def is_number_list(node: Any) -> bool:
    """A list that holds numbers, or lists of numbers, at every depth."""
    return isinstance(node, list) and len(node) > 0 and all(is_number(x) or is_number_list(x) for x in node)


def is_number(node: Any) -> bool:
    return isinstance(node, int | float | np.number) and not isinstance(node, bool)


def _join_lists(tree: PyTree, name: str) -> PyTree:
    """Turns every nested list of numbers into one array: as a pytree, each number would be a leaf of its own."""

    def join(path: tuple[Any, ...], node: Any) -> Any:
        if not is_number_list(node):
            return node
        try:
            array = np.asarray(node)
        except ValueError as error:
            where = jtu.keystr(path) or "the root"
            raise ValueError(f"The nested list at `{where}` of `{name}` is ragged: {error}") from None
        return array.astype(jnp.result_type(float)) if array.dtype.kind == "f" or name == "params" else array

    return jtu.tree_map_with_path(join, tree, is_leaf=is_number_list)


def _to_jax(tree: PyTree) -> PyTree:
    """Arrays on the device; whatever is no array stays."""
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, tree)
