"""Tell whether ``f`` would catch an error that an op raises for its values: in a transform that
runs once it has to be raised where the op is called."""

from __future__ import annotations

import dis
import sys
from functools import cache
from types import CodeType, FrameType

from ..debug import _NOT_THE_USERS, _OURS


@cache
def guarded(code: CodeType) -> list[tuple[int, int]]:
    """Return the parts of a function that have an exception handler; ``with`` blocks have none."""
    entries = dis._parse_exception_table(code)  # type: ignore[attr-defined]
    return [(e.start, e.end) for e in entries if not e.lasti]


def catches() -> bool:
    """Return whether an exception handler of the function that is being recorded is active."""
    frame: FrameType | None = sys._getframe(1)
    active = inside = False
    while frame is not None:
        code, at = frame.f_code, frame.f_lasti
        if code.co_filename.startswith(_OURS):
            inside = inside or (active and code.co_name == "record_into")
        elif not code.co_filename.startswith(_NOT_THE_USERS):
            active = active or any(start <= at < stop for start, stop in guarded(code))
        frame = frame.f_back
    return inside
