"""The shared object of a C++ source: found in the disk cache, else compiled."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from . import store, toolchain


def without_comments(source: str) -> str:
    return re.sub("//[^\n]*", "", source)


def built(source: str) -> Path:
    """The compiled file of this source. Raises CompilerError."""
    code = without_comments(source)  # these name the numbers that the kernels get
    key = hashlib.sha256(f"{toolchain.identity()}\n{code}".encode()).hexdigest()
    return store.find(key) or store.add(key, source, toolchain.compile)
