"""Draw random numbers again, or undo draws: set generators of a program to earlier states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Generator, Tensor

from ..capture.calls import CompiledCall
from ..errors import AotfuncError
from ..graph import Program, draws
from ..trace.traced import current
from ..transforms.lower import EVERYTHING, lowered


class States(list[tuple[Generator, Tensor]]):
    """Generators and their states; no tree to PyTorch, whose vmap of forward mode expects one leaf
    for an argument of a Function that is no tensor."""


def generator_states(program: Program) -> States:
    """Return the generators that a program draws from, with their states now."""
    found = program.cache.get("generators")
    if found is None:
        found = program.once("generators", lambda: generators_of(program))
    return States([(g, g.get_state()) for g in found])


def generators_of(program: Program) -> list[Generator]:
    found: dict[int, Generator] = {}
    for n in lowered(program, EVERYTHING).graph.nodes:
        if bodies := getattr(n.target, "bodies", ()):  # control flow
            found |= {id(g): g for body in bodies for g in generators_of(body)}
        elif n.op == "call_function" and draws(n):
            given = next(
                (a for a in (*n.args, *n.kwargs.values()) if isinstance(a, Generator)), None
            )
            g = given if given is not None else default_generator(device_of(n.meta["val"]))
            found[id(g)] = g
    return list(found.values())


def device_of(val: Any) -> torch.device:
    return device_of(val[0]) if isinstance(val, tuple) else val.device


def default_generator(device: torch.device) -> Generator:
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator


@contextmanager
def undrawn(call: CompiledCall) -> Iterator[None]:
    """Restore the generators of a call that is refused on the way."""
    before = generator_states(call.program) if call.draws and current() is None else []
    try:
        yield
    except AotfuncError:
        for g, state in before:
            g.set_state(state)
        raise


@contextmanager
def redrawn(states: Sequence[tuple[Generator, Tensor]]) -> Iterator[None]:
    """Set the generators to earlier states inside the block."""
    now = [(g, g.get_state()) for g, _ in states]
    for g, state in states:
        g.set_state(state)
    try:
        yield
    finally:
        for g, state in now:
            g.set_state(state)
