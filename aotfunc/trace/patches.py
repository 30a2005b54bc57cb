"""Exchange functions of torch, from the first capture on or while one is under way, and put them
back.

Each replacement asks whether a recording is under way in the calling thread, and else does what
torch does.
"""

from __future__ import annotations

import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Mapping
from itertools import repeat
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from .traced import current

if TYPE_CHECKING:
    from .tracer import Trace

#: the functions that are exchanged, as torch defines them
ORIGINALS: dict[str, Any] = {}

#: the module in which Dynamo keeps its rules for torch's functions
DYNAMO = "torch._dynamo.trace_rules"


def recorder() -> Trace | None:
    """Return the recording under way, unless it ignores autograd."""
    trace = current()
    return trace if trace is not None and trace.keeps_intent else None


class Code:
    """The code of a function ``f``, exchanged for the template's, which asks for a recording.
    Names bound to ``f`` earlier (``sq = Sq.apply``) come along."""

    def __init__(
        self, name: str, f: types.FunctionType, ours: Callable | None, template: Any
    ) -> None:
        self.name, self.f, self.ours, self.template = name, f, ours, template

    def install(self) -> None:
        """Exchange the code; a second thread may do so again."""
        f, name = self.f, self.name
        twin = types.FunctionType(
            f.__code__, f.__globals__, f.__name__, f.__defaults__, f.__closure__
        )
        twin.__kwdefaults__ = f.__kwdefaults__
        original = ORIGINALS.setdefault(name, twin)
        f.__globals__["_aotfunc_recording"] = recorder
        f.__globals__[f"_aotfunc_{name}"] = self.ours
        f.__globals__[f"_torch_{name}"] = original
        code = original.__code__  # TorchScript, which reads sources, finds torch's
        f.__code__ = self.template.__code__.replace(
            co_filename=code.co_filename, co_firstlineno=code.co_firstlineno
        )

    def undo(self) -> None:
        self.f.__code__ = ORIGINALS[self.name].__code__


class Attribute:
    """An attribute of a module or class of torch, exchanged for ``ours``."""

    def __init__(self, name: str, owner: Any, attribute: str, ours: Any) -> None:
        self.name, self.owner, self.attribute, self.ours = name, owner, attribute, ours
        self.inherited = attribute not in vars(owner)

    def install(self) -> None:
        ORIGINALS.setdefault(self.name, getattr(self.owner, self.attribute))
        setattr(self.owner, self.attribute, self.ours)

    def undo(self) -> None:
        if not self.inherited:
            setattr(self.owner, self.attribute, ORIGINALS[self.name])
        elif self.attribute in vars(self.owner):
            delattr(self.owner, self.attribute)


class Exchange:
    """Exchange attributes while any thread needs it. If Dynamo is imported meanwhile, it looks
    torch's functions up by name and would keep ours; it has to look again.

    Most recordings exchange and put back, so that this is done without a step of Python's for each
    attribute."""

    def __init__(self, new: dict[tuple[Any, str], Any]) -> None:
        self.lock, self.count, self.done = threading.Lock(), 0, False
        self.dynamo: Any = None  # Dynamo was imported before
        owners = {id(owner): owner for owner, _ in new}.values()
        self.tables = [
            Table(x, {name: ours for (owner, name), ours in new.items() if owner is x})
            for x in owners
        ]

    def __enter__(self) -> None:
        with self.lock:
            if not self.done:
                try:
                    self.dynamo = sys.modules.get(DYNAMO)
                    for table in self.tables:
                        if table.read(table.now) != table.before:
                            table.look_again()
                        table.update(table.ours)
                except BaseException:  # Ctrl-C
                    self.put_back()
                    raise
                self.done = True
            self.count += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.count -= 1
            if not self.count:
                self.done = False
                try:
                    self.put_back()
                except BaseException:
                    self.put_back()
                    raise
                dynamo: Any = sys.modules.get(DYNAMO)
                if dynamo is not self.dynamo and hasattr(dynamo, "clear_lru_cache"):
                    dynamo.clear_lru_cache()

    def put_back(self) -> None:
        for table in self.tables:
            if table.whole and table.read(table.now) == table.mine:
                table.update(table.theirs)
            else:
                table.put_back_ours()

    def before(self, owner: Any, name: str) -> Any:
        """Return what was exchanged there; None if nothing was, or the class inherits it."""
        return next(t.theirs[name] for t in self.tables if t.owner is owner and name in t.theirs)


class Table:
    """The attributes of a module or class that are exchanged: ``ours``, and ``theirs`` meanwhile;
    None for one that the class inherits."""

    def __init__(self, owner: Any, ours: dict[str, Any]) -> None:
        self.owner, self.ours = owner, ours
        self.theirs: dict[str, Any] = dict.fromkeys(ours)
        self.now = vars(owner)
        self.read: Callable[[Mapping[str, Any]], Any] = self.read_each
        if isinstance(owner, types.ModuleType) and ours.keys() <= self.now.keys():
            self.read = itemgetter(*ours)
        self.update = self.now.update if isinstance(self.now, dict) else self.set_each
        self.mine, self.before = self.read(ours), self.read(self.theirs)
        self.whole = False  # none of theirs is inherited

    def read_each(self, now: Mapping[str, Any]) -> list[Any]:
        return [*map(now.get, self.ours)]

    def set_each(self, new: dict[str, Any]) -> None:
        exhaust(map(setattr, repeat(self.owner), new, new.values()))

    def look_again(self) -> None:
        """Take what is there now for theirs; Ctrl-C may have left some of ours there."""
        self.theirs = {
            name: old if (x := self.now.get(name)) is self.ours[name] else x
            for name, old in self.theirs.items()
        }
        self.before, self.whole = self.read(self.theirs), None not in self.theirs.values()

    def put_back_ours(self) -> None:
        """Put back those that no other library has exchanged since."""
        for name, old in self.theirs.items():
            if self.now.get(name) is self.ours[name] and old is None:
                delattr(self.owner, name)
            elif self.now.get(name) is self.ours[name]:
                setattr(self.owner, name, old)


exhaust = deque[Any](maxlen=0).extend
