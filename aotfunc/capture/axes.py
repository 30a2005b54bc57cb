"""Keep the names that the ``vmap``s around a recording have given to their axes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class NamedAxes(threading.local):
    """The axes known in this thread: sizes by names."""

    def __init__(self) -> None:
        self.sizes: dict[Any, int] = {}


AXES = NamedAxes()


@contextmanager
def axes(sizes: dict[Any, int]) -> Iterator[None]:
    """Make exactly these axes known inside the block."""
    outer, AXES.sizes = AXES.sizes, sizes
    try:
        yield
    finally:
        AXES.sizes = outer
