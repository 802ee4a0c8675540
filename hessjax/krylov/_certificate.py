"""Certifies that no wanted eigenvalue was missed.

A small residual says that a pair is an eigenpair, not that it is one of the wanted ones: a Krylov space started from
one vector holds one copy of a repeated eigenvalue, and nothing that its start vector does not see. The certificate
decides whether A has an eigenvalue beyond a threshold x other than those found, by a few products on a fresh direction.

**Which operator.** With A E = E H + F C (see `_projected`), Sylvester's law of inertia counts, for x not in spec(H),

    #{λ(A) > x} = #{λ(H) > x} + #{λ(S) > x},    S = (I - EEᵀ) A (I - EEᵀ) + F D Fᵀ,    D = C (x - H)⁻¹ Cᵀ,

where S acts on the complement of span E. So the found values are all there are if and only if S has none beyond x. All
that the solver has already learned is deflated from S, which is why the test is short.

**Which test.** Lanczos on S from a random unit z gives the orthonormal polynomials p_i of z's spectral measure. If the
last one is not positive at x, S has a Ritz value, so an eigenvalue, beyond x: an *alarm*, and Σ p_i(x) z_i is a vector
with Rayleigh quotient at least x. Otherwise no eigenvector u of S at or beyond x can have ⟨u, z⟩² above the Christoffel
function 1 / Σ p_i(x)². For random z that overlap is below δ²/n with probability at most 0.8 δ, so once Σ p_i(x)² ≥ n/δ²
the absence of an eigenvalue is *proved* but for that probability.

Sources: Haynsworth, doi:10.1016/0024-3795(68)90050-5 (inertia); Simon, The Christoffel-Darboux kernel, arXiv 0806.1528.
"""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from hessjax._vectors import inner, matmul, norm, subtract
from hessjax.krylov._projected import Ritz

LOW, HIGH = 0, 1  # the sides; the low side of S is the high side of -S
_SIGNS = np.array([-1.0, 1.0])


def confidence(tol: Scalar) -> Scalar:
    """δ: how small an overlap of probe and missed eigenvector, in units of 1/√n, is still ruled out.

    A missed eigenvalue escapes with probability at most 0.8 δ: 0.8% at tol = 1e-2, 0.25% at 1e-3, 0.08% from 1e-4 on.
    Each factor of ten costs one or two products on the spectra of trained networks.
    """
    return jnp.clip(0.1 * jnp.sqrt(tol), 1e-3, 1e-2)


def start_suffices(ritz: Ritz, frontier: Bool[Array, " rows"], thresholds: Float[Array, " 2"], limit: Scalar) -> Array:
    """Whether the start vector itself, if random, proves that nothing lies beyond the thresholds.

    The test above with the iteration's own basis, when that is still the Krylov space of row 0: the polynomials at x
    are the entries of p = (x - H)⁻¹ Cᵀ up to a factor, and Σ p_i² ≥ n/δ² reads p_0² ≤ (δ²/n) ‖p‖². It says nothing of
    further copies of a repeated eigenvalue.
    """
    coupling = jnp.sum(jnp.where(frontier[:, None], ritz.couplings, 0), axis=0)

    def proves(x: Scalar) -> Array:
        weights = jnp.where(ritz.live, coupling / _off_zero(x - ritz.values), 0)
        kernel = matmul(ritz.vectors, weights / _off_zero(jnp.max(jnp.abs(weights))))
        return limit * jnp.square(kernel[0]) <= jnp.sum(jnp.square(kernel))

    return jnp.all(jnp.stack([~jnp.isfinite(x) | proves(x) for x in thresholds]))


