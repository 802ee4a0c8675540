"""Diagonal blocks of an operator: some of its leaves, one layer, or every layer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray, PyTree

from hessjax._arguments import needs_key
from hessjax._function import Function, as_function
from hessjax.operators._operator import Operator, as_operator


def restrict(op: Operator | Any, where: Any) -> Operator:
    """The diagonal block of the leaves that `where` selects.

    With P the inclusion of the selected leaves, this is PᵀAP, at the cost of one product with A.

    Args:
        op: symmetric A.
        where: a pytree of bools shaped as A's vectors, or coarser (one bool for a whole subtree); or a predicate on a
            leaf's key path as `jax.tree_util.keystr` prints it, such as `lambda path: "conv" in path`.

    Returns:
        An operator on the same pytrees, with None in place of every leaf that is not selected.

    Raises:
        ValueError: nothing is selected, or the tree of bools does not fit.
        TypeError: `op` is not an operator, or `where` gives something other than a bool.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> A = hj.operator(lambda v: {"w": v["w"] + 5 * v["b"], "b": 5 * v["w"] + 3 * v["b"]}, {"w": 0.0, "b": 0.0})
        >>> hj.restrict(A, lambda path: path == "['b']").dense().tolist()
        [[3.0]]
    """
    op = as_operator(op, None)
    selected = _selection(op.structure, where)
    if not any(selected):
        paths = ", ".join(f"`{path}`" for path in _paths(op.structure))
        raise ValueError(f"`where` must select at least one leaf, got none of {paths}.")
    return Block(op, selected)


def per_block(op: Operator | Any, group: Callable[[str], Any] | None = None) -> dict[str, Operator]:
    """All layers' diagonal blocks: a dict from the block's name to `hj.restrict` of it.

    Args:
        op: symmetric A.
        group: None for one block per layer; otherwise a function of a leaf's key path (as `jax.tree_util.keystr` prints
            it) that returns the name of its block, or None to leave it out. A layer is the outermost node below the
            root of the pytree that itself holds more than one array, with all that is below it; an array that lies in
            no such node is a block of its own. Layers are named by their key path.

    Returns:
        A dict in the order of the leaves, until `jax.jit` returns it: that sorts the names.

    Raises:
        TypeError: `op` is not an operator, or `group` returns something other than a string or None.
        ValueError: every leaf is left out.

    Example:
        >>> import hessjax as hj, jax.numpy as jnp
        >>> params = {"dense": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}, "scale": jnp.ones(())}
        >>> A = hj.operator(lambda v: v, params)
        >>> {name: block.size for name, block in hj.per_block(A).items()}
        {"['dense']": 9, "['scale']": 1}
        >>> list(hj.per_block(A, lambda path: "matrices" if "w" in path else "rest"))
        ['rest', 'matrices']
        >>> flat = {"0.weight": jnp.ones((2, 3)), "0.bias": jnp.ones(2), "2.weight": jnp.ones((1, 2))}   # as from torch
        >>> list(hj.per_block(hj.operator(lambda v: v, flat), lambda path: path.strip("[']").rpartition(".")[0]))
        ['0', '2']
    """
    op = as_operator(op, None)
    return {name: Block(op, selected) for name, selected in _blocks(op.structure, group).items()}


def map_blocks(
    function: Callable[[Operator, PRNGKeyArray], PyTree],
    op: Operator | Any,
    key: Any,
    group: Callable[[str], Any] | None = None,
) -> dict[str, PyTree]:
    """Runs an algorithm on every block of `hj.per_block`, compiled once for all blocks of equal shapes.

    Blocks whose leaves have the same shapes and dtypes run one after another in one loop, which chooses the block at
    run time: twelve equal layers of a transformer cost the compilation of one. A second call with the same function
    and new parameters of the same shapes compiles nothing.

    Args:
        function: `function(block, key)`, a pytree of arrays: `lambda block, key: hj.eigsh(block, 3, key)`. It runs
            under `jax.jit`, as a static argument: define it once, outside the training loop.
        op: symmetric A.
        key: split into one key per block.
        group: as `hj.per_block` takes it.

    Returns:
        A dict from the block's name to the function's value. Vectors in it have the structure of that block's vectors.

    Raises:
        TypeError, ValueError: as `hj.per_block`; TypeError where `key` is no key or `function` no function.

    Example:
        >>> import hessjax as hj, jax, jax.numpy as jnp
        >>> A = hj.operator(lambda v: [1 * v[0], 2 * v[1], 3 * v[2]], [jnp.ones(4), jnp.ones(4), jnp.ones(2)])
        >>> top = hj.map_blocks(lambda block, key: hj.eigsh(block, 1, key).eigenvalues[0], A, jax.random.key(0))
        >>> {name: value.item() for name, value in top.items()}
        {'[0]': 1.0, '[1]': 2.0, '[2]': 3.0}
    """
    op = as_operator(op, None)
    function = as_function(function, "function")
    needs_key(key, "map_blocks")
    blocks = _blocks(op.structure, group)
    order = {name: index for index, name in enumerate(blocks)}
    keys = jax.random.split(key, len(blocks))
    results: dict[str, PyTree] = {}
    for names in _families(op.structure, blocks):
        family = tuple(blocks[name] for name in names)
        places = np.array([order[name] for name in names])
        results.update(zip(names, _run(function, op, family, keys[places]), strict=True))
    return {name: results[name] for name in blocks}


Selection = tuple[bool, ...]  # one flag per leaf of the operator's vectors


class Block(Operator):
    """PᵀAP, where P includes the selected leaves."""

    operator: Operator
    selected: Selection = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return _keep(self.operator.like, self.selected)

    def product(self, vector: PyTree) -> PyTree:
        leaves = iter(jtu.tree_leaves(vector))
        specs, treedef = jtu.tree_flatten(self.operator.structure)
        full = [
            next(leaves) if chosen else jnp.zeros(spec.shape, spec.dtype)
            for chosen, spec in zip(self.selected, specs, strict=True)
        ]
        return _keep(self.operator.product(treedef.unflatten(full)), self.selected)


class FamilyBlock(Operator):
    """One of several blocks of equal shapes, chosen at run time; its vectors have the structure of the first one's."""

    operator: Operator
    index: Int[Array, ""]
    family: tuple[Selection, ...] = eqx.field(static=True)

    @property
    def like(self) -> PyTree:
        return _keep(self.operator.structure, self.family[0])

    def product(self, vector: PyTree) -> PyTree:
        parts, slots = jtu.tree_leaves(vector), self._slots()
        specs, treedef = jtu.tree_flatten(self.operator.structure)
        full = [jnp.zeros(spec.shape, spec.dtype) for spec in specs]
        for member, places in enumerate(slots):
            for part, place in zip(parts, places, strict=True):
                full[place] = jnp.where(self.index == member, part, full[place])
        image = jtu.tree_leaves(self.operator.product(treedef.unflatten(full)))
        columns = ([image[place] for place in column] for column in zip(*slots, strict=True))
        return jtu.tree_structure(vector).unflatten([jax.lax.select_n(self.index, *column) for column in columns])

    def _slots(self) -> list[list[int]]:
        """For every member, the places of its leaves among all."""
        return [[place for place, flag in enumerate(selected) if flag] for selected in self.family]


