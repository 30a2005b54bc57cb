"""The short form of the soak test: a few hundred calls, with caches so small that they are soon
full."""

import io

import pytest

from aotfunc import cache
from tests.soak import CALLS, soak


@pytest.mark.limit(240)
@pytest.mark.filterwarnings("ignore:.*has been captured")
def test_memory_is_flat_and_nothing_is_left_behind():
    limits = {c: c.limit for c in cache.EVERY}
    cache.clear_caches()
    for c in limits:
        c.limit //= 256
    try:
        memory = soak(180, out=io.StringIO())
    finally:
        for c, limit in limits.items():
            c.limit = limit
    assert memory[-1][0] - memory[4][0] < 8, memory
    assert CALLS == 20_000  # the long form: python -m tests.soak
