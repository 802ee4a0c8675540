"""`track_curvature`: eigenpairs of the Hessian while training, as an optax transformation."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

from hessjax._vectors import row_structure, select, size_of, structure_of, usual_promotion
from hessjax.krylov._warm import LowRank, WarmPairs, warm_eigenpairs
from hessjax.operators import Operator, hvp, precondition
from hessjax.operators._optax import is_masked
from hessjax.training._settings import Settings
from hessjax.training._state import CurvatureState, initial_state
from hessjax.training._subspace import continued, nearness, overlap, principal_angles


def track_curvature(
    loss: Callable[..., Any] | None,
    k: Any,
    key: PRNGKeyArray,
    *,
    every: Any = 1,
    which: str = "LA",
    preconditioner: str | Callable[[Any], PyTree] | None = None,
    operator: Callable[..., Operator] | None = None,
    grow_above: Any = None,
    tol: Any = 3e-3,
    certify: Any = 50,
    guards: Any = 7,
    history: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    """Measures the k outermost eigenpairs of the Hessian during training; the updates pass through unchanged.

    A measurement is made at the parameters that `update` is given, those *before* the update is applied, on the
    first update and then on each `every`-th. It starts from the eigenvectors of the last one; where the Hessian swings
    with period two, as at the edge of stability, from those before that; where it turns steadily, from as far on again.
    What the measurements before it left is a low-rank model of the Hessian, which points out what to multiply next.
    Nothing is computed in between.

    A warm solve cannot know of an eigenvalue that its vectors do not see. So each `certify`-th measurement is
    certified as `hj.eigsh` does it, and so is one whose values moved by a tenth, or whose start was poor (it took eight
    times the products of a good one); the first always is. `certified` in the state says when that last succeeded.

    Costs k products for a start that is still good, more where it is not, certificates beside that. On digits, before
    the edge of stability and on it: 1.3 and 2.2 a measurement at every step for k = 1, 3.4 and 4.8 for k = 3; at every
    tenth step 2.3 and 4, 6.8 and 7.3; from nothing, 30 and 46. A product takes the time of about two gradients on the
    same batch. Memory for 3k + `guards` vectors, and 2k + `guards` + 13 + max(20, 3k + 3) more during a measurement.

    The update takes the extra arguments

    - `batch=`: a tuple of the loss's further arguments. Required.
    - `opt_state=`: an optax state, for a `preconditioner` to read.
    - `grad=`: the gradient, for `gradient_overlap`, where the updates that come in are something else.

    Runs under `jit`, `scan`, `vmap` and in the optax combinators that pass extra arguments on to all parameters'
    updates (not `lookahead`, nor `masked` over a part: chain the tracker outside), and without optax's optimizers:
    `init` and `update` are two pure functions, and the updates may be None. `optax.MultiSteps` calls what it wraps on
    every mini-step and throws most results away: chain the tracker before it, not inside. A whole run under `vmap`,
    with `init` in it, skips what is not due; a `vmap` over states that hold a step each computes every measurement and
    keeps the due ones. Derivatives do not flow through the state. NaN in it stands for what has not been measured,
    which `jax_debug_nans` objects to.

    Args:
        loss: `loss(params, *batch)`, a scalar. None if `operator` is given.
        k: the number of eigenpairs; with `grow_above` the most of them.
        key: the same key gives the same bits.
        every: updates from one measurement to the next.
        which: "LA" largest, "SA" smallest, "LM" largest magnitude, "BE" from both ends; as in `hj.eigsh`.
        preconditioner: None; or "from_opt_state" for D⁻¹ᐟ² H D⁻¹ᐟ² with D = `hj.adam_preconditioner(opt_state)`; or
            a function from `opt_state` to D, such as that one with the hyperparameters that you changed. Give the
            state that the optimizer returned for this very gradient. An optimizer that the tracker shares a chain with
            can only give the state before: D is then one step old, and the first measurement NaN, as Adam has no D yet.
        operator: `(params, *batch) -> hj.Operator` on vectors shaped as the parameters, in place of `hj.hvp(loss)`.
        grow_above: measure only the pairs with an eigenvalue above this scalar, and the next one below. So one pair
            suffices until the sharpness comes to `hj.edge_of_stability(...)`, and others join it as they get there.
            A traced scalar will do. Only with "LA".
        tol: a pair has converged when its residual is at most tol · |λ|. An eigenvalue's error is about the square of
            that, over the relative gap: with the default at most 3e-4 on digits at the edge of stability.
        certify: measurements from one unconditional certificate to the next. 1 for all.
        guards: how many approximate eigenvectors to keep beside the k. Together they are the model that guides the next
            measurement. Each costs the memory of a vector and no product; with 1, tenth steps take half as many
            products again.
        history: keep the eigenvalues of this many measurements in the state.

    Returns:
        An `optax.GradientTransformationExtraArgs`. Its state is a `hj.CurvatureState`: `eigenvalues`, `eigenvectors`,
        `residuals`, `num_matvecs`, `step` and more, of one structure for life. Where the loss is not finite the
        eigenvalues are NaN and the residuals infinite, and the next measurement starts afresh.

    Raises:
        ValueError: an argument is out of range; both or neither of `loss` and `operator` came; from `update`, if
            `params`, `batch` or `opt_state` is missing, or the state is that of other parameters; and where a part of
            the parameters is masked.
        TypeError: `loss` or `operator` is no function; `k`, `every`, `certify`, `guards` or `history` is not an
            integer, `key` no key; and, from `init`, a parameter is not a floating-point array.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp, optax
        >>> loss = lambda w, x: jnp.mean((x @ w) ** 2) / 2
        >>> tracker = hj.track_curvature(loss, 1, jax.random.key(0))
        >>> optimizer = optax.chain(tracker, optax.sgd(0.1))
        >>> w, x = jnp.ones(2), jnp.array([[2.0, 0.0], [0.0, 4.0]])
        >>> state = optimizer.init(w)
        >>> updates, state = optimizer.update(jax.grad(loss)(w, x), state, w, batch=(x,))
        >>> optax.tree.get(state, "eigenvalues").tolist()
        [8.0]
    """
    settings = Settings.of(
        loss=loss,
        key=key,
        k=k,
        every=every,
        which=which,
        preconditioner=preconditioner,
        operator=operator,
        grow_above=grow_above,
        tol=tol,
        certify=certify,
        guards=guards,
        history=history,
    )

    def init(params: optax.Params) -> Any:  # a CurvatureState, for which optax's own alias is too narrow
        _needs_all(params)
        n = size_of(structure_of(params))
        if settings.k > n:
            raise ValueError(f"`track_curvature` needs `k` <= {n}, the number of parameters, got {settings.k}.")
        return initial_state(params, settings.k, min(settings.guards, n - settings.k), settings.history, key)

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        batch: Any = None,
        opt_state: Any = None,
        grad: optax.Updates | None = None,
        **_: Any,
    ) -> tuple[optax.Updates, Any]:
        if params is None:
            raise ValueError(
                "`track_curvature` measures at the parameters, got `params=None`. Call "
                "`update(updates, state, params, batch=...)`."
            )
        if not isinstance(batch, tuple | list):
            raise ValueError(
                "`track_curvature` needs `batch=`, a tuple of the loss's arguments after the parameters, such as "
                f"`batch=(x, y)`, or `batch=()` if there are none. Got {type(batch).__name__}. Is it handed on by what "
                "calls `update`? Flax's `TrainState.apply_gradients` does not: call `state.tx.update` itself."
            )
        if settings.preconditioner is not None and opt_state is None:
            raise ValueError(
                "`track_curvature` with a `preconditioner` needs `opt_state=`, the optimizer's state. Got None."
            )
        _needs_all(params)
        _needs_state_of(state, params, settings.k)
        vectors = jtu.tree_map(jnp.asarray, (params, updates, grad))
        read = opt_state if settings.preconditioner is not None else None
        given = Measured(vectors[0], tuple(batch), read, *vectors[1:])
        given = jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, given)
        return updates, _follow(settings, state, given)

    return optax.GradientTransformationExtraArgs(init, update)


def _needs_all(params: PyTree) -> None:
    """Raises ValueError where an optax combinator hides a part of the parameters, of which the loss is a function."""
    masked = [node for node in jtu.tree_leaves(params, is_leaf=is_masked) if is_masked(node)]
    if masked:
        raise ValueError(
            f"`track_curvature` needs all parameters, but {len(masked)} of them are masked, as in `optax.masked` or "
            "`optax.multi_transform`. Chain the tracker outside."
        )


def _needs_state_of(state: Any, params: PyTree, k: int) -> None:
    """Raises ValueError unless `state` is what `init` makes for these parameters."""
    if not isinstance(state, CurvatureState):
        raise ValueError(f"`track_curvature` needs the state that its `init` made, got {type(state).__name__}.")
    structure = structure_of(params)
    tracked = row_structure(state.eigenvectors)
    if tracked != structure or state.eigenvalues.shape != (k,):
        raise ValueError(
            f"`track_curvature` needs the state that its `init` made for these parameters, {k} pairs on {structure}, "
            f"got {state.eigenvalues.shape[0]} on {tracked}."
        )


class Measured(eqx.Module):
    """What a measurement is made of."""

    params: PyTree
    batch: tuple[Any, ...]
    opt_state: Any
    updates: PyTree
    grad: PyTree | None


@eqx.filter_jit
@usual_promotion()
def _follow(settings: Settings, state: CurvatureState, given: Measured) -> CurvatureState:
    """The state after one more update. Compiled by itself, so that a loop in Python compiles once."""
    due = state.step % settings.every == 0
    state = lax.cond(due, lambda: _measure(settings, state, given), lambda: state)
    return state._replace(step=state.step + 1)


def _measure(settings: Settings, state: CurvatureState, given: Measured) -> CurvatureState:
    op = _operator(settings, given)
    key = state.entropy
    if settings.implementation is not None:
        key = jax.random.wrap_key_data(key, impl=settings.implementation)
    count = state.step // settings.every
    predictions = _predictions(state)
    first = select(state.prediction == 1, *predictions[1:])
    first = jtu.tree_map(lambda leaf: jnp.where(state.prediction == 0, 0, leaf), first)
    pairs = warm_eigenpairs(
        op,
        first,
        LowRank(state.model_values, state.model_vectors),
        state.eigenvalues,
        jax.random.fold_in(key, state.step),
        which=settings.which,
        tol=jnp.asarray(settings.tol, state.eigenvalues.dtype),
        certify=count % settings.certify == 0,
        grow_above=None if settings.grow_above is None else settings.grow_above.astype(state.eigenvalues.dtype),
    )
    return _record(settings, state, given, pairs, predictions, count)


def _predictions(state: CurvatureState) -> tuple[PyTree, PyTree, PyTree]:
    """Where the next eigenvectors may lie: where the last did, where those before them did, or as far on again."""
    last = jtu.tree_map(lambda x, leaf: leaf[: x.shape[0]], state.eigenvectors, state.model_vectors)
    return last, state.earlier, continued(last, state.earlier)


def _record(
    settings: Settings,
    state: CurvatureState,
    given: Measured,
    pairs: WarmPairs,
    predictions: tuple[PyTree, PyTree, PyTree],
    count: Array,
) -> CurvatureState:
    """The state after a measurement, which is the `count`-th."""
    vectors = pairs.vectors
    known, failed = jnp.isfinite(state.eigenvalues[-1]), ~jnp.isfinite(pairs.values[-1])
    angles = principal_angles(state.eigenvectors, vectors)
    nearest = jnp.argmax(jnp.stack([nearness(vectors, rows) for rows in predictions]))
    grad = given.updates if given.grad is None else given.grad
    history, history_steps = state.history, state.history_steps
    if history is not None and history_steps is not None:
        slot = count % settings.history
        history, history_steps = history.at[slot].set(pairs.values), history_steps.at[slot].set(state.step)
    return CurvatureState(
        eigenvalues=pairs.values,
        eigenvectors=vectors,
        residuals=pairs.residuals,
        num_tracked=jnp.sum(~jnp.isnan(pairs.values), dtype=jnp.int32),
        num_matvecs=state.num_matvecs + pairs.num_matvecs,
        step=state.step,
        measured=state.step,
        certified=jnp.where(pairs.certified, state.step, state.certified),
        angles=jnp.where(known & ~failed, angles, jnp.nan),
        gradient_overlap=jnp.where(failed, jnp.nan, overlap(grad, vectors)),
        update_overlap=jnp.where(failed, jnp.nan, overlap(given.updates, vectors)),
        history=history,
        history_steps=history_steps,
        model_values=pairs.model.values,
        model_vectors=pairs.model.vectors,
        earlier=jtu.tree_map(lambda leaf: jnp.where(failed, 0, leaf).astype(leaf.dtype), predictions[0]),
        prediction=nearest.astype(jnp.int32),
        entropy=state.entropy,
    )


def _operator(settings: Settings, given: Measured) -> Operator:
    build = settings.function if settings.builds else hvp(settings.function)
    op = build(given.params, *given.batch)
    if not isinstance(op, Operator):
        raise TypeError(f"`operator` must return an `hj.Operator`, got {type(op).__name__}. See `hj.operator`.")
    # What the loss closes over may be differentiated around the tracker; the measurement is not.
    op = jtu.tree_map(lambda x: lax.stop_gradient(x) if eqx.is_array(x) else x, op)
    if op.structure != structure_of(given.params):
        raise ValueError(
            f"`operator` must act on vectors shaped as the parameters, {structure_of(given.params)}, got "
            f"{op.structure}."
        )
    return op if settings.preconditioner is None else precondition(op, settings.preconditioner(given.opt_state))
