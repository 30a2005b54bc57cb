"""Set or read the state of the default generator inside a recording."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..trace.patches import ORIGINALS
from ..trace.traced import current
from ..trace.tracer import Trace


def has_drawn(trace: Trace) -> bool:
    """Return whether the recording has draws, which happen when it runs."""
    return any(r[0].facts.random for r in trace.records)


def set_rng_state(new_state: Tensor) -> None:
    """Set the generator's state: before the first draw, or in a function that runs each time."""
    ORIGINALS["set_state"](settable("torch.set_rng_state", new_state))


def manual_seed(seed: int) -> Any:
    """Seed the default generator; allowed as in :func:`set_rng_state`."""
    return ORIGINALS["seed"](settable("torch.manual_seed", seed))


def random_seed() -> int:
    """Seed the default generator anew; allowed as in :func:`set_rng_state`."""
    settable("torch.seed", None)
    return ORIGINALS["random_seed"]()


def get_rng_state() -> Tensor:
    """Return the default generator's state, if it is the one that the program will find."""
    settable("torch.get_rng_state", None)
    return ORIGINALS["get_state"]()


def initial_seed() -> int:
    """Return the default generator's seed; allowed as in :func:`get_rng_state`."""
    settable("torch.initial_seed", None)
    return ORIGINALS["initial_seed"]()


def settable(what: str, value: Any) -> Any:
    """Return ``value``. Raises CaptureError if the state of the generator would be set or read at
    another time than when the program runs."""
    trace = current()
    if trace is not None:
        if has_drawn(trace):
            trace.seeds.refuse(
                f"{what} after a draw inside a captured function, which draws when it runs"
            )
        if not trace.may_ask_constants:
            trace.seeds.refuse(
                f"{what} inside a compiled function would run only once; call it outside"
            )
        trace.seeds.setting()
    return value
