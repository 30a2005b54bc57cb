"""How much of a long sweep one run takes: a part, or with AOTFUNC_FUZZ=N all of it, and N programs
where a test draws them (AOTFUNC_FUZZ_FIRST: from which seed on)."""

import os
from collections.abc import Iterable

FUZZ = int(os.environ.get("AOTFUNC_FUZZ", "0"))
FIRST = int(os.environ.get("AOTFUNC_FUZZ_FIRST", "0"))


def seeds(count: int, first: int = 0) -> range:
    """``count`` of them, or as many as AOTFUNC_FUZZ says."""
    return range(FIRST + first, FIRST + first + (FUZZ or count))


def every(step: int, items: Iterable) -> list:
    """Each ``step``-th of the items, or all with AOTFUNC_FUZZ."""
    return [*items][:: 1 if FUZZ else step]
