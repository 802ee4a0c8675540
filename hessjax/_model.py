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

from hessjax._function import Function, as_function, full_precision
from hessjax._vectors import structure_of
from hessjax.operators import Operator, hvp
from hessjax.operators._examples import as_samples, losses_of, outputs_of
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
        if not isinstance(data, tuple | list) or len(data) != 2 or _is_number(data[0]):
            what = f"{len(data)} items" if isinstance(data, tuple | list) else type(data).__name__
            raise ValueError(f"`data` must be the pair `(inputs, targets)`, got {what}.")
        inputs, targets = (
            _to_jax(_join_lists(part, name)) for part, name in zip(data, ("inputs", "targets"), strict=True)
        )
        self.data = (inputs, targets)
        count_examples(self.data)
        self.forward = as_function(forward)
        self.loss = as_function(loss)
        self.batched = batched

    @property
    def num_examples(self) -> int:
        """The length of the data's leading axis."""
        return count_examples(self.data)

    @property
    def forward_one(self) -> Function:
        """`forward(params, x)` on one example, as `hj.ntk`, `hj.fisher` and their like take it."""
        return as_function(_OneExample(self.forward)) if self.batched else self.forward

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
    ) -> None:
        """Compares this model with what another framework computed for it.

        Differences are relative to the largest magnitude of the expected array, leaf by leaf.

        Args:
            outputs: expected outputs on the model's inputs, with the structure of `outputs()`.
            loss: expected mean loss.
            gradient: expected gradient, with the structure of `params`.
            rtol: tolerance; 1e-4 where the model or the expectation is in float32 or less, else 1e-8.

        Raises:
            ValueError: a difference exceeds the tolerance, or a value is not finite. The message gives the largest
                difference, its place and the tolerance, and the usual causes. Also raised when nothing is given to
                compare with, or its structure differs.
        """
        if outputs is None and loss is None and gradient is None:
            raise ValueError("`verify` needs something to compare with: `outputs`, `loss` or `gradient`.")
        if outputs is not None:
            _compare("outputs", self.params, self.outputs(), _join_lists(outputs, "outputs"), rtol)
        if loss is not None:
            _compare("loss", self.params, self.loss_value(), loss, rtol)
        if gradient is not None:
            _compare("gradient", self.params, self.gradient(), _join_lists(gradient, "gradient"), rtol)


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


def _is_number_list(node: Any) -> bool:
    """A list that holds numbers, or lists of numbers, at every depth."""
    return isinstance(node, list) and len(node) > 0 and all(_is_number(x) or _is_number_list(x) for x in node)


def _is_number(node: Any) -> bool:
    return isinstance(node, int | float | np.number) and not isinstance(node, bool)


def _join_lists(tree: PyTree, name: str) -> PyTree:
    """Turns every nested list of numbers into one array: as a pytree, each number would be a leaf of its own."""

    def join(path: tuple[Any, ...], node: Any) -> Any:
        if not _is_number_list(node):
            return node
        try:
            array = np.asarray(node)
        except ValueError as error:
            where = jtu.keystr(path) or "the root"
            raise ValueError(f"The nested list at `{where}` of `{name}` is ragged: {error}") from None
        return array.astype(jnp.result_type(float)) if array.dtype.kind == "f" or name == "params" else array

    return jtu.tree_map_with_path(join, tree, is_leaf=_is_number_list)


def _to_jax(tree: PyTree) -> PyTree:
    """Arrays on the device; whatever is no array stays."""
    return jtu.tree_map(lambda leaf: jnp.asarray(leaf) if eqx.is_array_like(leaf) else leaf, tree)


def _compare(name: str, params: PyTree, ours: PyTree, expected: PyTree, rtol: float | None) -> None:
    if jtu.tree_structure(ours) != jtu.tree_structure(expected):
        raise ValueError(
            f"`{name}` must have the structure {jtu.tree_structure(ours)}, got {jtu.tree_structure(expected)}."
        )
    worst: tuple[float, str] | None = None
    sizes = [np.max(np.abs(np.asarray(leaf, np.float64)), initial=0) for leaf in jtu.tree_leaves(expected)]
    overall = float(max(sizes, default=0)) or 1.0
    pairs = zip(jtu.tree_leaves_with_path(ours), jtu.tree_leaves(expected), strict=True)
    for (path, leaf), other in pairs:
        place = f"`{name}{jtu.keystr(path)}`"
        if jnp.shape(leaf) != np.shape(other):
            raise ValueError(f"{place} must have shape {jnp.shape(leaf)}, got {np.shape(other)}.")
        dtypes = [np.asarray(leaf).dtype, np.asarray(other).dtype, *(x.dtype for x in jtu.tree_leaves(params))]
        single = any(dtype.name == "bfloat16" or (dtype.kind == "f" and dtype.itemsize < 8) for dtype in dtypes)
        tolerance = (1e-4 if single else 1e-8) if rtol is None else rtol
        mine, theirs = np.asarray(leaf, np.float64), np.asarray(other, np.float64)
        if mine.size == 0:
            continue
        gap = np.abs(mine - theirs)
        # A leaf that should be zero is measured against what the others of its kind amount to.
        peak = float(np.max(np.abs(theirs))) or overall
        finite = bool(np.all(np.isfinite(gap)))
        relative = float(np.max(gap)) / peak if finite else np.inf
        if relative > tolerance and (worst is None or relative > worst[0]):
            at = np.unravel_index(int(np.argmax(np.where(np.isfinite(gap), gap, np.inf))), gap.shape)
            index = tuple(int(i) for i in at)
            worst = (
                relative,
                f"{place} differs by {float(gap[index]):.3g} at {index}: got {float(mine[index]):.9g}, expected "
                f"{float(theirs[index]):.9g}. Relative to the largest entry that is {relative:.3g}, above the "
                f"tolerance {tolerance:.3g}.",
            )
    if worst is not None:
        raise ValueError(
            f"{worst[1]} Usual causes: train instead of eval mode (dropout, batch statistics), a sum for a mean in the "
            "loss, another dtype, transposed weights, another order of the examples."
        )
