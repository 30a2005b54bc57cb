"""Find whether an object holds a traced value, however deep."""

from __future__ import annotations

import functools
import gc
import types
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from .traced import Traced

#: objects that nothing changes, or that are known by their name
SHARED = (type, types.ModuleType, types.BuiltinFunctionType)

_ITERATED: tuple[type[Any], ...] = (list, tuple, set, frozenset, deque)


def holds_traced(x: Any, seen: set[int]) -> bool:
    """Return whether an object holds a traced value, beside objects that were ``seen``."""
    todo, seen, alive = [x], set(seen), []
    while todo:
        e = todo.pop()
        if type(e) is Traced:
            return True
        if id(e) not in seen and not issubclass(type(e), SHARED):
            seen.add(id(e))
            alive.append(e)  # so that its id stays its own
            todo += contents(e)
    return False


def contents(x: Any) -> Iterator[Any]:
    """Yield what an object holds."""
    cls = type(x)
    if cls is types.FunctionType:
        yield from [c.cell_contents for c in x.__closure__ or () if c != types.CellType()]
        yield from x.__defaults__ or ()
    elif issubclass(cls, functools.partial):
        yield from (x.func, *x.args, *x.keywords.values())
    elif cls is types.MethodType:
        yield x.__self__
    elif cls is functools._lru_cache_wrapper:
        yield from gc.get_referents(x)
    elif issubclass(cls, dict):
        yield from (*dict.keys(x), *dict.values(x))
    elif base := next((b for b in _ITERATED if issubclass(cls, b)), None):
        yield from base.__iter__(x)  # its own may leave something out
    with suppress(AttributeError):
        yield from object.__getattribute__(x, "__dict__").values()
    yield from [getattr(x, n) for n in slots_of(cls) if hasattr(x, n)]


def slots_of(cls: type) -> list[str]:
    """Return the names of the slots that instances of a class have."""
    own = [c.__dict__ for c in cls.__mro__ if "__slots__" in c.__dict__]
    return [
        n for table in own for n, e in table.items() if isinstance(e, types.MemberDescriptorType)
    ]
