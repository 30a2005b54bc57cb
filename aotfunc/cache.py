"""One bounded cache for everything that is made once and remembered between calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from typing import Any

#: no generation is closed with fewer entries: one call may need heavy ones, and needs them again
#: at once
FEW = 8

#: every cache, for clear_caches
EVERY: weakref.WeakSet[Cache] = weakref.WeakSet()


class Cache:
    """A mapping whose values weigh no more than ``limit`` together (but for the last few); what
    was used least recently goes.

    Entries live in two generations. Whatever is put, or found, is young; when the young ones weigh
    half of the limit they become the old ones, and the old ones that were not asked for meanwhile
    go. So a hit costs one look-up and no bookkeeping, and threads need no lock: what they may lose
    is an entry, which is made again."""

    def __init__(self, limit: int, weigh: Callable[[Any], int] = lambda value: 1) -> None:
        self.limit, self.weigh = limit, weigh
        self.young: dict[Hashable, Any] = {}
        self.old: dict[Hashable, Any] = {}
        self.weight = 0  # of the young
        EVERY.add(self)

    def get(self, key: Hashable) -> Any:
        """Return the value for this key, or None."""
        value = self.young.get(key)
        if value is None:
            value = self.old.get(key)
            if value is not None:
                self.put(key, value)
        return value

    def put(self, key: Hashable, value: Any) -> None:
        if 2 * self.weight >= self.limit and len(self.young) >= FEW:
            self.old, self.young, self.weight = self.young, {}, 0
        self.young[key] = value
        self.weight += self.weigh(value)

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return the value for this key, made if there is none."""
        value = self.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def clear(self) -> None:
        self.young, self.old, self.weight = {}, {}, 0

    def pop(self, key: Hashable) -> Any:
        """Forget this key; return its value, or None."""
        young, old = self.young.pop(key, None), self.old.pop(key, None)
        return old if young is None else young

    def __iter__(self) -> Iterator[Hashable]:
        return iter({**self.old, **self.young})

    def __len__(self) -> int:
        return len({**self.old, **self.young})

    def values(self) -> list[Any]:
        return list({**self.old, **self.young}.values())


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