@eqx.filter_jit
def _run(
    function: Function,
    op: Operator,
    family: tuple[Selection, ...],
    keys: Any,
) -> list[PyTree]:
    """The function's values on the blocks of one family."""
    if len(family) == 1:
        return [function(Block(op, family[0]), keys[0])]
    stacked = jax.lax.map(lambda at: function(FamilyBlock(op, at[0], family), at[1]), (jnp.arange(len(family)), keys))
    shapes = [jtu.tree_structure(_keep(op.structure, selected)) for selected in family]

    def is_vector(node: Any) -> bool:
        return jtu.tree_structure(node) == shapes[0]

    def member(index: int) -> PyTree:
        def pick(node: Any) -> Any:
            leaves = [leaf[index] for leaf in jtu.tree_leaves(node)]
            return shapes[index].unflatten(leaves) if is_vector(node) else leaves[0]

        return jtu.tree_map(pick, stacked, is_leaf=is_vector)

    return [member(index) for index in range(len(family))]


def _keep(tree: PyTree, selected: Selection) -> PyTree:
    """`tree` with None in place of the leaves that are not selected."""
    leaves, treedef = jtu.tree_flatten(tree)
    return treedef.unflatten([leaf if flag else None for leaf, flag in zip(leaves, selected, strict=True)])


def _paths(structure: PyTree) -> list[str]:
    return [jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(structure)]


def _selection(structure: PyTree, where: Any) -> Selection:
    """One flag per leaf, from a tree of bools or a predicate on the path."""
    flags = jtu.tree_leaves(where)
    by_path = callable(where) and not (flags and all(_is_bool(flag) for flag in flags))  # a module of bools is callable
    if by_path:
        flags = [where(path) for path in _paths(structure)]
    for flag in flags:
        if not _is_bool(flag):
            raise TypeError(f"`where` must give a Python bool for every leaf, got {flag!r}.")
    if by_path:
        return tuple(bool(flag) for flag in flags)
    try:
        spread = jtu.tree_map(lambda flag, part: [bool(flag)] * len(jtu.tree_leaves(part)), where, structure)
    except ValueError:
        wanted, got = jtu.tree_structure(structure), jtu.tree_structure(where)
        raise ValueError(f"`where` must be bools in the structure {wanted}, or coarser, got {got}.") from None
    return tuple(jtu.tree_leaves(spread))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)


def _blocks(structure: PyTree, group: Callable[[str], Any] | None) -> dict[str, Selection]:
    """Which leaves belong to which block."""
    names = [name for name, count in _layers(structure, ()) for _ in range(count)]
    if group is not None:
        names = [group(path) for path in _paths(structure)]
        for path, name in zip(_paths(structure), names, strict=True):
            if name is not None and not isinstance(name, str):
                raise TypeError(f"`group` must return a string or None, got {name!r} for `{path}`.")
    if all(name is None for name in names):
        raise ValueError("`group` must name at least one block, got None for every leaf.")
    return {name: tuple(other == name for other in names) for name in dict.fromkeys(names) if name is not None}


def _layers(node: PyTree, path: tuple[Any, ...]) -> list[tuple[str, int]]:
    """The names of the layers at and below a node, each with its number of leaves, in the order of the leaves."""
    if isinstance(node, jax.ShapeDtypeStruct):
        return [(jtu.keystr(path), 1)]
    children = jtu.tree_leaves_with_path(node, is_leaf=lambda child: child is not node)
    children = [(entry, child) for entry, child in children if child is not None and child is not node]
    if path and sum(isinstance(child, jax.ShapeDtypeStruct) for _, child in children) > 1:
        return [(jtu.keystr(path), len(jtu.tree_leaves(node)))]
    return [layer for entry, child in children for layer in _layers(child, path + entry)]


def _families(structure: PyTree, blocks: dict[str, Selection]) -> list[list[str]]:
    """The blocks' names, grouped by the shapes and dtypes of their leaves."""
    families: dict[Any, list[str]] = {}
    for name, selected in blocks.items():
        leaves = jtu.tree_leaves(_keep(structure, selected))
        families.setdefault(tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves), []).append(name)
    return list(families.values())
