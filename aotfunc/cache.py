"""One bounded cache for everything that is made once and remembered between calls."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

#: no generation is closed with fewer entries: one call may need heavy ones, and needs them again
#: at once
FEW = 8

#: every cache, for clear_caches
EVERY: weakref.WeakSet[Cache] = weakref.WeakSet()
#: every function that remembers its results, for clear_caches
REMEMBERED: list[Any] = []

F = TypeVar("F", bound=Callable)


def remembered(count: int) -> Callable[[F], F]:
    """Make a decorator: a function of the user's code, classes and the like remembers its last
    results, as by ``functools.lru_cache``, until :func:`clear_caches`."""

    def decorated(f: F) -> F:
        REMEMBERED.append(functools.lru_cache(count)(f))
        return REMEMBERED[-1]

    return decorated


class Cache(dict):
    """A mapping whose values weigh no more than ``limit`` together (but for the last few); what
    was used least recently goes.

    Entries live in two generations. Whatever is put, or found, is young; when the young ones weigh
    half of the limit they become the old ones, and the old ones that were not asked for meanwhile
    go. So a hit costs one look-up and no bookkeeping, and threads need no lock: what they may lose
    is an entry, which is made again. The young ones are the dictionary's own: a hit runs no
    Python."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __init__(self, limit: int, weigh: Callable[[Any], int] = lambda value: 1) -> None:
        self.limit, self.weigh = limit, weigh
        self.old: dict[Hashable, Any] = {}
        self.weight = 0  # of the young
        EVERY.add(self)

    def __missing__(self, key: Hashable) -> Any:
        value = self.old.get(key)
        if value is not None:
            self.put(key, value)
        return value

    #: return the value for this key, or None
    get = dict.__getitem__  # type: ignore[assignment]

    def put(self, key: Hashable, value: Any) -> None:
        if 2 * self.weight >= self.limit and dict.__len__(self) >= FEW:
            self.old, self.weight = dict.copy(self), 0
            dict.clear(self)
        self[key] = value
        self.weight += self.weigh(value)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value for this key, made if there is none."""
        value = self[key]
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def clear(self) -> None:
        self.old, self.weight = {}, 0
        dict.clear(self)

    def pop(self, key: Hashable) -> Any:  # type: ignore[override]
        """Forget this key; return its value, or None."""
        young, old = dict.pop(self, key, None), self.old.pop(key, None)
        return old if young is None else young

    def all(self) -> dict[Hashable, Any]:
        """Return the entries of both generations."""
        return {**self.old, **dict.copy(self)}

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self.all())

    def __len__(self) -> int:
        return len(self.all())

    def values(self) -> list[Any]:  # type: ignore[override]
        return list(self.all().values())

    def state(self) -> tuple[dict, dict, int]:
        """Return what is in it, to be put back by :meth:`restore`."""
        return dict.copy(self), self.old, self.weight

    def restore(self, state: tuple[dict, dict, int]) -> None:
        young, self.old, self.weight = state
        dict.clear(self)
        self.update(young)


def clear_caches() -> None:
    """Forget all that was captured, derived and compiled, and give the memory back. Only the time
    of the next calls changes: functions are captured again.

    >>> f = jit(torch.exp)
    >>> f(torch.zeros(2)); clear_caches(); f(torch.zeros(2))
    tensor([1., 1.])
    tensor([1., 1.])
    """
    for cache in list(EVERY):
        cache.clear()
    for f in REMEMBERED:
        f.cache_clear()
