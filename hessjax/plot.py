"""Pictures of what the other rooms return, on matplotlib's axes.

In: eigenpairs, densities, the tracker's state, numbers by block. Out: the `matplotlib.axes.Axes` drawn on, to label,
limit and save as any other. Each function draws on `ax`, or on a figure of its own where none is given. Nothing here
multiplies by an operator; `loss_along` evaluates a loss. matplotlib is imported at the first call.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float, PyTree

from hessjax._arguments import as_integer
from hessjax._lines import loss_of, losses_along, value_and_slopes
from hessjax._vectors import row_structure, structure_of
from hessjax.estimate import Density, Estimate
from hessjax.krylov import Eigenpairs

# Okabe and Ito's colours, told apart with any kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_SOFT = "#8a8a8a"
_POINTS = 2000  # of a density's grid, beside
_OUTER = 20  # nodes at either end
_Numbers = float | int | list | tuple | np.ndarray | np.number | jax.Array


def density(
    density: Density | Any, *, sigma: Any = None, eigenvalues: Any = None, label: str | None = None, ax: Any = None
) -> Any:
    """The density of the eigenvalues on a logarithmic axis, with two standard errors either way.

    The curve ends below a fifth of what a single eigenvalue contributes at its peak, 1 / (n σ √(2π)): nothing lower has
    a meaning.

    Args:
        density: what `hj.spectral_density` returns.
        sigma: the smoothing, as in `Density.pdf`, whose default it shares.
        eigenvalues: marked below the curve in its colour: known eigenvalues, an array, or `Eigenpairs`.
        label: of the curve, in a legend.
        ax: the axes to draw on.

    Returns:
        The axes. The horizontal one has the units of the eigenvalues, the vertical one their inverse.

    Raises:
        TypeError: `density` is no `Density`.
        ValueError: it is a batch, or not finite; or `sigma` is not positive.
        ImportError: matplotlib is not installed.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.linspace(0.0, 1.0, 500) * v, like=jnp.zeros(500))
        >>> ax = hj.plot.density(hj.spectral_density(A, jax.random.key(0), num_steps=30))  # doctest: +SKIP
    """
    if not isinstance(density, Density):
        raise TypeError(
            f"`plot.density` draws what `hj.spectral_density` returns, got {type(density).__name__}. For eigenvalues "
            "alone there is `hj.plot.eigenvalues`."
        )
    _one(density.nodes, 2, "density")
    if not np.all(np.isfinite(density.ends)):
        raise ValueError("`plot.density` needs a finite density. It is NaN where the operator's products are.")
    if sigma is not None and not 0 < float(sigma) < np.inf:
        raise ValueError(f"`plot.density` needs a positive `sigma`, got {sigma}.")
    low, high = (float(end) for end in density.ends)
    width = float(density.default_width if sigma is None else sigma)
    # Outermost nodes lie far apart, and their peaks between the points of an even grid.
    nodes = np.sort(np.asarray(density.nodes)[np.asarray(density.weights) > 0])
    peaks = np.add.outer(np.concatenate([nodes[:_OUTER], nodes[-_OUTER:]]), width * np.linspace(-3, 3, 13))
    grid = np.unique(np.concatenate([np.linspace(low - 4 * width, high + 4 * width, _POINTS), peaks.ravel()]))
    curve = density.pdf(grid, sigma)
    value, error = np.asarray(curve.value, float), 2 * np.nan_to_num(np.asarray(curve.stderr, float), posinf=0.0)
    least = 0.2 / (density.size * width * (2 * np.pi) ** 0.5)
    ax = _axes(ax, "density")
    colour = _next_colour(ax)
    ax.plot(grid, np.where(value > least, value, np.nan), color=colour, linewidth=1.2, label=label)
    below, above = (np.maximum(value + side * error, least) for side in (-1, 1))
    ax.fill_between(grid, below, above, where=above > least, color=colour, alpha=0.25, linewidth=0)
    if eigenvalues is not None:
        known, _, good = _spectrum(eigenvalues, "eigenvalues")
        known = known[good]
        ax.plot(known, np.full(known.size, 0.03), "|", color=colour, transform=ax.get_xaxis_transform())
    ax.set_yscale("log")
    return _finish(ax, "eigenvalue λ", "density of eigenvalues", label is not None)


def eigenvalues(pairs: Any, *, label: str | None = None, ax: Any = None) -> Any:
    """The eigenvalues by rank, the largest first, with their error bounds; those that did not converge are hollow.

    Args:
        pairs: what `hj.eigsh` returns, or an array of eigenvalues.
        label: of the points, in a legend.
        ax: the axes to draw on.

    Returns:
        The axes. The vertical one has the units of the eigenvalues.

    Raises:
        TypeError: `pairs` are neither.
        ValueError: they are a batch.
        ImportError: matplotlib is not installed.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: jnp.linspace(0.0, 1.0, 500) * v, like=jnp.zeros(500))
        >>> ax = hj.plot.eigenvalues(hj.eigsh(A, 6, jax.random.key(0)))  # doctest: +SKIP
    """
    values, errors, good = _spectrum(pairs, "pairs")
    ax = _axes(ax, "eigenvalues")
    order = np.argsort(-values, kind="stable")
    colour = _next_colour(ax)
    ax.axhline(0, color=_SOFT, linewidth=0.8, zorder=0)
    _points(ax, np.arange(1, values.size + 1), values[order], good[order], colour, label, yerr=errors[order])
    ax.xaxis.get_major_locator().set_params(integer=True)
    return _finish(ax, "rank", "eigenvalue λ", label is not None)


def tracking(state: Any, *, steps: Any = None, threshold: Any = None, label: str | None = None, ax: Any = None) -> Any:
    """Tracked eigenvalues over the steps of training, and the threshold that they are compared with.

    Args:
        state: what keeps them: an optimizer's state with a `hj.track_curvature(..., history=n)` in it, or the values
            themselves, (steps,) or (steps, k), as a `lax.scan` collects them. NaN leaves a gap.
        steps: the steps that the values belong to, where these came as an array: None for 0, 1, 2, …
        threshold: `hj.edge_of_stability(...)`, a number or one for every step.
        label: of the largest eigenvalue, in a legend.
        ax: the axes to draw on.

    Returns:
        The axes. The horizontal one counts steps, the vertical one has the units of the eigenvalues.

    Raises:
        TypeError: there is no tracker in `state`.
        ValueError: the tracker keeps no history, there are several, or `steps` has another length than the values.
        ImportError: matplotlib is not installed.

    Example:
        >>> import hessjax as hj, numpy as np
        >>> edge = hj.edge_of_stability("gradient_descent", 0.1)
        >>> ax = hj.plot.tracking(np.linspace(5.0, 20.0, 100), threshold=edge)  # doctest: +SKIP
    """
    values, known = _trail(state)
    steps = known if steps is None else np.asarray(steps)
    if steps.shape != values.shape[:1]:
        raise ValueError(
            f"`plot.tracking` needs a step for each of {values.shape[0]} measurements, got `steps` of shape "
            f"{steps.shape}."
        )
    ax = _axes(ax, "tracking")
    colour = _next_colour(ax)
    for place, column in enumerate(values.T[::-1]):
        line = {"color": colour, "alpha": 0.9**place, "linewidth": 1.4 / (1 + place)}
        ax.plot(steps, np.where(np.isfinite(column), column, np.nan), label=label if place == 0 else None, **line)
        if np.any(alone := _alone(column)):
            ax.plot(steps[alone], column[alone], ".", **line)
    if threshold is not None:
        edge, name = np.broadcast_to(np.asarray(threshold, float), steps.shape), "edge of stability"
        known = any(line.get_label() == name for line in ax.lines)
        ax.plot(steps, edge, "--", color=_SOFT, linewidth=1, label=None if known else name)
    return _finish(ax, "step", "eigenvalue λ", label is not None or threshold is not None)


def loss_along(
    loss: Any,
    pairs: Eigenpairs | Any,
    *,
    params: PyTree | None = None,
    radius: Any = None,
    num_points: Any = 41,
    ax: Any = None,
) -> Any:
    """The loss on the lines through the parameters along each eigenvector, and its parabola there, dashed.

    Where the two part, curvature at a point no longer tells what the loss does. Costs k · num_points losses and one
    gradient.

    Args:
        loss: a `hj.Model`, or a function of the parameters alone, `lambda params: loss(params, x, y)`.
        pairs: what `hj.eigsh` returns for it.
        params: where to stand; for a `Model` its own by default.
        radius: how far to go, in the norm of the parameters. None for √(2 L / |λ|max), where the parabola of the
            steepest direction reaches twice the loss.
        num_points: of each line, at least 2.
        ax: the axes to draw on.

    Returns:
        The axes. The horizontal one has the units of the parameters, the vertical one those of the loss.

    Raises:
        TypeError: `loss` is neither a model nor a function, or `pairs` no `Eigenpairs`.
        ValueError: there are no eigenvectors, or not of `params`; `params` is missing, or a number is out of range.
        ImportError: matplotlib is not installed.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> loss, w = lambda w: jnp.sum(w**4 + w**2), jnp.ones(300)
        >>> pairs = hj.eigsh(hj.hvp(loss)(w), 1, jax.random.key(0))
        >>> ax = hj.plot.loss_along(loss, pairs, params=w)  # doctest: +SKIP
    """
    if not isinstance(pairs, Eigenpairs):
        raise TypeError(f"`plot.loss_along` needs the `Eigenpairs` of `hj.eigsh`, got {type(pairs).__name__}.")
    if pairs.eigenvectors is None:
        raise ValueError("`plot.loss_along` needs eigenvectors; `pairs` came from `return_eigenvectors=False`.")
    if (num_points := as_integer("num_points", num_points)) < 2:
        raise ValueError(f"`plot.loss_along` needs `num_points >= 2`, got {num_points}.")
    if radius is not None and not 0 < float(radius) < np.inf:
        raise ValueError(f"`plot.loss_along` needs a positive `radius`, got {radius}.")
    _one(pairs.eigenvalues, 1, "loss_along")
    params, loss, function = loss_of(loss, params)
    wanted, got = structure_of(params), row_structure(pairs.eigenvectors)
    if got != wanted:
        raise ValueError(f"`plot.loss_along` needs eigenvectors shaped as `params`, {wanted}, got {got}.")
    values = np.asarray(pairs.eigenvalues, float)
    center, slopes = map(np.asarray, value_and_slopes(function, loss, params, pairs.eigenvectors))
    if radius is None:
        height, steepest = abs(float(center)), float(np.max(np.abs(values), initial=0))
        radius = (2 * height / steepest) ** 0.5 if height > 0 and steepest > 0 else 1.0
    distances = np.linspace(-float(radius), float(radius), num_points)
    heights = np.asarray(losses_along(function, loss, params, pairs.eigenvectors, distances))
    ax = _axes(ax, "loss_along")
    for index in reversed(range(values.size)):
        colour = _next_colour(ax)
        ax.plot(distances, heights[index], color=colour, linewidth=1.4, label=f"λ = {values[index]:.3g}")
        parabola = center + slopes[index] * distances + values[index] * distances**2 / 2
        ax.plot(distances, parabola, "--", color=colour, linewidth=0.8)
    return _finish(ax, "distance along the eigenvector", "loss", True)


def blocks(results: Mapping[str, Any] | Any, *, label: str | None = None, ax: Any = None) -> Any:
    """Numbers of every block, such as its eigenvalues or its trace: a line for each block, in the dict's order.

    Args:
        results: a dict from block name to `Eigenpairs`, `Estimate` or array, as `hj.map_blocks` returns it. Eigenpairs
            that did not converge are hollow; estimates have bars of two standard errors. `jax.jit` sorts the names of a
            dict that it returns.
        label: of the points, in a legend.
        ax: the axes to draw on. Results that were drawn there before are compared: a block keeps its line, by its
            name, and new ones are added below.

    Returns:
        The axes. The horizontal one has the units of the numbers.

    Raises:
        TypeError: `results` is no dict, or holds something else.
        ValueError: it is empty, or a block's result is a batch.
        ImportError: matplotlib is not installed.

    Example:
        >>> import hessjax as hj, numpy as np
        >>> ax = hj.plot.blocks({"first": np.array([1.0, 2.0]), "second": np.array([0.5])})  # doctest: +SKIP
    """
    if not isinstance(results, Mapping):
        raise TypeError(
            f"`plot.blocks` needs a dict from block name to result, such as `hj.map_blocks` returns, got "
            f"{type(results).__name__}."
        )
    if not results:
        raise ValueError("`plot.blocks` got no blocks.")
    for name, result in results.items():
        if not isinstance(result, Eigenpairs | Estimate | _Numbers):
            raise TypeError(
                f"`plot.blocks` draws `Eigenpairs`, `Estimate` and arrays, got {type(result).__name__} for {name!r}."
            )
    numbers = {str(name): _numbers(result, "blocks") for name, result in results.items()}
    ax = _axes(ax, "blocks", rows=len(results))
    colour = _next_colour(ax)
    names = _rows(ax)
    names += [name for name in numbers if name not in names]
    for place, (name, (values, errors, good)) in enumerate(numbers.items()):
        row = np.full(values.size, names.index(name))
        _points(ax, values, row, good, colour, label if place == 0 else None, xerr=errors)
    ax.axvline(0, color=_SOFT, linewidth=0.8, zorder=0)
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    return _finish(ax, "value", "", label is not None)


def _axes(ax: Any, caller: str, rows: int = 0) -> Any:
    """The given axes, or those of a new figure, high enough for that many rows of text."""
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(f"`hj.plot.{caller}` needs matplotlib: pip install 'hessjax[plot]'.") from error
    width, height = pyplot.rcParams["figure.figsize"]
    return pyplot.subplots(layout="constrained", figsize=(width, max(height, 1 + 0.2 * rows)))[1]


def _rows(ax: Any) -> list[str]:
    """The names of the blocks that an earlier call drew on these axes."""
    from matplotlib.ticker import FixedLocator

    named = isinstance(ax.yaxis.get_major_locator(), FixedLocator)
    return [tick.get_text() for tick in ax.get_yticklabels()] if named else []


def _alone(column: Float[np.ndarray, " steps"]) -> np.ndarray:
    """Which numbers have none beside them, so that a line through them would not show."""
    here = np.pad(np.isfinite(column), 1)
    return here[1:-1] & ~here[:-2] & ~here[2:]


def _one(array: Any, ndim: int, caller: str) -> None:
    """Raises ValueError where `jax.vmap` put further axes before those of one result."""
    if np.ndim(array) > ndim:
        raise ValueError(
            f"`plot.{caller}` draws one result, got a batch of {np.shape(array)[:-ndim]}. Take one of it, such as "
            "`jax.tree.map(lambda x: x[0], result)`."
        )


def _next_colour(ax: Any) -> str:
    """One that no earlier call on these axes took."""
    used = {line.get_color() for line in ax.lines}
    return next((colour for colour in _COLOURS if colour not in used), _COLOURS[len(ax.lines) % len(_COLOURS)])


def _points(ax: Any, x: Any, y: Any, good: Any, colour: str, label: str | None, **errors: Any) -> None:
    """Points with error bars, hollow where they are not good."""
    ax.errorbar(x, y, fmt="none", ecolor=colour, elinewidth=1, capsize=2, **errors)
    ax.plot(x[good], y[good], "o", color=colour, label=label)
    ax.plot(x[~good], y[~good], "o", markerfacecolor="none", color=colour)


def _finish(ax: Any, x: str, y: str, legend: bool) -> Any:
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[["top", "right"]].set_visible(False)
    if legend:
        ax.legend(frameon=False)
    return ax


def _spectrum(pairs: Any, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`_numbers` of `Eigenpairs` or of an array."""
    if not isinstance(pairs, Eigenpairs | list | tuple | np.ndarray | jax.Array):
        raise TypeError(f"`{name}` must be `Eigenpairs` or an array of eigenvalues, got {type(pairs).__name__}.")
    return _numbers(pairs, "eigenvalues")


