"""The names that the ``vmap``s around a recording have given to their axes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Axes(threading.local):
    """Sizes of the axes by their names, in this thread."""

    def __init__(self) -> None:
        self.sizes: dict[Any, int] = {}


AXES = Axes()


@contextmanager
def axes(sizes: dict[Any, int]) -> Iterator[None]:
    """Let exactly these axes be known."""
    outer, AXES.sizes = AXES.sizes, sizes
    try:
        yield
    finally:
        AXES.sizes = outer
