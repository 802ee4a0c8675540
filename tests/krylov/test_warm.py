"""What a warm solve is made of: reflected rows, and a model in other coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hessjax.krylov._basis import Basis
from hessjax.krylov._low_rank import LowRank, start_rows

M, K = 6, 2


def split(rows, dtype=jnp.float64):
    """Rows of length 30 as a pytree with two leaves."""
    return {"a": jnp.asarray(rows[:, :6].reshape(-1, 2, 3), dtype), "b": jnp.asarray(rows[:, 6:], dtype)}


def flat(tree):
    return np.concatenate(
        [np.asarray(leaf, np.float64).reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1
    )


def orthonormal(rng, count):
    return np.linalg.qr(rng.standard_normal((30, count)))[0].T


@pytest.mark.parametrize("storage", [None, "bfloat16"])
def test_reflection_of_a_basis_in_place(rng, storage, x64):
    rows = orthonormal(rng, 20)
    basis = Basis.zeros(
        {"a": jax.ShapeDtypeStruct((2, 3), jnp.float32), "b": jax.ShapeDtypeStruct((24,), jnp.float32)}, 20, storage
    )
    for index, row in enumerate(rows):
        basis = basis.set_row(jnp.asarray(index), jax.tree.map(lambda leaf: leaf[0], split(row[None], jnp.float32)))
    mirror = np.zeros(sum(basis.sizes))
    mirror[[1, 5, 17]] = [0.6, -0.48, 0.64]
    for when, want in ((True, (np.eye(len(mirror)) - 2 * np.outer(mirror, mirror))[:20, :20] @ rows), (False, rows)):
        got = jax.jit(lambda basis, when: basis.reflect(jnp.asarray(mirror, jnp.float32), when))(basis, when)
        stacked = flat(jax.tree.map(lambda *parts: jnp.concatenate(parts), *(got._open(block) for block in got.blocks)))
        np.testing.assert_allclose(stacked[:20], want, atol=1e-6 if storage is None else 1e-2)


@pytest.mark.parametrize("known", [M, 3])
def test_start_rows_hold_the_same_model_and_put_the_first_in_front(rng, known, x64):
    vectors = orthonormal(rng, M) * (np.arange(M) < known)[:, None]
    values = np.where(np.arange(M) < known, np.arange(9.0, 9 - M, -1), 0)
    first = orthonormal(rng, K)
    rows, matrix = jax.jit(start_rows)(LowRank(jnp.asarray(values), split(vectors)), split(first))
    rows = flat(rows)
    held = known + K
    np.testing.assert_allclose(rows @ rows.T, np.diag(np.arange(M + K) < held), atol=1e-12)
    np.testing.assert_allclose(rows[:K].T @ rows[:K], first.T @ first, atol=1e-12)
    np.testing.assert_allclose(rows.T @ np.asarray(matrix) @ rows, vectors.T * values @ vectors, atol=1e-12)


def test_start_rows_without_a_first_are_the_models_own_and_polished(rng, x64):
    vectors = orthonormal(rng, M) * (1 + 1e-5 * rng.standard_normal((M, 1)))
    none = jax.tree.map(jnp.zeros_like, split(vectors[:K]))
    rows, matrix = start_rows(LowRank(jnp.arange(6.0, 0, -1), split(vectors)), none)
    np.testing.assert_allclose(flat(rows)[:M], vectors, atol=1e-4)
    np.testing.assert_allclose(flat(rows) @ flat(rows).T, np.diag(np.arange(M + K) < M), atol=1e-9)
    np.testing.assert_array_equal(matrix, np.diag([6.0, 5, 4, 3, 2, 1, 0, 0]))


def test_a_first_within_the_model_adds_no_row(rng, x64):
    vectors = orthonormal(rng, M)
    first = np.linalg.qr(rng.standard_normal((M, K)))[0].T @ vectors
    rows, _ = start_rows(LowRank(jnp.arange(6.0, 0, -1), split(vectors)), split(first))
    np.testing.assert_allclose(flat(rows) @ flat(rows).T, np.diag(np.arange(M + K) < M), atol=1e-12)
    np.testing.assert_allclose(flat(rows)[:K].T @ flat(rows)[:K], first.T @ first, atol=1e-12)
