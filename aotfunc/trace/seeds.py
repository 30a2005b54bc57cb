"""Follow generators of random numbers that ``f`` seeds. A recording draws nothing, and its program
draws when it runs; so a state set between two draws, or in a function compiled once, would be set
at the wrong time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from ..debug import at, user_line
from ..errors import CaptureError
from .modes import device_generators
from .traced import quiet

States = dict[int, tuple[Generator, Tensor]]  # several Python objects may stand for one generator


def states(objects: Iterable[Any]) -> States:
    """Return the present states of the generators among ``objects``."""
    with quiet():
        return {g._cdata: (g, g.get_state()) for g in objects if isinstance(g, Generator)}


def named_generators(calls: Iterable[Any]) -> list[torch.Generator]:
    """Return the generators among the arguments of recorded ops, or of nodes."""
    # isinstance(a, Generator) would run torch's Python
    return [
        a
        for c in calls
        for a in (*c.args, *c.kwargs.values())
        if issubclass(a.__class__, torch.Generator)
    ]


class Seeds:
    """The generators that a recording named (``drawn``), in their states at the first draw, and
    the default generator's state ``before`` ``f`` set it."""

    drawn: States = {}
    before: Tensor | None = None

    def draw(self, calls: Iterable[Any]) -> None:
        """Note the generators that these recorded ops, or nodes, name."""
        self.drawn = (
            states(g for g in named_generators(calls) if g._cdata not in self.drawn) | self.drawn
        )

    def setting(self) -> None:
        """Note that the default generator is about to be set."""
        if self.before is None:
            self.before = torch.default_generator.get_state()

    def refuse(self, what: str) -> None:
        """Put the default generator back and raise CaptureError."""
        if self.before is not None:
            torch.default_generator.set_state(self.before)
        way_out = "draw from a generator of your own: torch.Generator().manual_seed(seed)"
        raise CaptureError(f"{what}{at(user_line())}; {way_out}")

    def check(self) -> None:
        """Refuse a generator that ``f`` seeded after a draw from it."""
        if undo_draws(self.drawn):
            raise CaptureError(
                "a torch.Generator was seeded after a draw from it, inside a captured "
                f"function{at(user_line())}; use one generator for each seed"
            )

    def check_compiled(self, known: States, name: str) -> None:
        """Refuse to seed or make a generator in a compiled function, which would do so once.
        ``known``: the generators that it finds outside, in their earlier states."""
        if undo_draws(known):
            raise CaptureError(
                f"a torch.Generator is seeded inside a compiled function, which {name} would do "
                f"only once{at(user_line())}; seed it outside"
            )
        if self.drawn.keys() - known.keys() - {g._cdata for g in device_generators()}:
            raise CaptureError(
                f"a torch.Generator is made inside a compiled function, which {name} would do "
                f"only once{at(user_line())}; pass it as an argument, or close over it and seed "
                "it outside"
            )


def undo_draws(known: States) -> bool:
    """Restore the states; return whether one had changed."""
    if not known:
        return False
    with quiet():
        same = all(torch.equal(g.get_state(), state) for g, state in known.values())
    for g, state in () if same else known.values():
        g.set_state(state)
    return not same


def of_python() -> tuple:
    """Return the states of Python's and NumPy's generators, drawn from by ``f``."""
    state: Any = np.random.get_state()
    _, keys, place, *rest = state
    return random.getstate(), keys.tobytes(), place, *rest


def rewinder() -> Callable[[], None]:
    """Return a function that sets the generators of :func:`of_python` to where they are now."""
    python, numpy = random.getstate(), np.random.get_state()

    def rewind() -> None:
        random.setstate(python)
        np.random.set_state(numpy)

    return rewind
