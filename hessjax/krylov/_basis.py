"""An orthonormal basis of pytree vectors, stored as blocks of rows.

A basis holds up to `num_rows` vectors. It is a tuple of blocks; a block is the vector's pytree with one more leading
axis, so leaves keep their dtype and sharding. Blocks grow geometrically (16, 48, 112, 256, ...), and a pass over the
basis skips every block that holds no row to be read. A pass therefore costs the rows in use rather than the capacity,
and reads them at memory speed; slicing the live rows out of one array would copy them on every pass.
"""

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from hessjax._vectors import contract, epsilon, norm, row_structure, scalar_dtype, select

_SMALLEST_BLOCK = 16  # rows; the others are multiples of it, except the last
_GROWTH = 2.25  # of a block over the one before: more blocks read fewer empty rows, but each is compiled
_CHUNK = 1 << 14  # columns rotated at a time, at most


def block_sizes(num_rows: int) -> list[int]:
    """Row counts 16, 48, 112, 256, ... that add up to `num_rows`.

    The last one is cut to fit; a remnant of less than half a block joins the block before, since each is compiled.
    """
    sizes: list[int] = []
    while (left := num_rows - sum(sizes)) > 0:
        following = sizes[-1] * _GROWTH if sizes else _SMALLEST_BLOCK
        size = math.ceil(following / _SMALLEST_BLOCK) * _SMALLEST_BLOCK
        if len(sizes) > 1 and left < size / 2:
            sizes[-1] += left
        else:
            sizes.append(min(size, left))
    return sizes