def _numbers(result: Any, caller: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, how far they may be off, 0 where that is not known, and which of them are good."""
    good = None
    if isinstance(result, Eigenpairs):
        _one(result.eigenvalues, 1, caller)
        values, errors, good = result.eigenvalues, result.error_bounds, np.asarray(result.converged)
    elif isinstance(result, Estimate):
        values, errors = result.value, 2 * np.asarray(result.stderr, float)
    else:
        values, errors = result, np.zeros(np.shape(result))
    values, errors = (np.asarray(part, float).reshape(-1) for part in (values, errors))
    return values, np.where(np.isfinite(errors), errors, 0), np.isfinite(values) if good is None else good


def _trail(state: Any) -> tuple[Float[np.ndarray, "steps k"], np.ndarray]:
    """Measured values, (steps, k), and the steps they belong to, in order."""
    if isinstance(state, np.ndarray | jax.Array) or (
        isinstance(state, list) and all(isinstance(x, float | int) for x in state)
    ):
        values = np.asarray(state, float)
        values = values[:, None] if values.ndim == 1 else values
        if values.ndim != 2:
            raise ValueError(f"`plot.tracking` needs values of shape (steps,) or (steps, k), got {values.shape}.")
        return values, np.arange(len(values))
    if not optax.tree.get_all_with_path(state, "history_steps"):
        raise TypeError(
            "`plot.tracking` found no `hj.track_curvature` in `state`, got "
            f"{type(state).__name__}. Give it the optimizer's state, or an array of values."
        )
    if (count := len(optax.tree.get_all_with_path(state, "history_steps"))) > 1:
        raise ValueError(f"`plot.tracking` draws one tracker, got a state with {count}. Give it the state of one.")
    history, steps = optax.tree.get(state, "history"), optax.tree.get(state, "history_steps")
    if history is None:
        raise ValueError("The tracker keeps no history: make it with `hj.track_curvature(..., history=n)`.")
    _one(steps, 1, "tracking")
    order = np.argsort(np.asarray(steps), kind="stable")
    order = order[np.asarray(steps)[order] >= 0]
    return np.asarray(history, float)[order], np.asarray(steps)[order]
