"""What a function reads from outside its arguments: closure cells, defaults, globals, attributes of objects.

A compiled program holds these as they were when it was traced. `Snapshot` makes them part of the key under which it is
kept, so that a loss is traced again when something that it reads was rebound, as if it had never been compiled.
"""

import dis
import functools
import inspect
import os
import sysconfig
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu
import numpy as np
from jax.core import Tracer

_MOST = 10_000  # values that are looked at; who reads more than that reads it from large containers
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_LIBRARIES = tuple(
    os.path.join(path or "", "")
    for path in (*map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), os.path.dirname(__file__))
)


class Snapshot:
    """The values that a function reads, as they are now. Compares equal to another of the very same ones.

    Not seen: an array that is changed in place, a number in a list or a dict, and what the function writes itself, all
    of which may be the count of their own traces; names that are looked up by string; and the globals of installed
    packages.
    """

    __slots__ = ("_values",)

    def __init__(self, function: Any):
        found = _Walk(with_globals=True).visit(function)
        self._values = tuple(Same(value) for value, counts in found if counts and not isinstance(value, Tracer))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)


def reads_tracers(*functions: Any) -> bool:
    """Whether an array that is being traced is among what functions read. One in a global is but a forgotten one."""
    walk = _Walk(with_globals=False)
    return any(isinstance(value, Tracer) for function in functions for value, _ in walk.visit(function))


class Node:
    """A pytree that takes a `Snapshot` of itself when it is flattened; so `static` is looked at, not its children."""

    @property
    def static(self) -> Any:
        """What it is apart from its arrays."""
        raise NotImplementedError


class Same:
    """A value, equal to itself, and a number or a string to its equals."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Same):
            return False
        a, b = self.value, other.value
        return a is b or (type(a) is type(b) and type(a) in _PLAIN and a == b)

    def __hash__(self) -> int:
        return hash(self.value) if type(self.value) in _PLAIN else id(self.value)


class _Walk:
    """Goes through what functions read, depth first. Yields each value, and whether it counts for a `Snapshot`."""

    def __init__(self, with_globals: bool):
        self.with_globals = with_globals
        self.seen: dict[tuple[int, frozenset[str]], Any] = {}  # holds what it saw, lest an id be used again

    def visit(self, value: Any, names: frozenset[str] = frozenset(), counts: bool = True) -> Iterator[tuple[Any, bool]]:
        """`value`, and what is read through it by code that takes attributes of these names."""
        if (id(value), names) in self.seen or len(self.seen) > _MOST:
            return
        self.seen[id(value), names] = value
        if isinstance(value, (*_PLAIN, jax.Array, np.ndarray, np.generic)):
            yield value, counts or not isinstance(value, _PLAIN)
        elif isinstance(value, Node):
            yield from self.visit(value.static, names, counts)
        elif isinstance(value, list | tuple | dict):
            for child in _children(value):
                yield from self.visit(child, names, counts and isinstance(value, tuple))
        elif isinstance(value, types.ModuleType):
            if not _is_library(getattr(value, "__file__", None) or ""):
                for name in sorted(names & vars(value).keys()):
                    yield from self.visit(vars(value)[name], names)
        else:
            if jtu.all_leaves([value]) and not isinstance(value, types.MethodType):  # others are made anew for each use
                yield value, True
            inside = self._of_function(value) if _is_function(value) else self._of_object(value, names)
            for item, its_names in inside:
                yield from self.visit(item, its_names)

    def _of_function(self, function: Any) -> Iterator[tuple[Any, frozenset[str]]]:
        """What a function reads directly, each with the names of the attributes that it takes of it."""
        if isinstance(function, functools.partial):
            for item in (function.func, *function.args, *function.keywords.values()):
                yield item, frozenset()
        elif isinstance(function, types.MethodType):
            yield function.__func__, frozenset()
            yield function.__self__, frozenset([function.__func__.__name__])
        elif isinstance(function, types.FunctionType):
            code = _names_in(function.__code__)
            cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
            values = [cell.cell_contents for name, cell in cells if name not in code.written and _is_filled(cell)]
            values += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
            if self.with_globals and not _is_foreign(function):
                scope = function.__globals__
                values += [scope[name] for name in code.globals if name in scope]
            for item in values:
                yield item, code.attributes
        else:
            yield function.__wrapped__, frozenset()

    def _of_object(self, value: Any, names: frozenset[str]) -> Iterator[tuple[Any, frozenset[str]]]:
        """Children in a pytree, attributes of these names, and those that its methods of these names read in turn."""
        for child in _children(value):
            yield child, names
        done, todo = set(), names | ({"__call__"} if callable(value) and not isinstance(value, type) else set())
        while todo:
            done |= todo
            found = [attribute for name in sorted(todo) if (attribute := _attribute(value, name)) is not None]
            for attribute in found:
                yield attribute, names
            code = [_names_in(f.__code__) for f in found if isinstance(f, types.FunctionType) and not _is_foreign(f)]
            todo = frozenset().union(*(names.attributes for names in code)) - done


def _is_function(value: Any) -> bool:
    return isinstance(value, types.FunctionType | types.MethodType | functools.partial) or hasattr(value, "__wrapped__")


def _is_foreign(function: types.FunctionType) -> bool:
    return _is_library(function.__code__.co_filename)


def _attribute(value: Any, name: str) -> Any:
    """An attribute, or the function behind it, found without running any code of the object."""
    found = inspect.getattr_static(value, name, None)
    if isinstance(found, types.MemberDescriptorType):
        return getattr(value, name, None)
    if isinstance(found, property):
        return found.fget
    if isinstance(found, functools.cached_property):
        return found.func
    return found.__func__ if isinstance(found, staticmethod | classmethod) else found


def _children(value: Any) -> list[Any]:
    """The children of a node of a pytree; none, if it is a leaf."""
    try:
        children = jtu.tree_leaves(value, is_leaf=lambda node: node is not value)
    except (TypeError, ValueError):  # such as a dict whose keys do not sort
        return list(value.values()) if isinstance(value, dict) else []
    return [child for child in children if child is not value]


class _Names(NamedTuple):
    """The globals and attributes that code reads and does not write, and the variables that it writes."""

    globals: tuple[str, ...]
    attributes: frozenset[str]
    written: frozenset[str]


@functools.cache
def _names_in(code: types.CodeType) -> _Names:
    """Of code, the functions inside it included."""
    scope, attributes, written = set(), set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("LOAD_GLOBAL", "LOAD_NAME")):
            scope.add(instruction.argval)
        elif instruction.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            attributes.add(instruction.argval)
        elif instruction.opname.startswith(("STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR")):
            written.add(instruction.argval)
    for inside in (_names_in(item) for item in code.co_consts if isinstance(item, types.CodeType)):
        scope, attributes, written = scope | {*inside.globals}, attributes | inside.attributes, written | inside.written
    return _Names(tuple(sorted(scope - written)), frozenset(attributes - written), frozenset(written))


@functools.cache
def _is_library(path: str) -> bool:
    return path.startswith(_LIBRARIES)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that is not assigned yet
        return False