def rows_held(num_rows: int, storage: str | None) -> int:
    """How many rows a basis has that must hold `num_rows`: a narrow one is read in parts of equal length."""
    return num_rows if storage is None else -(-num_rows // _SMALLEST_BLOCK) * _SMALLEST_BLOCK


class Basis(eqx.Module):
    """Up to `num_rows` vectors, of which the caller knows the live ones.

    Attributes:
        blocks: rows of the vectors, as they are kept.
        dtypes: those of the vectors' own leaves, in which they come and go.
        storage: the narrower dtype in which rows are kept, None for their own.
    """

    blocks: tuple[PyTree[Array], ...]
    dtypes: tuple[np.dtype, ...] = eqx.field(static=True)
    storage: str | None = eqx.field(static=True)

    @classmethod
    def zeros(cls, structure: PyTree[jax.ShapeDtypeStruct], num_rows: int, storage: str | None = None) -> "Basis":
        """An empty basis for vectors of the given structure, kept in the dtype `storage` or their own."""
        sizes = block_sizes(rows_held(num_rows, storage))
        return cls(
            tuple(
                jtu.tree_map(
                    lambda leaf, rows=rows: _kept(jnp.zeros((rows, *leaf.shape), leaf.dtype), storage), structure
                )
                for rows in sizes
            ),
            tuple(leaf.dtype for leaf in jtu.tree_leaves(structure)),
            storage,
        )

    @classmethod
    def of(cls, rows: PyTree[Float[Array, "m ..."]], num_rows: int) -> "Basis":
        """A basis that begins with the given orthonormal rows; the others are zero."""
        structure = row_structure(rows)
        empty, blocks, start = cls.zeros(structure, num_rows), [], 0
        for block, size in zip(empty.blocks, empty.sizes, strict=True):
            here = jtu.tree_map(lambda leaf, at=start, size=size: leaf[at : at + size], rows)
            blocks.append(jtu.tree_map(lambda old, new: old.at[: new.shape[0]].set(new), block, here))
            start += size
        return cls(tuple(blocks), empty.dtypes, empty.storage)

    @property
    def width(self) -> int:
        """The number of entries of a vector."""
        return sum(math.prod(leaf.shape[1:]) for leaf in jtu.tree_leaves(self.blocks[0]))

    @property
    def sizes(self) -> list[int]:
        return [jtu.tree_leaves(block)[0].shape[0] for block in self.blocks]

    def row(self, index: Int[Array, ""]) -> PyTree:
        """The vector in row `index`."""
        starts = [sum(self.sizes[:i]) for i in range(len(self.blocks))]
        which = sum((index >= start).astype(jnp.int32) for start in starts) - 1

        def reader(block: PyTree, start: int):
            return lambda: self._open(
                jtu.tree_map(lambda leaf: lax.dynamic_index_in_dim(leaf, index - start, 0, False), block)
            )

        return lax.switch(which, [reader(block, start) for block, start in zip(self.blocks, starts, strict=True)])

    def set_row(self, index: Int[Array, ""], vector: PyTree, *, in_place: bool = False) -> "Basis":
        """The basis with `vector` in row `index`; out of range changes nothing.

        A row of every block is read and written. If `in_place`, only the row itself is written, by a loop of one turn
        or none, as in `rotate`, which has no reverse mode.
        """
        blocks, start = [], 0
        for block, rows in zip(self.blocks, self.sizes, strict=True):
            local = jnp.clip(index - start, 0, rows - 1)
            inside = (index >= start) & (index < start + rows)
            new = jtu.tree_map(lambda x: _kept(x, self.storage), vector)
            if in_place:
                blocks.append(_put_if(inside, block, local, new))
            else:
                old = jtu.tree_map(lambda leaf, at=local: lax.dynamic_index_in_dim(leaf, at, 0, False), block)
                blocks.append(_put(block, local, select(inside, new, old)))
            start += rows
        return Basis(tuple(blocks), self.dtypes, self.storage)

    def project(
        self,
        vector: PyTree,
        read: Bool[Array, " num_rows"],
        remove: Bool[Array, " num_rows"],
        add: Float[Array, " num_rows"] | None = None,
    ) -> tuple[Float[Array, " num_rows"], PyTree]:
        """One pass of blockwise Gram-Schmidt: c = Qᵀx and x - Q_remove c_remove + Q add.

        Args:
            vector: x.
            read: rows whose coefficient is wanted. Blocks without such a row are skipped.
            remove: rows, among those read, whose component is taken out of x.
            add: coefficients to add to x, zero outside `read`.

        Returns:
            The coefficients c (zero in rows not read), and the new vector.
        """
        dtype = scalar_dtype(vector)

        def meet(block: PyTree, vector: PyTree, remove: Array, add: Array) -> tuple[Array, PyTree]:
            block = self._open(block)
            parts = jtu.tree_map(
                lambda rows, x: contract(rows, x, (tuple(range(1, rows.ndim)), tuple(range(x.ndim))), dtype),
                block,
                vector,
            )
            coefficients = sum(jtu.tree_leaves(parts), jnp.zeros(remove.shape, dtype))
            change = add - jnp.where(remove, coefficients, 0)
            return coefficients, jtu.tree_map(
                lambda rows, x: (x + contract(change, rows, (0, 0), dtype)).astype(x.dtype), block, vector
            )

        def visit(block: PyTree, vector: PyTree, remove: Array, add: Array) -> tuple[Array, PyTree]:
            if self.storage is None:
                return meet(block, vector, remove, add)

            def step(vector: PyTree, part: tuple[PyTree, Array, Array]) -> tuple[PyTree, Array]:
                coefficients, vector = meet(part[0], vector, *part[1:])
                return vector, coefficients

            vector, coefficients = lax.scan(step, vector, _in_parts((block, remove, add)))
            return coefficients.reshape(-1), vector

        def skip(_block: PyTree, vector: PyTree, remove: Array, _add: Array) -> tuple[Array, PyTree]:
            return jnp.zeros(remove.shape, dtype), vector

        add = jnp.zeros(read.shape, dtype) if add is None else add
        coefficients, start = [], 0
        for block, rows in zip(self.blocks, self.sizes, strict=True):
            here = slice(start, start + rows)
            part, vector = lax.cond(jnp.any(read[here]), visit, skip, block, vector, remove[here], add[here])
            coefficients.append(jnp.where(read[here], part, 0))
            start += rows
        return jnp.concatenate(coefficients), vector

    def orthogonalize(
        self,
        vector: PyTree,
        read: Bool[Array, " num_rows"],
        remove: Bool[Array, " num_rows"],
        add: Float[Array, " num_rows"] | None = None,
        size: Scalar | None = None,
    ) -> tuple[Float[Array, " num_rows"], PyTree, Scalar]:
        """`project` to working precision, and the norm of what is left; `size` is about ‖x‖, if that is known.

        A second pass runs only after cancellation, when the first one shrank the vector by more than 1/√2: twice is
        enough (Parlett, The Symmetric Eigenvalue Problem, section 6.9). What two passes shrink to rounding noise comes
        back as norm 0, so that noise is never normalised into a basis vector.
        """
        size = norm(vector) if size is None else size
        nothing = jnp.zeros(remove.shape, size.dtype)
        start = (nothing, vector, size, size, size)
        extra = nothing if add is None else add

        def sweep(carry: tuple[Array, PyTree, Scalar, Scalar, Scalar], first: Array) -> tuple[Any, None]:
            coefficients, vector, _, _, whole = carry
            change, vector = self.project(vector, read, remove, jnp.where(first, extra, 0))
            coefficients = coefficients + jnp.where(first | remove, change, 0)
            left = norm(vector, size)
            # ‖x‖ by Pythagoras, without another look at x.
            before = jnp.hypot(*lax.stop_gradient((left, norm(jnp.where(remove, change, 0), size))))
            return (coefficients, vector, left, before, jnp.where(first, before, whole)), None

        def maybe(carry: tuple[Array, PyTree, Scalar, Scalar, Scalar], first: Array) -> tuple[Any, None]:
            cancelled = carry[2] < carry[3] / math.sqrt(2)
            return lax.cond(first | cancelled, sweep, lambda carry, _: (carry, None), carry, first)

        # Two turns of a loop rather than two calls: the pass is compiled once.
        (coefficients, vector, left, before, whole), _ = lax.scan(maybe, start, jnp.array([True, False]))
        # A vector inside the span: what the second pass leaves is noise of both.
        noise = (left < 0.5 * before) & (left < 64 * epsilon(vector) * whole)
        return coefficients, vector, jnp.where(noise, 0, left)

    def combine(self, weights: Float[Array, "num_rows k"], read: Bool[Array, " num_rows"]) -> PyTree:
        """The k combinations Qw as one pytree with leading axis k."""
        k, start = weights.shape[1], 0
        out = self._open(jtu.tree_map(lambda leaf: jnp.zeros((k, *leaf.shape[1:]), leaf.dtype), self.blocks[0]))

        def add(block: PyTree, out: PyTree, weights: Array) -> PyTree:
            return jtu.tree_map(
                lambda rows, x: (x + contract(weights, rows, (0, 0), weights.dtype)).astype(x.dtype),
                self._open(block),
                out,
            )

        def accumulate(block: PyTree, out: PyTree, weights: Array) -> PyTree:
            if self.storage is None:
                return add(block, out, weights)
            return lax.scan(lambda out, part: (add(part[0], out, part[1]), None), out, _in_parts((block, weights)))[0]

        for block, rows in zip(self.blocks, self.sizes, strict=True):
            here = slice(start, start + rows)
            used = jnp.any(read[here])
            out = lax.cond(used, accumulate, lambda _block, out, _weights: out, block, out, weights[here])
            start += rows
        return out

    def reflect(self, mirror: Float[Array, " num_rows"], when: Bool[Array, ""]) -> "Basis":
        """The basis Q (I - 2 mmᵀ) for a unit vector m, in place, if `when` holds."""

        def turn(_: Array, blocks: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            basis = Basis(blocks, self.dtypes, self.storage)
            image = basis.combine(-2 * mirror[:, None], mirror != 0)
            changed, start = [], 0
            for block, rows in zip(blocks, self.sizes, strict=True):
                weights = mirror[start : start + rows]
                moved = jtu.tree_map(
                    lambda old, x, w=weights: (old + contract(w, x[0], 0, w.dtype)).astype(old.dtype),
                    self._open(block),
                    image,
                )
                changed.append(jtu.tree_map(lambda x: _kept(x, self.storage), moved))
                start += rows
            return tuple(changed)

        # A loop of one turn or none, as in `rotate`: a branch would copy the basis.
        blocks = lax.fori_loop(0, when.astype(jnp.int32), turn, self.blocks)
        return Basis(blocks, self.dtypes, self.storage)

    def rotate(self, transform: Float[Array, "num_rows num_rows"], when: Bool[Array, ""]) -> "Basis":
        """The basis Q · transform, in place, if `when` holds.

        Works on a few columns at a time in a loop that runs zero times when there is nothing to do, so that it needs
        no second basis and no branch that would copy this one. Its scratch memory is that of two vectors.
        """
        treedef = jtu.tree_structure(self.blocks[0])
        chunk = min(max(self.width // transform.shape[0], 64), _CHUNK)

        def turn(_: Array, blocks: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
            leaves = zip(*(jtu.tree_leaves(block) for block in blocks), strict=True)
            columns = [_rotate_leaf(list(parts), transform, chunk, self.storage) for parts in leaves]
            return tuple(treedef.unflatten(parts) for parts in zip(*columns, strict=True))

        return Basis(lax.fori_loop(0, when.astype(jnp.int32), turn, self.blocks), self.dtypes, self.storage)

    def _open(self, rows: PyTree) -> PyTree:
        """Kept rows in the vectors' own dtypes."""
        leaves, treedef = jtu.tree_flatten(rows)
        pairs = zip(leaves, self.dtypes, strict=True)
        return treedef.unflatten([_given(leaf, self.storage, dtype) for leaf, dtype in pairs])

    def stack(self) -> PyTree:
        """All rows in one pytree with leading axis `num_rows`."""
        return jtu.tree_map(lambda *rows: jnp.concatenate(rows), *self.blocks)


def _put(block: PyTree, at: Int[Array, ""], vector: PyTree) -> PyTree:
    return jtu.tree_map(lambda rows, x: lax.dynamic_update_index_in_dim(rows, x, at, 0), block, vector)


def _put_if(when: Bool[Array, ""], block: PyTree, at: Int[Array, ""], vector: PyTree) -> PyTree:
    return lax.fori_loop(0, when.astype(jnp.int32), lambda _, block: _put(block, at, vector), block)


def _kept(x: Array, storage: str | None) -> Array:
    """Rows as they are kept. Halves are kept as integers: XLA:CPU widens whole arrays of them to update one row."""
    if storage is None:
        return x
    narrow = x.astype(storage)
    return narrow if narrow.dtype.itemsize > 2 else lax.bitcast_convert_type(narrow, jnp.uint16)


def _given(x: Array, storage: str | None, dtype: Any) -> Array:
    """The inverse of `_kept`, up to rounding."""
    if storage is None:
        return x
    return (x if x.dtype.itemsize > 2 else lax.bitcast_convert_type(x, jnp.dtype(storage))).astype(dtype)


def _in_parts(tree: PyTree) -> PyTree:
    """Splits the leading axis of every leaf into parts of `_SMALLEST_BLOCK` rows."""
    return jtu.tree_map(lambda rows: rows.reshape(-1, _SMALLEST_BLOCK, *rows.shape[1:]), tree)


def _rotate_leaf(parts: list[Array], transform: Array, chunk: int, storage: str | None) -> list[Array]:
    """Rotates one leaf of every block, chunk by chunk along its flattened columns."""
    shapes = [part.shape for part in parts]
    width = math.prod(shapes[0][1:])
    flat = [part.reshape(part.shape[0], width) for part in parts]

    def rotated(parts: list[Array], start: Array | int, size: int) -> list[Array]:
        cut = [lax.dynamic_slice_in_dim(part, start, size, 1) for part in parts]
        rows = _given(jnp.concatenate(cut), storage, transform.dtype)
        new = _kept(contract(transform.T, rows, 1, transform.dtype), storage).astype(parts[0].dtype)
        out, row = [], 0
        for part in parts:
            piece = new[row : row + part.shape[0]]
            out.append(lax.dynamic_update_slice_in_dim(part, piece, start, 1))
            row += part.shape[0]
        return out

    whole, rest = divmod(width, chunk)
    if whole:
        flat = lax.fori_loop(0, whole, lambda i, p: rotated(p, i * chunk, chunk), flat)
    if rest:
        flat = rotated(flat, whole * chunk, rest)
    return [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]
