"""The shared object of a C++ source: found in the disk cache, else compiled."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from ..errors import CompilerError
from . import store, toolchain


def without_comments(source: str) -> str:
    return re.sub("//[^\n]*", "", source)


def key_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def built(source: str) -> Path:
    """Return the source's compiled file, or any compiler's without one. Raises CompilerError."""
    code = without_comments(source)  # these name the numbers that the kernels get
    key = key_of(f"{toolchain.target_facts()}\n{code}")
    try:
        key = f"{key}-{key_of(toolchain.compiler_identity())[:16]}"
    except CompilerError:
        if found := store.find_any(key):
            return found
        raise
    return store.find(key) or store.compile_and_keep(key, source, toolchain.compile)
