"""Arithmetic of a discrete measure whose atoms may stand for mass near them.

An atom of weight w at θ spreads half of w evenly over [θ - below, θ] and half over [θ, θ + above]; where an extent is
zero, that half sits at θ itself. For a node of a Gauss rule both extents reach to the neighbouring nodes, unless the
node's radius is smaller: the distribution function then runs through the middle of every step, which is where that of
a smooth spectrum runs, and still jumps at an eigenvalue that has been found.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from hessjax._vectors import or_one


def extents(nodes: Float[Array, " m"], weights: Float[Array, " m"], radii: Float[Array, " m"]) -> tuple[Array, Array]:
    """How far below and above its node each weight is spread: to the neighbour, or the radius if that is less.

    Towards a neighbour of less weight it is spread over less of the gap, in the ratio of the weights: next to the mass
    of eigenvalues near 0 a network has next to nothing, while the weights of a smooth spectrum vary slowly.

    Nothing is put beyond the outermost nodes: they lie within the spectrum, and it may end there.
    """
    live, none = weights > 0, jnp.zeros(1, nodes.dtype)
    # Nodes without weight repeat the last: they do not count as neighbours, their distance is zero.
    gaps = jnp.diff(nodes)
    left, right = weights[:-1], weights[1:]
    upward = gaps * jnp.minimum(1, right / or_one(left))
    downward = gaps * jnp.minimum(1, left / or_one(right))
    below = jnp.minimum(radii, jnp.concatenate([none, downward]))
    above = jnp.minimum(radii, jnp.concatenate([upward, none]))
    return jnp.where(live, below, 0), jnp.where(live, above, 0)


def mass_up_to(
    x: Float[Array, "..."],
    nodes: Float[Array, " m"],
    weights: Float[Array, " m"],
    below: Float[Array, " m"],
    above: Float[Array, " m"],
) -> Float[Array, "..."]:
    """The mass at or below each x."""
    distance = x[..., None] - nodes

    def share(end: Array, extent: Array) -> Array:
        inside = jnp.clip((distance + end) / or_one(extent), 0, 1)
        return jnp.where(extent > 0, inside, distance >= 0)

    halves = share(below, below) + share(jnp.zeros_like(above), above)
    return jnp.sum(weights / 2 * halves, axis=-1)


def smoothed(
    x: Float[Array, "..."],
    sigma: Float[Array, ""],
    nodes: Float[Array, " m"],
    weights: Float[Array, " m"],
    below: Float[Array, " m"],
    above: Float[Array, " m"],
) -> Float[Array, "..."]:
    """The density of the measure convolved with a normal distribution of standard deviation `sigma`.

    A half that is spread evenly over a length l counts as a normal distribution with its mean and variance, l² / 12.
    """
    low = gaussian(x[..., None], nodes - below / 2, jnp.hypot(sigma, below / math.sqrt(12)))
    high = gaussian(x[..., None], nodes + above / 2, jnp.hypot(sigma, above / math.sqrt(12)))
    return jnp.sum(weights / 2 * (low + high), axis=-1)


def invert(
    function: Callable[[Array], Array], target: Float[Array, "..."], low: Array, high: Array
) -> Float[Array, "..."]:
    """Where a nondecreasing function reaches `target`, by bisection to the last digit."""
    steps = 2 * (jnp.finfo(low.dtype).nmant + 2)

    def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) / 2
        reached = function(middle) >= target
        return jnp.where(reached, low, middle), jnp.where(reached, middle, high)

    shape = jnp.shape(target)
    return lax.fori_loop(0, steps, halve, (jnp.broadcast_to(low, shape), jnp.broadcast_to(high, shape)))[1]


def gaussian(x: Array, mean: Array, width: Array) -> Array:
    """The normal density. That of `jax.scipy.stats` takes 10 ms to import."""
    return jnp.exp(-0.5 * ((x - mean) / width) ** 2) / (math.sqrt(2 * math.pi) * width)
