"""Hooks that a function registers at every call, and what they may hold."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import BuiltinMethodType, FunctionType, MethodType
from typing import Any

from torch import nn

from ...errors import CaptureError
from ...trace.holding import SHARED, contents
from ...trace.traced import Traced
from ...trace.tracer import Trace
from .description import is_plain
from .state import State


def give_to_autograd(trace: Trace, state: State) -> None:
    """Let autograd call those hooks of values inside that hold nothing that the function makes.
    The others are recorded, and so are those by which a gradient was taken."""
    assert trace.live_hooks is not None
    recorded: set[Any] = set()  # with those that were registered on the value before
    for waiting in reversed(trace.deferred):
        if (hooks := waiting.hooks) is None or not hooks.held:
            continue
        mine = set(getattr(hooks, "handles", ()))
        outside = waiting.made is None and Held(hooks.held, state).made is None
        if outside and recorded.isdisjoint(mine):
            waiting.live = True
            trace.live_hooks.insert(0, hooks)
        else:
            recorded |= mine
            trace.late += tuple([x for x in hooks.held if not isinstance(x, nn.Module)])


def held_by(trace: Trace, state: State) -> Held | None:
    """Return what the hooks hold that every call registers, and let the check of the state require
    it. Raises CaptureError for a hook of an
    argument that holds what the function makes, which each call would have to make for it."""
    handles = [h for _, h in trace.given_hooks if not h.removed]
    for h in handles:
        h.settled = True
        if (made := Held([h.hook], state).made) is Traced:
            raise CaptureError(
                f"a hook of an argument reads what is computed inside{h.where}: register it on "
                "x.view_as(x)"
            )
        elif made is not None:
            raise CaptureError(
                f"a hook of an argument holds a {made.__name__} that the function makes{h.where}, "
                "which would be the same object at every call; make it outside"
            )
    hooks = [h.hook for h in handles] + [x for live in trace.live_hooks or () for x in live.held]
    held = Held(hooks, state) if hooks else None
    if held is not None:
        held.require(state)
    return held


class Held:
    """Objects held by hooks' state: a call must find these very ones again."""

    def __init__(self, hooks: Sequence[Any], state: State) -> None:
        #: the objects, by the variables of the check that hold them
        self.objects: dict[str, Any] = {}
        #: the class of an object that a hook holds and the function makes at each call
        self.made: type | None = None
        known, seen = held_variables(state), set[int]()
        todo: list[Any] = [*hooks]
        while todo:
            x = todo.pop()
            if id(x) in seen or is_plain(x) or isinstance(x, SHARED[:2]):
                continue
            seen.add(id(x))
            if id(x) in known:
                self.objects[known[id(x)]] = x
            elif isinstance(x, FunctionType | MethodType | functools.partial):
                todo += contents(x)
            elif isinstance(x, BuiltinMethodType):  # of a list: its append
                todo.append(x.__self__)
            elif self.made is not Traced:
                self.made = type(x)

    def require(self, state: State) -> bool:
        """Let an equal state's check require these objects; return whether the state has them."""
        for v, x in self.objects.items():
            state.require(v, x)
        known = held_variables(state)
        return all(known.get(id(x)) == v for v, x in self.objects.items())


def held_variables(state: State) -> dict[int, str]:
    """Return the variables of the check that hold the objects of a state, by ``id``."""
    return {id(owner): v for owner, v, _ in state.owners} | state.seen
