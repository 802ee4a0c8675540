"""What a tracker knows of the curvature: one structure for life, so that it can be carried, donated and saved."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, Scalar

from hessjax._vectors import scalar_dtype, structure_of


class CurvatureState(NamedTuple):
    """The top of the spectrum at the last measurement, and what the next one starts from.

    Read it out of a nested optax state by name, as in `optax.tree.get(opt_state, "eigenvalues")`.

    Attributes:
        eigenvalues: (k,), ascending; the last is always measured. NaN before the first measurement, where the loss was
            not finite, and where `grow_above` asks for fewer than k pairs.
        eigenvectors: the parameters' structure with a leading axis k on every leaf. Orthonormal; the entry of largest
            magnitude is positive. Zero where the eigenvalues are NaN.
        residuals: (k,), ‖Hv - λv‖, absolute. Infinite where the eigenvalues are NaN.
        num_tracked: how many eigenvalues are not NaN: the last so many.
        num_matvecs: products spent so far, those of certificates included.
        step: updates seen so far.
        measured: the `step` at which the eigenvalues were measured, at the parameters before that update; -1 for none.
        certified: the last measured step at which a certificate showed that no wanted eigenvalue was missed; -1.
        angles: (k,), the principal angles in radians between this space of eigenvectors and the one measured before
            it, ascending; NaN where either is missing. Where their dimensions differ there are as many angles as the
            smaller one has.
        gradient_overlap: the share of ‖g‖² that lies in the space of the eigenvectors, where g is the extra argument
            `grad=`, or else the updates that came in. NaN before a measurement.
        update_overlap: the same of the updates that came in, whatever `grad=` is.
        history: (length, k), the eigenvalues of the last `length` measurements, as a ring; None for a length of 0.
        history_steps: (length,), the steps they were measured at, -1 for none. The oldest comes first after
            `jnp.argsort(history_steps)`.
        model_values: (k + guards,), approximate eigenvalues, the most wanted first.
        model_vectors: approximate eigenvectors for them: what the last measurements left known of the Hessian, from
            which the next one starts.
        earlier: the first k of the `model_vectors` of the measurement before the last.
        prediction: what foretold the last eigenvectors best, and so tells the start of the next measurement. 0: those
            before them; 1: those before the ones before, as where the Hessian swings with period two; 2: the way from
            `earlier` to those before, gone as far again.
        entropy: the data of a random key that every measurement folds its step into.
    """

    eigenvalues: Float[Array, " k"]
    eigenvectors: PyTree[Float[Array, "k ..."]]
    residuals: Float[Array, " k"]
    num_tracked: Int[Array, ""]
    num_matvecs: Int[Array, ""]
    step: Int[Array, ""]
    measured: Int[Array, ""]
    certified: Int[Array, ""]
    angles: Float[Array, " k"]
    gradient_overlap: Scalar
    update_overlap: Scalar
    history: Float[Array, "length k"] | None
    history_steps: Int[Array, " length"] | None
    model_values: Float[Array, " m"]
    model_vectors: PyTree[Float[Array, "m ..."]]
    earlier: PyTree[Float[Array, "k ..."]]
    prediction: Int[Array, ""]
    entropy: Array


def initial_state(params: PyTree, k: int, guards: int, history: int, key: PRNGKeyArray) -> CurvatureState:
    """Nothing known yet. No two fields share a buffer, and none is the caller's, so that all can be donated."""
    structure = structure_of(params)
    dtype = scalar_dtype(structure)

    def rows(count: int) -> PyTree:
        return jtu.tree_map(lambda leaf: jnp.zeros((count, *leaf.shape), leaf.dtype), structure)

    def integer(value: int) -> Array:
        return jnp.full((), value, jnp.int32)

    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return CurvatureState(
        eigenvalues=jnp.full(k, jnp.nan, dtype),
        eigenvectors=rows(k),
        residuals=jnp.full(k, jnp.inf, dtype),
        num_tracked=integer(0),
        num_matvecs=integer(0),
        step=integer(0),
        measured=integer(-1),
        certified=integer(-1),
        angles=jnp.full(k, jnp.nan, dtype),
        gradient_overlap=jnp.full((), jnp.nan, dtype),
        update_overlap=jnp.full((), jnp.nan, dtype),
        history=jnp.full((history, k), jnp.nan, dtype) if history else None,
        history_steps=jnp.full(history, -1, jnp.int32) if history else None,
        model_values=jnp.zeros(k + guards, dtype),
        model_vectors=rows(k + guards),
        earlier=rows(k),
        prediction=integer(0),
        entropy=jnp.array(jax.random.key_data(key) if typed else key, copy=True),
    )
