"""The side of the outputs: J Jᵀ where the Gauss-Newton matrix is Jᵀ J.

For N examples of c outputs and n parameters, Nc ≪ n, the few nonzero eigenvalues of an n × n matrix are those of an
Nc × Nc one: vectors there are small, and a solver needs little memory. J Jᵀ itself is the neural tangent kernel.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree, Scalar

from hessjax._function import Function, as_function
from hessjax._vectors import matmul
from hessjax.operators._examples import Data, as_arguments, linearize
from hessjax.operators._operator import Operator, hoisted
from hessjax.operators._output_root import output_hessian, root_of
from hessjax.operators._slices import count_examples


def ntk(forward: Callable[[PyTree, PyTree], PyTree]) -> Callable[[PyTree, PyTree], Operator]:
    """Transforms a model into its empirical neural tangent kernel: `(params, inputs) -> Operator` on outputs.

    K = J Jᵀ with J the Jacobian of all outputs. The entry for outputs (n, i) and (m, j) is ⟨∇zₙᵢ, ∇zₘⱼ⟩. Nothing is
    divided by N: the nonzero eigenvalues of K / N are those of the Gauss-Newton matrix of half the squared error,
    `hj.fisher(forward, "gaussian")`. For another loss see `hj.ggn_gram`. A product costs a pass of cotangents and one
    of tangents over all examples.

    Args:
        forward: `forward(params, x)` on one example, a pytree of real floating-point arrays.

    Returns:
        A function of `(params, inputs)`. Its operator acts on pytrees shaped as the outputs, the examples on the
        leading axis. `forward` is traced once when it is made, to learn those shapes.

    Raises:
        ValueError: when called, the examples' leading lengths differ or are missing, or an output is not a real
            floating-point array.
        TypeError: when called, a leaf of `params` is not a floating-point array.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> K = hj.ntk(lambda w, x: jnp.dot(w, x))(jnp.zeros(3), jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> K.dense().tolist()
        [[5.0, 2.0], [2.0, 2.0]]

    Source: Jacot, Gabriel and Hongler, Neural tangent kernel, arXiv:1806.07572.
    """

    def build(params: PyTree, inputs: PyTree) -> Operator:
        return _gram(as_function(forward, "forward"), None, params, inputs, None)

    return build


def ggn_gram(
    forward: Callable[[PyTree, PyTree], PyTree], loss: Callable[[PyTree, PyTree], Scalar]
) -> Callable[[PyTree, PyTree, PyTree], Operator]:
    """Transforms a model and its loss into the small side of the Gauss-Newton matrix: `(params, inputs, targets)`.

    With a root Rₙ Rₙᵀ of the loss's Hessian at every output, G = (1/N) Σₙ JₙᵀRₙ RₙᵀJₙ and this is the Nc × Nc matrix
    (1/N) RᵀJ JᵀR: the same nonzero eigenvalues, for outputs of c entries. An eigenvector u here gives JᵀRu there.

    Args:
        forward: `forward(params, x)` on one example, a pytree of real floating-point arrays.
        loss: `loss(output, target)` on one example, convex in its output. Its c × c Hessians are formed and factored in
            every product, in c³ operations for an example.

    Returns:
        A function of `(params, inputs, targets)`. Its operator acts on pytrees shaped as the outputs.

    Raises:
        ValueError, TypeError: as `hj.ntk`; when applied, ValueError for a loss that is not a scalar.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, optax
        >>> forward, loss = lambda w, x: jnp.dot(w, x), optax.losses.l2_loss
        >>> data = jnp.array([[1.0, 2.0, 2.0]]), jnp.zeros(1)
        >>> small, large = (f(forward, loss)(jnp.zeros(3), *data) for f in (hj.ggn_gram, hj.ggn))
        >>> small.size, large.size
        (1, 3)
        >>> small.dense().item(), jnp.trace(large.dense()).item()
        (9.0, 9.0)
    """

    def build(params: PyTree, inputs: PyTree, targets: PyTree) -> Operator:
        return _gram(as_function(forward, "forward"), as_function(loss, "loss"), params, inputs, targets)

    return build


def _gram(forward: Function, loss: Function | None, params: PyTree, inputs: PyTree, targets: PyTree) -> Operator:
    params, data = as_arguments(params, inputs, targets)
    structure = eqx.filter_eval_shape(jax.vmap(forward, in_axes=(None, 0)), params, data[0])
    bad = [
        f"{leaf.dtype}{list(leaf.shape)} at `{jtu.keystr(path) or 'the root'}`"
        for path, leaf in jtu.tree_leaves_with_path(structure)
        if not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if bad or not jtu.tree_leaves(structure):
        raise ValueError(f"`forward` must return real floating-point arrays alone, got {', '.join(bad) or 'none'}.")
    leaves, treedef = jtu.tree_flatten(structure)
    op = Gram(forward, loss, params, data, tuple(leaves), treedef)
    return hoisted(op, forward) if loss is None else hoisted(op, forward, loss)


class Gram(Operator):
    """J Jᵀ, or (1/N) RᵀJ JᵀR where there is a loss."""

    forward: Function
    loss: Function | None
    params: PyTree
    data: Data
    leaves: tuple[jax.ShapeDtypeStruct, ...] = eqx.field(static=True)
    treedef: Any = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return self.treedef.unflatten(self.leaves)

    def product(self, vector: PyTree) -> PyTree:
        inputs, targets = self.data
        at = linearize(self.forward, self.params, inputs, batched=False)
        if self.loss is None:
            return at.push(at.pull(vector))
        loss, count = self.loss, count_examples(self.data)

        def root(output: PyTree, constants: PyTree, target: PyTree) -> Array:
            return root_of(output_hessian(loss, output, constants, target)) / count**0.5

        roots = jax.vmap(root)(at.outputs, at.constants, targets)
        image = at.push(at.pull(_each(roots, vector)))
        return _each(jnp.swapaxes(roots, 1, 2), image)


def _each(matrices: Array, vectors: PyTree) -> PyTree:
    """Applies the n-th matrix to the n-th vector, a pytree."""

    def apply(matrix: Array, vector: PyTree) -> PyTree:
        flat, unravel = ravel_pytree(vector)
        return unravel(matmul(matrix, flat))

    return jax.vmap(apply)(matrices, vectors)
