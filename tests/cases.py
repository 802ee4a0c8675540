"""Operators with known spectra, shared by the tests."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float
from sklearn.datasets import load_digits

import hessjax as hj


class Diagonal(hj.Operator):
    """diag(eigenvalues): a class, so that all tests of one size share a compiled program."""

    eigenvalues: Float[Array, " n"]

    @property
    def like(self):
        return self.eigenvalues

    def product(self, vector):
        return self.eigenvalues * vector


class Matrix(hj.Operator):
    """A dense symmetric matrix on flat vectors."""

    matrix: Float[Array, "n n"]

    @property
    def like(self):
        return self.matrix[0]

    def product(self, vector):
        return jnp.matmul(self.matrix, vector, precision=jax.lax.Precision.HIGHEST)


class Rotated(hj.Operator):
    """Q diag(eigenvalues) Qᵀ, Q a product of Householder reflections; where all reflectors are zero, the diagonal."""

    eigenvalues: Float[Array, " n"]
    reflectors: Float[Array, "count n"]

    @property
    def like(self):
        return self.eigenvalues

    def product(self, vector):
        for u in self.reflectors:
            vector = vector - 2 * u * jnp.vdot(u, vector, precision=jax.lax.Precision.HIGHEST)
        vector = self.eigenvalues * vector
        for u in self.reflectors[::-1]:
            vector = vector - 2 * u * jnp.vdot(u, vector, precision=jax.lax.Precision.HIGHEST)
        return vector

    def exact(self):
        """The dense matrix of these very leaves in float64."""
        matrix = np.diag(np.asarray(self.eigenvalues, np.float64))
        for u in np.asarray(self.reflectors, np.float64)[::-1]:
            matrix = matrix - 2 * np.outer(u, u @ matrix)
            matrix = matrix - 2 * np.outer(matrix @ u, u)
        return (matrix + matrix.T) / 2


def wanted(eigenvalues, k, which):
    """What SciPy's `which` asks for, from all eigenvalues."""
    values = np.sort(np.asarray(eigenvalues, np.float64))
    if which in ("LM", "SM"):
        sign = -1 if which == "LM" else 1
        return np.sort(values[np.argsort(sign * np.abs(values), kind="stable")[:k]])
    high = k if which == "LA" else 0 if which == "SA" else k - k // 2
    return np.concatenate([values[: k - high], values[len(values) - high :]])


def assert_honest(pairs, matvec, eigenvalues, which, tol, n):
    """No lie: true residuals, orthonormality, and, if all converged, the wanted eigenvalues themselves."""
    values = np.asarray(pairs.eigenvalues, np.float64)
    dtype = np.asarray(pairs.eigenvalues).dtype
    vectors = np.asarray(pairs.eigenvectors, np.float64).reshape(len(values), n)
    eps = float(np.finfo(dtype).eps)
    scale = float(np.abs(eigenvalues).max())
    # The documented floor of a residual is √m eps ‖A‖ after m products.
    rounding = max(50, 2 * int(pairs.num_matvecs) ** 0.5) * eps * scale
    converged = np.asarray(pairs.converged)
    true = np.linalg.norm(matvec(vectors) - values[:, None] * vectors, axis=1)
    promise = tol * np.maximum(eps ** (2 / 3) * scale, np.abs(values))
    assert np.all(np.diff(values) >= 0)
    assert np.all(true[converged] <= 2 * promise[converged] + rounding)
    assert np.all(np.asarray(pairs.residuals)[converged] <= 2 * true[converged] + rounding)
    assert np.all(true[converged] <= 2 * np.asarray(pairs.residuals)[converged] + rounding)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(values)), atol=100 * eps)
    if converged.all():
        np.testing.assert_allclose(values, wanted(eigenvalues, len(values), which), atol=promise.max() + rounding)


SIZES = (64, 16, 10)


def mlp(params, x):
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def mlp_params(key, sizes=SIZES):
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n))
        for k, m, n in zip(keys, sizes[:-1], sizes[1:], strict=False)
    ]


cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def digits_model(params, count=1797):
    digits = load_digits()
    x = jnp.asarray(digits.data[:count] / 16.0 - (digits.data / 16.0).mean(0), jax.tree.leaves(params)[0].dtype)
    return hj.Model(params, (x, jnp.asarray(digits.target[:count])), mlp, cross_entropy)


def digits_hessians():
    model = digits_model(mlp_params(jax.random.key(0)))
    optimizer = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def steps(params, state, count):
        def step(_, carry):
            params, state = carry
            updates, state = optimizer.update(hj.Model(params, model.data, mlp, cross_entropy).gradient(), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, count, step, (params, state))

    params, state, stages = model.params, optimizer.init(model.params), {}
    for name, count in {"early": 30, "middle": 270, "late": 1200}.items():
        params, state = steps(params, state, count)
        stage = hj.Model(params, model.data, mlp, cross_entropy)
        dense = np.asarray(stage.hessian().dense())
        stages[name] = (stage, dense, np.linalg.eigvalsh((dense + dense.T) / 2))
    return stages
