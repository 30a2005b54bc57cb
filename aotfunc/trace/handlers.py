"""Tell which parts of a function have handlers of errors, by its bytecode, and whether context
managers heed errors: swallow them, raise others, or look at them."""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Mapping, Sequence
from inspect import CO_VARARGS, CO_VARKEYWORDS
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

from ..cache import Cache

#: by identity, functions (whose hash takes long), what is known of them
_known, _exits, _at_yields = Cache(1 << 12), Cache(1 << 12), Cache(1 << 12)
_JUMPS = {*dis.hasjrel, *dis.hasjabs}

Part = tuple[int, int, Sequence[str] | None]


def guarded(code: CodeType) -> Sequence[Part]:
    """Return the parts of a function that have an exception handler, or a ``with`` block: with the
    names that say what its context manager is."""
    return _known.once(id(code), lambda: (guarded_parts(code), code))[0]


def guarded_parts(code: CodeType) -> Sequence[Part]:
    """Return a part for each handler that an error there comes to, from the inside out: a
    handler's own code is covered by what comes next."""
    calls = list(dis.get_instructions(code))
    table = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    handlers = {e.target: [i for i in calls if i.offset >= e.target] for e in table}
    begin = {e.target: e.start for e in reversed(table)}  # of a block that has several parts
    found: list[Part] = []
    for part in table:
        e = part
        while e is not None:
            handler = handlers[e.target]
            if not e.lasti and not is_finally(handler):
                found.append((part.start, part.end, None))
            elif any(i.opname == "WITH_EXCEPT_START" for i in handler[:2]):
                found.append((part.start, part.end, manager_names(calls, begin[e.target])))
            e = next((o for o in table if o.start <= e.target < o.end), None)
    return found


def is_finally(handler: Sequence[dis.Instruction]) -> bool:
    """Return whether a handler raises any error again, after what it does."""
    names = [i.opname for i in handler]
    if "RERAISE" not in names or names[:2] == ["PUSH_EXC_INFO", "POP_TOP"]:  # ``except:``
        return False
    body = handler[: names.index("RERAISE")]
    if any(i.opcode in _JUMPS and i.argval > body[-1].offset + 2 for i in body):
        return False
    others = {"CHECK_EXC_MATCH", "CHECK_EG_MATCH", "POP_EXCEPT", "RAISE_VARARGS"}
    return others.isdisjoint(i.opname for i in body)


def manager_names(calls: Sequence[dis.Instruction], start: int) -> Sequence[str]:
    """Return the names by which the context manager of a ``with`` block was found (``torch``,
    ``no_grad``), none if that is hard to say."""
    before = [i for i in calls if i.offset < start]
    if len(before) < 2 or before[-1].opname != "BEFORE_WITH" or before[-1].is_jump_target:
        return ()
    where = before[-2].positions  # the whole expression
    if where is None or where.lineno is None:
        return ()
    begin = where.lineno, where.col_offset
    names: list[str] = []
    for i in before[:-1]:
        at = i.positions
        if at is None or (at.lineno, at.col_offset) != begin:
            continue
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_FAST"):
            names = [i.argval]
        elif i.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(i.argval)
    return names


def swallows(frame: FrameType, names: Sequence[str]) -> bool:
    """Return whether the context manager of these names heeds errors."""
    return heeds(named(names, (frame.f_locals, frame.f_globals, frame.f_builtins)))


#: what functions decorated with a context manager are called by, and what makes one of a generator
_DECORATED = contextlib.ContextDecorator()(print).__code__
_FROM_GENERATOR = contextlib.contextmanager(iter).__code__


def swallows_as_decorator(frame: FrameType) -> bool:
    """Return whether a frame is that of a context manager that decorates a function, and heeds
    errors."""
    if frame.f_code is not _DECORATED:
        return False
    manager = frame.f_locals["self"]
    if isinstance(manager, contextlib._GeneratorContextManager):
        return yields_heed(manager.func, 8)  # type: ignore[attr-defined]
    return heeds(type(manager))


def named(names: Sequence[str], spaces: Sequence[Mapping[str, Any]]) -> Any:
    """Return the value of these names, one an attribute of the other; None if there is none."""
    if not names:
        return None
    value = next((space[names[0]] for space in spaces if names[0] in space), None)
    for name in names[1:]:
        value = getattr(value, name, None)
    return value


def heeds(manager: Any, depth: int = 8) -> bool:
    """Return whether a context manager, or what makes one, heeds errors: none of PyTorch's does,
    and of others only what can be read."""
    if manager in (contextlib.suppress, contextlib.ExitStack) or not depth:
        return True
    name = "__name__" if isinstance(manager, ModuleType) else "__module__"
    if (of := getattr(manager, name, None)) and is_known(of):  # objects of some classes have none
        return False
    if getattr(manager, "__code__", None) is _FROM_GENERATOR:
        return yields_heed(manager.__wrapped__, depth)
    kind = manager if isinstance(manager, type) else type(manager)
    if type(kind).__call__ is not type.__call__ or (kind is not manager and callable(manager)):
        return True
    leave = getattr(kind, "__exit__", None)
    if not isinstance(leave, FunctionType):
        return True
    code = leave.__code__
    return (
        not is_known(leave.__module__)
        and _exits.once(id(code), lambda: (exit_heeds(code), code))[0]
    )


def is_known(module: Any) -> bool:
    return str(module).split(".")[0] in ("torch", "aotfunc", "contextlib")


def yields_heed(function: Any, depth: int) -> bool:
    """Return whether a generator function heeds errors that it gets where it yields."""
    if not isinstance(function, FunctionType):
        return True
    code = function.__code__
    parts = _at_yields.once(id(code), lambda: (parts_at_yields(code), code))[0]
    own = dict.fromkeys((*code.co_varnames, *code.co_cellvars, *code.co_freevars))
    spaces = own, function.__globals__
    return any(names is None or heeds(named(names, spaces), depth - 1) for names in parts)


def parts_at_yields(code: CodeType) -> Sequence[Sequence[str] | None]:
    yields = [i.offset for i in dis.get_instructions(code) if i.opname == "YIELD_VALUE"]
    parts = guarded_parts(code)
    return [names for start, stop, names in parts for k in yields if start <= k < stop]


def exit_heeds(code: CodeType) -> bool:
    """Return whether an ``__exit__`` reads its arguments, raises, or returns anything but None and
    False."""
    if not code.co_argcount:
        return True
    errors = {*code.co_varnames[1 : parameter_count(code)]}
    calls = list(dis.get_instructions(code))
    for last, i in zip([None, *calls], calls, strict=False):
        read = i.argval if isinstance(i.argval, tuple) else (i.argval,)
        if i.opname == "RAISE_VARARGS" or (i.opname.startswith("LOAD_") and errors & {*read}):
            return True
        value = last if i.opname == "RETURN_VALUE" else i
        if i.opname.startswith("RETURN_") and i.opname != "RETURN_GENERATOR":
            if i.is_jump_target and value is last:
                return True
            if value is None or not value.opname.endswith("_CONST") or value.argval:
                return True
    return False


def parameter_count(code: CodeType) -> int:
    """Return how many variables of a function are parameters."""
    variadic = bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)
    return code.co_argcount + code.co_kwonlyargcount + variadic
