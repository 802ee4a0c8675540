"""The diagonal preconditioner that an optax optimizer applies, read from its state.

An adaptive optimizer divides by a root of accumulated squared gradients. That accumulator lies somewhere inside a
nested state: in a chain, under a mask, in one part of a partition, behind injected hyperparameters.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, PyTree

from hessjax._vectors import as_vector, structure_of


def adam_preconditioner(
    opt_state: Any,
    *,
    b1: Any = None,
    b2: Any = None,
    eps: Any = None,
    eps_root: Any = None,
    eps_in_sqrt: bool | None = None,
    like: PyTree | None = None,
) -> PyTree[Array]:
    """The diagonal D by which an adaptive optimizer divided its last update, from the optax state after that update.

    - Adam (`adam`, `adamw`, `scale_by_adam`; `amsgrad` with its running maximum for ν̂):
      D = (1 - b1ᵗ) (√(ν / (1 - b2ᵗ) + eps_root) + eps), so that the update is -lr · μ / D with the state's own μ,
      before any weight decay. Nesterov's form (`nadam`) has the same D, with
      b1 μ (1 - b1ᵗ) / (1 - b1ᵗ⁺¹) + (1 - b1) g for μ.
    - RMSProp (`rmsprop`, `scale_by_rms`, centred or not): D = √(ν + eps), or √ν + eps with `eps_in_sqrt=False`; b2 is
      optax's `decay`, for the bias correction where it is on. `contrib.schedule_free_adamw` is of this form.
    - Adagrad (`adagrad`, `scale_by_rss`): D = √(Σ g² + eps), infinite where no gradient came yet.

    The state is found inside `chain`, `named_chain`, `masked`, `multi_transform`, `MultiSteps` and the like. Whatever
    optax does after the division (learning rate, momentum, trust ratio) has no part in D. Other optimizers' states are
    refused by name. But some keep Adam's state and cannot be told from it: D is right for `lamb` with `eps=1e-6` and
    `yogi` with `eps=1e-3`, right up to one scalar factor for `radam`, and wrong for `adamax` and `adopt`.

    Args:
        opt_state: the state after at least one update; D is not finite before.
        b1: as given to the optimizer. A state does not hold its hyperparameters, unless `optax.inject_hyperparams` put
            them there: those are read. What is neither given nor found is the default of optax's function (of
            `schedule_free_adamw` inside its state), so give what you changed.
        b2: likewise; optax's `decay` for RMSProp.
        eps: likewise.
        eps_root: likewise.
        eps_in_sqrt: likewise, for the form of RMSProp alone.
        like: the parameters. Needed only where some of them have no adaptive state (the part of a `multi_transform`
            under `sgd`): there D = 1.

    Returns:
        A pytree shaped as the parameters, for `hj.precondition`.

    Raises:
        ValueError: `opt_state` holds no such state, or that of an optimizer which scales in another way (Lion,
            Adafactor, AdaBelief, Muon and others), or two for one parameter, or none for some parameter and `like` is
            not given.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp, optax
        >>> optimizer = optax.adam(0.1)
        >>> params, gradient = jnp.zeros(2), jnp.array([3.0, -4.0])
        >>> _, state = optimizer.update(gradient, optimizer.init(params), params)
        >>> [round(d, 4) for d in hj.adam_preconditioner(state).tolist()]   # (1 - b1) |g| after one step
        [0.3, 0.4]

    Source: Cohen et al., Adaptive gradient methods at the edge of stability, arXiv:2207.14484, for the factor of b1.
    """
    given = {"b1": b1, "b2": b2, "eps": eps, "eps_root": eps_root, "eps_in_sqrt": eps_in_sqrt}
    given = {name: value for name, value in given.items() if value is not None}
    parts = [rule(state, {**known, **given}) for state, rule, known in _search(opt_state, {})]
    if not parts:
        kinds = ", ".join(_kinds(opt_state)) or type(opt_state).__name__
        raise ValueError(
            f"`opt_state` must hold one of {', '.join(_RULES)}, got {kinds}. Pass the state that `optimizer.init` or "
            "`optimizer.update` returned."
        )
    return _complete(functools.reduce(_merge, parts), like)


Hyperparameters = dict[str, Any]
Rule = Callable[[Any, Hyperparameters], PyTree]


def _search(state: Any, known: Hyperparameters) -> list[tuple[Any, Rule, Hyperparameters]]:
    """Every adaptive state, with the rule that reads it and the hyperparameters that are known from around it."""
    kind = type(state).__name__
    if kind in _UNREAD:
        raise ValueError(
            f"`opt_state` holds {kind}, which scales the gradient in another way than the states that are read here: "
            f"{', '.join(_RULES)}. Of a partition, pass the part that belongs to one of these, and `like=params`."
        )
    if kind in _RULES:
        return [(state, _RULES[kind], known)]
    hyperparams = getattr(state, "hyperparams", None)
    if isinstance(hyperparams, Mapping):
        known = {**known, **hyperparams}
    known = {**_DEFAULTS.get(kind, {}), **known}
    return [hit for child in _children(state) for hit in _search(child, known)]


def _kinds(state: Any) -> list[str]:
    """The classes of the optax states in a state, each once."""
    own = [type(state).__name__] if hasattr(state, "_fields") else []
    return list(dict.fromkeys(own + [kind for child in _children(state) for kind in _kinds(child)]))


def _children(node: Any) -> list[Any]:
    """The nodes one level below; none below a leaf."""
    return [child for child in jtu.tree_leaves(node, is_leaf=lambda child: child is not node) if child is not node]


def _corrected(moment: PyTree, decay: Any, count: Any) -> PyTree:
    """Divides by 1 - decayᵗ, the power taken before the cast to the moment's dtype, as optax does."""
    factor = _warmth(decay, count)
    return jtu.tree_map(lambda x: x / factor.astype(x.dtype), moment)