class Probe(eqx.Module):
    """A Lanczos run on S, without its vectors: z_j, z_(j-1) and the suspect Σ p_i z_i, which the caller keeps.

    Attributes:
        active: a run is under way.
        proved: sides on which no eigenvalue is missing.
        side: the side that the present run is exact for, since S depends on the threshold.
        points: where the polynomials are evaluated. Exact on `side`; on the other one moved inwards by the norm of the
            difference of the two operators S, so that by Weyl's inequality its verdict holds too.
        beyond: sides whose polynomial has been nonpositive.
        polynomial, previous: p_j and p_(j-1) at both points.
        mass: Σ p_i² up to j, at both points.
        steps: j.
        beta: the off-diagonal coefficient between z_(j-1) and z_j.
        overlap: Fᵀz_j, in the coordinates of all rows.
    """

    active: Bool[Array, ""]
    proved: Bool[Array, " 2"]
    side: Int[Array, ""]
    points: Float[Array, " 2"]
    beyond: Bool[Array, " 2"]
    polynomial: Float[Array, " 2"]
    previous: Float[Array, " 2"]
    mass: Float[Array, " 2"]
    steps: Int[Array, ""]
    beta: Scalar
    overlap: Float[Array, " rows"]

    @classmethod
    def idle(cls, rows: int, dtype: np.dtype) -> "Probe":
        """No run under way, and nothing proved."""
        scalar, two, row = jnp.zeros((), dtype), jnp.zeros(2, dtype), jnp.zeros(rows, dtype)
        no, none, integer = jnp.zeros((), bool), jnp.zeros(2, bool), jnp.zeros((), jnp.int32)
        return cls(no, none, integer, two, none, two, two, two, integer, scalar, row)

    @property
    def alarm(self) -> Bool[Array, ""]:
        """S has an eigenvalue beyond the threshold: the suspect points to it."""
        return self.active & self.beyond[self.side]

    def begin(self, ritz: Ritz, unwanted: Bool[Array, " rows"], thresholds: Float[Array, " 2"]) -> "Probe":
        """A run on a side that has a threshold and is not yet proved; the harder one if that leaves a choice.

        The caller draws z_0 and then sets `overlap` to Fᵀz_0.
        """
        remaining = jnp.isfinite(thresholds) & ~self.proved
        signs = jnp.asarray(_SIGNS, self.mass.dtype)
        gaps = signs * thresholds - jnp.max(jnp.where(unwanted, signs[:, None] * ritz.values, -jnp.inf), axis=1)
        gaps = jnp.minimum(gaps, jnp.finfo(gaps.dtype).max)  # infinite where every Ritz value is wanted
        side = jnp.argmin(jnp.where(remaining, gaps, jnp.inf)).astype(jnp.int32)
        points = jnp.where(jnp.isfinite(thresholds), thresholds, 0)
        distance = norm(_self_energy(ritz, points[HIGH]) - _self_energy(ritz, points[LOW]))
        one, zero = jnp.ones_like(self.mass), jnp.zeros_like(self.mass)
        return dataclasses.replace(
            self,
            active=jnp.ones((), bool),
            side=side,
            points=points - signs * jnp.where(jnp.arange(2) == side, 0, distance),
            beyond=jnp.zeros(2, bool),
            polynomial=one,
            previous=zero,
            mass=one,
            steps=jnp.zeros((), jnp.int32),
            beta=jnp.zeros_like(self.beta),
            overlap=jnp.zeros_like(self.overlap),
        )

    def lift(self, ritz: Ritz) -> Float[Array, " rows"]:
        """D Fᵀz_j: the coefficients on the frontier rows by which S z_j exceeds the projected A z_j."""
        distance = self.points[self.side] - ritz.values
        weights = jnp.where(ritz.live, matmul(self.overlap, ritz.couplings) / _off_zero(distance), 0)
        return matmul(ritz.couplings, weights)

    @property
    def weight(self) -> Scalar:
        """p_j at the point of `side`: how much of z_j is in the suspect."""
        alternate = jnp.where((self.side == LOW) & (self.steps % 2 == 1), -1, 1)
        return alternate * self.polynomial[self.side]

    def advance(
        self,
        z: PyTree,
        image: PyTree,
        size: Scalar,
        overlap: Float[Array, " rows"],
        thresholds: Float[Array, " 2"],
        limit: Scalar,
        quotient: Scalar,
        eps: float,
    ) -> tuple["Probe", Scalar, Scalar]:
        """One Lanczos step on S.

        Args:
            z: z_j.
            image: S z_j less quotient · z_j and β z_(j-1).
            size: the norm of A z_j.
            overlap: Fᵀ of the image.
            thresholds: infinite where a side needs no proof.
            limit: the mass n/δ² that proves a side.
            quotient: α = ⟨z_j, S z_j⟩ up to rounding.
            eps: the rounding unit.

        Returns:
            The next state, and two numbers r and b: z_(j+1) = (image - r z_j) / b, and zero where b is.
        """
        signs = jnp.asarray(_SIGNS, self.mass.dtype)
        rest = inner(z, image)
        alpha = quotient + rest
        beta = norm(subtract(image, rest, z), size)
        # Below the rounding of this very subtraction the run has closed: its space holds no further eigenvalue that z
        # sees. The rounding of a product with A may be far larger, and so may an eigenvalue of S that hides in it.
        beta = jnp.where(beta <= 8 * eps * jnp.hypot(alpha, self.beta), 0, beta)
        # p_(j+1) before its division by beta: its sign is that of the last Sturm ratio.
        value = signs * (self.points - alpha) * self.polynomial - self.beta * self.previous
        polynomial = jnp.where((beta == 0) & (value > 0), jnp.inf, value / _off_zero(beta))
        mass = self.mass + jnp.square(polynomial)
        beyond = self.beyond | ~(value > 0)
        probe = dataclasses.replace(
            self,
            proved=self.proved | (jnp.isfinite(thresholds) & ~beyond & (mass >= limit)),
            beyond=beyond,
            polynomial=polynomial,
            previous=self.polynomial,
            mass=mass,
            steps=self.steps + 1,
            beta=beta,
            overlap=(overlap - rest * self.overlap) / _off_zero(beta),
        )
        return probe, rest, beta


def _off_zero(x: Array) -> Array:
    """x, kept away from zero by the smallest normal number."""
    tiny = jnp.finfo(x.dtype).tiny
    return jnp.where(jnp.abs(x) < tiny, jnp.where(x < 0, -tiny, tiny), x)


def _self_energy(ritz: Ritz, x: Scalar) -> Float[Array, "rows rows"]:
    """D = C (x - H)⁻¹ Cᵀ on the frontier rows."""
    weights = jnp.where(ritz.live, 1 / _off_zero(x - ritz.values), 0)
    return matmul(ritz.couplings * weights, ritz.couplings.T)
