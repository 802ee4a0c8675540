"""What a function reads from outside its arguments, as far as its code names it.

A compiled program holds these values as they were when it was traced. `Snapshot` makes them part of the key under which
it is kept, so that a loss is traced again when `data` was rebound, as if it had never been compiled. It follows names
and attributes (`data`, `config.scale`, `self.net`) through the user's own functions and methods. It never looks inside
a container and never runs code of the user's: a snapshot is taken at every call.
"""

import dis
import functools
import inspect
import os
import sys
import sysconfig
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
import optax
from jax.core import Tracer

_MOST = 1000  # functions that are followed
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_RULES = ("fwd", "bwd", "jvp")  # attributes of a function with a custom derivative
_LIBRARIES = tuple(
    os.path.join(path, "")
    for path in (
        *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")),
        *(os.path.dirname(module.__file__ or "") for module in (jax, np, eqx, optax)),
        os.path.dirname(__file__),
    )
    if path
)


class Snapshot:
    """The values that a function reads, as they are now. Compares equal to another of the very same ones.

    Seen are globals, closure variables and defaults, and chains of attributes of these and of a method's own object; in
    the function itself and in the functions, methods and properties that it names so. Not seen: an array, a list or an
    object that is changed in place; what the functions write themselves, such as a count of their traces; what is read
    by a subscript, by `super()` or by a method's decorator; and inside installed packages.
    """

    __slots__ = ("_values",)

    def __init__(self, function: Any):
        found = list(_values_of(function))
        written = frozenset().union(*(item.written for item in found))
        self._values = tuple(
            Same(item.value)
            for item in found
            if item.name not in written and not isinstance(item.value, Tracer | types.ModuleType)
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and self._values == other._values

    def __hash__(self) -> int:
        return hash(self._values)


class Same:
    """A value, equal to itself; numbers, strings, bound methods, and pytrees such as modules, to their equals."""

    __slots__ = ("key", "value")

    def __init__(self, value: Any):
        self.value, self.key = value, _key_of(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (self.value is other.value or self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)


def _key_of(value: Any) -> Any:
    if type(value) in _PLAIN:
        return type(value), repr(value)  # in which NaN is itself
    if isinstance(value, np.generic):
        return type(value), value.tobytes()
    if isinstance(value, types.MethodType):
        return id(value.__self__), value.__func__
    if type(value) in (list, tuple, dict) or jtu.all_leaves([value]):
        return id(value)
    try:
        leaves, treedef = jtu.tree_flatten(value)
        hash(key := (treedef, *map(id, leaves)))
    except Exception:  # a static part without a hash, or whatever else a user's class raises
        return id(value)
    return key


def reads_tracers(*functions: Any) -> bool:
    """Whether an array that is being traced is among what functions close over, in containers as well."""
    todo, seen = list(functions), {}  # which keeps what it saw alive
    while todo:
        value = todo.pop()
        if isinstance(value, Tracer):
            return True
        if id(value) in seen or isinstance(value, (*_PLAIN, jax.Array, np.ndarray, np.generic)):
            continue
        seen[id(value)] = value
        if isinstance(value, list | tuple | dict):
            todo.extend(value.values() if isinstance(value, dict) else value)
        elif not jtu.all_leaves([value]):
            todo.extend(jtu.tree_leaves(value))
        if callable(value):
            found = [item.value for item in _values_of(value, closed_over=True)]
            # It has followed the functions among these.
            todo.extend(item for item in found if not callable(item) or not jtu.all_leaves([item]))
    return False


class _Found(NamedTuple):
    """A value, the last name by which it was reached, and the names that the code it was found in writes."""

    value: Any
    name: str | None
    written: frozenset[str]


def _values_of(function: Any, closed_over: bool = False) -> Iterator[_Found]:
    """All values, in an order that depends on the code alone; or without globals, but with what libraries hold."""
    todo: list[tuple[Any, Any]] = [(function, None)]  # with the object that is its first argument
    seen: dict[tuple[int, int], Any] = {}
    while todo and len(seen) < _MOST:
        function, owner = todo.pop()
        if isinstance(function, types.MethodType):
            function, owner = function.__func__, function.__self__
        if (id(function), id(owner)) in seen:
            continue
        seen[id(function), id(owner)] = function, owner
        for item, its_owner in _read_by(function, owner, closed_over):
            yield item
            if callable(item.value) and not isinstance(item.value, type):
                todo.append((item.value, its_owner))


def _read_by(function: Any, owner: Any, closed_over: bool) -> Iterator[tuple[_Found, Any]]:
    """What a callable reads directly, each with the object that it is bound to, if it is a method."""
    nothing = frozenset[str]()
    if isinstance(function, types.FunctionType):
        yield from _read_by_code(function, owner, closed_over)
    elif isinstance(function, functools.partial):
        for part in (function.func, *function.args, *function.keywords.values()):
            yield _Found(part, None, nothing), None
    elif (wrapped := _wrapped(function)) is not None:
        yield _Found(wrapped, None, nothing), owner
        for rule in _RULES:
            if isinstance(part := inspect.getattr_static(function, rule, None), types.FunctionType):
                yield _Found(part, None, nothing), None
    elif _is_users(type(function)):
        call = inspect.getattr_static(function, "__call__", None)
        if isinstance(call, types.FunctionType):
            yield _Found(call, None, nothing), function


def _read_by_code(function: types.FunctionType, owner: Any, closed_over: bool) -> Iterator[tuple[_Found, Any]]:
    code, nothing = function.__code__, frozenset[str]()
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    held = {name: cell.cell_contents for name, cell in cells if _is_filled(cell)}
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if _is_library(code.co_filename):
        for value in (*held.values(), *defaults):
            if closed_over or callable(value):  # what a library wraps is the user's again
                yield _Found(value, None, nothing), None
        if owner is not None:  # as flax's `model.apply` runs the model
            yield from ((item, owner) for item, _ in _read_by(owner, None, closed_over))
        return
    for value in defaults:
        yield _Found(value, None, nothing), None
    names = _names_in(code)
    if owner is not None and code.co_argcount:
        held[code.co_varnames[0]] = owner
    for is_global, name, chain in names.paths:
        variables = function.__globals__ if is_global else held
        if name not in variables or (is_global and closed_over):
            continue
        for value, its_owner in _along(variables[name], chain):
            yield _Found(value, (name, *chain)[-1], names.written), its_owner


def _along(value: Any, chain: tuple[str, ...]) -> Iterator[tuple[Any, Any]]:
    """The value at the end of a chain of attributes; a method or a property with its object, where one ends it."""
    owner = None
    for name in chain:
        if isinstance(value, types.ModuleType) and _is_library(getattr(value, "__file__", None) or _LIBRARIES[0]):
            return
        found, owner = inspect.getattr_static(value, name, None), None
        if isinstance(found, property | functools.cached_property):
            yield (found.fget if isinstance(found, property) else found.func), value
            return
        if isinstance(found, types.MemberDescriptorType):
            try:
                found = found.__get__(value)
            except AttributeError:  # a slot that is not filled yet
                return
        if isinstance(found, staticmethod | classmethod):
            found = found.__func__
        elif isinstance(found, types.FunctionType) and inspect.getattr_static(type(value), name, None) is found:
            owner = value
        if found is None:
            return
        value = found
    if not isinstance(value, types.ModuleType):
        yield value, owner


class _Names(NamedTuple):
    """What code reads: whether a global, the variable, and attributes of it. And the names that it writes."""

    paths: tuple[tuple[bool, str, tuple[str, ...]], ...]
    written: frozenset[str]


@functools.cache
def _names_in(code: types.CodeType) -> _Names:
    """Of code, the functions inside it included."""
    paths, written = set(), set()
    start, chain = None, ()
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("EXTENDED_ARG", "CACHE"):
            continue
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and start is not None:
            chain = (*chain, name)
            continue
        if start is not None:
            paths.add((*start, chain))
        start, chain = None, ()
        if operation.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST")):
            name = name[-1] if isinstance(name, tuple) else name  # two variables in one instruction
            start = operation.startswith(("LOAD_GLOBAL", "LOAD_NAME")), name
        elif operation in ("STORE_GLOBAL", "STORE_ATTR") or (operation == "STORE_DEREF" and name in code.co_freevars):
            written.add(name)
    for inner in (item for item in code.co_consts if isinstance(item, types.CodeType)):
        names = _names_in(inner)
        # Of the inner one's own variables only those count that it shares with this one.
        paths |= {path for path in names.paths if path[0] or path[1] in inner.co_freevars}
        written |= names.written
    return _Names(tuple(sorted(paths)), frozenset(written))


def _wrapped(value: Any) -> Any:
    """The function that a wrapper such as `jax.jit` was made of, if it says so."""
    found = inspect.getattr_static(value, "__wrapped__", None)
    return getattr(value, "__wrapped__", None) if isinstance(found, property) else found


def _is_users(kind: type) -> bool:
    """Whether a class is defined outside of libraries."""
    top = kind.__module__.partition(".")[0]
    path = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return top not in sys.stdlib_module_names and not _is_library(path)


@functools.cache
def _is_library(path: str) -> bool:
    return path.startswith(_LIBRARIES) or "/site-packages/" in path or "/dist-packages/" in path


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that is not assigned yet
        return False