def _warmth(decay: Any, count: Any) -> Array:
    return 1 - decay ** jnp.asarray(count)


def _adam(state: Any, given: Hyperparameters) -> PyTree:
    corrected = _corrected(state.nu, given.get("b2", 0.999), state.count)
    return _with_momentum(state, corrected, given)


def _amsgrad(state: Any, given: Hyperparameters) -> PyTree:
    return _with_momentum(state, state.nu_max, given)


def _with_momentum(state: Any, nu: PyTree, given: Hyperparameters) -> PyTree:
    """(1 - b1ᵗ) (√(ν̂ + eps_root) + eps): the moment's own bias correction divides as well."""
    warmth = _warmth(given.get("b1", 0.9), state.count)
    eps, root = given.get("eps", 1e-8), given.get("eps_root", 0.0)
    return jtu.tree_map(lambda x: warmth.astype(x.dtype) * (jnp.sqrt(x + root) + eps).astype(x.dtype), nu)


def _rms(state: Any, given: Hyperparameters) -> PyTree:
    decay, eps = given.get("b2", given.get("decay", 0.9)), given.get("eps", 1e-8)
    corrects = "count" in state._fields
    nu = _corrected(state.nu, decay, state.count) if corrects else state.nu
    if "mu" in state._fields:  # centred: the variance in place of the second moment
        mu = _corrected(state.mu, decay, state.count) if corrects else state.mu
        nu = jtu.tree_map(lambda x, m: x - m * m, nu, mu)
    root = (lambda x: jnp.sqrt(x + eps)) if given.get("eps_in_sqrt", True) else (lambda x: jnp.sqrt(x) + eps)
    return jtu.tree_map(lambda x: root(x).astype(x.dtype), nu)


def _adagrad(state: Any, given: Hyperparameters) -> PyTree:
    eps = given.get("eps", 1e-7)
    return jtu.tree_map(lambda x: jnp.where(x > 0, jnp.sqrt(x + eps), jnp.inf).astype(x.dtype), state.sum_of_squares)


# By name, because optax does not export all of these classes.
_RULES: dict[str, Rule] = {
    "ScaleByAdamState": _adam,
    "ScaleByAmsgradState": _amsgrad,
    "ScaleByRmsState": _rms,
    "ScaleByRmsWithCountState": _rms,
    "ScaleByRStdDevState": _rms,
    "ScaleByRStdDevWithCountState": _rms,
    "ScaleByRssState": _adagrad,
}
# The defaults of optax's functions that wrap such a state, by the state that tells of the wrapping.
_DEFAULTS: dict[str, Hyperparameters] = {
    "ScheduleFreeState": {"decay": 0.999, "eps_in_sqrt": False},  # contrib.schedule_free_adamw
}
_UNREAD = {
    "FactoredState",
    "GaLoreState",
    "MuonState",
    "ScaleByAdaDeltaState",
    "ScaleByAdanState",
    "ScaleByAdemamixState",
    "ScaleByBeliefState",
    "ScaleByLBFGSState",
    "ScaleByLionState",
    "ScaleByNovogradState",
    "ScaleByRpropState",
    "ScaleBySM3State",
    "SophiaState",
}


def is_masked(node: Any) -> bool:
    """Whether optax put this in the place of parameters that a transformation does not see."""
    return isinstance(node, optax.MaskedNode)


def _merge(first: PyTree, second: PyTree) -> PyTree:
    """Two trees that cover different parameters, each masked where the other is not."""
    if is_masked(first) or is_masked(second):
        return second if is_masked(first) else first
    ours, theirs = _children(first), _children(second)
    if jtu.all_leaves([first]) or len(ours) != len(theirs):
        raise ValueError(
            "`opt_state` must hold one adaptive state for a parameter, got two of them for the same one. Pass the part "
            "of the state that belongs to the preconditioner you mean."
        )
    treedef = jtu.tree_structure(first, is_leaf=lambda child: child is not first)
    return treedef.unflatten([_merge(a, b) for a, b in zip(ours, theirs, strict=True)])


def _complete(scale: PyTree, like: PyTree | None) -> PyTree:
    """D = 1 for parameters without an adaptive state."""
    if like is None:
        bare = [path for path, d in jtu.tree_leaves_with_path(scale, is_leaf=is_masked) if is_masked(d)]
        if bare:
            places = ", ".join(f"`{jtu.keystr(path)}`" for path in bare)
            raise ValueError(
                f"`opt_state` holds no adaptive state for {places}. Pass `like=params`, and D is 1 there; or leave "
                "these parameters out of the operator with `hj.restrict`."
            )
        return scale
    structure = structure_of(like)

    def fill(d: Any, spec: PyTree) -> PyTree:
        return jtu.tree_map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), spec) if is_masked(d) else d

    try:
        scale = jtu.tree_map(fill, scale, structure, is_leaf=is_masked)
    except ValueError:
        got = jtu.tree_structure(scale)
        raise ValueError(f"`like` must have the structure of the optimized parameters, {got}, got {like!r}.") from None
    return as_vector(scale, structure, "like")
